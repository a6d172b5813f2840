"""Atomic writing: an output appears whole, on disk, or not at all.

Until it is complete, an output has a staging name beside OUT, ``.NAME.neft-<16 hex digits>``, and is locked
with ``flock``. It is fsynced, renamed to OUT, and the folder is fsynced. A killed process leaves its staging
name unlocked, and the next process that writes the same OUT removes it. On file systems without ``flock``
such names stay, because nothing tells whether their process is alive.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MachineError, NeftError, UsageError, naming
from .output_checks import MAX_NAME, AnyPath, identity, named_output
from .positioned import OpenFile, write_exactly

_log = logging.getLogger(__name__)

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TOKEN = re.compile(r"(old-)?[0-9a-f]{16}")
_IN_THE_WAY = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}
#: Each try fails only if another process takes the name at that moment, or the folder takes no files (/proc).
_TRIES = 20
_WRITEBACK_BYTES = 512 << 10
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file that is being written under a staging name, ``path``."""

    path: Path
    fd: int  # open for reading and writing; it has the lock: do not close it

    def write_at(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of ``data``, C-contiguous, at byte ``offset``; calls from several threads do not mix."""
        write_exactly(self.fd, data, offset)


@contextmanager
def staged_file(out: AnyPath, *, force: bool = False, mode: int | None = None) -> Iterator[StagedFile]:
    """Write the file ``out`` atomically, with permission bits ``mode`` (by default those under the umask).

    It appears when the context ends, unless by an exception. ``force`` replaces what is there, even a folder
    or a link. A `UsageError` says that ``out`` exists at the end, without ``force``, or its folder does not.
    """
    bits = 0o666 if mode is None else 0o600
    with _staging(out, force=force, create=lambda path: os.open(path, _CREATE, bits)) as (path, fd):
        yield StagedFile(path, fd)
        if mode is not None:
            os.fchmod(fd, mode)
        fsync(fd)


@contextmanager
def staged_directory(out: AnyPath, *, force: bool = False) -> Iterator[Path]:
    """Write the directory ``out`` atomically: yields one to fill, with all files closed at the end.

    As `staged_file`, but an empty directory at ``out`` is replaced even without ``force``.
    """
    with _staging(out, force=force, create=_create_directory) as (path, _):
        yield path
        _fsync_tree(path)


def _create_directory(path: Path) -> int:
    os.mkdir(path)
    return os.open(path, _OPEN | os.O_DIRECTORY)


@contextmanager
def _staging(out: AnyPath, *, force: bool, create: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    final = named_output(out).absolute()  # the caller may change the current folder
    remove_stale(final)
    entry = _StagedEntry()
    try:
        path = _reserve(final, create, entry)
        yield path, entry.fd
        if force:
            _replace(path, final)
        else:
            _place(path, final)
        fsync_folder(final.parent)
    except OSError as error:
        if not isinstance(error, NeftError):
            error.filename = _named(error.filename, entry.path, final)
        raise
    finally:
        # After a failure this removes the partial output; after an exchange, the old content of OUT.
        entry.remove()


def _named(file: Any, staged: Path | None, out: Path) -> str:
    """The file of an error, with the name of the output for that of the staging file or folder."""
    path = Path(os.fsdecode(file)) if isinstance(file, str | bytes | os.PathLike) else out
    return str(out / path.relative_to(staged) if staged and path.is_relative_to(staged) else path)


class _StagedEntry:
    """A staging name, known before the file exists, so that a signal at any moment leaves nothing."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.fd = -1
        _unfinished.add(self)

    def remove(self) -> None:
        """Remove what is there, and release the lock."""
        try:
            if self.path is not None:
                _discard(self.path)
        finally:
            if self.fd >= 0:
                os.close(self.fd)
            self.path, self.fd = None, -1
            _unfinished.discard(self)


_unfinished: set[_StagedEntry] = set()
os.register_at_fork(after_in_child=_unfinished.clear)  # they are the parent's


def remove_unfinished() -> None:
    """Remove the outputs whose contexts were left behind, for a process that ends.

    A signal between the end of an ``__enter__`` and the first line of its ``with`` block leaves that block
    without an ``__exit__``. The context then ends when Python collects it, which is too late in a cycle.
    """
    for entry in list(_unfinished):
        entry.remove()


def _reserve(out: Path, create: Callable[[Path], int], entry: _StagedEntry) -> Path:
    """Create and lock a file or folder under a new staging name for ``out``; ``entry`` keeps both."""
    for _ in range(_TRIES):
        path = entry.path = _staging_name(out)
        try:
            entry.fd = create(path)
        except (FileExistsError, FileNotFoundError) as error:
            entry.path = None  # another process's, or none
            if out.parent.is_dir():
                continue
            error.filename = str(out)
            raise
        # Before it was locked, another process may have taken it for a stale one, and removed it.
        if _lock(entry.fd) is not False and identity(entry.fd) == identity(path):
            return path
        entry.remove()
    raise MachineError(
        "nothing can be created in this folder", file=out.parent, hint="name an output elsewhere"
    )


def _staging_name(out: Path, tag: str = "") -> Path:
    return out.with_name(f"{_staging_prefix(out)}{tag}{secrets.token_hex(8)}")


def _staging_prefix(out: Path) -> str:
    stem = out.name
    room = MAX_NAME - len("..neft-old-") - 16
    if len(os.fsencode(stem)) > room:
        digest = hashlib.blake2b(os.fsencode(stem), digest_size=8).hexdigest()
        while len(os.fsencode(stem)) > room - 17:
            stem = stem[:-1]
        stem = f"{stem}~{digest}"
    return f".{stem}.neft-"


def remove_stale(out: Path) -> None:
    """Remove what killed processes left of outputs of the same name, or restore it."""
    prefix = _staging_prefix(out)
    try:
        names = os.listdir(out.parent)
    except PermissionError:  # a folder that can be written but not listed
        return
    for name in names:
        if name.startswith(prefix) and (token := _TOKEN.fullmatch(name, len(prefix))):
            with suppress(OSError):
                _remove_if_stale(out.with_name(name), out, aside=token[1] is not None)


def _remove_if_stale(path: Path, out: Path, *, aside: bool) -> None:
    with closing(OpenFile.at(path, _OPEN)) as file:  # refuses links, which are not staging names
        fd, kind = file.fileno(), stat.S_IFMT(file.status().st_mode)
        if kind in (stat.S_IFREG, stat.S_IFDIR) and _lock(fd) and identity(fd) == identity(path):
            _log.info("removing what an interrupted run left: %s", path)
            if aside:
                _restore_or_discard(path, out)
            else:
                _discard(path)


def _lock(fd: int) -> bool | None:
    """Take the lock; False if another process has it, None if the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _place(path: Path, out: Path) -> None:
    """Rename ``path`` to ``out``, where nothing may be, or only an empty folder for a folder."""
    try:
        if path.is_dir():
            os.rename(path, out)
        elif not _rename_with_flags(path, out, exchange=False):
            _link_and_unlink(path, out)
    except OSError as error:
        if error.errno in _IN_THE_WAY and os.path.lexists(out):
            raise UsageError(
                "the output appeared while it was being written",
                file=out,
                hint="another process wrote it; name another output, or replace it with [[force=True]]",
            ) from error
        raise


def _link_and_unlink(path: Path, out: Path) -> None:
    try:
        os.link(path, out)
    except FileExistsError:
        raise
    except OSError as error:
        # There are no hard links (FAT): checking first is the best that can be done.
        if os.path.lexists(out):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out)) from error
        os.rename(path, out)
    else:
        os.unlink(path)


def _replace(path: Path, out: Path) -> None:
    """Rename ``path`` to ``out``, whatever is there; the old content may then be at ``path``."""
    try:
        os.replace(path, out)
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            raise
    else:
        return
    if _rename_with_flags(path, out, exchange=True):
        return
    aside = _staging_name(out, "old-")
    try:
        os.rename(out, aside)
        os.rename(path, out)
        fsync_folder(out.parent)
    finally:
        _restore_or_discard(aside, out)


def _restore_or_discard(aside: Path, out: Path) -> None:
    """Move what was set aside back if nothing took its place, else remove it."""
    if os.path.lexists(out):
        _discard(aside)
    else:
        os.rename(aside, out)


def _rename_with_flags(path: Path, out: Path, *, exchange: bool) -> bool:
    """Swap two names (``exchange``), or rename if nothing is at ``out``; false if the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    source, target = os.fsencode(path), os.fsencode(out)
    if hasattr(libc, "renameat2"):  # Linux: AT_FDCWD, RENAME_EXCHANGE or RENAME_NOREPLACE
        code = libc.renameat2(-100, source, -100, target, ctypes.c_uint(2 if exchange else 1))
    elif hasattr(libc, "renamex_np"):  # macOS: RENAME_SWAP or RENAME_EXCL
        code = libc.renamex_np(source, target, ctypes.c_uint(2 if exchange else 4))
    else:
        return False
    number = ctypes.get_errno()
    if code and number not in _UNSUPPORTED:
        raise OSError(number, os.strerror(number), str(out))
    return not code


def _discard(path: Path) -> None:
    """Remove whatever is at ``path``. A failure is only logged, because the work is done."""
    try:
        _remove(path)
    except OSError as error:
        _log.warning("could not remove %s: %s", path, error.strerror or error)
    except BaseException:  # a second Ctrl-C
        with suppress(OSError):
            _remove(path)
        raise


def _remove(path: Path) -> None:
    for attempt in range(3):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:  # another process removes it too, or it has read-only folders
            if attempt == 2:
                raise
            if isinstance(error, PermissionError):
                with suppress(OSError):
                    _make_removable(path)
        else:
            return


def _make_removable(folder: Path) -> None:
    """Give the owner access to every folder of a tree."""
    folder.chmod(0o700)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _make_removable(Path(entry.path))


def fsync(fd: int) -> None:
    """Make a file's content durable."""
    # On macOS only F_FULLFSYNC reaches the disk itself.
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):
            fcntl.fcntl(fd, full)
            return
    os.fsync(fd)


def begin_writeback(fd: int, start: int, count: int) -> None:
    """Start writing a large range to disk in the background, so that the final sync is shorter."""
    if count >= _WRITEBACK_BYTES and (sync_file_range := _sync_file_range()) is not None:
        sync_file_range(fd, start, count, 2)  # SYNC_FILE_RANGE_WRITE; only a hint, so no error matters


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def fsync_folder(folder: Path) -> None:
    """Make a folder's names durable, where the file system can."""
    with closing(OpenFile.at(folder, os.O_DIRECTORY)) as file, naming(folder):
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _UNSUPPORTED:  # some file systems cannot sync a folder
                raise


def _fsync_tree(top: Path) -> None:
    """Files first, then folders from the innermost out."""

    def fail(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(top, topdown=False, onerror=fail):
        for name in names:
            path = os.path.join(folder, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                with closing(OpenFile.at(path, _OPEN)) as file, naming(path):
                    fsync(file.fileno())
        fsync_folder(Path(folder))
