"""Runs the parts one after the other, and stores each result at once."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.files import reading, scaling, writing
from benchmarks.files.contestants import neftsurgery
from benchmarks.files.fixtures import DiskSpaceError, Fixtures
from benchmarks.files.options import Options
from benchmarks.harness import machine, results
from benchmarks.harness.log import log
from benchmarks.harness.page_cache import PageCacheError
from benchmarks.harness.process import CommandError, run

RESULTS = "files.json"
MEASUREMENTS: dict[str, Callable[[Fixtures, Options], dict[str, Any]]] = {
    "warm": reading.warm,
    "cold": reading.cold,
    "extract": reading.extract,
    "threads": reading.threads,
    "bits": reading.bits,
    "apply": writing.apply,
    "sizes": scaling.sizes,
    "inplace": writing.in_place,
    "shards": scaling.shards,
    "tensors": scaling.tensors,
    "sparse": scaling.sparse,
}


def measure(options: Options) -> None:
    """Measures the parts asked for; writes ``options.out/files.json``."""
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="neft-bench-", dir=options.work))
    here = machine.describe(folder)
    fixtures = Fixtures(folder)
    began = time.perf_counter()
    try:
        _prepare(fixtures, options)
        for part in options.parts:
            log(f"{part}  (at {time.perf_counter() - began:.0f} s)")
            result = _outcome(MEASUREMENTS[part], fixtures, options)
            today = datetime.now(UTC).date().isoformat()
            circumstances = {"command": options.command(part), "date": today, "machine": here}
            results.store(options.out / RESULTS, part, circumstances | result)
    finally:
        shutil.rmtree(folder)
    log(f"done after {time.perf_counter() - began:.0f} s")


def _prepare(fixtures: Fixtures, options: Options) -> None:
    """Runs everything once on small files: kernels are compiled and modules read before anything is timed."""
    log("warming up")
    pair, patch, out = fixtures.pair(10**7), fixtures.output("patch.safetensors"), fixtures.output("out")
    run(neftsurgery("extract", pair.base, pair.tuned, "--neurons", "3%", "-o", patch))
    run(neftsurgery("apply", pair.base, patch, "-o", out))
    if options.rivals:
        packages = ", ".join(
            name for name in ("torch", "transformers", "peft", "mergekit") if find_spec(name)
        )
        run([sys.executable, "-c", f"import {packages or 'sys'}"])


def _outcome(part: Callable[..., dict[str, Any]], fixtures: Fixtures, options: Options) -> dict[str, Any]:
    """What the part measured, or the reason why it could not."""
    try:
        return part(fixtures, options)
    except (DiskSpaceError, PageCacheError, CommandError) as failure:
        log(f"  skipped: {failure}")
        reason = failure.reason if isinstance(failure, CommandError) else str(failure)
        return {"title": (part.__doc__ or "").partition(".")[0], "groups": [], "skipped": reason}
