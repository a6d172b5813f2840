"""What has a LoRA form, exported, loaded with PEFT, merged: are the weights those of `apply`?"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.live.lora_places import PeftPlaces

from .tiny_checkpoints import rounded

__all__ = ["LoraOutcome", "lora_round"]


@dataclass
class LoraOutcome:
    """What became of the LoRA of one model."""

    verdict: Literal["right", "refused", "wrong"]
    reason: str = ""
    tensors: int = 0  # that the adapter changes
    forms: dict[str, int] = field(default_factory=dict)  # how many modules of each
    refused: dict[str, str] = field(default_factory=dict)  # tensors that have no LoRA form, and why
    unmerged: str = ""  # whether the outputs are those of the patched model before the adapter is merged


def lora_round(
    base: Path, tuned: Path, folder: Path, neurons: str = "5%", inputs: dict[str, Any] | None = None
) -> LoraOutcome:
    """Export ``neurons`` random ones of each tensor that has a LoRA form; ``folder`` is for what is written.

    With ``inputs`` of a forward pass, the outputs of the adapted and of the patched model are compared, too.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    keywords: dict[str, Any] = {"policy": "random", "per": "tensor", "include": ["*"], "reversible": True}
    keywords["max_per_tensor"] = 16  # one-hot vectors of a whole vocabulary are long
    patch = ns.extract(base, tuned, neurons=neurons, out=folder / "all.safetensors", **keywords)
    places = PeftPlaces(Checkpoint.open(base), patch).places
    refused = {name: place for name, place in places.items() if isinstance(place, str)}
    if len(refused) == len(patch.tensors):
        return LoraOutcome("refused", next(iter(refused.values()), "no neurons"), refused=refused)
    kept = patch.selection.counts.keys() - refused
    patch = ns.extract(
        base, tuned, neurons=neurons, only=sorted(kept), out=folder / "patch.safetensors", **keywords
    )
    try:
        done = ns.export_lora(patch, folder / "adapter", base=base, rank_pattern=True)
    except ns.NeftError as error:
        return LoraOutcome("refused", str(error), refused=refused)
    forms: dict[str, int] = {}
    for module in done.modules:
        forms[module.place.form] = forms.get(module.place.form, 0) + 1
    outcome = LoraOutcome("right", tensors=len(patch.tensors), forms=forms, refused=refused)
    ns.apply(base, patch, out=folder / "applied")
    wrong = _difference(base, folder)
    if wrong:
        outcome.verdict, outcome.reason = "wrong", wrong
    elif inputs is not None:
        outcome.unmerged = _outputs(base, folder, inputs)
    return outcome


def _load(path: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(path)
    name = (config.architectures or [""])[0]
    return getattr(transformers, name, transformers.AutoModel).from_pretrained(path, dtype="auto").eval()


def _adapted(base: Path, folder: Path) -> tuple[Any, list[str]]:
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(_load(base), folder / "adapter")
    return model, [str(one.message) for one in caught if "missing" in str(one.message).lower()]


def _difference(base: Path, folder: Path) -> str:
    """The first weight that differs by more than one rounding of the difference; empty if none does."""
    adapted, said = _adapted(base, folder)
    if said:
        return said[0][:300]
    old, new, merged = (
        dict(model.state_dict())
        for model in (_load(base), _load(folder / "applied"), adapted.merge_and_unload())
    )
    if merged.keys() != new.keys():
        return f"other weights: {sorted(merged.keys() ^ new.keys())[:2]}"
    for name, expected in new.items():
        if not expected.is_floating_point():
            continue
        # Of the difference as float32, and of the sum as the weight's dtype.
        size = torch.finfo(torch.float32).eps * (expected.double() - old[name].double()).abs()
        size += torch.finfo(expected.dtype).eps * torch.maximum(expected.abs(), old[name].abs()).double()
        gap = (merged[name].double() - expected.double()).abs()
        if (gap > size).any():
            return f"{name} is off by {float(gap.max()):.3g}"
    return ""


def _outputs(base: Path, folder: Path, inputs: dict[str, Any]) -> str:
    """Whether the adapted model gives what the patched one gives, as far as float32 tells."""

    def run(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found = model(**inputs)
        return torch.cat([one.flatten().double() for one in found.values() if isinstance(one, torch.Tensor)])

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        # The lengths of sounds may be among what a patch changes.
        return float((one - other).abs().max()) if one.shape == other.shape else float(one.abs().max())

    try:
        plain, expected = run(_load(base)), run(_load(folder / "applied"))
        off, moved = apart(run(_adapted(base, folder)[0]), expected), apart(plain, expected)
        if off <= 1e-3 * moved + 1e-6:
            return "equal"
        noise = apart(run(rounded(_load(folder / "applied"))), expected)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "equal within rounding" if off <= 4 * noise else f"off by {off:.3g} of {moved:.3g}"
