"""What the live models of each type tell, one JSON file a type."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers

from .attention import attention_blocks
from .blocks import named_attention, named_blocks, pattern_of
from .calls import Calls
from .feed_forward import feed_forward_blocks
from .live_weights import file_tensors, live_tensors
from .parts import parts_of, sort_tensors
from .tiny_models import build

__all__ = ["describe", "gather"]


def describe(model_type: str) -> dict[str, Any]:
    """All that the models of one type tell."""
    records: dict[str, set[tuple[str, int, str]]] = {}
    parts: dict[str, dict[str, tuple[str, set[str]]]] = {}
    blocks: dict[str, dict[str, dict[str, str]]] = {}
    classes: dict[str, str] = {}
    models: dict[str, Any] = {}
    not_run: dict[str, str] = {}
    tried: dict[Any, Any] = {}
    tried_heads: dict[Any, Any] = {}
    for name, model, reason in build(model_type):
        classes[name] = reason
        if model is None:
            continue
        live = live_tensors(model)
        pictures = [live]
        try:
            live, written = file_tensors(model, live)
            pictures = [live, written]
        except Exception as error:
            classes[name] = f"files: {type(error).__name__}: {error}".splitlines()[0][:160]
        calls = Calls(model)
        known = list(feed_forward_blocks(model, calls, tried)) if len(pictures) == 2 else []
        heads = list(attention_blocks(model, calls, tried_heads)) if len(pictures) == 2 else []
        if calls.why:
            not_run[name] = calls.why
        inner = parts_of(model)
        models[name] = {
            "config": json.loads(model.config.to_json_string()),  # as files have it
            "tensors": {one.name: [one.shape, one.verdict] for one in pictures[-1].values()},
        }
        for picture in pictures:
            by_type, named = sort_tensors(picture.values(), inner, model_type)
            for owner, found in by_type.items():
                mine = {tensor.name: tensor for tensor in found}
                held = named_blocks(known, live, mine) + named_attention(heads, live, mine)
                blocks.setdefault(owner, {}).update((json.dumps(block), block) for block in held)
            for owner, found in by_type.items():
                records.setdefault(owner, set()).update(
                    (pattern_of(tensor.name), len(tensor.shape), tensor.verdict)
                    for tensor in found
                    if len(tensor.shape) > 1
                )
            for whole, keys in named.items():
                for key, (kind, names) in keys.items():
                    parts.setdefault(whole, {}).setdefault(key, (kind, set()))[1].update(names)
    return {
        "classes": classes,
        "not_run": not_run,
        "models": models,
        "records": {owner: sorted(found) for owner, found in records.items()},
        "blocks": {owner: list(found.values()) for owner, found in blocks.items() if found},
        "parts": {
            whole: {key: [kind, sorted(names)] for key, (kind, names) in keys.items()}
            for whole, keys in parts.items()
        },
        "head_counts": head_counts(model_type),
    }


def head_counts(model_type: str) -> tuple[int, int | None] | None:
    """The numbers of query and key/value heads of a config that states none; None of the latter: as many."""
    config = transformers.CONFIG_MAPPING[model_type]

    def default(*names: str) -> Any:
        found = [config.attribute_map.get(name, name) for name in names]
        return next((getattr(config, name) for name in found if hasattr(config, name)), None)

    query = default("num_attention_heads", "num_heads")
    kv = default("num_key_value_heads", "num_kv_heads")
    return (query, kv if type(kv) is int else None) if type(query) is int else None


def gather(folder: Path, model_types: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What was stored, and why some types have nothing."""
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for model_type in model_types:
        path = folder / f"{model_type}.json"
        stored = json.loads(path.read_text()) if path.exists() else {"failed": "not tried"}
        reasons = "; ".join(dict.fromkeys(why for why in stored.get("classes", {}).values() if why))
        if "failed" in stored:
            failed[model_type] = stored["failed"]
        else:
            found[model_type] = stored
            if not stored["records"]:
                failed[model_type] = reasons
    return found, failed
