"""Measures each layout: diff, plain reads and torch take turns, with the files in the page cache and not."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.files.contestants import best_reads, diff, neftsurgery, script
from benchmarks.files.fixtures import CheckpointPair, Fixtures
from benchmarks.files.suite import measure_parts
from benchmarks.harness.process import run
from benchmarks.harness.side_by_side import Contestant, run_group
from benchmarks.quantized.options import LAYOUTS, RESULTS, Options

WARM = ((1, 1 << 19), (2, 1 << 19), (2, 1 << 21), (4, 1 << 19))  # threads and buffers of the plain reads
COLD = ((4, 1 << 22), (8, 1 << 21), (16, 1 << 21))


def measure(options: Options) -> None:
    """Measures the layouts asked for; writes ``options.out/quantized.json``."""
    parts = {name: (LAYOUTS[name], partial(_measured, layout=name, options=options)) for name in options.only}
    measure_parts(parts, options.out / RESULTS, options.command, options.work, partial(_prepare, options))


def _prepare(options: Options, fixtures: Fixtures) -> None:
    """Kernels are compiled and modules read before anything is timed."""
    for layout in options.only:
        small = fixtures.pair(10**7, "--quantized", layout)
        run(neftsurgery("diff", small.base, small.tuned))
        if options.rivals and find_spec("torch"):
            run(torch(small, layout, 1).command)


def _measured(fixtures: Fixtures, layout: str, options: Options) -> dict[str, Any]:
    pair = fixtures.pair(options.size, "--quantized", layout)
    pair.warm()
    reads, _ = best_reads(pair, pair.warm, WARM, min(options.repeat, 2))
    warm = [diff(pair, pair.warm, options.threads), *reads]
    if options.rivals:
        warm.append(torch(pair, layout, 1))
    groups = [run_group("in the page cache", pair.nbytes, warm, options.repeat)]
    reads, _ = best_reads(pair, pair.drop, COLD, 1)
    cold = [diff(pair, pair.drop, None), *reads]
    groups.append(run_group("not in the page cache", pair.nbytes, cold, options.repeat))
    return {"groups": groups}


def torch(pair: CheckpointPair, layout: str, rounds: int) -> Contestant:
    """Dequantize each weight with torch, and call ``cosine_similarity``."""
    command = script("rivals.torch_dequantized", pair.base, pair.tuned, layout)
    name = "torch: dequantize, cosine_similarity"
    return Contestant(name, "rival", command, pair.warm, rounds=rounds, needs=("torch",))
