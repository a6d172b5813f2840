"""The page of the suite on quantized checkpoints: the requirements, and a table for each layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.log import log
from benchmarks.page.files import group_table, machines, requirement_table
from benchmarks.page.metrics import Group, limit, named, peak, ratio, spread, wall, work
from benchmarks.page.requirements import Requirement
from benchmarks.quantized.options import LAYOUTS, RESULTS

WARM_SHARES = {"fp8": 0.4, "mxfp4": 0.2}
MEMORY = 400e6
INTRODUCTION = """\
# Quantized checkpoints

How fast `diff` scores two [quantized checkpoints](quantized.md). `python -m benchmarks quantized` makes this
page, on pairs that it writes itself: tuned is base plus noise, and both are quantized after that, so scales
move too. The [raw runs]({folder}/{results}) are kept; `python -m benchmarks render` makes the page from them.

Terms are those of the [other benchmarks](benchmarks.md): contestants take turns, figures are medians with
minimum and maximum, and ratios are taken within each round. The limit is the fastest plain read of the round.
No test asserts these figures."""


def render_quantized(folder: Path) -> None:
    """Writes ``folder-quantized.md`` from the results in ``folder``."""
    parts = results.load(folder / RESULTS)
    parts = {name: parts[name] for name in LAYOUTS if name in parts}
    page = folder.with_name(f"{folder.name}-quantized.md")
    page.write_text("\n\n".join(_page(parts, folder.name)) + "\n")
    log(f"wrote {page}")


def _page(parts: dict[str, Any], folder: str) -> Iterator[str]:
    yield INTRODUCTION.format(folder=folder, results=RESULTS)
    yield "## Requirements"
    yield requirement_table(one for name, part in parts.items() for one in requirements(name, part))
    for part in parts.values():
        yield f"## {part['title']}"
        yield f"`{part['command']}`"
        yield group_table(part["groups"]) if part["groups"] else f"Not measured: {part['skipped']}."
    yield "## Machines"
    yield "\n".join(machines(parts))


def requirements(layout: str, part: dict[str, Any]) -> Iterator[Requirement]:
    """What diff of this layout should reach."""
    warm, cold = (dict(one) for one in part["groups"] or ({}, {}))
    yield _share(layout, warm, "in the page cache", WARM_SHARES[layout])
    yield _share(layout, cold, "not in the page cache", 0.9)
    ours, torch = named(warm, "neftsurgery diff"), named(warm, "torch")
    yield Requirement.of(
        f"{layout}: the whole process is at least 30 times as fast as dequantizing with torch",
        "times as fast",
        ratio(torch, ours, wall),
        lambda times: times >= 30,
    )
    peaks = spread(ours, lambda run: peak(run) / 1e6) if ours else None
    yield Requirement.of(
        f"{layout}: peak memory under 400 MB, as of other checkpoints",
        "MB",
        peaks,
        lambda found: found < MEMORY / 1e6,
    )


def _share(layout: str, group: Group, where: str, least: float) -> Requirement:
    return Requirement.of(
        f"{layout}, {where}: diff reaches {least} of the plain reads' throughput",
        "share of their throughput",
        ratio(limit(group), named(group, "neftsurgery diff"), work),
        lambda share: share >= least,
    )
