"""The page of the run on a GPU: what ran, the tests, and the tables of the two suites."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.options import RESULTS
from benchmarks.harness import results
from benchmarks.harness.log import log
from benchmarks.page.files import row, table
from benchmarks.page.switch import switch
from benchmarks.page.training import setting
from benchmarks.switch.options import RESULTS as SWITCH
from benchmarks.training.suite import RESULTS as TRAINING

INTRODUCTION = """\
# On a GPU

`make gpu` makes this page, without a network. The raw results lie in `{folder}/`. Each step is a process with
a time limit. Ratios are taken within each turn of the contestants. No test asserts a time."""
Part = dict[str, Any]


def render_gpu(folder: Path) -> None:
    """Writes ``folder.md`` from the results in ``folder``, as far as there are any."""
    page = folder.with_name(f"{folder.name}.md")
    page.write_text("\n\n".join(_page(folder)) + "\n")
    log(f"wrote {page}")


def _page(folder: Path) -> Iterator[str]:
    yield INTRODUCTION.format(folder=folder.name)
    for part in results.load(folder / RESULTS).values():
        yield _summary(part)
        yield table(
            "| step | seconds | |", (row(s["name"], str(s["seconds"]), s["ended"]) for s in part["steps"])
        )
        yield from _tests(part["tests"])
    for part in results.load(folder / SWITCH).values():
        yield from switch(part)
    for part in results.load(folder / TRAINING).values():
        yield from setting(part)


def _summary(part: Part) -> str:
    device, here = part["device"], part["machine"]
    facts = [device["name"]]
    if "cuda" in device:
        facts.append(f"{device['memory_gb']} GB, capability {device['capability']}, CUDA {device['cuda']}")
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    facts.append(f"beside {here['processor']}, {here['cores']} cores; Python {here['python']}, {packages}")
    quick = " A smoke test: its figures mean nothing." if part["quick"] else ""
    return f"`{part['command']}`: {part['seconds']} s on {part['date']}, on {'; '.join(facts)}.{quick}"


def _tests(tests: Part) -> Iterator[str]:
    yield "## Tests marked for CUDA"
    if not tests:
        yield "They left no report."
        return
    counts = f"{tests['passed']} passed, {len(tests['failed'])} failed, {len(tests['skipped'])} skipped."
    told = [f"- {name}: **{why}**" for name, why in tests["failed"].items()]
    told += [f"- {name}: skipped: {why}" for name, why in tests["skipped"].items()]
    yield "\n".join([counts, "", *told] if told else [counts])
