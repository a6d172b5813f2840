"""From what live models tell to the rows of ``architectures.json``: the shortest patterns that say it all."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from neftsurgery.neurons.families import SHARED, Attention, Family, FeedForward
from neftsurgery.neurons.submodels import NO_PATTERN, Role, Submodel, roles
from neftsurgery.neurons.tensor_names import NameReading, read_name

from .live_weights import ORDERS

__all__ = [
    "DATA",
    "OVERLAY",
    "Record",
    "agrees",
    "load_overlay",
    "make_data",
    "make_row",
    "short_blocks",
    "text_of",
]

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "neftsurgery" / "neurons" / "architectures.json"
OVERLAY = Path(__file__).with_name("overlay.json")

Record = tuple[str, int, str]
"""A name with ``*`` for numbers, its number of axes, its verdict."""

_FIELDS = {"embedding": "embeddings", "head": "heads", "router": "routers", "norm": "norms"}
_ROLES = {
    "embeddings": "embedding",
    "heads": "output head",
    "routers": "router",
    "norms": "norm",
    "others": "other",
}
_REASONS = {
    "embedding": "embedding",
    "head": "output head",
    "router": "router",
    "norm": "norm",
    "bias": "bias",
}
_SHARED_BY = 6  # model types, at least
_SHARED_FIELDS = ("embeddings", "heads", "routers")
#: Words that models outside transformers have for other things: a gated unit's gate, a decoder's linear
#: layer, a table of Keras, whose rows are neurons as long as nothing says what they are.
_AMBIGUOUS = {"decoder", "embedding", "embeddings", "gate", "shared"}
_EMPTY = Family("")


class _Table(Submodel):
    """A known model with no other roles than those given."""

    def __init__(self, given: Mapping[tuple[str, ...], Role]) -> None:
        super().__init__("", (_EMPTY,), True, {})
        self.__dict__["_roles"] = dict(given)


def agrees(reading: NameReading, ndim: int, verdict: str) -> bool:
    """Whether a reading says what the live model does, or less."""
    if ndim < 2:
        return True
    if verdict in ORDERS:
        return reading.reason == "" and reading.axes == ORDERS[verdict]
    return reading.reason == _REASONS[verdict] if verdict in _REASONS else reading.reason != ""


def _stem(name: str) -> tuple[str, ...]:
    parts = tuple(name.split("."))
    return parts[:-1] if parts[-1] == "weight" and len(parts) > 1 else parts


def _general(name: str) -> str:
    """``*`` for the numbers in a ``Sequential`` too: there may be more of them."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _field(verdict: str) -> str:
    return verdict if verdict in ORDERS else _FIELDS.get(verdict, "others")


def make_row(
    records: Iterable[Record],
    shared: Mapping[tuple[str, ...], Role],
    blocks: Iterable[Mapping[str, str]] = (),
) -> dict[str, set[str]]:
    """Per field the shortest patterns that, beside ``blocks``, make a known model read as ``records`` say."""
    kinds = {True: Attention, False: FeedForward}
    own = Family("", tuple(kinds["o" in block](**block) for block in blocks))  # type: ignore[arg-type]
    table = _Table({**shared, **roles(own)})
    meant: dict[tuple[str, ...], set[str]] = defaultdict(set)  # by suffix, the fields of all that end so
    known = sorted(
        {
            (general, _stem(general), ndim, verdict)
            for name, ndim, verdict in records
            if ndim >= 2
            for general in [_general(name)]
        }
    )
    for _, stem, _, verdict in known:
        for depth in range(1, len(stem) + 1):
            meant[stem[-depth:]].add(_field(verdict))
    row: dict[str, set[str]] = defaultdict(set)
    for name, stem, ndim, verdict in known:
        if agrees(read_name(tuple(name.split(".")), ndim, table), ndim, verdict):
            continue
        suffixes = (stem[-depth:] for depth in range(1, len(stem) + 1))
        fitting = (suffix for suffix in suffixes if meant[suffix] == {_field(verdict)} and suffix[0] != "*")
        suffix = next(fitting, None)
        if suffix is None:  # one name, several layers: a Sequential of both, say
            row["others"].add(".".join(stem))
        else:
            row[_field(verdict)].add(".".join(suffix))
    return row


