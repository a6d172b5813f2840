"""A Hub that all tests of this folder share, emptied for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_support import WRITER, Hub, hub_process, run_against, run_several
from support import Result

import neftsurgery as ns


@pytest.fixture(scope="session")
def one_hub() -> Iterator[Hub]:
    with hub_process() as hub:
        yield hub


@pytest.fixture
def hub(one_hub: Hub) -> Hub:
    one_hub.ask("reset")
    return one_hub


@pytest.fixture
def on_hub(hub: Hub, tmp_path: Path) -> Callable[..., Result]:
    """Runs a command line as a process: ``on_hub(*words, token=WRITER, home="home")``."""

    def call(*words: object, token: str | None = WRITER, home: str = "home") -> Result:
        return run_against(hub, words, tmp_path, tmp_path / home, token)

    return call


@pytest.fixture
def several(hub: Hub, tmp_path: Path) -> Callable[..., list[Result]]:
    """As ``on_hub``, for a list of command lines in one process."""

    def call(
        commands: list[tuple[object, ...]], token: str | None = WRITER, home: str = "home"
    ) -> list[Result]:
        return run_several(hub, commands, tmp_path, tmp_path / home, token)

    return call


@pytest.fixture
def patch_file(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A patch of 20 neurons of ``base``, which it knows as a local folder only."""
    base, tuned = pair
    ns.extract(base, tuned, neurons=20, out=tmp_path / "p.safetensors").close()
    return tmp_path / "p.safetensors"
