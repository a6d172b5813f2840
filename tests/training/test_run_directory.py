"""The run directory: who may resume from it, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import neftsurgery as ns
from neftsurgery.training.run_directory import RunDirectory, RunIdentity

IDENTITY = RunIdentity({"model": "m", "train": {"seed": 0, "more": {}}}, "abc", "0f")
#: As the version before typed identities wrote it.
WRITTEN = '{"recipe": {"model": "m", "train": {"seed": 0, "more": {}}}, "base": "abc", "examples": "0f"}'


def save(directory: RunDirectory, step: int) -> None:
    """A complete save, as the Trainer's mixin marks it."""
    folder = directory.saves / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "state").write_text("x")
    (folder / "neuron_save.json").write_text(json.dumps({"version": 1, "files": {"state": 1}}))


def test_an_older_run_is_resumed(tmp_path: Path) -> None:
    directory = RunDirectory.beside(tmp_path / "run")
    assert directory.path == tmp_path / "run.unfinished"
    assert directory.resumable_step(IDENTITY) is None
    directory.path.mkdir()
    (directory.path / "run.json").write_text(WRITTEN)
    assert directory.resumable_step(IDENTITY) == 0
    save(directory, 6)
    save(directory, 12)
    assert directory.resumable_step(IDENTITY) == 12
    assert json.loads(WRITTEN) == IDENTITY.to_json()


@pytest.mark.parametrize("damaged", [WRITTEN.replace('"seed": 0', '"seed": 1'), "{", "[]", '{"recipe": 5}'])
def test_another_run_is_refused_once_it_has_saved(tmp_path: Path, damaged: str) -> None:
    directory = RunDirectory(tmp_path)
    (tmp_path / "run.json").write_text(damaged)
    assert directory.resumable_step(IDENTITY) is None
    save(directory, 6)
    names = "recipe.train.seed" if "seed" in damaged else "base, examples, recipe.model"
    with pytest.raises(ns.UsageError, match=f"unfinished run of another recipe: {names} differ"):
        directory.resumable_step(IDENTITY)


def test_opening_keeps_what_resumes_and_empties_the_rest(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "r")
    with directory.opened(IDENTITY, restart=False):
        assert json.loads((directory.path / "run.json").read_bytes()) == json.loads(WRITTEN)
        directory.selection.touch()
        save(directory, 6)
        with (
            pytest.raises(ns.UsageError, match="another process is training here"),
            directory.opened(IDENTITY, restart=False),
        ):
            pass
    with directory.opened(IDENTITY, restart=False):
        assert directory.last_step == 6
    with directory.opened(IDENTITY, restart=True):
        assert {path.name for path in directory.path.iterdir()} == {"lock", "run.json"}
    with pytest.raises(ZeroDivisionError), directory.opened(IDENTITY, restart=False):
        raise ZeroDivisionError
    assert not directory.path.exists()  # nothing was chosen yet
