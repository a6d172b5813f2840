"""The section of the switch suite, in the page of the training suite and in that of a run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.page.files import requirement_table, row, table
from benchmarks.page.metrics import ratio, spread
from benchmarks.page.requirements import Requirement

Part = dict[str, Any]


def switch(part: Part) -> Iterator[str]:
    """A setting of the switch suite: the requirement, and a table."""
    yield f"## Switching between two patches: {part['title']}"
    yield f"`{part['command']}`"
    yield (
        f"A patch has {part['rows']:,} rows, {part['bytes'] / 1e6:.1f} MB. A switch takes the rows of one "
        "patch out, checks that the weights are those of the other's base, and puts its rows in. A `Patch` "
        "object that was attached before is not read again: its rows and the base's are in memory, twice the "
        "size of the patch, and the weights are compared with the base's in part: a version counter tells of "
        f"other changes. Threads of torch: {part['threads']}."
    )
    entries = {entry["id"]: entry for entry in part["contestants"]}
    found = ratio(entries["ours"], entries["host"], _seconds)
    yield requirement_table(
        [
            Requirement.of(
                "a switch to a patch that was attached before takes at most twice the time of `index_copy_` "
                "of its rows, from processor memory",
                "of its time",
                found,
                lambda times: times <= 2,
            )
        ]
    )
    lines = (
        row(
            f"**{entry['name']}**" if entry["role"] == "ours" else entry["name"],
            format(spread(entry, lambda run: 1e3 * _seconds(run)), ".3f"),
            *(f"{ratio(entry, entries[other], _seconds):.2f}" for other in ("resident", "host")),
        )
        for entry in entries.values()
    )
    yield table("| | ms | resident = 1 | from the processor = 1 |", lines)


def _seconds(run: dict[str, Any]) -> float:
    return float(run["seconds"])
