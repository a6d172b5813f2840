"""Unfinished changes in place: where their journals are, who wrote them, the refusal of such a checkpoint.

While its journal exists, a change is not complete, and the weights are neither the old nor the new ones. A
command that reads refuses such a checkpoint. It never heals it, because a stranger may have made the journal.
A command that changes it heals unasked only what this user's own commands wrote: the SHA-256 of their
journals is in the user's state folder. The record is synced to disk before the journal gets its name, and so
before the first weight byte is written. It is removed after the journal.
"""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from pathlib import Path

from ..errors import MachineError, NeftError
from ..sources.resolve import Source
from ..storage.output import fsync, fsync_folder
from .weight_files import weight_files

JOURNAL_NAME = ".neft-journal"
_STATE_HOME = "set XDG_STATE_HOME to a folder that can be written, or write a new checkpoint with [[out=...]]"
_DEEPEST = 4  # levels below a checkpoint's folder where its shards may be


def journal_path(source: Source) -> Path:
    """Where the journal of a checkpoint is: inside its folder, or beside its file."""
    path = source.path
    return path / JOURNAL_NAME if path.is_dir() else path.with_name(f".{path.name}{JOURNAL_NAME}")


def find_journals(source: Source) -> list[Source]:
    """The folders and files whose journals concern ``source``, or what it links to; none of a Hub model."""
    if source.repo is not None:
        return []
    path, named = source.path, source.named
    if path.is_symlink():
        path = Path(os.path.realpath(path))
        named = str(path)
    found = [Source(path, named)]
    if path.is_dir():
        for journal in sorted([*path.glob(f".*{JOURNAL_NAME}"), *path.glob(f"[!.]*/**/.*{JOURNAL_NAME}")]):
            file = journal.with_name(journal.name[1 : -len(JOURNAL_NAME)])
            if _belongs(file, path):
                found.append(Source(file, str(file)))
        parts = [journal.parent for journal in sorted(path.glob(f"[!.]*/{JOURNAL_NAME}"))]
        found += [Source(part, str(part)) for part in parts if _belongs(part, path)]
    above = path.parents[: 1 if path.is_dir() else _DEEPEST]
    above = [one for one in above if os.path.lexists(one / JOURNAL_NAME) and _belongs(path, one)]
    found += [Source(folder, str(folder)) for folder in above]
    return [one for one in found if os.path.lexists(journal_path(one))]


def refuse_unfinished(source: Source) -> None:
    """Raise a `MachineError` if a change in place of ``source`` is not complete."""
    for one in find_journals(source):
        raise MachineError(
            "a change in place was interrupted or is under way: its journal is here",
            file=journal_path(one),
            hint=f"show it and undo it: neftsurgery heal {shlex.quote(one.named)}",
        )


def _belongs(file: Path, folder: Path) -> bool:
    """Whether a weight file, or a part, is one of the checkpoint in ``folder``."""
    try:
        found = weight_files(folder)
    except NeftError:
        return False
    return file in [folder / name for name in (*found.parts_of, *found.parts) if name]


def record(sha256: str, journal: Path) -> None:
    """Record a journal as this user's, synced to disk; a `MachineError` if that cannot be written."""
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
            hint=f"nothing was changed; a change in place is recorded there first: {_STATE_HOME}",
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
            hint=f"nothing was changed; {_STATE_HOME}",
        )
    return folder


def _make(folder: Path) -> None:
    """Make a folder and its parents, each name synced to disk."""
    if not folder.is_dir():
        _make(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        fsync_folder(folder.parent)
