"""The page on training: what was asked of a step, and a table for every setting that was measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.contest import say
from benchmarks.page.claims import Claim
from benchmarks.page.figures import Entry, Spread, ratio, spread
from benchmarks.page.markdown import claim_row, machines
from benchmarks.training.suite import RESULTS

INTRODUCTION = """\
# Benchmarks of training

Made by `python -m benchmarks training`; `--help` tells the settings. The [raw runs]({folder}/{results}) are
kept, and `python -m benchmarks render` makes this page of them.

- Every contestant is a process of its own with a Llama of the same shape, weights at random, and the same
  batch. They live side by side and step in turns, A B C A B C, so that drift hits all alike. Figures are
  medians over the turns, with the least and the most in brackets; ratios are taken within each turn.
- A step is forward, loss, backward, AdamW (fused, as the Trainer's default is) and zeroing the gradients;
  NeFT's includes writing the rows.
- All train the same modules: every linear layer but the head. Rows are drawn at random, as many in each.
- The floor trains nothing. Its gradient starts where that of the others ends: at the outputs of the first
  layer's query, key and value projections.
- Adapters have the rank that brings them nearest to NeFT's number of parameters.
- Peak memory, of the steps: on a processor the most resident bytes, above what the process held after its
  imports; on a GPU the most allocated.
- Nothing of this is asserted in tests: machines are noisy."""
HEAD = "| | ms a step | tokens/s | peak, MB | trainable | optimizer, MB | time, floor = 1 | time, LoRA = 1 |"
RULE = "|---|---|---|---|---|---|---|---|"
Part = dict[str, Any]


def render_training(folder: Path) -> None:
    """Writes ``folder-training.md`` from the results in ``folder``."""
    parts = results.load(folder / RESULTS)
    page = folder.with_name(f"{folder.name}-training.md")
    page.write_text("\n\n".join(_page(parts, folder.name)) + "\n")
    say(f"wrote {page}")


def _page(parts: dict[str, Part], folder: str) -> Iterator[str]:
    yield INTRODUCTION.format(folder=folder, results=RESULTS)
    for part in parts.values():
        yield f"## {part['title']}"
        yield f"`{part['command']}`"
        yield "\n".join(["| asked | found | |", "|---|---|---|", *map(claim_row, claims(part))])
        yield "\n".join([HEAD, RULE, *(_row(entry, part) for entry in part["contestants"])])
    yield "## Machines"
    yield "\n".join(machines(parts))


def claims(part: Part) -> Iterator[Claim]:
    """What was asked of NeFT, of one setting."""
    ours, lora, masked = (_named(part, name) for name in ("neft-3", "lora-3", "masked-3"))
    bound = 1.05 if part["device"] == "cuda" else 1.10
    steps = (
        ("NeFT 3%: a step at or under PEFT LoRA's at equal parameters", lora, 1.0),
        (f"NeFT 3%: a step within {bound:.2f} of the frozen floor's", _named(part, "floor"), bound),
        ("NeFT 3%: a step well under that of full gradients plus mask (under 0.9)", masked, 0.9),
    )
    for asked, other, most in steps:
        yield Claim.of(asked, "of its time", ratio(ours, other, _seconds), lambda x, most=most: x <= most)
    memory = (
        ("NeFT 3%: peak memory at or under LoRA's", lora, 1.0),
        ("NeFT 3%: peak memory well under that of full gradients plus mask (under 0.9)", masked, 0.9),
    )
    for asked, other, most in memory:
        found = Spread.of([ours["peak"] / other["peak"]]) if ours and other else None
        yield Claim.of(asked, "of its memory", found, lambda x, most=most: x <= most)


def _row(entry: Entry, part: Part) -> str:
    name = f"**{entry['name']}**" if entry["role"] == "ours" else entry["name"]
    if not entry["runs"]:
        return f"| {name}: {entry['skipped']} | | | | | | | |"
    milliseconds = spread(entry, lambda run: 1e3 * _seconds(run))
    rate = spread(entry, lambda run: part["tokens"] / _seconds(run))
    assert rate is not None
    cells = [
        f"{milliseconds:.1f}",
        f"{rate.median:,.0f}",
        f"{entry['peak'] / 1e6:,.0f}",
        f"{entry['trainable']:,}",
        f"{entry['optimizer_bytes'] / 1e6:.1f}",
        _beside(entry, _named(part, "floor")),
        _beside(entry, _named(part, "lora-3")),
    ]
    return f"| {' | '.join([name, *cells])} |"


def _beside(entry: Entry, other: Entry | None) -> str:
    found = ratio(entry, other, _seconds)
    return "" if found is None or entry is other else f"{found:.2f}"


def _named(part: Part, name: str) -> Entry | None:
    return next((entry for entry in part["contestants"] if entry["id"] == name and entry["runs"]), None)


def _seconds(run: dict[str, Any]) -> float:
    return float(run["seconds"])
