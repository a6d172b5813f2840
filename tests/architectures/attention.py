"""Attention units, found by experiment: names and sizes propose them, what the module computes decides.

A unit is one key/value head and the query heads that read it. If its output columns are silent, nothing that
happens to its rows of q, k and v is heard; and two units that change places are not heard. How many heads
there are is what the package reads in the config.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from neftsurgery.neurons.families import Attention
from neftsurgery.neurons.submodels import Heads, Role, Submodel
from neftsurgery.neurons.units import unit_spans

from .calls import Call, Calls
from .trial import Trial, alike, layers_of, sizes_of

__all__ = ["LiveAttention", "attention_blocks", "units_of"]

_NAME = re.compile(
    r"(?:to_|w|linear_|proj_|fc_)?(q|k|v|query|key|value)(?:_proj|_lin|_linear|_layer|_projection)?", re.I
)
_FUSED = ("sections", "heads", "quarters")


@dataclass(frozen=True)
class LiveAttention:
    """Live names of the weights by member (q, k, v, o, or qkv, o), their heads, and how qkv is fused."""

    members: tuple[tuple[str, str], ...]
    heads: Heads
    fused: str = "sections"
    tied: str = ""  # other parameters, or arguments of the module, that hold something of each unit


def units_of(member: str, rows: int, heads: Heads, fused: str) -> Any:
    """The unit of each row of q, k, v or qkv, or column of o, by the anatomy. A ValueError if none fits."""
    block = Attention(fused=fused)  # type: ignore[arg-type]
    spans = unit_spans(Role("weight", "out in", block, member), rows, heads)
    return np.concatenate([np.repeat(np.arange(s.first, s.first + s.units), s.repeat) for s in spans])


def attention_blocks(
    model: Any, calls: Calls, seen: dict[tuple[Any, ...], list[LiveAttention]]
) -> Iterator[LiveAttention]:
    """Those of ``model``, on the meta device. Of modules that are alike, one is tried: see ``seen``."""
    configs: dict[str, PreTrainedConfig] = {}
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            configs[path] = config
        layers = layers_of(module)
        if not layers:
            continue
        config = next((configs[at] for at in _ancestors(path) if at in configs), model.config)
        heads = Submodel("", (), True, config.to_dict()).heads(path.split("."))
        if heads is None:
            continue
        key = (heads, *alike(module, calls.of(path)))
        if key not in seen:
            seen[key] = list(_blocks_of(module, layers, heads, calls.of(path)))
        for block in seen[key]:
            members = tuple(
                (member, f"{path}.{name}.weight" if path else f"{name}.weight")
                for member, name in block.members
            )
            yield replace(block, members=members)


def _ancestors(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _blocks_of(
    module: nn.Module, layers: Mapping[str, nn.Module], heads: Heads, call: Call | None
) -> Iterator[LiveAttention]:
    taken: set[str] = set()
    trials: dict[int, list[_AttentionTrial]] = {}
    for proposal in _proposals(layers, heads):
        names = {name for _, name in proposal}
        if len({name.partition(".")[0] for name in names}) < 2 or names & taken:
            continue
        width = sizes_of(layers[proposal[0][1]])[0]  # type: ignore[index]
        head = sizes_of(layers[dict(proposal)["o"]])[0] // heads.query  # type: ignore[index]
        if width not in trials:
            given = [call, None] if call else [None]
            trials[width] = [one for each in given for one in _AttentionTrial.made(module, width, each, head)]
        found = (
            LiveAttention(proposal, heads, fused, tied)
            for fused in (_FUSED if proposal[0][0] == "qkv" else _FUSED[:1])
            for trial in trials[width]
            if (tied := _holds(trial, layers, proposal, heads, fused)) is not None
        )
        block = next(found, None)
        if block is not None:
            taken |= names
            yield block


def _proposals(layers: Mapping[str, nn.Module], heads: Heads) -> Iterator[tuple[tuple[str, str], ...]]:
    groups: dict[str, dict[str, str]] = {}
    for name in layers:
        found = _NAME.fullmatch(name.rpartition(".")[2])
        if found:
            groups.setdefault(name.rpartition(".")[0], {})[found[1][0].lower()] = name
    for group, (o, last) in product(groups.values(), layers.items()):
        if group.keys() == {"q", "k", "v"} and o not in group.values():
            wide = sizes_of(layers[group["v"]])[1] * heads.query // heads.kv  # type: ignore[index]
            if sizes_of(last)[0] == wide:  # type: ignore[index]
                yield (*((member, group[member]) for member in "qkv"), ("o", o))
    for (qkv, first), (o, last) in product(layers.items(), layers.items()):
        inner = sizes_of(last)[0]  # type: ignore[index]
        if qkv != o and sizes_of(first)[1] * heads.query == inner * (heads.query + 2 * heads.kv):  # type: ignore[index]
            yield (("qkv", qkv), ("o", o))


class _AttentionTrial(Trial):
    @classmethod
    def made(cls, module: nn.Module, width: int, call: Call | None, head: int) -> Iterator[_AttentionTrial]:
        """A trial that runs: without a ``call``, with a rotation that fits."""
        for size in (0,) if call else (head, head // 2, head // 4, 2 * (head // 4)):
            try:
                trial = cls(module, width, call)
                if size and "position_embeddings" in trial.names:
                    angles = torch.linspace(0, 1, 4 * size, dtype=torch.float64).view(1, -1, size)
                    rotation = tuple(one.expand(3, -1, -1) for one in (angles.cos(), angles.sin()))
                    trial.given["position_embeddings"] = rotation
                trial.run()
            except Exception:  # another part of the head is rotated, or it does not run alone
                continue
            yield trial
            return


def _holds(
    trial: Trial,
    layers: Mapping[str, nn.Module],
    proposal: tuple[tuple[str, str], ...],
    heads: Heads,
    fused: str,
) -> str | None:
    """What ties the units to their places, if the first and the last are heard through their columns alone.

    They are not where one norm spans all heads: that is such a tie.
    """
    try:
        units = {
            member: units_of(member, sizes_of(layers[name])[0 if member == "o" else 1], heads, fused)  # type: ignore[index]
            for member, name in proposal
        }
        base, alone = trial.run(), True
        draw = torch.Generator().manual_seed(1)
        for unit in {0, heads.kv - 1}:
            where = {member: np.flatnonzero(units[member] == unit).tolist() for member, _ in proposal}
            names = dict(proposal)

            def noise(old: Any) -> Any:
                return old + torch.randn(old.shape, generator=draw, dtype=old.dtype)

            silence = (names["o"], where["o"], True, torch.zeros_like)
            silent = trial.edited(silence)
            effect = (silent - base).abs().max()
            for member in names.keys() - {"o"}:
                change = (names[member], where[member], False, noise)
                heard = (trial.edited(change) - base).abs().max() > 1e-3 * effect
                quiet = (trial.edited(silence, change) - silent).abs().max() <= 1e-5 * effect
                alone = alone and bool(quiet)
                if not heard:
                    return None
            if heads.kv > 1:  # the columns of another unit do not silence this one
                other = np.flatnonzero(units["o"] == (unit + 1) % heads.kv).tolist()
                silence = (names["o"], other, True, torch.zeros_like)
                first = proposal[0][0]
                change = (names[first], where[first], False, noise)
                if (trial.edited(silence, change) - trial.edited(silence)).abs().max() <= 1e-5 * effect:
                    return None
        tied = _tie(trial, units, dict(proposal), heads) if heads.kv > 1 else ""
        return tied if alone or tied else None
    except Exception:  # this module cannot be run alone
        return None


def _tie(trial: Trial, units: Mapping[str, Any], names: Mapping[str, str], heads: Heads) -> str | None:
    """What ties the first and the last unit to their places: see `Trial.tied_by`."""

    def pairs(unit_of: Any) -> list[tuple[int, int]]:
        first, last = (np.flatnonzero(unit_of == unit).tolist() for unit in (0, heads.kv - 1))
        return list(zip(first, last, strict=True))

    moves = [
        move
        for member in (*(names.keys() - {"o"}), "o")
        for move in trial.moves(names[member], pairs(units[member]), column=member == "o")
    ]
    counted = [np.arange(heads.kv), np.arange(heads.query) * heads.kv // heads.query]
    places = {len(unit_of): pairs(unit_of) for unit_of in (*units.values(), *counted)}
    return trial.tied_by(moves, places)
