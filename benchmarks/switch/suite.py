"""Measures what a switch between two patches costs. Needs torch and transformers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import machine, results
from benchmarks.harness.log import log
from benchmarks.switch.options import RESULTS, Options

WARM_UP = 2
CONTESTANTS = {
    "resident": "`index_copy_` of the same rows, which lie on the device",
    "host": "`index_copy_` of the same rows, from the processor's memory",
    "first": "`attached.switch(path)`: the patch is read and checked each time",
    "ours": "`attached.switch(patch)` to a patch that was attached before",
}


def measure(options: Options) -> None:
    """Measures one setting; writes ``options.out/switch.json``."""
    import torch

    here = machine.describe(options.out.parent if options.out.parent.exists() else Path())
    warnings.filterwarnings("ignore")
    with TemporaryDirectory() as folder:
        job = {"device": options.device, "dtype": options.dtype, "shape": options.shape}
        job |= {"layers": options.layers, "length": 8, "checkpointing": False}
        both = prepare(job, options.share / 100, Path(folder))
        turns = both.turns
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in turns}
        for number in range(WARM_UP + options.rounds):
            for name, turn in turns.items():
                _wait(torch, options.device)
                began = time.perf_counter()
                turn(number % 2)
                _wait(torch, options.device)
                if number >= WARM_UP:
                    runs[name].append({"seconds": round(time.perf_counter() - began, 6)})
    part = {
        "title": f"{options.shape}, {options.layers} layers, {options.dtype}, {options.share:g}% of rows",
        "command": options.command(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": here,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "rows": sum(len(index) for _, index, _ in both.sides[0]),
        "bytes": sum(values.nbytes for *_, values in both.sides[0]),
        "contestants": [
            {"id": name, "name": CONTESTANTS[name], "role": name, "runs": own} for name, own in runs.items()
        ],
    }
    results.store(options.out / RESULTS, options.part, part)
    log(f"    {options.part}: measured")


@dataclass(frozen=True)
class Prepared:
    """A model, two patches of it, and contestants that put the first or the second in.

    ``sides``: name, rows' indices and values of each weight of each patch. ``weights``: copies of the
    model's, which the plain contestants write into, since a switch checks that the base is as it was. Each
    round has the other number than the last, so ``first`` takes the patch of ``ours`` before out.
    """

    model: Any
    sides: list[Any]
    weights: dict[str, Any]
    turns: dict[str, Callable[[int], None]]


def prepare(job: dict[str, Any], share: float, folder: Path) -> Prepared:
    """The fixtures of a setting; the patches are written into ``folder``."""
    import torch

    import neftsurgery as ns
    from benchmarks.training import models
    from benchmarks.training.contestants import rows, selection_of

    model = models.build(job)
    patches, sides = [], []
    for number in range(2):
        picks = rows(model, share, seed=number)
        with ns.attach(model, selection_of(model, picks), base=False) as trained:
            torch.manual_seed(number)
            with torch.no_grad():
                for parameter in trained.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            values = (one.detach().to(model.dtype).cpu() for one in trained.parameters())
            names = [name.partition("_neurons_")[0] for name, _ in trained.named_parameters()]
            sides.append([(name, picks[name], rows) for name, rows in zip(names, values, strict=True)])
            patches.append(trained.patch(folder / f"{number}.safetensors"))
    weights = {name: model.get_parameter(name).detach().clone() for name, *_ in sides[0]}
    resident = [[(name, *(one.to(model.device) for one in own)) for name, *own in side] for side in sides]
    attached = ns.attach(model, patches[1], base=False)

    def copy(given: list[Any], number: int) -> None:
        for name, index, values in given[number]:
            weight = weights[name]
            weight.index_copy_(0, index.to(weight.device), values.to(weight.device))

    turns: dict[str, Callable[[int], None]] = {
        "resident": partial(copy, resident),
        "host": partial(copy, sides),
        "first": lambda number: attached.switch(folder / f"{number}.safetensors"),
        "ours": lambda number: attached.switch(patches[number]),
    }
    return Prepared(model, sides, weights, turns)


def _wait(torch: Any, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
