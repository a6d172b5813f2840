"""What the tensors of each architecture are: data, read by suffix of the tensor name.

The data are ``architectures.json``. ``make families`` makes them from the live models of transformers, and
from a small table kept by hand: see ``docs/architectures.md``.

Patterns are dotted name endings without ``.weight``; ``*`` stands for a number (a layer's, an expert's). The
last part may be the number of one layer of a ``Sequential``: ``ffn.0``. A name may have any prefix, so files
of a bare model and of the model with a head both match. The longest matching pattern wins. A ``.weight`` of
two axes that no pattern of a known family names is a linear weight ``[out, in]``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

AxisOrder = Literal["out in", "in out", "E out in", "E in out", "E ? ?"]
"""The order of a weight's axes; ``E`` are experts, ``?`` is not known and never guessed.

A convolution has further axes, which follow: ``out in`` is ``[out, in, ...]``.
"""

SHARED = "*"
"""The row of what architectures share: it serves unknown model types, and comes on top of every other row."""


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The tensors of a feed-forward block: unit u is row u of up and gate and column u of down.

    Of the two rows of a gated unit, gate is the one that goes through the activation. ``gate_up``
    holds both: ``halves`` all gates before all ups, ``pairs`` gate and up of one unit side by side;
    ``swapped`` where up is first. ``tied`` names what else holds something of each unit, so that
    a unit is tied to its place.
    """

    up: str = ""
    gate: str = ""
    down: str = ""
    gate_up: str = ""
    fused: Literal["halves", "pairs", "swapped halves", "swapped pairs"] = "halves"
    order: AxisOrder = "out in"
    tied: str = ""


@dataclass(frozen=True, slots=True)
class Attention:
    """The tensors of an attention block: a unit is one key/value head and the query heads that read it.

    ``qkv`` holds all three: ``sections`` all q rows, then k, then v; ``heads`` one stretch of rows
    per key/value head; ``quarters`` four times q, v, k of a quarter of the heads.
    """

    q: str = ""
    k: str = ""
    v: str = ""
    o: str = ""
    qkv: str = ""
    fused: Literal["sections", "heads", "quarters"] = "sections"
    order: AxisOrder = "out in"
    tied: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """One row of the data. Texts hold several patterns, separated by blanks."""

    model_types: str  # the ``model_type`` values of the configs it serves
    blocks: tuple[FeedForward | Attention, ...] = ()  # each whose tensors are in the files is used
    embeddings: str = ""
    heads: str = ""
    routers: str = ""
    norms: str = ""
    #: Those in no block, by the order of their axes.
    weights: Mapping[AxisOrder, str] = field(default_factory=dict)
    others: str = ""  # named like weights, and not known to be of a linear layer or a convolution
    one_kv_head: str = ""  # a config key: true or absent means one key/value head
    many_kv_heads: str = ""  # a config key: true overrides `one_kv_head`


@dataclass(frozen=True, slots=True)
class CompositePart:
    """The part of a composite that a nested config describes."""

    model_type: str  # of a nested config that does not state its own, or states that of the whole model
    names: tuple[str, ...]  # the parts of a name that put a tensor under it


@dataclass(frozen=True, slots=True)
class Architectures:
    """The data, of which rows are read on demand."""

    rows: Mapping[str, Mapping[str, Any]]
    head_counts: Mapping[str, tuple[int, int | None]]
    parts: Mapping[str, Mapping[str, CompositePart]]


@functools.cache
def architectures() -> Architectures:
    """By model type, its row; the numbers of query and key/value heads (None: as many) of a config that omits
    them, as nested configs omit what equals the defaults of their class; and the parts of a composite.
    """
    data = json.loads(Path(__file__).with_name("architectures.json").read_text(encoding="utf-8"))
    return Architectures(
        {name: row for row in data["rows"] for name in row["model_types"].split()},
        {name: (query, kv) for query, kv, names in data["head_counts"] for name in names.split()},
        {
            name: {key: CompositePart(kind, tuple(names.split())) for key, (kind, names) in parts.items()}
            for name, parts in data["parts"].items()
        },
    )


@functools.cache
def family_of(model_type: str) -> Family | None:
    """The row of ``model_type``, if there is one."""
    row = architectures().rows.get(model_type)
    if row is None:
        return None
    blocks = (Attention(**one) if "o" in one else FeedForward(**one) for one in row.get("blocks", ()))
    return Family(**{**row, "blocks": tuple(blocks)})
