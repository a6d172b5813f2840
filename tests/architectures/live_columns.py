"""The columns of live models: gradients, a step, the patch back in the files, and LoRA."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

import neftsurgery as ns
from neftsurgery.errors import NeftError
from neftsurgery.scoring.scores import Scores
from neftsurgery.selection.selection import Chosen, Selection

from .lora_round import lora_round
from .runnable import outputs
from .tiny_checkpoints import TinyCheckpoints, Unusable, far
from .verdicts import Column, Wrong, plain

__all__ = ["attach_column", "attach_what_goes", "lora_column"]

_GRADIENT = 2e-3  # of the largest element of the tensor's gradient, in float32


def attach_column(case: TinyCheckpoints, column: Column, scores: Scores) -> None:
    """Gradients, a step, `patch`, `apply` to files, reload: all beside the plain model."""
    selection = scores.select(neurons="5%", per="tensor", policy="random", seed=1)
    base = _outputs(case, case.plain)
    model = case.copy()
    before = _state(model)
    attached, selection = attach_what_goes(model, selection, case.base, column)
    column.counts = {"tensors": len(selection.tensors), "of": len(scores.tensors)}
    if apart := far(base, _outputs(case, model)):
        raise Wrong(f"attached, the model gives something else ({apart:.1e})")
    if case.runs:
        column.counts |= _gradients(case, model, attached, selection)
    _step(attached)
    patch = attached.patch(case.folder / "stepped.safetensors")
    after = _outputs(case, model)
    stepped = case.folder / "stepped"
    ns.apply(case.base, patch, out=stepped)
    reloaded = case.load(stepped)
    if apart := far(after, _outputs(case, reloaded)):
        raise Wrong(f"patched files give something else than the live model ({apart:.1e})")
    attached.detach()
    _require_same_state(before, _state(model), "after detach")
    with ns.attach(model, patch, base=case.base):
        if apart := far(after, _outputs(case, model)):
            raise Wrong(f"the attached patch gives something else than the trained model ({apart:.1e})")
    _require_same_state(before, _state(model), "after the patch is detached")
    try:
        ns.apply_live(model, patch)
    except NeftError as error:
        column.leave(error, error.tensor or "apply_live")
    else:
        _require_same_state(_state(reloaded), _state(model), "apply_live and the files")
    shutil.rmtree(stepped)
    if not case.runs:  # all but outputs and gradients is right
        raise Unusable(case.why)


def _outputs(case: TinyCheckpoints, model: Any) -> list[torch.Tensor]:
    """What a model gives; nothing, if this type cannot be run."""
    return case.outputs_of(model) if case.runs else []


def attach_what_goes(
    model: Any, selection: Selection, base: Path, column: Column
) -> tuple[ns.Attached, Selection]:
    """Attach the selection without what is refused by name, which `column` is told."""
    logging.disable(logging.WARNING)
    try:
        attached = ns.attach(model, selection, base=base, skip="unattachable")
    finally:
        logging.disable(logging.NOTSET)
    for name, reason in attached.skipped.items():
        column.leave(plain(reason), name)
    return attached, attached.selection


def _state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _require_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], when: str) -> None:
    if one.keys() != other.keys():
        raise Wrong(f"{sorted(one.keys() ^ other.keys())[0]}: not in both state dicts {when}")
    for name, value in one.items():
        if not torch.equal(value.nan_to_num(0), other[name].nan_to_num(0)):
            raise Wrong(f"{name}: other bits {when}")


def _loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
    draw = torch.Generator().manual_seed(5)
    parts = [
        (one * torch.randn(one.shape, generator=draw)).sum() / one.numel() ** 0.5
        for one in outputs(model, inputs)
    ]
    parts = [part for part in parts if part.requires_grad]
    return sum(parts[1:], parts[0]) if parts else None


def _gradients(
    case: TinyCheckpoints, model: Any, attached: ns.Attached, selection: Selection
) -> dict[str, int]:
    """Compare the gradient of every attached row with that of the plain model, in the files' layout."""
    assert case.found.inputs is not None
    plain = case.copy()
    for parameter in plain.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    loss, own = _loss(plain, case.found.inputs), None
    if loss is None:
        return {"no gradient": 1}
    try:
        loss.backward()
    except AssertionError:  # Reformer has gradients in training mode alone, where its hashes are random
        return {"no gradient": 1}
    own = _loss(model, case.found.inputs)
    whole = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in plain.named_parameters(remove_duplicate=False)
    }
    expected = revert_weight_conversion(plain, whole)
    if own is None:
        if any(bool(one.any()) for one in whole.values()):
            raise Wrong("no attached row has a gradient, and weights of the plain model have")
        return {"no gradient": 1}
    own.backward()
    kept = {name: value.clone() for name, value in attached.state_dict().items()}
    with torch.no_grad():
        for row in attached.parameters():
            row.copy_(torch.zeros_like(row) if row.grad is None else row.grad)
    found = attached.state_dict()
    reached = 0
    wrong = ""
    for name, chosen in selection.tensors.items():
        if name not in expected:
            raise Wrong(f"{name}: the plain model has no such file tensor")
        reference = _rows(expected[name], chosen)
        scale = float(expected[name].abs().max())
        reached += int(bool(reference.any()))
        apart = float((found[name].double() - reference.double()).abs().max())
        if not wrong and apart > _GRADIENT * scale + 1e-8:
            what = "absent" if not bool(found[name].any()) else "wrong"
            wrong = f"{name}: gradient {what} ({apart:.1e} apart, the largest is {scale:.1e})"
    attached.load_state_dict(kept)
    if wrong:
        raise Wrong(wrong)
    return {"reached": reached}


def _rows(value: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    axes = chosen.layout.axes
    front = value.movedim(axes, tuple(range(len(axes))))
    return front.reshape(chosen.layout.count, -1)[torch.from_numpy(chosen.index)]


def _step(attached: ns.Attached) -> None:
    """One step that moves every row, those that no input reaches too."""
    draw = torch.Generator().manual_seed(7)
    for row in attached.parameters():
        noise = torch.randn(row.shape, generator=draw).to(row.dtype)
        row.grad = noise if row.grad is None else row.grad + noise
    torch.optim.SGD(attached.parameters(), lr=0.03).step()


def lora_column(case: TinyCheckpoints, column: Column) -> None:
    """Export rows as LoRA, load them by PEFT, merge: the patched model."""
    inputs = case.found.inputs if case.plain is not None and case.runs else None
    found = lora_round(case.base, case.tuned, case.folder / "lora", inputs=inputs)
    column.counts = {"tensors": found.tensors, **found.forms}
    for name, reason in found.refused.items():
        column.leave(plain(reason), name)
    if found.verdict == "wrong":
        raise Wrong(found.reason)
    if found.verdict == "refused":
        column.verdict, column.why = "refused", plain(found.reason)
    elif found.unmerged.startswith("off"):
        raise Wrong(f"before merging, the outputs are {found.unmerged}")
