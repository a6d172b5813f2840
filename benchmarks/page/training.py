"""The page of the training suite: for every measured setting the requirements on a step, and a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.log import log
from benchmarks.page.files import machines, requirement_table, row, table
from benchmarks.page.metrics import Entry, Spread, ratio, spread
from benchmarks.page.requirements import Requirement
from benchmarks.page.switch import switch
from benchmarks.switch.options import RESULTS as SWITCH
from benchmarks.training.suite import RESULTS

INTRODUCTION = """\
# Benchmarks of training

`python -m benchmarks training` and `python -m benchmarks switch` make this page; `--help`
lists the settings. The raw runs are kept ([steps]({folder}/{results}), [switches]({folder}/switch.json));
`python -m benchmarks render` makes this page from them.

- Each contestant is its own process, with a Llama of the same shape, random weights, and the same batch. The
  processes run side by side and step in turns, A B C A B C, so that drift affects all alike. Figures are
  medians over the turns, with minimum and maximum in brackets. Ratios are taken within each turn.
- A step is forward, loss, backward, AdamW (fused, the Trainer's default) and zeroing the gradients. NeFT's
  step includes writing the rows.
- All train the same modules: every linear layer except the head. Rows are drawn at random, the same share of
  each weight.
- The floor trains nothing. Its backward pass ends where that of the others ends: at the outputs of the first
  layer's query, key and value projections.
- Adapters have the rank whose number of parameters is nearest to NeFT's.
- Peak memory is that of the steps: on a processor the peak resident bytes above what the process held after
  its imports, on a GPU the peak of allocated bytes.
- Processor time is that of all threads of a process. On a busy machine it says more than the time on the
  clock.
- No test asserts these figures: machines are noisy.
- `make gpu` measures a GPU, beside the tests marked for CUDA and the switch between patches, and writes one
  page, `build/gpu.md`."""
HEAD = (
    "| | step, ms | tokens/s | peak, MB | trainable | optimizer, MB | time, floor = 1 | time, LoRA = 1 "
    "| processor time, floor = 1 | processor time, LoRA = 1 |"
)
Part = dict[str, Any]


def render_training(folder: Path) -> None:
    """Writes ``folder-training.md`` from the results in ``folder``."""
    parts, switches = results.load(folder / RESULTS), results.load(folder / SWITCH)
    page = folder.with_name(f"{folder.name}-training.md")
    page.write_text("\n\n".join(_page(parts, switches, folder.name)) + "\n")
    log(f"wrote {page}")


def _page(parts: dict[str, Part], switches: dict[str, Part], folder: str) -> Iterator[str]:
    yield INTRODUCTION.format(folder=folder, results=RESULTS)
    for part in parts.values():
        yield from setting(part)
    for part in switches.values():
        yield from switch(part)
    yield "## Machines"
    yield "\n".join(machines(parts | {f"switch {name}": part for name, part in switches.items()}))


def setting(part: Part) -> Iterator[str]:
    """The section of one measured setting."""
    yield f"## {part['title']}"
    yield f"`{part['command']}`"
    yield requirement_table(requirements(part))
    yield table(HEAD, (_row(entry, part) for entry in part["contestants"]))


def requirements(part: Part) -> Iterator[Requirement]:
    """The requirements on NeFT in one setting."""
    if part.get("experts"):
        ours, floor = _named(part, "experts-3"), _named(part, "experts_floor")
        statement = "NeFT, 3% of the experts' rows: a step takes at most 1.15 of the floor's time"
        yield Requirement.of(statement, "of its time", ratio(ours, floor, _seconds), lambda x: x <= 1.15)
        ours, lora = _named(part, "experts_peft-3"), _named(part, "experts_lora-3")
        statement = "As a PEFT method: at most the time of PEFT LoRA's on the experts"
        yield Requirement.of(statement, "of its time", ratio(ours, lora, _seconds), lambda x: x <= 1)
        return
    ours, lora, masked = (_named(part, name) for name in ("neft-3", "lora-3", "masked-3"))
    bound = 1.05 if part["device"] == "cuda" else 1.10
    steps = (
        ("NeFT 3%: a step takes at most the time of PEFT LoRA's at equal parameters", ours, lora, 1.0),
        (
            f"NeFT 3%: a step takes at most {bound:.2f} of the floor's time",
            ours,
            _named(part, "floor"),
            bound,
        ),
        ("NeFT 3%: a step takes at most 0.9 of the time of full gradients with a mask", ours, masked, 0.9),
        (
            "As a PEFT method: at most 1.20 of the floor's time",
            _named(part, "peft-3"),
            _named(part, "floor"),
            1.2,
        ),
        ("As a PEFT method: at most the time of PEFT LoRA's", _named(part, "peft-3"), lora, 1.0),
    )
    for statement, one, other, most in steps:
        yield Requirement.of(
            statement, "of its time", ratio(one, other, _seconds), lambda x, most=most: x <= most
        )
    memory = (
        ("NeFT 3%: peak memory is at most LoRA's", lora, 1.0),
        ("NeFT 3%: peak memory is at most 0.9 of that of full gradients with a mask", masked, 0.9),
    )
    for statement, other, most in memory:
        found = Spread.of([ours["peak"] / other["peak"]]) if ours and other else None
        yield Requirement.of(statement, "of its memory", found, lambda x, most=most: x <= most)


def _row(entry: Entry, part: Part) -> str:
    name = f"**{entry['name']}**" if entry["role"] == "ours" else entry["name"]
    if not entry["runs"]:
        return f"| {name}: {entry['skipped']} | | | | | | | | | |"
    milliseconds = spread(entry, lambda run: 1e3 * _seconds(run))
    rate = spread(entry, lambda run: part["tokens"] / _seconds(run))
    assert rate is not None
    floor = _named(part, "floor") or _named(part, "experts_floor")
    lora = _named(part, "lora-3") or _named(part, "experts_lora-3")
    cells = [
        f"{milliseconds:.1f}",
        f"{rate.median:,.0f}",
        f"{entry['peak'] / 1e6:,.0f}",
        f"{entry['trainable']:,}",
        f"{entry['optimizer_bytes'] / 1e6:.1f}",
        *(_beside(entry, other, _seconds) for other in (floor, lora)),
        *(_beside(entry, other, _processor) for other in (floor, lora)),
    ]
    return row(name, *cells)


def _beside(entry: Entry, other: Entry | None, of: Callable[[dict[str, Any]], float]) -> str:
    found = None if other is None or of(entry["runs"][0]) == 0 else ratio(entry, other, of)
    return "" if found is None or entry is other else f"{found:.2f}"


def _named(part: Part, name: str) -> Entry | None:
    return next((entry for entry in part["contestants"] if entry["id"] == name and entry["runs"]), None)


def _processor(run: dict[str, Any]) -> float:
    return float(run.get("cpu", 0.0))  # older results have none


def _seconds(run: dict[str, Any]) -> float:
    return float(run["seconds"])