def short_blocks(blocks: Iterable[Mapping[str, str]], records: Iterable[Record]) -> list[dict[str, str]]:
    """Blocks of whole names as blocks of the shortest endings that name nothing else."""
    meant: dict[tuple[str, ...], set[tuple[str, str]]] = defaultdict(set)  # by whole name, the members it is
    known = [dict(block) for block in blocks]
    for block in known:
        for member, name in _members(block).items():
            meant[name].add((member, block.get("order", "")))
    stems = {_stem(name) for name, ndim, _ in records if ndim >= 2}
    found: dict[str, dict[str, str]] = {}
    for block in known:
        members = _members(block)
        for cut in _cuts(list(members.values())):
            short = {member: name[cut:] for member, name in members.items()}
            if not any(ending[0].isdecimal() for ending in short.values()) and all(
                meant.get(stem) == {(member, block.get("order", ""))}
                for member, ending in short.items()
                for stem in stems
                if stem[-len(ending) :] == ending
            ):
                named = {member: ".".join(ending) for member, ending in short.items()}
                ordered = {key: {**block, **named}[key] for key in _BLOCK_KEYS if key in block}
                found[json.dumps(ordered)] = ordered
                break
    return list(found.values())


_NOT_ENTRANCES = ("down", "o", *NO_PATTERN)  # two blocks may end in one tensor
_BLOCK_KEYS = ("up", "gate", "gate_up", "down", "q", "k", "v", "qkv", "o", *NO_PATTERN)


