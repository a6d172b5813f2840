"""The names that the members of a feed-forward block have in memory and in files, as patterns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from neftsurgery.neurons.tensor_names import name_pattern

from .attention import LiveAttention, units_of
from .feed_forward import LiveBlock
from .live_weights import ORDERS, Tensor

__all__ = ["named_attention", "named_blocks", "pattern_of"]

_UP, _GATE, _DOWN = 1, 2, 3


def pattern_of(name: str) -> str:
    """A name as the package reads it, with ``*`` for numbers."""
    return ".".join(name_pattern(name.split(".")))


def named_blocks(
    blocks: Iterable[LiveBlock], live: Mapping[str, Tensor], picture: Mapping[str, Tensor]
) -> list[dict[str, str]]:
    """The ``blocks`` in the tensors of a ``picture`` (those of a model, or of its files), each once.

    Members are whole names with ``*`` for numbers. A block that the picture does not hold whole is left out.
    """
    top = 1 + max((int(tensor.ids.max()) for tensor in live.values() if tensor.ids is not None), default=0)
    label = np.zeros(top, dtype=np.int8)
    block_of = np.full(top, -1, dtype=np.int32)
    known = list(blocks)
    for number, block in enumerate(known):
        for name, member in ((block.up, _UP), (block.gate, _GATE), (block.down, _DOWN)):
            if name and live[name].ids is not None:
                ids = live[name].ids.reshape(live[name].ids.shape[0], -1).numpy()
                block_of[ids] = number
                label[ids] = (
                    _labels(ids.shape, block.fused, stacked=live[name].verdict.startswith("E"))
                    if member == _UP and block.fused
                    else member
                )
    found: dict[int, dict[str, set[tuple[str, str]]]] = {}
    for name, tensor in picture.items():
        if tensor.ids is None or tensor.verdict not in ORDERS:
            continue
        ids = tensor.ids.numpy()
        owners = set(block_of[ids].ravel().tolist())
        if len(owners) != 1 or -1 in owners:
            continue
        field = _field(label[ids.reshape(-1, ids.shape[-1])])
        found.setdefault(owners.pop(), {}).setdefault(field, set()).add((pattern_of(name), tensor.verdict))
    named: dict[str, dict[str, str]] = {}
    for number, members in found.items():
        entry = _entry(members)
        if entry:
            _add(named, entry, known[number].tied)
    return list(named.values())


def _labels(shape: tuple[int, ...], fused: str, *, stacked: bool) -> Any:
    """Per row whether it is up or gate: ``shape`` is experts by rows, or rows by one."""
    count = shape[1] if stacked else shape[0]
    at = np.arange(count)
    second = at % 2 == 1 if fused.endswith("pairs") else at >= count // 2
    ups = ~second if fused.startswith("swapped") else second
    row = np.where(ups, _UP, _GATE).astype(np.int8)
    return np.broadcast_to(row, shape) if stacked else row.reshape(shape)


def _field(labels: Any) -> str:
    """Which member of a block a tensor with these labels is, experts by rows; "" if none."""
    if (labels != labels[:1]).any():
        return ""
    row = labels[0]
    for name, member in (("up", _UP), ("gate", _GATE), ("down", _DOWN)):
        if (row == member).all():
            return name
    for fused in ("halves", "pairs", "swapped halves", "swapped pairs"):
        if (row == _labels((len(row), 1), fused, stacked=False).ravel()).all():
            return f"gate_up {fused}"
    return ""


def _entry(members: Mapping[str, set[tuple[str, str]]]) -> dict[str, str]:
    """The block as the data have it; empty if a member is missing, or has several names or orders."""
    fields = {field.partition(" ")[0]: names for field, names in members.items()}
    orders = {order for names in members.values() for _, order in names}
    whole = fields.keys() in ({"up", "down"}, {"up", "gate", "down"}, {"gate_up", "down"})
    if not whole or len(orders) != 1 or any(len(names) != 1 for names in members.values()):
        return {}
    entry = {field: next(iter(names))[0].removesuffix(".weight") for field, names in fields.items()}
    fused = next((field.partition(" ")[2] for field in members if field.startswith("gate_up ")), "halves")
    entry |= {} if fused == "halves" else {"fused": fused}
    order = orders.pop()
    return entry | ({} if order == "out in" else {"order": order})


def _add(named: dict[str, dict[str, str]], entry: dict[str, str], tied: str) -> None:
    """Keep a block once, with all that ties its units in any layer."""
    words = {*named.get(str(sorted(entry.items())), {}).get("tied", "").split(), *tied.split()}
    named[str(sorted(entry.items()))] = entry | ({"tied": " ".join(sorted(words))} if words else {})


def named_attention(
    blocks: Iterable[LiveAttention], live: Mapping[str, Tensor], picture: Mapping[str, Tensor]
) -> list[dict[str, str]]:
    """The same of attention blocks: a member holds rows of one or all of q, k and v, by units in order."""
    top = 1 + max((int(tensor.ids.max()) for tensor in live.values() if tensor.ids is not None), default=0)
    unit_of, block_of = np.zeros(top, dtype=np.int64), np.full(top, -1, dtype=np.int32)
    member_of = np.zeros(top, dtype=np.int8)
    known = list(blocks)
    members = ("q", "k", "v", "o", "qkv")
    for number, block in enumerate(known):
        for member, name in block.members:
            tensor = live[name]
            if tensor.ids is None or tensor.ids.ndim != 1:
                break
            ids = tensor.ids.numpy()
            block_of[ids], member_of[ids] = number, members.index(member)
            if member != "o":
                unit_of[ids] = units_of(member, len(ids), block.heads, block.fused)
    found: dict[int, dict[str, set[tuple[str, str]]]] = {}
    fused_as: dict[int, str] = {}
    held_as: Counter[str] = Counter()
    for name, tensor in picture.items():
        if tensor.ids is None or tensor.verdict not in ("out in", "in out") or len(tensor.shape) != 2:
            continue
        ids = tensor.ids.numpy()
        owners = set(block_of[ids].tolist())
        if len(owners) != 1 or -1 in owners:
            continue
        number = owners.pop()
        held = {members[index] for index in set(member_of[ids].tolist())}
        field = "qkv" if held in ({"q", "k", "v"}, {"qkv"}) else "".join(sorted(held))
        if field not in members:
            continue
        for fused in ("sections", "heads", "quarters") if field == "qkv" else ("sections",):
            try:
                fits = field == "o" or units_of(field, len(ids), known[number].heads, fused) == unit_of[ids]
            except ValueError:
                continue
            if np.all(fits):
                pattern = pattern_of(name)
                held_as[pattern] += 1
                found.setdefault(number, {}).setdefault(field, set()).add((pattern, tensor.verdict))
                if field == "qkv":
                    fused_as[number] = fused
                break
    # A name that stands for a member in one layer and for something else in another tells nothing.
    everywhere = Counter(pattern_of(name) for name in picture)
    doubtful = {name for name, count in everywhere.items() if 0 < held_as[name] < count}
    named: dict[str, dict[str, str]] = {}
    for number, fields in found.items():
        orders = {order for names in fields.values() for _, order in names}
        if fields.keys() not in ({"q", "k", "v", "o"}, {"qkv", "o"}) or len(orders) != 1:
            continue
        patterns = {pattern for names in fields.values() for pattern, _ in names}
        if len(patterns) != len(fields) or patterns & doubtful:
            continue
        entry = {
            field: next(iter(names))[0].removesuffix(".weight") for field, names in sorted(fields.items())
        }
        if fused_as.get(number, "sections") != "sections":
            entry["fused"] = fused_as[number]
        order = orders.pop()
        entry |= {} if order == "out in" else {"order": order}
        _add(named, entry, known[number].tied)
    return list(named.values())
