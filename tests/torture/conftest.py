"""Fixtures of the fault tests. ``NEFT_TORTURE=1000`` asks for about a thousand trials of each fault."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import raw_folder, raw_read
from torture.runner import Runner, injector, running
from torture.trials import Trials

import neftsurgery as ns


@pytest.fixture(scope="session")
def trials() -> Iterator[Trials]:
    """Counts trials; writes them to the file that ``NEFT_TORTURE_TRIALS`` names, if it is set."""
    made = Trials()
    yield made
    if path := os.environ.get("NEFT_TORTURE_TRIALS"):
        made.write(Path(path))


@pytest.fixture(scope="session")
def runner() -> Iterator[Runner]:
    if not hasattr(os, "fork"):
        pytest.skip("the server forks")
    with running() as made:
        yield made


@pytest.fixture(scope="session")
def faulty() -> Iterator[Runner]:
    """A runner whose system calls can be made to fail."""
    library = injector()
    if library is None:
        pytest.skip("there is no C compiler here, or no LD_PRELOAD")
    with running(preload=library) as made:
        yield made


@pytest.fixture(scope="session")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of 20 MB in two and three shards, with files beside the weights."""
    root = tmp_path_factory.mktemp("crash")
    rng = np.random.default_rng(0)
    base = {
        f"layers.{n}.weight": ("BF16", rng.integers(0, 1 << 14, (2048, 1280), np.uint16)) for n in range(4)
    }
    tuned = {name: (kind, bits ^ np.uint16(5)) for name, (kind, bits) in base.items()}
    config = {"model_type": "?"}
    return raw_folder(root / "base", base, 3, config), raw_folder(root / "tuned", tuned, 2, config)


@pytest.fixture(scope="session", params=[0, 1, None], ids=["rows", "columns", "lossless"])
def patch(request: pytest.FixtureRequest, sides: tuple[Path, Path]) -> Path:
    """Half of the neurons of every tensor; or all, in shards as the base has them, and the files beside."""
    path = sides[0].parent / f"patch{request.param}"
    if request.param is None:
        tensors = {n: bits for file in sides[1].glob("*.safetensors") for n, bits in raw_read(file).items()}
        tuned = raw_folder(path.with_name("alike"), dict(sorted(tensors.items())), 3, {"model_type": "other"})
        (tuned / "vocab.txt").write_text("a b c")
        ns.extract(sides[0], tuned, lossless=True, reversible=True, out=path).close()
        return path
    options = {"axis": {"*": request.param}, "per": "tensor", "score": "random", "reversible": True}
    ns.extract(*sides, neurons="50%", out=path, **options).close()
    return path
