"""The state folder: what is recorded there, when, and what happens where it cannot be written."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from support import snapshot, write_folder

import neftsurgery as ns
from neftsurgery.checkpoint import unfinished
from neftsurgery.checkpoint.unfinished import forget, is_recorded, record
from neftsurgery.surgery import rewrite

SHA = "ab" * 32


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder that is not there yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home" / "state"))
    return tmp_path / "home" / "state" / "neftsurgery" / "journals"


@pytest.fixture
def setting(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and a patch of it."""
    arrays = {"a.weight": np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)}
    base = write_folder(tmp_path / "base", arrays)
    tuned = write_folder(tmp_path / "tuned", {"a.weight": arrays["a.weight"] + 1})
    ns.extract(base, tuned, neurons=4, out=tmp_path / "patch").close()
    return base, tmp_path / "patch"


def test_what_is_recorded_is_known_until_it_is_forgotten(state: Path, tmp_path: Path) -> None:
    assert not is_recorded(SHA)
    record(SHA, tmp_path / ".neft-journal")
    assert is_recorded(SHA)
    assert (state / SHA).read_text() == f"{tmp_path}/.neft-journal\n"
    assert (state / SHA).stat().st_mode & 0o077 == 0
    forget(SHA)
    forget(SHA)
    assert not is_recorded(SHA)


def test_every_new_folder_is_synced_into_its_parent(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(unfinished, "fsync_folder", synced.append)
    record(SHA, tmp_path / ".neft-journal")
    assert synced == [tmp_path, *list(state.parents)[2::-1], state]


def test_the_record_is_there_before_the_first_weight_byte_and_gone_afterwards(
    setting: tuple[Path, Path], state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, patch = setting
    seen = []
    write = rewrite._write_rows

    def noted(*args: object) -> None:
        journal = (base / ".neft-journal").read_bytes()
        seen.append((hashlib.sha256(journal).hexdigest(), os.listdir(state)))
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(rewrite, "_write_rows", noted)
    ns.apply(base, patch, in_place=True)
    assert len(seen) == 1
    assert seen[0][1] == [seen[0][0]]
    assert os.listdir(state) == []


def unwritable(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: object, flags: int, *args: object, **kwargs: object) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(state)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refusing)


def in_the_way(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.parents[1].parent.mkdir()
    state.parents[1].write_text("a file where the folder should be")


def no_home(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a home


@pytest.mark.parametrize("how", [unwritable, in_the_way, no_home], ids=lambda how: how.__name__)
def test_a_state_folder_that_cannot_be_written_stops_it_before_the_first_byte(
    setting: tuple[Path, Path], state: Path, monkeypatch: pytest.MonkeyPatch, how, neft
) -> None:
    base, patch = setting
    before = snapshot(base)
    how(state, monkeypatch)
    result = neft("apply", base, patch, "--in-place")
    assert result.code == 5
    assert "XDG_STATE_HOME" in result.err
    assert snapshot(base) == before
    assert [path.name for path in base.iterdir()] == ["model.safetensors"]


def test_without_a_home_heal_still_works(
    setting: tuple[Path, Path], state: Path, monkeypatch: pytest.MonkeyPatch, neft
) -> None:
    base, patch = setting
    before = snapshot(base)

    def torn(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(rewrite, "_write_rows", torn)
        broken.setattr(rewrite, "heal_recorded", lambda source: None)
        with pytest.raises(KeyboardInterrupt):
            ns.apply(base, patch, in_place=True)
    no_home(state, monkeypatch)
    assert neft("apply", base, patch, "--in-place").code == 5  # no record can be read
    assert (base / ".neft-journal").exists()
    assert neft("heal", base, "--yes").code == 0
    assert snapshot(base) == before
