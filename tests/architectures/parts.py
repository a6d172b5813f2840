"""The parts of a composite: which modules a nested config describes, and what their tensors are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from .live_weights import Tensor

__all__ = ["LivePart", "parts_of", "sort_tensors"]


@dataclass(frozen=True)
class LivePart:
    """A module that the config under ``key`` of another one describes."""

    path: str
    key: str
    model_type: str
    whole: str  # the model type of the config that holds ``key``
    whole_path: str


def parts_of(model: Any) -> list[LivePart]:
    """The parts of a live model, and theirs in turn, the outer ones first."""
    return list(_parts(model, "", model.config))


def _parts(module: Any, at: str, config: Any) -> Iterator[LivePart]:
    nested = {key: value for key, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    taken: list[str] = []
    for path, child in module.named_modules():
        own = getattr(child, "config", None)
        if not isinstance(own, PreTrainedConfig) or own is config or any(_within(path, one) for one in taken):
            continue
        key = _key(path, own, nested)
        if key and path and own.model_type:
            taken.append(path)
            full = f"{at}.{path}" if at else path
            yield LivePart(full, key, own.model_type, config.model_type, at)
            yield from _parts(child, full, own)


def _key(path: str, own: Any, nested: dict[str, Any]) -> str:
    same = [key for key, value in nested.items() if value is own]
    same = same or [key for key, value in nested.items() if value.model_type == own.model_type]
    if len(same) > 1:
        same = [key for key in same if key.removesuffix("_config") in path]
    return same[0] if len(same) == 1 else ""


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _leading(pieces: list[str], ends: set[str]) -> list[str]:
    """``pieces`` up to the first that names another part: what follows is read as that part's."""
    stop = next((index for index, piece in enumerate(pieces) if piece in ends), len(pieces))
    return pieces[: stop + 1]


def sort_tensors(
    tensors: Iterable[Tensor], parts: list[LivePart], whole: str
) -> tuple[dict[str, list[Tensor]], dict[str, dict[str, tuple[str, set[str]]]]]:
    """The tensors by the model type whose row serves them, and by whole and key each part with its names."""
    found = list(tensors)
    sorted_: dict[str, list[Tensor]] = {}
    named: dict[str, dict[str, tuple[str, set[str]]]] = {}
    served = {tensor.name: whole for tensor in found}
    for part in parts:
        around = [
            tensor for tensor in found if _within(tensor.source, part.whole_path) or not part.whole_path
        ]
        inside = [tensor.name.split(".") for tensor in around if _within(tensor.source, part.path)]
        ends = {other.path.rpartition(".")[2] for other in parts if other.whole_path == part.whole_path} - {
            part.path.rpartition(".")[2]
        }
        outside = {
            piece
            for tensor in around
            if not _within(tensor.source, part.path)
            for piece in _leading(tensor.name.split("."), ends)
        }
        if not inside:
            continue
        common = set(inside[0]).intersection(*inside[1:]) - outside
        telling = [
            piece for piece in inside[0] if piece in common and piece != "model" and not piece.isdecimal()
        ]
        last = part.path.rpartition(".")[2]
        names = [last] if last in telling else telling[:1]
        kind, known = named.setdefault(part.whole, {}).setdefault(part.key, (part.model_type, set()))
        known.update(names)
        if kind == part.model_type and (names or part.key == "text_config"):
            served |= {tensor.name: kind for tensor in around if _within(tensor.source, part.path)}
    for tensor in found:
        sorted_.setdefault(served[tensor.name], []).append(tensor)
    return sorted_, named