def _members(block: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {key: tuple(text.split(".")) for key, text in block.items() if key not in NO_PATTERN}


def _cuts(names: list[tuple[str, ...]]) -> list[int]:
    """Where endings of the names of one block may begin: after the layer's number, or further left."""
    shared = 0
    while all(len(name) > shared + 1 and name[shared] == names[0][shared] for name in names):
        shared += 1
    stars = [index + 1 for index in range(shared) if names[0][index] == "*"]
    if not stars:
        return list(range(max(0, shared - 1), -1, -1))
    wide = [cut for cut in stars if all(len(name) - cut >= 2 for name in names)]
    first = wide[-1] if wide else stars[0]
    return [first, *range(first - 2, -1, -1)]


def _shared(records: Mapping[str, Iterable[Record]]) -> dict[str, set[str]]:
    """What many types leave out, and almost none counts as a weight: those say so in rows of their own."""
    users: dict[str, Counter[str]] = defaultdict(Counter)
    for known in records.values():
        said = {
            (".".join(_stem(_general(name))[-depth:]), _field(verdict))
            for name, ndim, verdict in known
            if ndim >= 2
            for depth in (1, 2)
        }
        for suffix, field in said:
            users[suffix][field] += 1
    found: dict[str, set[str]] = defaultdict(set)
    for suffix, fields in sorted(users.items(), key=lambda item: item[0].count(".")):
        field, count = fields.most_common(1)[0]
        weights = sum(fields[order] for order in ORDERS)
        covered = any(suffix.rpartition(".")[2] in one for one in found.values())
        if (
            field in _SHARED_FIELDS
            and count >= _SHARED_BY
            and 10 * weights <= count
            and not covered
            and "*" not in suffix
            and suffix not in _AMBIGUOUS
        ):
            found[field].add(suffix)
    return found


def load_overlay(path: Path = OVERLAY) -> list[dict[str, Any]]:
    """What the script cannot see, each entry with its reason."""
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return entries


def _as_family(row: Mapping[str, Iterable[str]]) -> Family:
    plain = {field: " ".join(sorted(row.get(field, ()))) for field in _ROLES}
    weights = {order: " ".join(sorted(row[order])) for order in ORDERS if row.get(order)}
    return Family("", weights=weights, **plain)  # type: ignore[arg-type]


def make_data(
    records: Mapping[str, Iterable[Record]],
    guests: Mapping[str, Iterable[Record]],
    blocks: Mapping[str, list[dict[str, str]]],
    parts: Mapping[str, Mapping[str, tuple[str, Iterable[str]]]],
    head_counts: Mapping[str, tuple[int, int | None]],
    overlay: Iterable[Mapping[str, Any]],
    made_with: str,
) -> dict[str, Any]:
    """The content of ``architectures.json``. ``guests`` are what parts are called in composites."""
    shared = _shared(records)
    shared_roles = roles(_as_family(shared))
    rows = {SHARED: _plain(shared)}
    for model_type, known in records.items():
        short = short_blocks(blocks.get(model_type, ()), known)
        row = make_row({*known, *guests.get(model_type, ())}, shared_roles, short)
        rows[model_type] = _plain(row) | ({"blocks": short} if short else {})
    for entry in overlay:
        for model_type in entry["model_types"].split():
            _overlay(rows[model_type], entry)
    merged: dict[str, list[str]] = defaultdict(list)
    for model_type, row in rows.items():
        merged[json.dumps(row, sort_keys=True)].append(model_type)
    lines = sorted(merged.items(), key=lambda item: sorted(item[1]))
    counts: dict[tuple[int, int | None], list[str]] = defaultdict(list)
    for model_type, numbers in head_counts.items():
        counts[numbers].append(model_type)
    return {
        "made_with": made_with,
        "rows": [{"model_types": " ".join(sorted(types)), **json.loads(row)} for row, types in lines],
        "head_counts": [
            [query, kv, " ".join(sorted(types))]
            for (query, kv), types in sorted(counts.items(), key=lambda item: (item[0][0], item[0][1] or 0))
        ],
        "parts": {
            whole: {key: [kind, " ".join(sorted(names))] for key, (kind, names) in sorted(known.items())}
            for whole, known in sorted(parts.items())
        },
    }


def _plain(row: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    found: dict[str, Any] = {field: " ".join(sorted(row[field])) for field in _ROLES if row.get(field)}
    weights = {order: " ".join(sorted(row[order])) for order in ORDERS if row.get(order)}
    return found | ({"weights": weights} if weights else {})


def _overlay(row: dict[str, Any], entry: Mapping[str, Any]) -> None:
    """Put what ``entry`` says into a row, in place of what the row says of the same patterns."""
    own = {" ".join(entry.get(field, "").split()) for field in _ROLES} | set(
        entry.get("weights", {}).values()
    )
    stated = {pattern for text in own for pattern in text.split()}
    for block in entry.get("blocks", ()):
        stated |= {text for field, text in block.items() if field not in NO_PATTERN}
    for holder in (row, row.get("weights", {})):
        for field in [*_ROLES, *ORDERS]:
            if field in holder:
                holder[field] = " ".join(one for one in holder[field].split() if one not in stated)
    for field, value in entry.items():
        if field in _ROLES:
            row[field] = " ".join(sorted({*row.get(field, "").split(), *value.split()}))
        elif field == "weights":
            weights = row.setdefault("weights", {})
            for order, text in value.items():
                weights[order] = " ".join(sorted({*weights.get(order, "").split(), *text.split()}))
        elif field == "blocks":
            entrances = {text for block in value for key, text in block.items() if key not in _NOT_ENTRANCES}
            others = [block for block in row.get("blocks", ()) if not entrances & set(block.values())]
            row["blocks"] = [*value, *others]
        elif field not in ("model_types", "why"):
            row[field] = value
    if "weights" in row:
        row["weights"] = {order: text for order, text in row["weights"].items() if text}
    for field in [field for field, value in row.items() if not value]:
        del row[field]


def text_of(data: Mapping[str, Any]) -> str:
    """``data`` as JSON with one line for each row, so that a difference can be read."""
    sections = [f'"made_with": {json.dumps(data["made_with"])}']
    for name in ("rows", "head_counts"):
        sections.append(f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in data[name]) + "\n]")
    lines = (f"{json.dumps(whole)}: {json.dumps(parts)}" for whole, parts in data["parts"].items())
    return "{" + ",\n".join(sections) + ',\n"parts": {\n' + ",\n".join(lines) + "\n}}\n"
