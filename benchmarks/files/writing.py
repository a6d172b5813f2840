"""Parts that write: apply to a new checkpoint, and in place."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from benchmarks.files.contestants import copy, neftsurgery, script, writers
from benchmarks.files.options import Options
from benchmarks.files.workshop import Pair, Workshop
from benchmarks.harness import pages
from benchmarks.harness.contest import Contestant, compete, say
from benchmarks.harness.process import CommandError, run
from benchmarks.harness.units import human

Part = dict[str, Any]
DOWN = "*.down_proj.weight"  # the tensors whose neurons are columns in the anatomy ffn


def apply(shop: Workshop, options: Options) -> Part:
    """A patch of 3% into a new checkpoint, beside what else writes one."""
    pair = shop.pair(options.size, outputs=options.size)
    patch, adapter, out = (shop.place(name) for name in ("patch.safetensors", "adapter", "out"))
    run(neftsurgery("extract", pair.base, pair.tuned, "--neurons", "3%", "-o", patch))
    nbytes = pages.total_size([pair.base])

    def before() -> None:
        shop.clear(out.name)
        pages.warm(pair.base)

    command = neftsurgery("apply", pair.base, patch, "-o", out, threads=options.threads)
    plain = script("limits.writes", out, "--size", nbytes)
    contestants = [
        Contestant("neftsurgery apply, 3%", "ours", command, before),
        copy(pair.base, out, before),
        Contestant("plain write of one file, then fsync", "limit", plain, before),
    ]
    if options.rivals:
        _make_adapter(pair, adapter)
        contestants += writers(pair.base, patch, adapter, out, before, options.few)
    entries = compete(contestants, options.repeat)
    for left in (patch, adapter, out):
        shop.clear(left.name)
    group = {"label": human(nbytes), "bytes": nbytes, "contestants": entries}
    return {"title": "apply: a patched checkpoint", "groups": [group]}


def in_place(shop: Workshop, options: Options) -> Part:
    """1% of the rows, and of down_proj's columns, changed in place: beside apply to a new checkpoint."""
    pair = shop.pair(options.in_place_size, outputs=options.in_place_size * 5 // 4)
    rows = _Reversible(shop, pair, "rows", "--neurons", "1%")
    columns = _Reversible(shop, pair, "columns", "--neurons", "1%", "--anatomy", "ffn", "--only", DOWN)
    out = shop.place("out")
    command = neftsurgery("apply", pair.base, rows.patch, "-o", out, threads=options.threads)

    def before() -> None:
        shop.clear(out.name)
        pages.warm(pair.base)

    contestants = [
        Contestant("neftsurgery apply, 1% of rows", "ours", command, before),
        rows.contestant("1% of rows", options.threads, {"patch_bytes": rows.patch.stat().st_size}),
        columns.contestant("1% of down_proj's columns", options.threads, {"tensor_bytes": columns.touched()}),
    ]
    try:
        entries = compete(contestants, options.few)
        run(neftsurgery("verify", pair.base, rows.patch, "--expect", "base"))
    except BaseException:
        shutil.rmtree(pair.folder)  # it may be half of either: no other part must measure it
        raise
    for left in (out, rows.patch, rows.way_back, columns.patch, columns.way_back):
        shop.clear(left.name)
    nbytes = pages.total_size([pair.base])
    group = {"label": human(nbytes), "bytes": nbytes, "contestants": entries}
    return {"title": "apply --in-place", "groups": [group]}


class _Reversible:
    """A patch to apply in place, and a reversible one of the same neurons to take it out again, untimed."""

    def __init__(self, shop: Workshop, pair: Pair, name: str, *words: str) -> None:
        self.base = pair.base
        self.patch = shop.place(f"{name}.safetensors")
        self.way_back = shop.place(f"{name}-reversible.safetensors")
        run(neftsurgery("extract", pair.base, pair.tuned, *words, "-o", self.patch))
        run(neftsurgery("extract", pair.base, pair.tuned, *words, "--reversible", "-o", self.way_back))

    def contestant(self, what: str, threads: int, facts: dict[str, int]) -> Contestant:
        name = f"neftsurgery apply --in-place, {what}"
        command = neftsurgery("apply", self.base, self.patch, "--in-place", threads=threads)
        return Contestant(name, "ours", command, self._warm, self._revert, facts=facts)

    def touched(self) -> int:
        """Bytes of the tensors that the patch has neurons of."""
        names = {name.removesuffix(":index") for name in _header(self.patch) if name.endswith(":index")}
        tensors = {k: v for file in self.base.glob("*.safetensors") for k, v in _header(file).items()}
        return sum(2 * math.prod(tensors[name]["shape"]) for name in names)

    def _warm(self) -> None:
        pages.warm(self.base)

    def _revert(self) -> None:
        run(neftsurgery("revert", self.base, self.way_back, "--in-place"))


def _header(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        return dict(json.loads(stream.read(int.from_bytes(stream.read(8), "little"))))


def _make_adapter(pair: Pair, adapter: Path) -> None:
    """For PEFT; where it is not installed, its contestant says so."""
    try:
        run(script("rivals.peft_merge", pair.base, adapter, "--make-adapter"))
    except CommandError as failure:
        say(f"  no adapter: {failure.reason}")
