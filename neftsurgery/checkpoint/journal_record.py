"""Which journals this user's own commands wrote: their SHA-256, in the user's state folder.

A stranger may have made a journal. So a command heals unasked only if the journal is recorded here.
The record is synced to disk before the journal gets its name, and so before the first weight byte is written.
It is removed after the journal.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..errors import MachineError
from ..storage.output import fsync, fsync_folder

__all__ = ["forget", "is_recorded", "record"]


def record(sha256: str, journal: Path) -> None:
    """Record that a journal with this SHA-256 is this user's, and sync the record to disk.

    Raises a `MachineError` if there is no home folder, or the state folder cannot be written.
    """
    folder = _folder()
    try:
        _make(folder)
        fd = os.open(folder / sha256, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, f"{journal.absolute()}\n".encode("utf-8", "surrogateescape"))
            fsync(fd)
        finally:
            os.close(fd)
        fsync_folder(folder)
    except OSError as error:
        raise MachineError(
            f"the state folder cannot be written: {(error.strerror or str(error)).lower()}",
            file=folder,
            hint="nothing was changed; a change in place is recorded there first: set XDG_STATE_HOME to a "
            "folder that can be written, or write a new checkpoint with [[out=...]]",
        ) from error


def is_recorded(sha256: str) -> bool:
    """Whether a journal with this SHA-256 was written by a command of this user, on this machine."""
    try:
        return (_folder() / sha256).is_file()
    except OSError:  # no home, or no access to it
        return False


def forget(sha256: str) -> None:
    """Remove the record of a journal that was removed; one that stays does no harm."""
    with suppress(OSError):
        (_folder() / sha256).unlink()


def _folder() -> Path:
    import platformdirs

    try:
        folder = platformdirs.user_state_path("neftsurgery") / "journals"
    except RuntimeError:  # a user without a home folder
        folder = Path()
    if not folder.is_absolute():
        raise MachineError(
            "there is no home folder, where changes in place are recorded",
            hint="nothing was changed; set XDG_STATE_HOME to a folder that can be written, or write a new "
            "checkpoint with [[out=...]]",
        )
    return folder


def _make(folder: Path) -> None:
    """Make a folder and its parents, each name synced to disk."""
    if not folder.is_dir():
        _make(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        fsync_folder(folder.parent)
