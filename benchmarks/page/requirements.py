"""The requirements on the commands on files, and whether the measurements meet them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.page.metrics import Entry, Group, Spread, limit, named, peak, ratio, spread, wall, work

Parts = dict[str, Any]
Check = Callable[[float], bool]
MB = 1e6


@dataclass(frozen=True)
class Requirement:
    """A requirement, the measured figure, and whether it is met: None if not measured, or without a bound."""

    statement: str
    measured: str
    met: bool | None

    @classmethod
    def of(cls, statement: str, what: str, found: Spread | None, met: Check) -> Requirement:
        """Judged by the median."""
        if found is None:
            return cls(statement, "not measured", None)
        return cls(statement, f"{what}: {found:.2f}", met(found.median))


def requirements(parts: Parts) -> list[Requirement]:
    """All requirements, in the page's order."""
    return [
        requirement
        for about in (_reading, _extract, _writing, _in_place, _many, _remote, _memory, _bits)
        for requirement in about(parts)
    ]


def _only(parts: Parts, part: str) -> Group:
    groups = parts.get(part, {}).get("groups") or [{}]
    return dict(groups[0])


def _reading(parts: Parts) -> Iterator[Requirement]:
    warm, cold = _only(parts, "warm"), _only(parts, "cold")
    ours = named(warm, "neftsurgery diff")
    yield Requirement.of(
        "Warm: diff reaches 0.8 of the plain reads' throughput, without process start",
        "share of the plain reads' throughput",
        ratio(limit(warm), ours, work),
        lambda share: share >= 0.8,
    )
    yield Requirement.of(
        "Warm: the whole process is at least 10 times as fast as per-tensor float32 torch",
        "times as fast",
        ratio(named(warm, "torch cosine_similarity, float32"), ours, wall),
        lambda times: times >= 10,
    )
    yield Requirement.of(
        "Cold: diff reaches 0.9 of the best parallel read's throughput",
        "share of its throughput",
        ratio(limit(cold), named(cold, "neftsurgery diff"), work),
        lambda share: share >= 0.9,
    )


def _beside(group: Group, ours: str, other: str, statement: str, whose: str, most: float) -> Requirement:
    """The time of one command as a share of another's: of the whole process, and in brackets of its work."""
    one, two = named(group, ours), named(group, other)
    without = ratio(one, two, work)
    what = f"of {whose} time, whole process" + (f" (without start: {without.median:.2f})" if without else "")
    return Requirement.of(statement, what, ratio(one, two, wall), lambda times: times <= most)


def _extract(parts: Parts) -> Iterator[Requirement]:
    group, statement = _only(parts, "extract"), "extract of 3% takes at most 1.15 of diff's time"
    yield _beside(group, "neftsurgery extract", "neftsurgery diff", statement, "diff's", 1.15)


def _writing(parts: Parts) -> Iterator[Requirement]:
    group, statement = _only(parts, "apply"), "apply takes at most 1.1 of the time of cp and sync"
    yield _beside(group, "neftsurgery apply", "cp -r", statement, "their", 1.1)


def _in_place(parts: Parts) -> Iterator[Requirement]:
    group = _only(parts, "inplace")
    rows = named(group, "neftsurgery apply --in-place, 1% of rows")
    columns = named(group, "neftsurgery apply --in-place, 1% of down_proj")
    yield Requirement.of(
        "--in-place of 1% of rows takes at most 10% of apply's time, without process start",
        "of apply's time",
        ratio(rows, named(group, "neftsurgery apply, 1%"), work),
        lambda share: share <= 0.1,
    )
    yield Requirement.of(
        "--in-place of 1% of rows writes at most 2.2 times the patch's bytes",
        f"times the patch{_dirtied(rows, 'patch_bytes')}",
        _written(rows, "handed", "patch_bytes"),
        lambda times: times <= 2.2,
    )
    found = _written(columns, "handed", "tensor_bytes")
    what = f"times the tensors touched{_dirtied(columns, 'tensor_bytes')}"
    yield Requirement(
        "--in-place of columns writes about their whole tensors",
        f"{what}: {found:.2f}" if found else "not measured",
        None,
    )


def _many(parts: Parts) -> Iterator[Requirement]:
    for group, verb in zip(parts.get("tiny", {}).get("groups") or [{}, {}], ("diff", "apply"), strict=True):
        statement = (
            f"Very many tiny tensors: {verb} takes at most twice the time of a loop that does the same"
        )
        yield _beside(group, f"neftsurgery {verb}", "a loop", statement, "its", 2)


def _remote(parts: Parts) -> Iterator[Requirement]:
    for group in parts.get("remote", {}).get("groups") or [{}]:
        yield Requirement.of(
            "Behind URLs: diff reaches 0.9 of plain parallel range reads' throughput"
            + (f", {group['label']}" if group else ""),
            "share of the throughput of the same client's reads",
            ratio(limit(group), named(group, "neftsurgery diff"), work),
            lambda share: share >= 0.9,
        )


def _written(entry: Entry | None, figure: str, unit: str) -> Spread | None:
    return spread(entry, lambda run: run[figure] / entry[unit]) if entry else None


def _dirtied(entry: Entry | None, unit: str) -> str:
    found = _written(entry, "dirtied", unit)
    return f" ({found.median:.2f} in whole folios)" if found else ""


def _memory(parts: Parts) -> Iterator[Requirement]:
    groups = [group for group in parts.get("sizes", {}).get("groups", []) if group.get("contestants")]
    sides = [group["label"].partition(" a side")[0] for group in groups]
    labels = sides or ["the smallest", "the largest size"]
    statement = f"Peak memory flat (within 20%) from {labels[0]} to {labels[-1]}"
    for command in ("diff", "extract", "apply"):
        entries = [_exactly(group, f"neftsurgery {command}") for group in groups]
        peaks = [found.median for entry in entries if (found := spread(entry, peak))]
        grown = Spread.of([max(peaks) / min(peaks)]) if len(peaks) > 1 else None
        megabytes = ", ".join(f"{p / MB:.0f}" for p in peaks)
        what = f"{command}, {megabytes} MB; maximum / minimum"
        yield Requirement.of(statement, what, grown, lambda times: times <= 1.2)
    yield _sparse(_only(parts, "sparse"))


def _exactly(group: Group, command: str) -> Entry | None:
    """The command itself, not its ``--dry-run``, whose name begins alike."""
    entries = [entry for entry in group["contestants"] if entry["name"].partition(",")[0] == command]
    return next((entry for entry in entries if entry["runs"]), None)


def _sparse(group: Group) -> Requirement:
    statement = (
        f"Peak memory of diff under 400 MB plus 8 bytes a neuron at {group.get('label', '100 GB of holes')}"
    )
    found = spread(_exactly(group, "neftsurgery diff"), peak) if group else None
    if found is None:
        return Requirement(statement, "not measured", None)
    bound = 400 * MB + 8 * group["neurons"]
    return Requirement(
        statement, f"{found.maximum / MB:.0f} MB of {bound / MB:.0f} MB", found.maximum < bound
    )


def _bits(parts: Parts) -> Iterator[Requirement]:
    statement = "The same result bits for 1, 2 and 4 threads"
    files = parts.get("bits", {}).get("sha256", {})
    if not files:
        yield Requirement(statement, "not measured", None)
        return
    same = {what: len(set(hashes.values())) == 1 for what, hashes in files.items()}
    words = ", ".join(f"{what} {'equal' if equal else 'DIFFER'}" for what, equal in same.items())
    yield Requirement(statement, words, all(same.values()))
