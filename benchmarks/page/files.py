"""The page of the files suite: the requirements, then every part with its command and its table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.files.options import PARTS
from benchmarks.files.suite import RESULTS
from benchmarks.harness import results
from benchmarks.harness.log import log
from benchmarks.page.metrics import Entry, Group, Metric, first, limit, peak, ratio, spread, wall, work
from benchmarks.page.requirements import Requirement, requirements

INTRODUCTION = """\
# Benchmarks

`make bench` makes this page, on checkpoints that it writes itself: bf16 Llamas of real geometry, where tuned
is base plus noise everywhere. `make bench SIZE=500MB` measures smaller ones;
`python -m benchmarks files --help` lists all options. The [raw runs]({folder}/{results}) are kept;
`python -m benchmarks render` makes this page from them.

- Each contestant is its own process. The contestants take turns, A B C A B C, so that drift affects all
  alike. Figures are medians, with minimum and maximum in brackets. Ratios are taken within each round. The
  limit is the fastest plain read, copy or write of the round.
- *Whole* is the time of the process from start to exit. *Work* excludes its start and imports, as the process
  itself reports (`seconds` of `--json`). GB/s is the size of the files (both sides, or the copied one)
  divided by *work*.
- Peak memory counts mapped file pages. The measurement cannot see peaks below 25 MB.
- Files are in the page cache, except in the cold part, where they are not. Both are checked with `mincore`.
  Caches below the page cache, such as that of a virtual machine's host, are not controlled.
- Contestants that write end with fsync, rivals too. Bytes written are those passed to write calls. The
  kernel's count of dirty pages is shown beside them. It counts whole folios, of up to megabytes on file
  systems with large ones; only their changed blocks reach the disk.
- No test asserts these figures: machines are noisy."""

COLUMNS = "| | whole, s | work, s | GB/s | CPU, s | peak, MB | whole, ours = 1 | work, limit = 1 |"


def render(folder: Path) -> None:
    """Writes ``folder.md`` and the charts in ``folder`` from the results in it."""
    parts = results.load(folder / RESULTS)
    parts = {name: parts[name] for name in PARTS if name in parts}
    pictures = _charts(parts, folder)
    page = folder.with_name(f"{folder.name}.md")
    page.write_text("\n\n".join(_page(parts, folder.name, pictures)) + "\n")
    log(f"wrote {page}")


def _charts(parts: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Draws the charts. Returns their file names and captions."""
    try:
        from benchmarks.page.files_charts import draw
    except ImportError:
        log("no charts: matplotlib is not installed")
        return []
    return draw(parts, folder)


def _page(parts: dict[str, Any], folder: str, pictures: list[tuple[str, str]]) -> Iterator[str]:
    yield INTRODUCTION.format(folder=folder, results=RESULTS)
    yield "## Requirements"
    yield requirement_table(requirements(parts))
    for file, caption in pictures:
        yield f"![{caption}]({folder}/{file})"
    for name, part in parts.items():
        yield from _section(name, part)
    yield "## Machines"
    yield "\n".join(machines(parts))


def requirement_table(requirements: Iterable[Requirement]) -> str:
    """A table of requirements, what was measured, and whether it meets them."""
    verdicts = {True: "yes", False: "**no**", None: ""}
    rows = (row(one.statement, one.measured, verdicts[one.met]) for one in requirements)
    return table("| requirement | measured | met |", rows)


def table(head: str, rows: Iterable[str]) -> str:
    """A Markdown table."""
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows])


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _section(name: str, part: dict[str, Any]) -> Iterator[str]:
    yield f"## {part['title']}"
    yield f"`{part['command']}`"
    if "skipped" in part:
        yield f"Not measured: {part['skipped']}."
    if part.get("groups"):
        yield group_table(part["groups"])
    written = [line for group in part.get("groups", []) for line in _written(group)]
    if written:
        yield "\n".join(written)
    if "sweep" in part:
        yield _sweep(part["sweep"])
    if "sha256" in part:
        yield _hashes(part["sha256"])


