"""Parts about growth: bytes, shards, tensors in a header, and far more bytes than there is disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from benchmarks.files.contestants import copy, diff, neftsurgery, reads, torch_cosine
from benchmarks.files.options import Options
from benchmarks.files.workshop import NoRoomError, Pair, Workshop
from benchmarks.harness import pages
from benchmarks.harness.contest import Contestant, compete, nothing, say
from benchmarks.harness.process import run
from benchmarks.harness.units import human, size

Part = dict[str, Any]
READS = (2, 1 << 19)  # of the plain reads here; the part warm looks for the best
SHARDS_SIZE = size("0.5GB")


def sizes(shop: Workshop, options: Options) -> Part:
    """diff, extract and apply at growing sizes."""
    groups = []
    for nbytes in options.sizes:
        label = f"{human(nbytes)} a side"
        try:
            pair = shop.pair(nbytes, outputs=nbytes)
            groups += _groups(shop, pair, label, options)
        except (NoRoomError, pages.PagesError) as reason:
            say(f"  {label} skipped: {reason}")
            groups.append({"label": label, "skipped": str(reason)})
    return {"title": "Growing files", "groups": groups}


def shards(shop: Workshop, options: Options) -> Part:
    """The same tensors in more and more files."""
    nbytes = min(SHARDS_SIZE, options.size)
    most = max(options.shards)
    groups = []
    for count in options.shards:
        pair = shop.pair(nbytes, "--least-tensors", most, "--shards", count, outputs=nbytes)
        groups += _groups(shop, pair, f"{count} shard{'s' * (count != 1)}", options)
    return {"title": f"Growing numbers of shards, {human(nbytes)} a side", "groups": groups}


def tensors(shop: Workshop, options: Options) -> Part:
    """A header of very many small tensors."""
    nbytes = 8_192 * options.tensors
    pair = shop.pair(nbytes, "--experts", options.tensors, outputs=nbytes)
    rivals = [torch_cosine(pair, pair.warm, options.few)] if options.rivals else []
    groups = _groups(shop, pair, f"{human(pair.nbytes / 2)} a side", options, rivals)
    return {"title": f"A header of {options.tensors:,} tensors", "groups": groups}


def sparse(shop: Workshop, options: Options) -> Part:
    """Files of holes, far longer than the disk: planning time, and the memory of a whole diff."""
    pair = shop.pair(options.sparse_size, "--shards", 20, "--sparse", outputs=options.sparse_size // 20)
    contestants = [
        _planning(pair, nothing, options),
        replace(diff(pair, nothing, options.threads), rounds=1),
    ]
    entries = compete(contestants, options.few)
    neurons = run(neftsurgery("diff", pair.base, pair.tuned, "--dry-run")).printed["neurons"]
    label = f"2 x {human(pair.nbytes / 2)}, {neurons:,} neurons"
    group = {"label": label, "bytes": pair.nbytes, "neurons": neurons, "contestants": entries}
    return {"title": "Files of holes: planning time and memory", "groups": [group]}


def _groups(
    shop: Workshop, pair: Pair, label: str, options: Options, rivals: Iterable[Contestant] = ()
) -> list[dict[str, Any]]:
    """Those that read both sides; then, apart, those that write, as their outputs take page cache."""
    patch, out = shop.place("patch.safetensors"), shop.place("out")
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
        shop.clear(out.name)
        pages.warm(pair.base)

    apply = neftsurgery("apply", pair.base, patch, "-o", out, threads=options.threads)
    writers = [Contestant("neftsurgery apply, 3%", "ours", apply, before), copy(pair.base, out, before)]
    base_bytes = pages.total_size([pair.base])
    groups = [
        {
            "label": f"{label}: diff, extract",
            "bytes": pair.nbytes,
            "contestants": compete(readers, options.few),
        },
        {"label": f"{label}: apply", "bytes": base_bytes, "contestants": compete(writers, options.few)},
    ]
    shop.clear(patch.name)
    shop.clear(out.name)
    return groups


def _planning(pair: Pair, before: Callable[[], None], options: Options) -> Contestant:
    command = neftsurgery("diff", pair.base, pair.tuned, "--dry-run", threads=options.threads)
    return Contestant("neftsurgery diff --dry-run", "plan", command, before)
