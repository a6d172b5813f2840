"""The columns of files: axes, units, and patches that go on and come off."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from neftsurgery.errors import NeftError
from neftsurgery.neurons.anatomy import NeuronTensor, read_anatomy
from neftsurgery.scoring.scores import Scores
from neftsurgery.surgery.apply import plan_apply, plan_revert
from neftsurgery.surgery.extract import plan_extract
from neftsurgery.tensors.header import TensorInfo

from .live_weights import ORDERS, file_tensors, live_tensors
from .tiny_checkpoints import TinyCheckpoints, far, tensors_in, write_like
from .verdicts import Column, Wrong
from .watch import output_axes

__all__ = ["changed_column", "diff_column", "extract_column", "units_column"]

_NOTHING_TO_SCORE = ("one element wide", "no elements")


def diff_column(case: TinyCheckpoints, column: Column, scores: Scores, by_hand: tuple[str, ...]) -> None:
    """Whether every scored tensor has its axes, and every other one is no weight of a layer."""
    config, infos = read_files(case.base)
    axes = {name: tensor.layout.axes for name, tensor in scores.tensors.items()}
    anatomy = read_anatomy("rows", infos, config)
    reasons = {entry.info.name: entry.reason for entry in anatomy.listed}
    warned = any("weights count as [out, in" in warning for warning in anatomy.warnings)
    column.counts = {"scored": len(axes), "left out": len(reasons)}
    try:
        live = live_tensors(case.found.model)
        written = file_tensors(case.found.model, live)[1]
    except Exception as error:
        written = {}
        column.counts["not told by the harvest"] = 1
        column.why = f"harvest: {error}"[:120]
    for name, tensor in written.items():
        if name not in infos or len(tensor.shape) < 2:
            continue
        told = ORDERS.get(tensor.verdict)
        if name in axes and told is None and warned:
            column.leave("counts as [out, in], with a warning", name)
        elif name in axes and told != axes[name] and not (told is None and name.endswith(by_hand)):
            shape = list(tensor.shape)
            raise Wrong(f"{name} {shape}: read along {axes[name]}, and live it is {tensor.verdict}")
        if name not in axes and told is not None and reasons.get(name) not in _NOTHING_TO_SCORE:
            column.leave(reasons.get(name, "not scored"), name)
    column.why = ""
    _watched(case, column, axes)


def _watched(case: TinyCheckpoints, column: Column, axes: dict[str, tuple[int, ...]]) -> None:
    """Move one neuron of each file tensor: live, that moves whole outputs of the running module."""
    if not case.runs:
        return
    tensors = tensors_in(case.base)
    for name, along in axes.items():
        where: list[Any] = [slice(None)] * tensors[name].ndim
        for axis in along:
            where[axis] = tensors[name].shape[axis] - 1
        tensors[name][tuple(where)] += 1
    folder = case.folder / "bumped"
    write_like(case.base, folder, tensors)
    before, after = case.plain.state_dict(), case.load(folder).state_dict()
    watched: dict[str, dict[int, bool]] = {}
    torch.manual_seed(0)
    for name, axis, told in output_axes(case.copy(), case.found.inputs):
        watched.setdefault(name, {})[axis] = told
    seen = 0
    for name, found in watched.items():
        outs = [axis for axis, told in found.items() if told]
        moved = before[name] != after[name] if name in before else torch.zeros(0, dtype=torch.bool)
        if len(outs) != 1 or not bool(moved.any()):
            continue
        seen += 1
        # Stacked experts have an axis of their own, of which one is moved.
        others = [axis for axis in range(moved.ndim) if axis != outs[0] and (axis or moved.ndim != 3)]
        if not torch.equal(_reduced(moved, others, torch.any), _reduced(moved, others, torch.all)):
            shape = list(moved.shape)
            raise Wrong(f"{name} {shape}: a neuron is not one output (axis {outs[0]}) of the module")
    column.counts["watched"] = seen


def _reduced(moved: torch.Tensor, axes: list[int], how: Callable[..., torch.Tensor]) -> torch.Tensor:
    for axis in reversed(axes):
        moved = how(moved, axis)
    return moved


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The config and the tensors of a folder."""
    config = json.loads((folder / "config.json").read_text())
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
    infos = {
        name: TensorInfo(name, names.get(value.dtype, "I64"), tuple(value.shape))
        for name, value in tensors_in(folder).items()
    }
    return config, infos


def extract_column(case: TinyCheckpoints, column: Column, scores: Scores) -> None:
    """Extract 5% of the rows of each tensor, apply, revert: to the byte."""
    selection = scores.select(neurons="5%", per="tensor")
    out, patched, back = (case.folder / name for name in ("rows.safetensors", "patched", "back"))
    patch = plan_extract(case.base, case.tuned, selection, out=out).run()
    plan_apply(case.base, [patch], out=patched).run()
    plan_revert(patched, patch, out=back, base=case.base).run()
    require_same_files(case.base, back)
    base, tuned, found = tensors_in(case.base), tensors_in(case.tuned), tensors_in(patched)
    for name, value in found.items():
        mine = value != base[name]
        expected = 0 if name not in selection.tensors else selection.tensors[name].parameters
        if not torch.equal(value[mine], tuned[name][mine]) or int(mine.sum()) != expected:
            raise Wrong(f"{name}: {int(mine.sum())} elements are patched, and {expected} were chosen")
    column.counts = {"tensors": len(selection.tensors), "neurons": selection.neurons}