def group_table(groups: Iterable[Group]) -> str:
    """The table of side-by-side runs."""
    return table(COLUMNS, (line for group in groups for line in _rows(group)))


def _rows(group: Group) -> Iterator[str]:
    """A group's rows of the table, below its label."""
    skipped = f": not measured, {group['skipped']}" if "skipped" in group else ""
    yield f"| *{group['label']}{skipped}* | | | | | | | |"
    ours, bound = first(group, "ours"), limit(group)
    for entry in group.get("contestants", []):
        yield _row(entry, group["bytes"], ours, bound)


def _row(entry: Entry, nbytes: int, ours: Entry | None, bound: Entry | None) -> str:
    name = f"**{entry['name']}**" if entry["role"] in ("ours", "plan") else entry["name"]
    if not entry["runs"]:
        return f"| {name}: {entry['skipped']} | | | | | | | |"
    weights = entry["role"] != "plan"
    cells = [
        _spread(entry, wall, ".2f"),
        _spread(entry, work, ".2f") if weights else "",
        _median(entry, lambda run: nbytes / work(run) / 1e9, ".3g") if weights else "",
        _median(entry, lambda run: run["cpu"], ".2f"),
        _median(entry, lambda run: peak(run) / 1e6, ".0f"),
        _ratio(entry, ours, wall),
        _ratio(entry, bound, work) if weights else "",
    ]
    return row(name, *cells)


def _spread(entry: Entry, metric: Metric, spec: str) -> str:
    return format(spread(entry, metric), spec)


def _median(entry: Entry, metric: Metric, spec: str) -> str:
    found = spread(entry, metric)
    return format(found.median, spec) if found else ""


def _ratio(entry: Entry, one: Entry | None, metric: Metric) -> str:
    found = ratio(entry, one, metric)
    return "" if found is None or entry is one else f"{found:.2f}"


def _written(group: Group) -> Iterator[str]:
    """What runs in place wrote, relative to the minimum."""
    for entry in group.get("contestants", []):
        for key, what in (("patch_bytes", "patch"), ("tensor_bytes", "tensors touched")):
            if entry["runs"] and key in entry:
                size = entry[key]
                handed = _median(entry, lambda run, size=size: run["handed"] / size, ".2f")
                folios = _median(entry, lambda run, size=size: run["dirtied"] / size, ".2f")
                yield (
                    f"- {entry['name']}: {what} {size / 1e6:.1f} MB; "
                    f"passed to write calls {handed} times that, in dirty folios {folios} times"
                )


def _sweep(sweep: list[dict[str, Any]]) -> str:
    """Plain reads by threads and buffer, in GB/s."""
    threads = sorted({one["threads"] for one in sweep})
    rate = {(one["threads"], one["buffer"]): one["bytes_per_second"] / 1e9 for one in sweep}
    lines = (
        row(f"{buffer >> 10} KiB", *(f"{rate[count, buffer]:.2f}" for count in threads))
        for buffer in sorted({one["buffer"] for one in sweep})
    )
    return table(row("plain reads, GB/s", *(f"threads: {count}" for count in threads)), lines)


def _hashes(files: dict[str, dict[str, str]]) -> str:
    lines = (
        row(what, threads, f"`{digest[:16]}`")
        for what, digests in files.items()
        for threads, digest in digests.items()
    )
    return table("| | threads | SHA-256 begins |", lines)


def machines(parts: dict[str, Any]) -> Iterator[str]:
    """One line for each machine, with the parts measured on it."""
    found: dict[str, list[str]] = {}
    for name, part in parts.items():
        here = part["machine"]
        packages = ", ".join(f"{package} {version}" for package, version in here["packages"].items())
        words = (
            f"{here['processor']}, {here['cores']} cores, {here['memory_gb']} GB, {here['kernel']}, "
            f"{here['file_system']}, load before the start {here['load']}; "
            f"Python {here['python']}, {packages}; {part['date']}"
        )
        found.setdefault(words, []).append(name)
    return (f"- {', '.join(names)}: {words}" for words, names in found.items())
