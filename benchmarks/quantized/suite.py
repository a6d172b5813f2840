"""Measures each layout: diff, plain reads and torch take turns, with the files in the page cache and not."""

from __future__ import annotations

import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.files.contestants import best_reads, diff, neftsurgery, script
from benchmarks.files.fixtures import CheckpointPair, DiskSpaceError, Fixtures
from benchmarks.harness import machine, results
from benchmarks.harness.log import log
from benchmarks.harness.page_cache import PageCacheError
from benchmarks.harness.process import CommandError, run
from benchmarks.harness.side_by_side import Contestant, run_group
from benchmarks.quantized.options import LAYOUTS, RESULTS, Options

WARM = ((1, 1 << 19), (2, 1 << 19), (2, 1 << 21), (4, 1 << 19))  # threads and buffers of the plain reads
COLD = ((4, 1 << 22), (8, 1 << 21), (16, 1 << 21))


def measure(options: Options) -> None:
    """Measures the layouts asked for; writes ``options.out/quantized.json``."""
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="neft-bench-", dir=options.work))
    here = machine.describe(folder)
    fixtures = Fixtures(folder)
    try:
        for layout in options.only:
            began = time.perf_counter()
            log(layout)
            try:
                found: dict[str, Any] = {"groups": _groups(fixtures, layout, options)}
            except (DiskSpaceError, PageCacheError, CommandError) as failure:
                log(f"  skipped: {failure}")
                reason = failure.reason if isinstance(failure, CommandError) else str(failure)
                found = {"groups": [], "skipped": reason}
            today = datetime.now(UTC).date().isoformat()
            about = {"title": LAYOUTS[layout], "command": options.command(layout), "date": today}
            results.store(options.out / RESULTS, layout, about | {"machine": here} | found)
            log(f"  {layout} took {time.perf_counter() - began:.0f} s")
    finally:
        shutil.rmtree(folder)


def _groups(fixtures: Fixtures, layout: str, options: Options) -> list[dict[str, Any]]:
    small = fixtures.pair(10**7, "--quantized", layout)
    run(neftsurgery("diff", small.base, small.tuned))  # kernels are compiled before anything is timed
    pair = fixtures.pair(options.size, "--quantized", layout)
    pair.warm()
    reads, _ = best_reads(pair, pair.warm, WARM, min(options.repeat, 2))
    warm = [diff(pair, pair.warm, options.threads), *reads]
    if options.rivals:
        warm.append(torch(pair, layout, min(options.repeat, 2)))
    groups = [run_group("in the page cache", pair.nbytes, warm, options.repeat)]
    reads, _ = best_reads(pair, pair.drop, COLD, 1)
    cold = [diff(pair, pair.drop, None), *reads]
    return [*groups, run_group("not in the page cache", pair.nbytes, cold, options.repeat)]


def torch(pair: CheckpointPair, layout: str, rounds: int) -> Contestant:
    """Dequantize each weight with torch, and call ``cosine_similarity``."""
    command = script("rivals.torch_dequantized", pair.base, pair.tuned, layout)
    name = "torch: dequantize, cosine_similarity"
    return Contestant(name, "rival", command, pair.warm, rounds=rounds, needs=("torch",))