def changed_column(case: TinyCheckpoints, column: Column) -> None:
    """Extract all that changed: what is lacking then is named."""
    plan = plan_extract(case.base, case.tuned, changed=True)
    patch, out = plan.run(), case.folder / "whole"
    plan_apply(case.base, [patch], out=out).run()
    tuned, found = tensors_in(case.tuned), tensors_in(out)
    lacking = {name for name, value in found.items() if not torch.equal(value, tuned[name])}
    named = set(() if plan.remainder is None else plan.remainder.left)
    if lacking != named:
        first = sorted(lacking ^ named)[0]
        how = "differs and is not named" if first in lacking else "is named and does not differ"
        raise Wrong(f"{first} {how}")
    column.counts = {"tensors": len(found), "named": len(named)}


def require_same_files(base: Path, back: Path) -> None:
    """Raise unless two folders hold the same files."""
    names = {path.name for path in base.iterdir()}
    if names != {path.name for path in back.iterdir()}:
        raise Wrong("other files are there after revert")
    for name in names:
        if (base / name).read_bytes() != (back / name).read_bytes():
            raise Wrong(f"{name} is not what it was before")


def units_column(case: TinyCheckpoints, column: Column) -> None:
    """Swap two units of every block in the files: the outputs stay, or the data say that they are tied."""
    config, infos = read_files(case.base)
    for offered in ("ffn", "units"):
        try:
            anatomy = read_anatomy(offered, infos, config)
        except NeftError as error:
            column.leave(error, offered)
            continue
        column.counts[offered] = len(anatomy.scored)
    scored = anatomy.scored if column.counts.get("units") else ()
    every = [(tensor, tensor.units.base) for tensor in scored if tensor.units is not None]
    tied = {base for tensor, base in every if tensor.tied}
    members = [tensor for tensor, base in every if base not in tied]
    column.counts["tied"] = len(tied)
    if not members or not case.runs:
        column.why = case.why if members else "all units are tied to their places" if tied else "no units"
        return
    _require_alike(case, column, members)


def _require_alike(case: TinyCheckpoints, column: Column, members: list[NeuronTensor]) -> None:
    heard = _swapped(case, "one member", [one for one in members if one.axes[-1] != 0])
    apart = _swapped(case, "all", members)
    if not apart:
        if not heard:  # swapped in some members only, units must be heard
            column.verdict, column.why = "not run", "no unit is heard"
        return
    blocks: dict[int, list[NeuronTensor]] = {}
    for member in members:
        assert member.units is not None
        blocks.setdefault(member.units.base, []).append(member)
    seen: set[tuple[str, ...]] = set()
    wrong = []
    for base, block in blocks.items():
        kinds = tuple(one.kind for one in block)
        if kinds in seen:
            continue
        seen.add(kinds)
        if any(one.tied for one in block):
            column.counts["tied"] = column.counts.get("tied", 0) + 1
            continue
        if apart := _swapped(case, f"block {base}", block):
            wrong.append(f"{' '.join(one.info.name for one in block)} ({apart:.1e})")
    column.counts["not exact"] = len(wrong)
    if wrong or not column.counts.get("tied"):
        raise Wrong(f"swapped units are heard: {'; '.join(wrong) or 'of several blocks'}"[:400])


def _swapped(case: TinyCheckpoints, what: str, members: list[NeuronTensor]) -> float:
    """How far the outputs move when the first and last unit of each block are swapped in ``members``."""
    if not members:
        return 0.0
    tensors = tensors_in(case.base)
    for member in members:
        assert member.units is not None
        ids = torch.from_numpy(member.units.ids())
        order = torch.arange(len(ids))
        for step in range(member.units.outer):
            first = member.units.base + step * member.units.units
            ends = (first, first + member.units.units - 1)
            one, two = (torch.nonzero(ids == unit).flatten() for unit in ends)
            order[one], order[two] = two.clone(), one.clone()
        _permute(tensors, member.info.name, member.axes, order)
        if member.bias is not None:
            bias = tensors[member.bias]
            tensors[member.bias] = bias.flatten()[order].view(bias.shape)
    folder = case.folder / f"swapped {what}"
    write_like(case.base, folder, tensors)
    apart = far(case.base_outputs, case.outputs_of(case.load(folder)), 1e-4)
    if 0 < apart < 1e-2:  # many layers may enlarge what float32 rounds
        with contextlib.suppress(RuntimeError):  # a part that is float32 whatever the weights are
            sides = (case.outputs_of(model, torch.float64) for model in (case.copy(), case.load(folder)))
            return far(*sides, 1e-6)
    return apart


def _permute(tensors: dict[str, torch.Tensor], name: str, axes: tuple[int, ...], order: torch.Tensor) -> None:
    value = tensors[name]
    front = value.movedim(axes, tuple(range(len(axes))))
    count = math.prod(value.shape[axis] for axis in axes)
    moved = front.reshape(count, -1)[order].view(front.shape)
    tensors[name] = moved.movedim(tuple(range(len(axes))), axes).contiguous()
