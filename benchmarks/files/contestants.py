"""The contestants of the files suite: this tool's public commands, the limits, the rivals."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.files.fixtures import CheckpointPair
from benchmarks.harness.log import log
from benchmarks.harness.process import run
from benchmarks.harness.side_by_side import Contestant
from benchmarks.harness.sizes import format_size

# Sweeps of the plain reads: threads and bytes per buffer. Warm reads are fastest with buffers that fit the
# processor's cache, cold reads with many requests in flight.
Settings = tuple[tuple[int, int], ...]
WARM_SWEEP: Settings = tuple(product((1, 2, 4), (1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22)))
COLD_SWEEP: Settings = tuple(product((2, 4, 8, 16), (1 << 20, 1 << 21, 1 << 22, 1 << 23)))
SWEPT = 400_000_000  # bytes per side that each setting of a sweep reads


def neftsurgery(verb: str, *words: object, threads: int | None = None) -> list[str]:
    """The command line of this tool; without ``threads``, its default."""
    bound = [] if threads is None else ["--threads", str(threads)]
    return [sys.executable, "-m", "neftsurgery", verb, *map(str, words), *bound, "--json", "--quiet"]


def script(module: str, *words: object) -> list[str]:
    """The command line of a limit or rival."""
    return [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)]


def diff(pair: CheckpointPair, before: Callable[[], None], threads: int | None) -> Contestant:
    """This tool's diff."""
    command = neftsurgery("diff", pair.base, pair.tuned, threads=threads)
    return Contestant("neftsurgery diff", "ours", command, before)


def library(pair: CheckpointPair, before: Callable[[], None], threads: int) -> Contestant:
    """`ns.diff` from Python, which reads by position."""
    return Contestant(
        "ns.diff, from Python", "rival", script("files.library", pair.base, pair.tuned, threads), before
    )


def reads(pair: CheckpointPair, before: Callable[[], None], setting: tuple[int, int]) -> Contestant:
    """Plain parallel reads of both sides."""
    threads, buffer = setting
    flags = ("--threads", threads, "--buffer", buffer)
    name = f"plain reads, {threads} x {buffer >> 10} KiB"
    return Contestant(name, "limit", script("limits.reads", pair.base, pair.tuned, *flags), before)


def best_reads(
    pair: CheckpointPair, before: Callable[[], None], sweep: Settings, tries: int
) -> tuple[list[Contestant], list[dict[str, Any]]]:
    """The plain reads with the two fastest settings, and the whole sweep: threads, buffer, bytes per second.

    There are two because a sweep is short and machines are noisy. The limit is the faster one of each round.
    """
    if pair.nbytes < SWEPT:
        sweep = tuple(one for one in sweep if one[1] == sweep[0][1])  # rates of so small files tell nothing
    found = []
    for threads, buffer in sweep:
        flags = ("--threads", threads, "--buffer", buffer, "--head", SWEPT)
        rates = []
        for _ in range(tries):
            before()
            printed = run(script("limits.reads", pair.base, pair.tuned, *flags)).printed
            rates.append(printed["bytes_read"] / printed["seconds"])
        found.append({"threads": threads, "buffer": buffer, "bytes_per_second": round(median(rates))})
    best = sorted(found, key=lambda one: one["bytes_per_second"], reverse=True)[:2]
    log(f"  best plain read: {format_size(best[0]['bytes_per_second'])}/s")
    return [reads(pair, before, (one["threads"], one["buffer"])) for one in best], found


def torch_cosine(
    pair: CheckpointPair, before: Callable[[], None], rounds: int, dtype: str = "float32"
) -> Contestant:
    """Per-tensor cosine similarity with torch."""
    command = script("rivals.torch_cosine", pair.base, pair.tuned, dtype)
    name = f"torch cosine_similarity, {dtype}"
    return Contestant(name, "rival", command, before, rounds=rounds, needs=("torch",))


def readers(pair: CheckpointPair, before: Callable[[], None], rounds: int) -> list[Contestant]:
    """The tools with which people compare two checkpoints."""

    def rival(name: str, module: str, package: str) -> Contestant:
        command = script(f"rivals.{module}", pair.base, pair.tuned)
        return Contestant(name, "rival", command, before, rounds=rounds, needs=("torch", package))

    return [
        torch_cosine(pair, before, rounds),
        torch_cosine(pair, before, rounds, "bfloat16"),
        rival("load both with transformers, cosine", "transformers_cosine", "transformers"),
        rival("mergekit's reader, nothing computed", "mergekit_read", "mergekit"),
    ]


def writers(
    base: Path, patch: Path, adapter: Path, out: Path, before: Callable[[], None], rounds: int
) -> list[Contestant]:
    """The tools with which people write changed weights into a checkpoint."""

    def rival(name: str, module: str, source: Path, *needs: str) -> Contestant:
        command = script(f"rivals.{module}", base, source, out)
        return Contestant(name, "rival", command, before, rounds=rounds, needs=("torch", *needs))

    return [
        rival("transformers: load, replace, save_pretrained", "transformers_save", patch, "transformers"),
        rival("mergekit's reader and writer", "mergekit_write", patch, "mergekit"),
        rival("PEFT: load, merge_and_unload, save_pretrained", "peft_merge", adapter, "transformers", "peft"),
    ]


def copy(base: Path, out: Path, before: Callable[[], None]) -> Contestant:
    """``cp -r`` and ``sync`` of the copied files."""
    command = ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", str(base), str(out)]
    return Contestant("cp -r, then sync", "limit", command, before)
