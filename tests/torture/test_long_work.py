"""Models of many tensors, many shards, long names, odd names, and of more bytes than there is disk."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import assert_same_tensors, patched_by_hand, raw_folder, raw_read, snapshot
from torture.trials import TIMES, Trials

import neftsurgery as ns

pytestmark = pytest.mark.slow
SKIPPED = pytest.mark.skipif(not TIMES, reason="it takes minutes: NEFT_TORTURE=1")
Raw = dict[str, tuple[str, np.ndarray]]


def names(count: int) -> Iterator[str]:
    """Names that no real model has."""
    odd = ["é", "é", "層.重み", "🧠.weight", "a b\tc", 'quo"te', "back\\slash", "../up", "/abs", "\x1b[31m",
           "ﬁ.weight", "null\0byte", "x" * 10_000 + ".weight", "ż" * 10_000]  # fmt: skip
    yield from odd
    for number in range(count - len(odd)):
        yield f"layers.{number}.weight"


def round_trip(root: Path, base: Raw, shards: int) -> None:
    """diff, extract, apply, verify, revert, merge, inspect; each judged from outside."""
    config = {"model_type": "?"}
    tuned = {name: (kind, bits ^ np.uint32(5)) for name, (kind, bits) in base.items()}
    one, two = raw_folder(root / "base", base, shards, config), raw_folder(root / "tuned", tuned, 3, config)
    everything = {"include": ["*"], "with_bias": True}
    with ns.diff(one, two, include=["*"], out=root / "scores") as scores:
        assert len(scores.tensors) == len(base)
    ns.extract(one, two, changed=True, reversible=True, out=root / "patch", **everything).close()
    ns.apply(one, root / "patch", out=root / "patched")
    assert_same_tensors(raw_read(root / "patched"), tuned)
    assert_same_tensors(raw_read(root / "patched"), patched_by_hand(raw_read(one), root / "patch"))
    assert ns.verify(root / "patched", root / "patch").state == "patched"
    ns.revert(root / "patched", root / "patch", in_place=True)
    assert snapshot(root / "patched") == snapshot(one)
    ns.merge([root / "patch"], out=root / "merged").close()
    with ns.Patch.load(root / "merged") as merged:
        merged.check()
        assert sorted(merged.tensors) == sorted(base)


@pytest.mark.parametrize(
    ("tensors", "shards"), [(300, 20), pytest.param(64_000, 500, marks=SKIPPED)]
)  # fmt: skip
def test_many_tensors_shards_and_odd_names(trials: Trials, tmp_path: Path, tensors: int, shards: int) -> None:
    rng = np.random.default_rng(0)
    base = {name: ("F32", rng.integers(1 << 29, 1 << 30, (3, 4), "u4")) for name in names(tensors)}
    with trials.trial(f"{tensors:,} tensors in {shards} shards, odd names", "a round of all commands"):
        round_trip(tmp_path, base, shards)
        names_there = {path.name for path in tmp_path.iterdir()}
        assert names_there == {"base", "tuned", "scores", "patch", "patched", "merged"}


def sparse_checkpoint(path: Path, tensors: int, shape: tuple[int, int]) -> None:
    """A sparse checkpoint of zeros, which takes no disk space."""
    nbytes = 4 * shape[0] * shape[1]
    header = {
        f"layers.{n}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [n * nbytes, (n + 1) * nbytes]}
        for n in range(tensors)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + tensors * nbytes)


def test_a_checkpoint_of_300_gb(trials: Trials, tmp_path: Path) -> None:
    """In place reads and writes only the rows that change; a copy is refused where the disk is too small."""
    base, tuned, patch = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "patch"
    shape = (1 << 17, 6000)  # 3.1 GB a tensor, past 2**31 bytes
    try:
        for path in (base, tuned):
            sparse_checkpoint(path, 100, shape)
        size = base.stat().st_size
        assert size > 300e9
    except OSError:
        pytest.skip("this file system has no files of 300 GB")
    index, width = np.array([0, 7, shape[0] - 1]), shape[1]
    rows = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
    start = 8 + struct.unpack("<Q", _head(base))[0]
    with open(tuned, "r+b") as file:
        for row, values in zip(index, rows, strict=True):
            file.seek(start + 99 * 4 * shape[0] * width + int(row) * 4 * width)
            file.write(values.tobytes())
    with trials.trial("a sparse checkpoint of 300 GB", "extract, apply, verify, revert, in place"):
        chosen = selection(tmp_path / "selection", "layers.99.weight", shape, index)
        with ns.extract(base, tuned, chosen, reversible=True, out=patch) as made:
            assert made.nbytes < 1e6
        ns.apply(base, patch, in_place=True)
        assert ns.verify(base, patch).state == "patched"
        with open(base, "rb") as file:
            file.seek(start + 99 * 4 * shape[0] * width + 7 * 4 * width)
            assert file.read(4 * width) == rows[1].tobytes()
        ns.revert(base, patch, in_place=True)
        assert ns.verify(base, patch).state == "base"
        assert base.stat().st_size == size
        assert base.stat().st_blocks * 512 < 1e8, "holes were filled"
        ns.inspect(base)
        if shutil.disk_usage(tmp_path).free < size:
            with pytest.raises(ns.MachineError, match="not enough space"):
                ns.apply(base, patch, out=tmp_path / "out")
    for path in (base, tuned):
        os.unlink(path)


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


def selection(path: Path, name: str, shape: tuple[int, int], index: np.ndarray) -> ns.Selection:
    from support import raw_file

    described = {"version": 1, "tensors": {name: {"shape": shape, "dtype": "F32", "neuron_axes": [0]}}}
    raw_file(path, [(f"{name}:index", "I64", [len(index)], index.astype("<i8").tobytes())],
             {"neuron_selection": json.dumps(described)})  # fmt: skip
    return ns.Selection.load(path)
