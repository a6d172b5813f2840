"""Feed-forward blocks, found by experiment: shapes propose the layers, what their module computes decides.

Unit u of a block is row u of up and gate and column u of down. So if column u of down is silent, nothing that
happens to row u of up or gate is heard; what down gets of the unit is an affine function of the up row; two
units that change places are not heard. What moves between tokens is attention, unless no other layer is in
the module. A module runs alone, as a copy with random weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from .calls import Call, Calls
from .trial import Move, Trial, alike, layers_of, sizes_of

__all__ = ["LiveBlock", "feed_forward_blocks"]

_UNIT, _OTHER = 1, 2  # the unit that is silenced, and the one that it changes places with


@dataclass(frozen=True)
class LiveBlock:
    """Live names of the weights; of a fused one, how gate and up lie in it."""

    up: str
    down: str
    gate: str = ""
    fused: str = (
        ""  # "halves" or "pairs" with the gate first; "swapped halves" or "swapped pairs" with up first
    )
    tied: str = ""  # other parameters that hold something of each unit


def feed_forward_blocks(
    model: nn.Module, calls: Calls, seen: dict[tuple[Any, ...], list[LiveBlock]]
) -> Iterator[LiveBlock]:
    """Those of ``model``, on the meta device. Of modules that are alike, one is tried: see ``seen``."""
    for path, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "down_proj"):
            key = alike(module, calls.of(path))
            if key not in seen:
                seen[key] = list(_stacked(module, calls.of(path)))
            for block in seen[key]:
                yield replace(block, up=f"{path}.{block.up}", down=f"{path}.{block.down}")
            continue
        layers = layers_of(module)
        if not layers or any(hasattr(part, "is_concatenated") for part in module.modules()):
            continue
        key = alike(module, calls.of(path))
        if key not in seen:
            seen[key] = list(_blocks_of(module, layers, calls.of(path)))
        for block in seen[key]:
            gate = _weight(path, block.gate) if block.gate else ""
            yield replace(block, up=_weight(path, block.up), down=_weight(path, block.down), gate=gate)


def _weight(path: str, layer: str) -> str:
    return ".".join(part for part in (path, layer, "weight") if part)


def _blocks_of(module: nn.Module, layers: dict[str, nn.Module], call: Call | None) -> Iterator[LiveBlock]:
    """The blocks whose layers have ``module`` as their nearest common owner."""
    trials: dict[int, list[Any]] = {}
    for down, layer in layers.items():
        inner, outer = sizes_of(layer) or (0, 0)
        ups = [
            name
            for name, other in layers.items()
            if name != down
            and sizes_of(other) in ((outer, inner), (outer, 2 * inner))
            and inner > 2
            and name.partition(".")[0] != down.partition(".")[0]
        ]
        if not ups:
            continue
        if outer not in trials:
            trials[outer] = list(_FeedForwardTrial.of(module, outer, call))
        for trial in trials[outer]:
            try:
                found = trial.decide(down, ups, inner)
            except Exception:  # this module cannot be run alone
                continue
            if found is not None:
                yield found
                break


class _FeedForwardTrial(Trial):
    """Tells which layers form a block."""

    def decide(self, down: str, ups: list[str], inner: int) -> LiveBlock | None:
        """The block that ends in ``down``, if there is just one."""
        base = self.run()
        silent = self.edited((down, [_UNIT], True, torch.zeros_like))
        effect = (silent - base).abs().max()
        if effect < 1e-4 * base.abs().max():
            return None
        heard: list[tuple[str, int, str]] = []  # the layer, its row of the unit, where the row is
        members: list[tuple[str, int, str]] = []  # those that are heard through the column alone
        for up in ups:
            rows = {_UNIT: "apart"}
            if sizes_of(self.module.get_submodule(up)) != (self.width, inner):
                rows = {_row(where, inner, _UNIT): where for where in _FUSED}
            for row, where in rows.items():
                change = (up, [row], False, lambda old: -2 * old + 1)
                if (self.edited(change) - base).abs().max() <= 1e-3 * effect:
                    continue
                heard.append((up, row, where))
                quiet = (
                    self.edited((down, [_UNIT], True, torch.zeros_like), change) - silent
                ).abs().max() <= 1e-3 * effect
                if quiet:
                    members.append((up, row, where))
        for found in (members, heard):  # one norm over all units, say: then the swap decides alone
            names = {up for up, _, _ in found}
            if not found or (names | {down} != layers_of(self.module).keys() and self.mixes(down, names)):
                continue
            block = _judged(found, [self.is_linear(down, up, row) for up, row, _ in found], down)
            tied = None if block is None else self.tie(down, found, inner)
            if block is not None and tied is not None:
                return replace(block, tied=tied)
        return None

    def tie(self, down: str, members: list[tuple[str, int, str]], inner: int) -> str | None:
        """What ties the unit to its place."""
        pairs: dict[str, list[tuple[int, int]]] = {}
        for up, row, where in members:
            pairs.setdefault(up, []).append((row, _row(where, inner, _OTHER)))
        moves = [move for up, rows in pairs.items() for move in self.moves(up, rows)]
        places = {inner: [(_UNIT, _OTHER)]}
        if members[0][2] != "apart":
            places[2 * inner] = [pair for rows in pairs.values() for pair in rows]
        return self.tied_by([*moves, *self.moves(down, [(_UNIT, _OTHER)], column=True)], places)

    def is_linear(self, down: str, up: str, row: int) -> bool:
        """Whether what ``down`` gets of the unit is an affine function of a row: then it is up."""
        got = []
        owner = self.module.get_submodule(down)
        hook = owner.register_forward_pre_hook(lambda _, args: got.append(args[0][..., _UNIT].clone()))
        for factor in (2, 1, 0, -1):
            self.edited((up, [row], False, lambda old, by=factor: by * old))
        hook.remove()
        bends = torch.stack([got[at] + got[at + 2] - 2 * got[at + 1] for at in (0, 1)])
        return bool(bends.abs().max() <= 1e-3 * (got[1] - got[3]).abs().max())

    def mixes(self, down: str, ups: set[str]) -> bool:
        """Whether an up row at one token reaches the input of down at another."""
        seen: list[Any] = []
        tokens: set[int] = set()
        owner = self.module.get_submodule(down)
        hooks = [owner.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))]
        self.run()
        for up in ups:

            def nudge(_: Any, __: Any, out: Any) -> Any:
                changed = out.clone()
                tokens.add(out.numel() // out.shape[-1])
                changed.view(-1, out.shape[-1])[0] += 1
                return changed

            hooks.append(self.module.get_submodule(up).register_forward_hook(nudge))
        self.run()
        for hook in hooks:
            hook.remove()
        before, after = (one.reshape(-1, one.shape[-1]) for one in seen)
        if len(before) < 2 or {len(before)} != tokens:
            raise ValueError("tokens are pooled, or there is one alone, which tells nothing")
        moved = (before - after).abs().amax(1) > 1e-6
        return bool(moved[1:].any()) or not bool(moved[0])


_FUSED = ("first half", "second half", "even", "odd")


def _row(where: str, inner: int, unit: int) -> int:
    """The row of a unit."""
    return {"first half": unit, "second half": inner + unit, "even": 2 * unit, "odd": 2 * unit + 1}.get(
        where, unit
    )


def _judged(members: list[tuple[str, int, str]], linear: list[bool], down: str) -> LiveBlock | None:
    """The block of one or two rows of a unit; None where it does not tell which is which."""
    if len(members) == 1:
        (up, _, where) = members[0]
        return LiveBlock(up, down) if where == "apart" else None
    if len(members) != 2 or sum(linear) != 1:
        return None
    (first, _, here), (second, _, there) = members
    if here == there == "apart":
        return LiveBlock(*((first, down, second) if linear[0] else (second, down, first)))
    fused = {("first half", "second half"): "halves", ("even", "odd"): "pairs"}.get((here, there))
    if first != second or fused is None:
        return None
    return LiveBlock(first, down, "", f"swapped {fused}" if linear[0] else fused)


def _stacked(module: Any, call: Call | None) -> Iterator[LiveBlock]:
    """All experts in one tensor, as transformers' decorator of experts says they lie."""
    fused = _fused_experts(module) if module.has_gate else ""
    if fused is None:
        return
    up = "gate_up_proj" if module.has_gate else "up_proj"
    tied: str | None = ""
    for trial in islice(Trial.of(module, 0, call), 1) if call else ():
        rows, columns = (2, 1) if module.is_transposed else (1, 2)
        inner = module.down_proj.shape[columns]
        places = ["apart"] if not fused else _FUSED[:2] if "halves" in fused else _FUSED[2:]
        pairs = [(_row(where, inner, _UNIT), _row(where, inner, _OTHER)) for where in places]
        moves: list[Move] = [(up, rows, pairs)]
        if getattr(module, f"{up}_bias", None) is not None:
            moves.append((f"{up}_bias", 1, pairs))
        swap = [(_UNIT, _OTHER)]
        tied = trial.tied_by([*moves, ("down_proj", columns, swap)], {inner: swap})
    if tied is not None:
        yield LiveBlock(up, "down_proj", "", fused, tied)


def _fused_experts(module: Any) -> str | None:
    """How gate and up of all experts lie in one tensor; None if that cannot be told."""
    draw = torch.Generator().manual_seed(0)
    width = 6
    try:
        both = torch.randn(2, 2 * width, generator=draw)
        base = module._apply_gate(both)
        up = torch.zeros(
            2 * width, dtype=torch.bool
        )  # where gpt_oss adds one, a change is proportional all the same
        for at in range(2 * width):
            steps = []
            for step in (0.01, 0.02):
                moved = both.clone()
                moved[:, at] += step
                steps.append(module._apply_gate(moved) - base)
            up[at] = bool((steps[1] - 2 * steps[0]).abs().max() <= 1e-6)
    except Exception:
        return None
    halves = torch.arange(2 * width) >= width
    pairs = torch.arange(2 * width) % 2 == 1
    for name, shape in (("halves", halves), ("pairs", pairs)):
        for fused, pattern in ((name, shape), (f"swapped {name}", ~shape)):
            if bool((up == pattern).all()) and (name == "halves") == bool(module.is_concatenated):
                return fused
    return None
