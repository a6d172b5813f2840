"""Parts that read: diff warm and cold, extract beside diff, and different numbers of threads."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from benchmarks.files.contestants import (
    COLD_SWEEP,
    WARM_SWEEP,
    best_reads,
    diff,
    library,
    neftsurgery,
    readers,
    reads,
    torch_cosine,
)
from benchmarks.files.fixtures import Fixtures
from benchmarks.files.options import Options
from benchmarks.harness.process import run
from benchmarks.harness.side_by_side import Contestant, run_group
from benchmarks.harness.sizes import format_size

Part = dict[str, Any]
THREADS = (1, 2, 3, 4)
BITS_THREADS = (1, 2, 4)


def warm(fixtures: Fixtures, options: Options) -> Part:
    """diff with both sides in the page cache."""
    pair = fixtures.pair(options.size)
    pair.warm()
    limits, sweep = best_reads(pair, pair.warm, WARM_SWEEP, options.few)
    contestants = [diff(pair, pair.warm, options.threads), *limits]
    if options.rivals:
        contestants += readers(pair, pair.warm, options.few)
    contestants.append(library(pair, pair.warm, options.threads))
    group = run_group(f"2 x {format_size(pair.nbytes / 2)}", pair.nbytes, contestants, options.repeat)
    return {"title": "diff, both sides in the page cache", "sweep": sweep, "groups": [group]}


def cold(fixtures: Fixtures, options: Options) -> Part:
    """diff with neither side in the page cache, with the tool's default number of threads."""
    pair = fixtures.pair(options.size)
    limits, sweep = best_reads(pair, pair.drop, COLD_SWEEP, min(options.repeat, 2))
    contestants = [diff(pair, pair.drop, None), *limits]
    if options.rivals:
        contestants.append(torch_cosine(pair, pair.drop, min(options.few, 2)))
    group = run_group(f"2 x {format_size(pair.nbytes / 2)}", pair.nbytes, contestants, options.repeat)
    return {"title": "diff, neither side in the page cache", "sweep": sweep, "groups": [group]}


def extract(fixtures: Fixtures, options: Options) -> Part:
    """extract of 3% beside diff."""
    pair = fixtures.pair(options.size)
    patch = fixtures.output("extracted.safetensors")
    words = (pair.base, pair.tuned, "--neurons", "3%", "-o", patch)
    command = neftsurgery("extract", *words, threads=options.threads)
    contestants = [
        diff(pair, pair.warm, options.threads),
        Contestant(
            "neftsurgery extract, 3%", "ours", command, pair.warm, lambda: fixtures.remove(patch.name)
        ),
    ]
    group = run_group(f"2 x {format_size(pair.nbytes / 2)}", pair.nbytes, contestants, options.repeat)
    return {"title": "extract of 3% of the neurons, beside diff", "groups": [group]}


def threads(fixtures: Fixtures, options: Options) -> Part:
    """diff and the plain reads with 1 to 4 threads."""
    pair = fixtures.pair(options.size)
    contestants: list[Contestant] = []
    for count in THREADS:
        ours = diff(pair, pair.warm, count)
        name = f"{ours.name}, {count} thread{'s' * (count != 1)}"
        contestants += [replace(ours, name=name), reads(pair, pair.warm, (count, 1 << 19))]
    group = run_group(f"2 x {format_size(pair.nbytes / 2)}", pair.nbytes, contestants, options.few)
    return {"title": "diff with 1 to 4 threads", "groups": [group]}


def bits(fixtures: Fixtures, options: Options) -> Part:
    """Hashes of scores and patches made with different numbers of threads."""
    pair = fixtures.pair(options.size)
    budget = ("--neurons", "3%")
    files: dict[str, dict[str, str]] = {"scores": {}, "patch": {}}
    for count in BITS_THREADS:
        for what, verb, words in (("scores", "diff", ()), ("patch", "extract", budget)):
            out = fixtures.output("bits.safetensors")  # always the same name: a file may hold its own
            run(neftsurgery(verb, pair.base, pair.tuned, *words, "-o", out, threads=count))
            with open(out, "rb") as stream:
                files[what][str(count)] = hashlib.file_digest(stream, "sha256").hexdigest()
    fixtures.remove("bits.safetensors")
    return {"title": "The same bits with any number of threads", "sha256": files}
