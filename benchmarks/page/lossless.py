"""The page of the suite on lossless patches: goals, the curve, the chain, and a table for every pair."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.log import log
from benchmarks.harness.sizes import format_size
from benchmarks.lossless.options import PARTS, RESULTS
from benchmarks.page.files import machines, requirement_table, row, table
from benchmarks.page.lossless_goals import goals
from benchmarks.page.metrics import Entry, Group, Spread, spread

CHART = "lossless-curve.svg"
INTRODUCTION = """\
# A whole fine-tune, to the bit

How small a [lossless patch](patch-format.md#the-lossless-patch-version-2) is, and how fast it is made and
applied. `make bench-lossless` makes this page; `python -m benchmarks lossless --help` says what it needs. The
[raw runs]({folder}/{results}) are kept; `python -m benchmarks render` makes this page from them.

- **MiniLM** is all-MiniLM-L6-v2, tuned with masked language modelling. **SmolLM2** is SmolLM2-135M-Instruct
  from a dequantized Q4_1 base: its values are coarser than those of a model that was published in bf16, and
  0.24% of them are zeros, which the first step of training moves. Both are rounded to bf16 before they are
  tuned, so the float32 pairs have bases whose values are bf16 numbers.
  **textgenrnn** are float32 fine-tunes that others published.
- Training is AdamW on float32 weights, with matrix products in bf16. An *RL-like* step takes the loss of each
  sequence times a random advantage, standardized over the batch, as policy gradients weigh it. Real
  fine-tunes are longer: see [the curve](#a-longer-sft).
- Sizes are in % of the tuned file. The *entropy* is what the differences take if each is coded by how often
  it occurs, given the kind of tensor and the exponent of the base's element, and the code is known. In
  float32 most differences occur once: there the figure is far below what a code can reach.
- Contestants take turns on one core, A B C A B C. Speeds are bytes of the tuned file per second of processor
  time: medians, with minimum and maximum in brackets. Ratios are taken within each turn.
- All go from files in the page cache to files, and every unpacked file is compared with the tuned one. This
  tool hashes base and result on the way. The time to import it and the Python packages is not counted;
  programs start in milliseconds. Slow contestants run once, on small files.
- *In memory*: what is read is in memory beforehand. This tool checks both hashes of every block, and writes
  the result into arrays that exist; so does memcpy.
- No test asserts these figures: machines are noisy."""
COLUMNS = "| | % of the tuned file | entropy = 1 | encode, MB/s | decode, MB/s |"
MODELS = {"minilm": "MiniLM", "smollm2": "SmolLM2", "textgenrnn": "textgenrnn"}
OTHERS = (
    "others who send sparse updates (verl, slime, SkyRL, NeMo-RL, prime-rl, vLLM) report that 1 to 3% of the "
    "bytes change per step"
)


def render_lossless(folder: Path) -> None:
    """Writes ``folder-lossless.md`` and its chart from the results in ``folder``."""
    stored = results.load(folder / RESULTS)
    parts = {name: stored[name] for name in PARTS if name in stored}
    page = folder.with_name(f"{folder.name}-lossless.md")
    page.write_text("\n\n".join(_page(parts, folder)) + "\n")
    log(f"wrote {page}")


def _page(parts: dict[str, Any], folder: Path) -> Iterator[str]:
    yield INTRODUCTION.format(folder=folder.name, results=RESULTS)
    yield "## Goals"
    yield requirement_table(goals(parts))
    for name, part in parts.items():
        yield f"## {part['title']}"
        yield f"`{part['command']}`"
        if "skipped" in part:
            yield f"Not measured: {part['skipped']}."
        elif name in MODELS:
            if part.get("text"):
                yield f"Tuned on {part['text']}."
            yield from _pairs(part)
        else:
            yield from {"threads": _threads, "chain": _chain, "curve": _curve}[name](part, folder)
    yield "## Machines"
    yield "\n".join(machines(parts))


def _pairs(part: dict[str, Any]) -> Iterator[str]:
    for group in part["groups"]:
        yield f"### {group['label']}, {group['dtype']}"
        elements, nbytes = (f"{100 * group[key]:.3g}%" for key in ("changed", "changed_bytes"))
        size = format_size(group["bytes"])
        yield f"{size}; {elements} of the elements and {nbytes} of the bytes changed."
        yield table(COLUMNS, _rows(group))


def _rows(group: Group) -> Iterator[str]:
    nbytes, limit = group["bytes"], group["entropy"]
    yield row("*entropy*", f"{100 * limit / nbytes:.3f}", "1", "", "")
    for entry in group["contestants"]:
        name = f"**{entry['name']}**" if entry["role"] == "ours" else entry["name"]
        if not entry["runs"]:
            yield row(f"{name}: {entry['skipped']}", "", "", "", "")
            continue
        size = entry["size"]
        speeds = (f"{_speed(entry, way, nbytes):.0f}" for way in ("encode", "decode"))
        yield row(name, f"{100 * size / nbytes:.3f}", f"{size / limit:.2f}", *speeds)
    if "adapter" in group:
        size = group["adapter"]
        yield row("the adapter, not merged", f"{100 * size / nbytes:.3f}", f"{size / limit:.2f}", "", "")


def _speed(entry: Entry, way: str, nbytes: int) -> Spread | None:
    return spread(entry, lambda run: nbytes / 1e6 / max(run[way], 1e-6))


def _threads(part: dict[str, Any], folder: Path) -> Iterator[str]:
    yield f"{part['label']}, bf16, {format_size(part['bytes'])}. Wall time in seconds, on two cores."
    lines = []
    for verb in part["verbs"]:
        threads, processes = (spread(verb, lambda run, way=way: run[way]) for way in ("threads", "processes"))
        share = spread(verb, lambda run: run["processes"] / (2 * run["threads"]))
        lines.append(row(verb["name"], f"{threads:.2f}", f"{processes:.2f}", f"{share:.2f}"))
    head = (
        "| | one with two threads | two with one thread each, at the same time | throughput, processes = 1 |"
    )
    yield table(head, lines)


def _chain(part: dict[str, Any], folder: Path) -> Iterator[str]:
    yield (
        f"SmolLM2, bf16, at {part['rate']:g}: each step's patch is made from the step before; {OTHERS}. The "
        "last row is one patch from the base to the last step, as `merge --chain` makes it of all."
    )
    total = {"label": "sum"} | {
        key: sum(link[key] for link in part["links"]) for key in ("size", "fast", "entropy")
    }
    lines = [_sizes(link) for link in part["links"]]
    nbytes = part["whole"]["bytes"]
    shares = (f"{100 * total[key] / nbytes:.3f}" for key in ("size", "fast", "entropy"))
    lines.append(row("all links", *shares, "", ""))
    lines.append(_sizes(part["whole"] | {"label": "base to the last step"}))
    yield table(f"| {SIZES}", lines)


SIZES = "| patch, % | --fast, % | entropy, % | elements changed, % | bytes changed, % |"


def _sizes(one: dict[str, Any]) -> str:
    shares = (f"{100 * one[key] / one['bytes']:.3f}" for key in ("size", "fast", "entropy"))
    return row(str(one["label"]), *shares, *(f"{100 * one[key]:.2f}" for key in ("changed", "changed_bytes")))


def _curve(part: dict[str, Any], folder: Path) -> Iterator[str]:
    yield "SmolLM2, bf16: the patch from the base to every step, at two learning rates."
    try:
        from benchmarks.page.lossless_chart import draw
    except ImportError:
        log("no chart: matplotlib is not installed")
    else:
        draw(part["lines"], folder / CHART)
        yield f"![Size of the patch and share of changed elements by step]({folder.name}/{CHART})"
    lines = [
        _sizes(point | {"label": f"{line['rate']:g}, step {point['step']}"})
        for line in part["lines"]
        for point in line["points"]
    ]
    yield table(f"| {SIZES}", lines)
