"""Fixtures of all tests, and how hypothesis runs them."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray
from processor_time import ProcessorTime
from support import LLAMA_CONFIG, Result, llama, write_folder

from neftsurgery.cli.main import run

# No test is about time, and these machines are noisy. Runs are repeatable; NEFT_FUZZ=1 draws new examples.
settings.register_profile(
    "neftsurgery",
    deadline=None,
    database=None,
    derandomize=not os.environ.get("NEFT_FUZZ"),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


settings.load_profile("neftsurgery")


REPOSITORY = Path(__file__).resolve().parents[1]


SHARED = REPOSITORY.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ProcessorTime())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process ends long after the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """A million objects of modules and tests last as long as the run: no collection visits them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder of the tests' own, here and in the processes they start."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real checkpoints, text and malformed files beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED.name}: it lies beside the repository, not in it")
    return SHARED


@pytest.fixture
def llama_arrays() -> Callable[..., dict[str, NDArray[np.float32]]]:
    """Makes the float32 tensors of a small Llama: ``llama_arrays(hidden=32, ffn=48, layers=2, ...)``."""

    def make(
        hidden: int = 32, ffn: int = 48, layers: int = 2, vocabulary: int = 40, seed: int = 0
    ) -> dict[str, NDArray[np.float32]]:
        return llama(hidden, ffn, layers, vocabulary, seed)

    return make


@pytest.fixture
def neft(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs a command line inside this process, in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read when it was imported

    def call(*words: object) -> Result:
        capfd.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(SystemExit) as left:
                run([str(word) for word in words])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capfd.readouterr()
        return Result(int(left.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def pair(tmp_path: Path, llama_arrays: Callable[..., dict[str, Any]]) -> tuple[Path, Path]:
    """``base`` and ``tuned`` in ``tmp_path``: small sharded Llamas; every linear row moved a little."""
    base = llama_arrays()
    rng = np.random.default_rng(1)
    tuned = {
        name: array + (1e-3 * rng.standard_normal(array.shape)).astype(np.float32)
        if array.ndim > 1
        else array
        for name, array in base.items()
    }
    return (
        write_folder(tmp_path / "base", base, 2, LLAMA_CONFIG),
        write_folder(tmp_path / "tuned", tuned, 3, LLAMA_CONFIG),
    )
