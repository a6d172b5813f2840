"""Parts about scaling: bytes, shards, tensors in a header, and more bytes than the disk holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from benchmarks.files.contestants import copy, diff, neftsurgery, reads, script, torch_cosine
from benchmarks.files.fixtures import CheckpointPair, DiskSpaceError, Fixtures
from benchmarks.files.options import Options
from benchmarks.harness import page_cache
from benchmarks.harness.log import log
from benchmarks.harness.process import run
from benchmarks.harness.side_by_side import Contestant, do_nothing, run_group
from benchmarks.harness.sizes import format_size, parse_size

Part = dict[str, Any]
READS = (2, 1 << 19)  # threads and buffer of the plain reads here; the part warm searches for the best
TINY = 8  # rows and columns
SHARDS_SIZE = parse_size("0.5GB")


def sizes(fixtures: Fixtures, options: Options) -> Part:
    """diff, extract and apply at growing sizes."""
    groups = []
    for nbytes in options.sizes:
        label = f"{format_size(nbytes)} a side"
        try:
            pair = fixtures.pair(nbytes, outputs=nbytes)
            groups += _groups(fixtures, pair, label, options)
        except (DiskSpaceError, page_cache.PageCacheError) as reason:
            log(f"  {label} skipped: {reason}")
            groups.append({"label": label, "skipped": str(reason)})
    return {"title": "Growing files", "groups": groups}


def shards(fixtures: Fixtures, options: Options) -> Part:
    """The same tensors in a growing number of files."""
    nbytes = min(SHARDS_SIZE, options.size)
    most = max(options.shards)
    groups = []
    for count in options.shards:
        pair = fixtures.pair(nbytes, "--least-tensors", most, "--shards", count, outputs=nbytes)
        groups += _groups(fixtures, pair, f"{count} shard{'s' * (count != 1)}", options)
    return {"title": f"Growing numbers of shards, {format_size(nbytes)} a side", "groups": groups}


def tensors(fixtures: Fixtures, options: Options) -> Part:
    """A header of very many small tensors."""
    nbytes = 8_192 * options.tensors
    pair = fixtures.pair(nbytes, "--experts", options.tensors, outputs=nbytes)
    rivals = [torch_cosine(pair, pair.warm, options.few)] if options.rivals else []
    groups = _groups(fixtures, pair, f"{format_size(pair.nbytes / 2)} a side", options, rivals)
    return {"title": f"A header of {options.tensors:,} tensors", "groups": groups}


def tiny(fixtures: Fixtures, options: Options) -> Part:
    """Very many tiny tensors, beside loops of safetensors and numpy that do the same."""
    pair = fixtures.pair(128 * options.tensors, "--experts", options.tensors, "--width", TINY)
    scores, patch, out = (fixtures.output(name) for name in ("scores.safetensors", "patch", "out"))
    run(neftsurgery("extract", pair.base, pair.tuned, "--neurons", "3%", "-o", patch))

    def before() -> None:
        fixtures.remove(out.name)
        fixtures.remove(scores.name)
        pair.warm()

    def ours(name: str, *words: object) -> Contestant:
        command = neftsurgery(name, pair.base, *words, threads=options.threads)
        return Contestant(f"neftsurgery {name}", "ours", command, before)

    def loop(name: str, *words: object) -> Contestant:
        command = script(f"rivals.numpy_{name}", pair.base, *words)
        return Contestant(f"a loop of safetensors and numpy, {name}", "rival", command, before)

    contestants = [ours("diff", pair.tuned, "-o", scores), ours("apply", patch, "-o", out)]
    if options.rivals:
        contestants += [loop("diff", pair.tuned, scores), loop("apply", patch, out)]
    label = f"{format_size(pair.nbytes / 2)} a side"
    groups = [
        run_group(f"{label}: {name}", nbytes, contestants[number::2], options.repeat)
        for number, (name, nbytes) in enumerate((("diff", pair.nbytes), ("apply", pair.nbytes // 2)))
    ]
    before()
    fixtures.remove(patch.name)
    return {"title": f"{options.tensors:,} matrices of {TINY} x {TINY}", "groups": groups}


def sparse(fixtures: Fixtures, options: Options) -> Part:
    """Sparse files, much longer than the disk: planning time, and the memory of a whole diff."""
    pair = fixtures.pair(options.sparse_size, "--shards", 20, "--sparse", outputs=options.sparse_size // 20)
    contestants = [
        _planning(pair, do_nothing, options),
        replace(diff(pair, do_nothing, options.threads), rounds=1),
    ]
    neurons = run(neftsurgery("diff", pair.base, pair.tuned, "--dry-run")).printed["neurons"]
    label = f"2 x {format_size(pair.nbytes / 2)}, {neurons:,} neurons"
    group = run_group(label, pair.nbytes, contestants, options.few) | {"neurons": neurons}
    return {"title": "Sparse files: planning time and memory", "groups": [group]}


def _groups(
    fixtures: Fixtures, pair: CheckpointPair, label: str, options: Options, rivals: Iterable[Contestant] = ()
) -> list[dict[str, Any]]:
    """Contestants that read both sides; then, separately, those that write, since outputs take page cache."""
    patch, out = fixtures.output("patch.safetensors"), fixtures.output("out")
    words = (pair.base, pair.tuned, "--neurons", "3%", "--force", "-o", patch)
    extract = neftsurgery("extract", *words, threads=options.threads)
    readers = [
        _planning(pair, pair.warm, options),
        diff(pair, pair.warm, options.threads),
        Contestant("neftsurgery extract, 3%", "ours", extract, pair.warm),
        reads(pair, pair.warm, READS),
        *rivals,
    ]

    def before() -> None:
        fixtures.remove(out.name)
        page_cache.warm(pair.base)

    apply = neftsurgery("apply", pair.base, patch, "-o", out, threads=options.threads)
    writers = [Contestant("neftsurgery apply, 3%", "ours", apply, before), copy(pair.base, out, before)]
    base_bytes = page_cache.total_size([pair.base])
    groups = [
        run_group(f"{label}: diff, extract", pair.nbytes, readers, options.few),
        run_group(f"{label}: apply", base_bytes, writers, options.few),
    ]
    fixtures.remove(patch.name)
    fixtures.remove(out.name)
    return groups


def _planning(pair: CheckpointPair, before: Callable[[], None], options: Options) -> Contestant:
    command = neftsurgery("diff", pair.base, pair.tuned, "--dry-run", threads=options.threads)
    return Contestant("neftsurgery diff --dry-run", "plan", command, before)
