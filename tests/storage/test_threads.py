"""Executors whose processes do the work: the same bits as threads, and errors that name the worker."""

from __future__ import annotations

import multiprocessing
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support import llama, process, write_folder

import neftsurgery as ns


def pool(workers: int = 1, *first: object) -> ProcessPoolExecutor:
    """Processes that call ``first`` before they work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["neftsurgery.surgery.verify", "neftsurgery.surgery.diff"])
    start = {"initializer": first[0], "initargs": first[1:]} if first else {}
    return ProcessPoolExecutor(workers, mp_context=context, **start)


@pytest.fixture(scope="module")
def two_processes() -> Iterator[ProcessPoolExecutor]:
    with pool(2) as found:
        yield found


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair that is sent in several lots: small tensors, one of many pieces, a NaN, and equal rows."""
    folder, rng = tmp_path_factory.mktemp("sides"), np.random.default_rng(0)
    base = llama(64, 160, 3, 300, 0)
    base |= {f"model.layers.{n}.mlp.large_proj.weight": rng.random((2500, 640), np.float32) for n in range(3)}
    moved = {
        k: (v * (1 + rng.random((len(v), *[1] * (v.ndim - 1))) ** 8)).astype(np.float32)
        for k, v in base.items()
    }
    moved["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    moved["model.layers.1.mlp.large_proj.weight"][100:200] = base["model.layers.1.mlp.large_proj.weight"][
        100:200
    ]
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    write_folder(folder / "base", base, config=config)
    write_folder(folder / "tuned", {f"tuned.{k}": v for k, v in moved.items()}, shards=3, config=config)
    return folder / "base", folder / "tuned"


@pytest.mark.parametrize("anatomy", ["rows", "ffn", "units"])
def test_scores_have_the_bits_of_threads(
    anatomy: str, sides: tuple[Path, Path], two_processes: ProcessPoolExecutor, tmp_path: Path
) -> None:
    how = {"anatomy": anatomy, "strip_prefix": "tuned.", "include": ["lm_head*"], "exclude": "*.2.*"}
    ns.diff(*sides, out=tmp_path / "threads", **how)
    found = ns.diff(*sides, out=tmp_path / "processes", executor=two_processes, **how)
    assert (tmp_path / "processes").read_bytes() == (tmp_path / "threads").read_bytes()
    assert found.timing.bytes_read > 0


def test_patches_and_their_states(
    sides: tuple[Path, Path],
    two_processes: ProcessPoolExecutor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(sides[0].parent)  # relative paths mean the same to processes elsewhere
    for name, executor in (("threads", None), ("processes", two_processes)):
        out, how = tmp_path / name, {"strip_prefix": "tuned.", "executor": executor}
        ns.extract("base", "tuned", neurons="3%", with_bias=True, out=out, **how)
    assert (tmp_path / "processes").read_bytes() == (tmp_path / "threads").read_bytes()
    ns.extract("base", "base", lossless=True, out=tmp_path / "lossless")
    for patch in ("threads", "lossless"):
        here, there = (ns.verify("base", tmp_path / patch, executor=one) for one in (None, two_processes))
        assert (there.state, there.tensors, there.same_base, there.remark) == (
            here.state,
            here.tensors,
            here.same_base,
            here.remark,
        )
    unsaved = ns.extract("base", "tuned", neurons=5, strip_prefix="tuned.")
    with pytest.raises(ns.UsageError, match="save the patch first"):
        ns.verify("base", unsaved, executor=two_processes)
    with pytest.raises(ns.UsageError, match="executor does not go with lossless"):
        ns.extract("base", "base", lossless=True, executor=two_processes)


def other_processor() -> None:
    os.environ["NUMBA_CPU_NAME"] = "another"


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ((os.utime,), "is not alike .*model.safetensors"),
        ((os.unlink,), "cannot open the same files"),
        ((other_processor,), "is not alike .* 'another'"),
    ],
)
def test_a_worker_that_sees_other_files(first: tuple[object, ...], words: str, tmp_path: Path) -> None:
    base = llama(16, 32, 1, 20, 0)
    for side in ("base", "tuned"):
        write_folder(tmp_path / side, base)
    weights = tmp_path / "tuned" / "model.safetensors"
    os.utime(weights, (1, 1))
    start = first if first[0] is other_processor else (*first, weights)
    with pool(1, *start) as executor, pytest.raises(ns.MismatchError, match=words) as told:
        ns.diff(tmp_path / "base", tmp_path / "tuned", executor=executor)
    assert f"the worker {platform.node()} " in told.value.what
    assert first[0] is other_processor or "tuned" in str(told.value)


def test_an_executor_that_breaks(sides: tuple[Path, Path]) -> None:
    with (
        pool(1, os._exit, 1) as executor,
        pytest.raises(ns.MachineError, match="the executor failed: Broken"),
    ):
        ns.diff(*sides, strip_prefix="tuned.", executor=executor)


def test_no_scheduler(sides: tuple[Path, Path]) -> None:
    told = process("verify", str(sides[0]), "patch", "--dask", "tcp://127.0.0.1:9", cwd=sides[0])
    assert told.code in (2, 5), told  # 2 where distributed is not installed
    assert ("no Dask scheduler answers" if told.code == 5 else "--dask needs distributed") in told.err
