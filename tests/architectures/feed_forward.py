"""Feed-forward blocks, found by experiment: shapes propose the layers, what their module computes decides.

Unit u of a block is row u of up and gate and column u of down. So if column u of down is silent, nothing that
happens to row u of up or gate is heard; and what down gets of the unit is an affine function of the up row.
What moves between tokens is attention. A module runs alone, as a small copy with random weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .trial import Trial, layers_of, sizes_of

__all__ = ["LiveBlock", "feed_forward_blocks"]

_UNIT = 1  # the unit that is silenced


@dataclass(frozen=True)
class LiveBlock:
    """Live names of the weights; of a fused one, how gate and up lie in it."""

    up: str
    down: str
    gate: str = ""
    fused: str = (
        ""  # "halves" or "pairs" with the gate first; "swapped halves" or "swapped pairs" with up first
    )


def feed_forward_blocks(
    model: nn.Module, seen: dict[tuple[Any, ...], list[LiveBlock]]
) -> Iterator[LiveBlock]:
    """Those of ``model``, on the meta device. Of modules that are alike, one is tried: see ``seen``."""
    for path, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "down_proj"):
            yield from _stacked(path, module)
            continue
        layers = layers_of(module)
        if not layers or any(hasattr(part, "is_concatenated") for part in module.modules()):
            continue
        key = (type(module), *((name, sizes_of(layer)) for name, layer in layers.items()))
        if key not in seen:
            seen[key] = list(_blocks_of(module, layers))
        for block in seen[key]:
            gate = _weight(path, block.gate) if block.gate else ""
            yield LiveBlock(_weight(path, block.up), _weight(path, block.down), gate, block.fused)


def _weight(path: str, layer: str) -> str:
    return ".".join(part for part in (path, layer, "weight") if part)


def _blocks_of(module: nn.Module, layers: dict[str, nn.Module]) -> Iterator[LiveBlock]:
    """The blocks whose layers have ``module`` as their nearest common owner."""
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
        try:
            found = _FeedForwardTrial(module, outer).decide(down, ups, inner)
        except Exception:  # this module cannot be run alone
            continue
        if found is not None:
            yield found


class _FeedForwardTrial(Trial):
    """Tells which layers form a block."""

    def decide(self, down: str, ups: list[str], inner: int) -> LiveBlock | None:
        """The block that ends in ``down``, if there is just one."""
        base = self.run()
        silent = self.edited((down, [_UNIT], True, torch.zeros_like))
        effect = (silent - base).abs().max()
        if effect < 1e-4:
            return None
        members: list[tuple[str, int, str]] = []  # the layer, its row of the unit, where the row is
        for up in ups:
            rows = {_UNIT: "apart"}
            if sizes_of(self.module.get_submodule(up)) != (self.input.shape[-1], inner):
                rows = {
                    _UNIT: "first half",
                    inner + _UNIT: "second half",
                    2 * _UNIT: "even",
                    2 * _UNIT + 1: "odd",
                }
            for row, where in rows.items():
                change = (up, [row], False, lambda old: -2 * old + 1)
                heard = (self.edited(change) - base).abs().max() > 1e-3 * effect
                quiet = (
                    self.edited((down, [_UNIT], True, torch.zeros_like), change) - silent
                ).abs().max() <= 1e-3 * effect
                if heard and quiet:
                    members.append((up, row, where))
        if not members or self.mixes(down, {up for up, _, _ in members}):
            return None
        return _judged(members, [self.is_linear(down, up, row) for up, row, _ in members], down)

    def is_linear(self, down: str, up: str, row: int) -> bool:
        """Whether what ``down`` gets of the unit is an affine function of a row: then it is up."""
        got = []
        owner = self.module.get_submodule(down)
        hook = owner.register_forward_pre_hook(lambda _, args: got.append(args[0][..., _UNIT].clone()))
        for factor in (1, 0, -1):
            self.edited((up, [row], False, lambda old, by=factor: by * old))
        hook.remove()
        plus, none, minus = got
        return bool((plus + minus - 2 * none).abs().max() <= 1e-3 * (plus - minus).abs().max())

    def mixes(self, down: str, ups: set[str]) -> bool:
        """Whether an up row at one token reaches the input of down at another."""
        seen: list[Any] = []
        owner = self.module.get_submodule(down)
        hooks = [owner.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))]
        self.run()
        for up in ups:

            def nudge(_: Any, __: Any, out: Any) -> Any:
                changed = out.clone()
                changed.view(-1, out.shape[-1])[0] += 1
                return changed

            hooks.append(self.module.get_submodule(up).register_forward_hook(nudge))
        self.run()
        for hook in hooks:
            hook.remove()
        before, after = (one.reshape(-1, one.shape[-1]) for one in seen)
        moved = (before - after).abs().amax(1) > 1e-6
        return bool(moved[1:].any()) or not bool(moved[0])


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


def _stacked(path: str, module: Any) -> Iterator[LiveBlock]:
    """All experts in one tensor, as transformers' decorator of experts says they lie."""
    if not module.has_gate:
        yield LiveBlock(f"{path}.up_proj", f"{path}.down_proj")
        return
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
        return
    halves = torch.arange(2 * width) >= width
    pairs = torch.arange(2 * width) % 2 == 1
    for name, shape in (("halves", halves), ("pairs", pairs)):
        for fused, pattern in ((name, shape), (f"swapped {name}", ~shape)):
            if bool((up == pattern).all()) and (name == "halves") == bool(module.is_concatenated):
                yield LiveBlock(f"{path}.gate_up_proj", f"{path}.down_proj", "", fused)
