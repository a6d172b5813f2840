"""Runs the parts one after the other; every result is stored as soon as it is there."""

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

from benchmarks.files import growth, reading, writing
from benchmarks.files.contestants import neftsurgery
from benchmarks.files.options import Options
from benchmarks.files.workshop import NoRoomError, Workshop
from benchmarks.harness import machine, results
from benchmarks.harness.contest import say
from benchmarks.harness.pages import PagesError
from benchmarks.harness.process import CommandError, run

RESULTS = "files.json"
MEASURES: dict[str, Callable[[Workshop, Options], dict[str, Any]]] = {
    "warm": reading.warm,
    "cold": reading.cold,
    "extract": reading.extract,
    "threads": reading.threads,
    "bits": reading.bits,
    "apply": writing.apply,
    "sizes": growth.sizes,
    "inplace": writing.in_place,
    "shards": growth.shards,
    "tensors": growth.tensors,
    "sparse": growth.sparse,
}


def measure(options: Options) -> None:
    """Measures the parts asked for, into ``options.out/files.json``."""
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="neft-bench-", dir=options.work))
    here = machine.describe(folder)
    shop = Workshop(folder)
    began = time.perf_counter()
    try:
        _prepare(shop, options)
        for part in options.parts:
            say(f"{part}  (at {time.perf_counter() - began:.0f} s)")
            result = _outcome(MEASURES[part], shop, options)
            today = datetime.now(UTC).date().isoformat()
            circumstances = {"command": options.command(part), "date": today, "machine": here}
            results.store(options.out / RESULTS, part, circumstances | result)
    finally:
        shutil.rmtree(folder)
    say(f"done after {time.perf_counter() - began:.0f} s")


def _prepare(shop: Workshop, options: Options) -> None:
    """Everything once, on something small: kernels get compiled and modules read before anything is timed."""
    say("warming up")
    pair, patch, out = shop.pair(10**7), shop.place("patch.safetensors"), shop.place("out")
    run(neftsurgery("extract", pair.base, pair.tuned, "--neurons", "3%", "-o", patch))
    run(neftsurgery("apply", pair.base, patch, "-o", out))
    if options.rivals:
        packages = ", ".join(
            name for name in ("torch", "transformers", "peft", "mergekit") if find_spec(name)
        )
        run([sys.executable, "-c", f"import {packages or 'sys'}"])


def _outcome(part: Callable[..., dict[str, Any]], shop: Workshop, options: Options) -> dict[str, Any]:
    """What the part measured, or the sentence that says why it could not."""
    try:
        return part(shop, options)
    except (NoRoomError, PagesError, CommandError) as failure:
        say(f"  skipped: {failure}")
        reason = failure.reason if isinstance(failure, CommandError) else str(failure)
        return {"title": (part.__doc__ or "").partition(".")[0], "groups": [], "skipped": reason}
