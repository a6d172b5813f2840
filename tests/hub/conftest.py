"""The Hub that the tests of this folder share, emptied before each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from card_support import LLAMA
from hub_support import WRITER, Hub, hub_process, patch_of, run_against, run_several
from support import Result

import neftsurgery as ns


@pytest.fixture(scope="session")
def one_hub() -> Iterator[Hub]:
    with hub_process() as hub:
        yield hub


@pytest.fixture
def hub(one_hub: Hub) -> Hub:
    one_hub.ask("reset")
    return Hub(one_hub.address)


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
    """A patch of 20 neurons of ``base``, which it knows only as a local folder."""
    base, tuned = pair
    ns.extract(base, tuned, neurons=20, out=tmp_path / "p.safetensors").close()
    return tmp_path / "p.safetensors"


@pytest.fixture
def llama(tmp_path: Path) -> ns.Patch:
    """A patch of `LLAMA` that says how it was chosen and trained."""
    training = {"data": "mine.jsonl", "steps": 30, "learning_rate": 2e-5, "dev_loss": 1.25}
    selection = {"score": "cosine", "budget": {"neurons": "3%"}, "captured": 0.6687, "captured_scored": 0.731}
    return patch_of(
        tmp_path / "llama.safetensors",
        LLAMA,
        selection=selection,
        training=training,
        created_by="neftsurgery",
    )


@pytest.fixture
def furnished(hub: Hub) -> Hub:
    """A Hub with repositories that a refused push must leave unchanged."""
    hub.make("me/there", {"notes.txt": b"mine"})
    hub.make("org/base", {"README.md": b"---\nlicense: mit\n---\n"})
    hub.make("me/badcard", {"README.md": b"---\n{: [\n---\ntext\n"})
    hub.make("me/lostmark", {"README.md": b"---\ntags: []\n---\n<!-- neftsurgery:begin -->\nx\n"})
    hub.make("me/binary", {"README.md": b"caf\xe9"})
    hub.make("me/badlicence", {"README.md": b"---\nlicense: refuse-me\n---\ntext\n"})
    return hub
