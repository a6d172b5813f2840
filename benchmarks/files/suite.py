"""Runs the parts one after the other, and stores each result at once."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.files import reading, remote, scaling, writing
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
    "tiny": scaling.tiny,
    "remote": remote.remote,
    "sparse": scaling.sparse,
}


Parts = Mapping[str, tuple[str, Callable[[Fixtures], dict[str, Any]]]]  # by name: title, measurement


def measure(options: Options) -> None:
    """Measures the parts asked for; writes ``options.out/files.json``."""
    parts = {name: MEASUREMENTS[name] for name in options.parts}
    titles = {name: (part.__doc__ or "").partition(".")[0] for name, part in parts.items()}
    measure_parts(
        {name: (titles[name], partial(part, options=options)) for name, part in parts.items()},
        options.out / RESULTS,
        options.command,
        options.work,
        partial(_prepare, rivals=options.rivals),
    )


def measure_parts(
    parts: Parts,
    file: Path,
    command: Callable[[str], str],
    work: Path | None,
    prepare: Callable[[Fixtures], None],
) -> None:
    """Measures parts one after the other, and stores each in ``file`` at once.

    ``command`` tells how a part is measured again; ``work``: where the temporary folder is made. ``prepare``
    runs first, untimed.
    """
    if work:
        work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="neft-bench-", dir=work))
    here = machine.describe(folder)
    fixtures = Fixtures(folder)
    began = time.perf_counter()
    try:
        log("warming up")
        prepare(fixtures)
        for name, (title, part) in parts.items():
            log(f"{name}  (at {time.perf_counter() - began:.0f} s)")
            today = datetime.now(UTC).date().isoformat()
            circumstances = {"title": title, "command": command(name), "date": today, "machine": here}
            results.store(file, name, circumstances | _outcome(part, fixtures))
    finally:
        shutil.rmtree(folder)
    log(f"done after {time.perf_counter() - began:.0f} s")


def _prepare(fixtures: Fixtures, rivals: bool) -> None:
    """Runs everything once on small files: kernels are compiled and modules read before anything is timed."""
    pair, patch, out = fixtures.pair(10**7), fixtures.output("patch.safetensors"), fixtures.output("out")
    run(neftsurgery("extract", pair.base, pair.tuned, "--neurons", "3%", "-o", patch))
    run(neftsurgery("apply", pair.base, patch, "-o", out))
    if rivals:
        packages = ", ".join(
            name for name in ("torch", "transformers", "peft", "mergekit") if find_spec(name)
        )
        run([sys.executable, "-c", f"import {packages or 'sys'}"])


def _outcome(part: Callable[[Fixtures], dict[str, Any]], fixtures: Fixtures) -> dict[str, Any]:
    """What the part measured, or the reason why it could not."""
    try:
        return part(fixtures)
    except (DiskSpaceError, PageCacheError, CommandError) as failure:
        log(f"  skipped: {failure}")
        reason = failure.reason if isinstance(failure, CommandError) else str(failure)
        return {"groups": [], "skipped": reason}
