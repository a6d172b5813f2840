"""Dask: four worker processes, one of which is killed in the middle."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import llama, process, write_folder

import neftsurgery as ns

distributed = pytest.importorskip("distributed", reason="Dask is not installed: make test-field has it")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(4, threads_per_worker=1, dashboard_address=None) as found:
        yield found


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, rng = tmp_path_factory.mktemp("sides"), np.random.default_rng(0)
    base = llama(512, 1400, 24, 1000, 0)
    tuned = {name: (one.T * (1 + rng.random(len(one), np.float32) ** 8)).T for name, one in base.items()}
    config = {"model_type": "llama", "num_attention_heads": 8, "hidden_size": 512}
    return write_folder(folder / "base", base, config=config), write_folder(
        folder / "tuned", tuned, 3, config
    )


def test_a_worker_that_is_killed_costs_its_pieces(
    cluster: Any, sides: tuple[Path, Path], tmp_path: Path
) -> None:
    killed: list[float] = []

    with distributed.Client(cluster) as client:
        workers = list(client.run(os.getpid).values())

        @contextmanager
        def progress(what: str, total: int, unit: str = "B") -> Iterator[Callable[[int], None]]:
            def advance(done: int) -> None:
                sums.append(done)
                if not killed and sum(sums) > total / 10:
                    killed.append(sum(sums) / total)
                    os.kill(workers[0], signal.SIGKILL)

            sums: list[int] = []
            yield advance

        ns.diff(*sides, out=tmp_path / "threads")
        executor = client.get_executor(retries=2)
        ns.diff(*sides, out=tmp_path / "dask", executor=executor, progress=progress)
        assert killed
        assert killed[0] < 0.9
        assert workers[0] not in client.run(os.getpid).values()
    assert (tmp_path / "dask").read_bytes() == (tmp_path / "threads").read_bytes()


def test_the_commands(cluster: Any, sides: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = map(str, sides)
    for name, more in (("here", []), ("there", ["--dask", cluster.scheduler_address])):
        for verb, out, options in (("diff", "scores", []), ("extract", "patch", ["--neurons", "3%"])):
            told = process(verb, base, tuned, "-o", f"{name}.{out}", *options, *more, cwd=tmp_path)
            assert told.code == 0, told
        told = process("verify", base, "here.patch", "--json", *more, cwd=tmp_path)
        assert told.json["state"] == "base"
    for out in ("scores", "patch"):
        assert (tmp_path / f"there.{out}").read_bytes() == (tmp_path / f"here.{out}").read_bytes()
