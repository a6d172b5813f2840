"""Parts that write: apply to a new checkpoint, and in place."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from benchmarks.files.contestants import copy, neftsurgery, script, writers
from benchmarks.files.fixtures import CheckpointPair, Fixtures
from benchmarks.files.options import Options
from benchmarks.harness import page_cache
from benchmarks.harness.log import log
from benchmarks.harness.process import CommandError, run
from benchmarks.harness.side_by_side import Contestant, run_group
from benchmarks.harness.sizes import format_size

Part = dict[str, Any]
DOWN = "*.down_proj.weight"  # tensors whose neurons are columns in the anatomy ffn


def apply(fixtures: Fixtures, options: Options) -> Part:
    """Writes a checkpoint with a patch of 3%, beside the rivals that write one."""
    pair = fixtures.pair(options.size, outputs=options.size)
    patch, adapter, out = (fixtures.output(name) for name in ("patch.safetensors", "adapter", "out"))
    run(neftsurgery("extract", pair.base, pair.tuned, "--neurons", "3%", "-o", patch))
    nbytes = page_cache.total_size([pair.base])

    def before() -> None:
        fixtures.remove(out.name)
        page_cache.warm(pair.base)

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
    group = run_group(format_size(nbytes), nbytes, contestants, options.repeat)
    for left in (patch, adapter, out):
        fixtures.remove(left.name)
    return {"title": "apply: a patched checkpoint", "groups": [group]}


def in_place(fixtures: Fixtures, options: Options) -> Part:
    """Changes 1% of the rows, and of down_proj's columns, in place, beside apply to a new checkpoint."""
    pair = fixtures.pair(options.in_place_size, outputs=options.in_place_size * 5 // 4)
    rows = _Reversible(fixtures, pair, "rows", "--neurons", "1%")
    columns = _Reversible(fixtures, pair, "columns", "--neurons", "1%", "--anatomy", "ffn", "--only", DOWN)
    out = fixtures.output("out")
    command = neftsurgery("apply", pair.base, rows.patch, "-o", out, threads=options.threads)

    def before() -> None:
        fixtures.remove(out.name)
        page_cache.warm(pair.base)

    contestants = [
        Contestant("neftsurgery apply, 1% of rows", "ours", command, before),
        rows.contestant("1% of rows", options.threads, {"patch_bytes": rows.patch.stat().st_size}),
        columns.contestant("1% of down_proj's columns", options.threads, {"tensor_bytes": columns.touched()}),
    ]
    nbytes = page_cache.total_size([pair.base])
    try:
        group = run_group(format_size(nbytes), nbytes, contestants, options.few)
        run(neftsurgery("verify", pair.base, rows.patch, "--expect", "base"))
    except BaseException:
        shutil.rmtree(pair.folder)  # it may be half patched: no other part must measure it
        raise
    for left in (out, rows.patch, rows.undo, columns.patch, columns.undo):
        fixtures.remove(left.name)
    return {"title": "apply --in-place", "groups": [group]}


class _Reversible:
    """A patch to apply in place, and a reversible one of the same neurons to revert it, untimed."""

    def __init__(self, fixtures: Fixtures, pair: CheckpointPair, name: str, *words: str) -> None:
        self.base = pair.base
        self.patch = fixtures.output(f"{name}.safetensors")
        self.undo = fixtures.output(f"{name}-reversible.safetensors")
        run(neftsurgery("extract", pair.base, pair.tuned, *words, "-o", self.patch))
        run(neftsurgery("extract", pair.base, pair.tuned, *words, "--reversible", "-o", self.undo))

    def contestant(self, what: str, threads: int, facts: dict[str, int]) -> Contestant:
        name = f"neftsurgery apply --in-place, {what}"
        command = neftsurgery("apply", self.base, self.patch, "--in-place", threads=threads)
        return Contestant(name, "ours", command, self._warm, self._revert, facts=facts)

    def touched(self) -> int:
        """Bytes of the tensors that the patch has neurons of."""
        names = json.loads(_header(self.patch)["__metadata__"]["neuron_patch"])["tensors"]
        tensors = {k: v for file in self.base.glob("*.safetensors") for k, v in _header(file).items()}
        return sum(2 * math.prod(tensors[name]["shape"]) for name in names)

    def _warm(self) -> None:
        page_cache.warm(self.base)

    def _revert(self) -> None:
        run(neftsurgery("revert", self.base, self.undo, "--in-place"))


def _header(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        return dict(json.loads(stream.read(int.from_bytes(stream.read(8), "little"))))


def _make_adapter(pair: CheckpointPair, adapter: Path) -> None:
    """Writes an adapter with PEFT. Without PEFT its contestant reports why it is skipped."""
    try:
        run(script("rivals.peft_merge", pair.base, adapter, "--make-adapter"))
    except CommandError as failure:
        log(f"  no adapter: {failure.reason}")
