"""Checks of outputs: that exist, that are or hold an input, or that do not fit on the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..errors import MachineError, UsageError
from ..sources.places import is_url, shown_url
from ..text import tilde_hint

AnyPath = str | os.PathLike[str]
#: Bytes of a file's name, on every file system that matters.
MAX_NAME = 255


def refuse_output(
    out: AnyPath | None,
    *,
    inputs: Sequence[AnyPath],
    force: bool,
    kind: Literal["file", "directory"] | None = None,
) -> Path | None:
    """Raise a `UsageError` for an output that must not be written, a `MachineError` if its folder cannot be.

    Returns it as a path; None: nothing is written. ``out`` is as the user typed it: a trailing slash means a
    folder. With ``force`` it may be replaced, unless it is, holds or is inside one of ``inputs`` or what they
    link to. Only a ``"directory"`` may replace an empty one without it.
    """
    if out is None:
        return None
    path = named_output(out)
    if kind == "file" and os.fspath(out).endswith(os.sep):
        raise UsageError("the output is a file, but its name ends in a slash", file=out)
    for one in inputs:
        _refuse_input(path, Path(one))
    if os.path.lexists(path):
        _refuse_existing(path, force, kind)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        error = MachineError(
            "no permission to write in this folder", file=path.parent, hint="name an output elsewhere"
        )
        error.errno = errno.EACCES
        raise error
    return path


def named_output(out: AnyPath) -> Path:
    """The output as a path; raises a `UsageError` if it has no name, or its folder does not exist."""
    path = Path(out)
    if is_url(out):
        hint = "write to a local path, and copy the result there with the tool of that store"
        raise UsageError("an output is a local path, not a URL", file=shown_url(os.fspath(out)), hint=hint)
    if os.fspath(out) == "-":
        raise UsageError("an output cannot go to stdout", file=out, hint="name a file; ./- is one named -")
    if path.name in ("", ".."):
        raise UsageError(
            "the output has no name of its own", file=out, hint="give the name of a file or folder to create"
        )
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise UsageError(f"the output's name is longer than {MAX_NAME} bytes", file=out)
    if not path.parent.is_dir():
        missing = not os.path.lexists(path.parent)
        raise UsageError(
            f"the folder {path.parent} does not exist" if missing else f"{path.parent} is not a folder",
            file=out,
            hint=(tilde_hint(out) or "create it first, or check the spelling") if missing else None,
        )
    return path


def _refuse_input(out: Path, source: Path) -> None:
    real_out, real = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    inside, holds = _within(real_out, real), _within(real, real_out)
    if not inside and not holds and real.is_dir():
        # Files of a Hub snapshot are links into a folder of blobs, which must not be replaced either.
        with os.scandir(real) as entries:
            links = [Path(os.path.realpath(entry)) for entry in entries if entry.is_symlink()]
        holds = any(_within(link, real_out) for link in links)
    if inside or holds:
        how = "is" if inside and holds else "lies inside" if inside else "holds files of"
        hint = "name an output outside every input"
        raise UsageError(f"the output {how} the input {source}", file=out, hint=hint)


def _within(inner: Path, outer: Path) -> bool:
    """Whether ``inner`` is ``outer`` or inside it, by name and by inode; both are real paths."""
    own = identity(outer)
    return any(
        place == outer or (own is not None and identity(place) == own) for place in (inner, *inner.parents)
    )


def identity(path: Path | int) -> tuple[int, int] | None:
    """Device and inode of an open file, or of what is at a path, links followed; None if there is nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _refuse_existing(out: Path, force: bool, kind: Literal["file", "directory"] | None) -> None:
    is_folder = out.is_dir() and not out.is_symlink()
    if out.exists() and not out.is_file() and not out.is_dir():
        raise UsageError("the output is a device, pipe or socket", file=out)
    if is_folder:
        what = "is a mount point, which cannot be replaced" if os.path.ismount(out) else ""
        kept = (Path(os.path.realpath(place)) for place in (os.curdir, os.path.expanduser("~")))
        if not what and any(_within(place, Path(os.path.realpath(out))) for place in kept):
            what = "is, or holds, the current folder or your home folder"
        if what:
            raise UsageError(f"the output {what}", file=out, hint="name a file or folder inside it")
        if kind != "file" and _is_empty(out):
            return
    if not force:
        what = "a link" if out.is_symlink() else "a folder" if is_folder else "a file"
        raise UsageError(
            f"the output exists already: {what}",
            file=out,
            hint="name another output, or replace it with [[force=True]]",
        )


def _is_empty(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except PermissionError:
        return False


def require_space(folder: AnyPath, nbytes: int) -> None:
    """Raise a `MachineError` with ``errno`` ``ENOSPC`` unless ``nbytes`` more fit on the disk of ``folder``.

    Call it inside the staging context, when what killed processes left has been removed.
    """
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if nbytes > free:
        error = MachineError(
            f"not enough space: {_size(nbytes, up=True)} are needed, {_size(free, up=False)} are free",
            file=folder,
            hint="free some space, or write the output to another disk",
        )
        error.errno = errno.ENOSPC
        raise error


def _size(nbytes: int, *, up: bool) -> str:
    """In decimal units, rounded so that of two sizes the larger never reads as the smaller."""
    power = min((len(str(nbytes)) - 1) // 3, 4)
    if power == 0:
        return f"{nbytes} bytes"
    tenths = -(-nbytes * 10 // 1000**power) if up else nbytes * 10 // 1000**power
    return f"{tenths / 10:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
