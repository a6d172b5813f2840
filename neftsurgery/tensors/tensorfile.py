"""One safetensors file: positioned reads of parts of its tensors, and writes by position.

Scores, selections, patches and the shards of a checkpoint are all read through `TensorFile`; the
first three are written by `written_file`, block by block and in any order.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptFileError, MachineError, MismatchError, NeftError, UsageError
from ..storage.output import begin_writeback, staged_file
from ..storage.output_checks import require_space
from .header import FilePlan, Header, TensorInfo, read_header

__all__ = [
    "OpenFile",
    "TensorFile",
    "TensorFileWriter",
    "read_exactly",
    "read_rows_exactly",
    "sha256_of",
    "stretches",
    "write_exactly",
    "written_file",
]

_NUMPY = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "C64": np.dtype("<c8"),
}

_COPY_BYTES = 8 << 20
_SMALL_BYTES = 32 << 10
_HELD_BYTES = 4 << 20
_WRITEBACK_BYTES = 512 << 10


def read_exactly(fd: int, buffer: memoryview, offset: int, path: str | os.PathLike[str] | None) -> None:
    """Fill ``buffer`` from byte ``offset`` of ``fd``.

    Raises
    ------
    CorruptFileError
        If the file ends first: it was cut short after it was opened.
    """
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        if got == 0:
            raise CorruptFileError(
                "the file ends too soon: it was cut short while it was read",
                file=path,
                expected=f"{len(buffer)} bytes at {offset}",
                found=f"{done}",
            )
        done += got


def read_rows_exactly(
    fd: int,
    offset: int,
    rows: NDArray[np.integer],
    out: NDArray[np.uint8],
    path: str | os.PathLike[str] | None,
) -> None:
    """Fill ``out``, shape ``[k, bytes of a row]``, with rows ``rows`` (ascending) of a table at ``offset``.

    Raises
    ------
    CorruptFileError
        As `read_exactly`.
    """
    row = out.shape[1]
    buffer = out.data.cast("B")
    for first, last, number in stretches(rows):
        part, position = buffer[first * row : last * row], offset + number * row
        # The call itself, as there may be thousands; what it leaves is for the patient way.
        got = os.preadv(fd, (part,), position)
        if got < len(part):
            read_exactly(fd, part[got:], position + got, path)


def stretches(index: NDArray[np.integer]) -> Iterator[tuple[int, int, int]]:
    """Maximal runs of consecutive numbers: ``(first, last, number)``, positions in ``index``, its value."""
    index = np.asarray(index, np.int64)
    edges = np.flatnonzero(np.diff(index, prepend=-2, append=-2) != 1)
    firsts = edges[:-1]
    return zip(firsts.tolist(), edges[1:].tolist(), index[firsts].tolist(), strict=True)


def write_exactly(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of ``data`` at byte ``offset`` of ``fd``."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def sha256_of(file: BinaryIO) -> str:
    """The SHA-256 of what is left to read of ``file``, in hex, as ``sha256sum`` shows it."""
    state = hashlib.sha256()
    while block := file.read(_COPY_BYTES):
        state.update(block)
    return state.hexdigest()


class OpenFile:
    """A file open for reading, closed when the last one who holds it lets go.

    Checkpoints and patches are values that live as long as someone uses them, so their files are not
    closed in a ``with``; a file object of Python would warn of that.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> OpenFile:
        """Open the file at ``path``."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def fileno(self) -> int:
        """The descriptor.

        Raises
        ------
        ValueError
            If the file is closed.
        """
        if self._fd < 0:
            raise ValueError("the file is closed")
        return self._fd

    def close(self) -> None:
        """Close the file, if it is open."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # Bound early: when the interpreter ends, modules may be gone before their objects.
        if self._fd >= 0:
            close(self._fd)


def _stamp(file: OpenFile) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


class TensorFile:
    """A safetensors file opened for positioned reads.

    Nothing but the header is held; every read asks for the bytes it needs.
    """

    def __init__(self, file: OpenFile, header: Header, path: Path | None) -> None:
        self._file = file
        self.header = header
        self.path = path
        self._stamp = _stamp(file)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TensorFile:
        """Open and check the file at ``path``.

        Raises
        ------
        CorruptFileError
            If it is not a valid safetensors file.
        OSError
            If it cannot be read.
        """
        file = OpenFile.at(path)
        header = read_header(path)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise MachineError("the file was replaced while it was opened", file=path, hint="try again")
        return cls(file, header, Path(path))

    @classmethod
    def named(cls, path: str | os.PathLike[str]) -> TensorFile:
        """As `open`, for a path that a user gave.

        Raises
        ------
        UsageError
            If there is no such file.
        """
        try:
            if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
                raise UsageError("this is a device, pipe or socket, not a file", file=path)
            return cls.open(path)
        except ValueError as error:
            if isinstance(error, NeftError):
                raise
            raise UsageError(f"not a usable path: {error}", file=repr(os.fspath(path))) from error
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            folder = isinstance(error, IsADirectoryError)
            what = "this is a folder, where a file is wanted" if folder else "there is no such file"
            raise UsageError(what, file=path) from error

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors of the file, by name."""
        return self.header.tensors

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of tensor ``name`` from its byte ``start``."""
        read_exactly(self._file.fileno(), buffer, self.header.offsets[name] + start, self.path)

    def array(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows ``[start, stop)`` of tensor ``name`` along its first axis, in memory.

        Only for element types that numpy has.
        """
        info = self.tensors[name]
        raw = self.array_bytes(name, start, stop)
        return raw.reshape(-1).view(_NUMPY[info.dtype]).reshape((len(raw), *info.shape[1:]))

    def array_bytes(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """As `array`, as raw bytes: shape ``[stop - start, bytes of a row]``, for any type of whole bytes."""
        info = self.tensors[name]
        rows = info.shape[0] if info.shape else 1
        stop = rows if stop is None else min(stop, rows)
        row = info.nbytes // rows if rows else 0
        raw = np.empty((stop - start, row), dtype=np.uint8)
        if raw.size:
            self.read_into(name, start * row, raw.data.cast("B"))
        return raw

    def joined(self, names: Sequence[str]) -> NDArray[Any]:
        """The elements of several tensors of one type, one after the other; neighbours are read at once.

        Only for element types that numpy has.
        """
        sizes = [self.tensors[name].nbytes for name in names]
        raw = np.empty(sum(sizes), np.uint8)
        start = filled = end = 0  # of the stretch that is being collected: where in the file, where in `raw`
        position = 0
        for name, size in zip(names, sizes, strict=True):
            offset = self.header.offsets[name]
            if offset != end:
                read_exactly(self._file.fileno(), raw.data[filled:position], start, self.path)
                start, filled = offset, position
            position += size
            end = offset + size
        read_exactly(self._file.fileno(), raw.data[filled:], start, self.path)
        return raw.view(_NUMPY[self.tensors[names[0]].dtype] if names else np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return os.fstat(self._file.fileno()).st_size

    def check_in_place(self) -> None:
        """Raise a ``FileNotFoundError`` if the file was removed or replaced since it was opened."""
        if self.path is not None and not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
            raise FileNotFoundError(errno.ENOENT, "the file was replaced", str(self.path))

    def stream(self) -> BinaryIO:
        """The whole file as a buffered one, from its start; to be closed by whoever asks for it."""
        copy = os.dup(self._file.fileno())
        os.lseek(copy, 0, os.SEEK_SET)  # positioned reads leave it there, another stream would not
        return os.fdopen(copy, "rb")

    def check_unchanged(self) -> None:
        """Raise a `MachineError` if the content was edited since the file was opened.

        A file that was removed, or replaced by another of its name, is read on as it was.
        """
        if self.path is not None and _stamp(self._file) != self._stamp:
            raise MachineError(
                "the file was changed by someone else while it was in use",
                file=self.path,
                hint="nothing was written; run the command again when the file is at rest",
            )

    def copy_to(self, target: int) -> None:
        """Copy the whole file to the descriptor ``target``."""
        fd, size = self._file.fileno(), self.nbytes
        buffer = memoryview(bytearray(min(size, _COPY_BYTES)))
        for start in range(0, size, _COPY_BYTES):
            part = buffer[: min(_COPY_BYTES, size - start)]
            read_exactly(fd, part, start, self.path)
            write_exactly(target, part, start)

    def close(self) -> None:
        """Close the file; a spooled one is gone with it."""
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorFileWriter:
    """Writes a safetensors file whose entries are known and whose metadata is not, yet.

    Made by `written_file`. Writes may come in any order, and from several threads.
    """

    def __init__(self, plan: FilePlan, fd: int) -> None:
        self._plan = plan
        self._fd = fd
        self._small = _SmallWrites(fd)
        self.header: Header | None = None
        os.ftruncate(fd, plan.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self._plan.nbytes

    def write(self, name: str, start: int, data: NDArray[Any]) -> None:
        """Write ``data`` into entry ``name`` from its row ``start`` (along the first axis)."""
        info = self._plan.tensors[name]
        rows = info.shape[0] if info.shape else 1
        if data.nbytes == 0:
            return
        begin = start * (info.nbytes // rows) if rows else 0
        if start < 0 or begin + data.nbytes > info.nbytes:
            raise ValueError(f"{data.nbytes} bytes at row {start} do not fit entry {name!r}")
        position = self._plan.offsets[name] + begin
        if data.nbytes < _SMALL_BYTES:
            self._small.add(position, data.tobytes())
        else:
            write_exactly(self._fd, np.ascontiguousarray(data).data.cast("B"), position)
            if data.nbytes >= _WRITEBACK_BYTES:
                begin_writeback(self._fd, position, data.nbytes)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header with the final ``metadata``, no longer than the room that was kept for it."""
        self._small.flush()
        position = 0
        for part in self._plan.pack(metadata):
            write_exactly(self._fd, part, position)
            position += len(part)
        self.header = self._plan.header(metadata)

    def sha256(self) -> str:
        """The SHA-256 of the finished file, in hex."""
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            return sha256_of(file)


class _SmallWrites:
    """Writes held back until they are worth a call; neighbours become one. Thread-safe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, bytes]] = []
        self._size = 0

    def add(self, position: int, data: bytes) -> None:
        with self._lock:
            self._waiting.append((position, data))
            self._size += len(data)
            if self._size < _HELD_BYTES:
                return
            waiting, self._waiting, self._size = self._waiting, [], 0
        self._write(waiting)

    def flush(self) -> None:
        with self._lock:
            waiting, self._waiting, self._size = self._waiting, [], 0
        self._write(waiting)

    def _write(self, waiting: list[tuple[int, bytes]]) -> None:
        start, end, parts = 0, 0, list[bytes]()
        for position, data in sorted(waiting):
            if position != end:
                write_exactly(self._fd, b"".join(parts), start)
                start, parts = position, []
            parts.append(data)
            end = position + len(data)
        write_exactly(self._fd, b"".join(parts), start)


class _Written:
    """What `written_file` yields: the writer, and afterwards a reader of the file."""

    def __init__(self, writer: TensorFileWriter, spool: OpenFile | None, out: Path | None) -> None:
        self.writer = writer
        self._spool, self._out = spool, out

    def reader(self) -> TensorFile:
        """The finished file, once the context has ended; what was just written is not checked again."""
        if self.writer.header is None:
            raise ValueError("the file is not finished")
        file = OpenFile.at(self._out) if self._out is not None else self._spool
        assert file is not None  # one of the two is given
        return TensorFile(file, self.writer.header, self._out)


@contextmanager
def written_file(
    entries: Sequence[TensorInfo],
    room: Mapping[str, str],
    out: str | os.PathLike[str] | None,
    *,
    force: bool = False,
) -> Iterator[_Written]:
    """Write a safetensors file, all or nothing.

    Parameters
    ----------
    entries:
        The tensors the file will hold.
    room:
        Metadata as large as the final one can get: it only reserves space in the header.
    out:
        Where to. None: a nameless temporary file, which lives as long as its reader.

    Raises
    ------
    UsageError
        If ``out`` exists, without ``force``.
    MismatchError
        If the entries' names clash or do not fit a header.
    """
    try:
        plan = FilePlan.of(entries, room)
    except ValueError as error:
        raise MismatchError(f"these tensors do not fit one safetensors file: {error}", file=out) from error
    if out is None:
        with tempfile.TemporaryFile(prefix="neft-", buffering=0) as nameless:
            spool = OpenFile(os.dup(nameless.fileno()))
        require_space(tempfile.gettempdir(), plan.nbytes)
        yield _Written(TensorFileWriter(plan, spool.fileno()), spool, None)
        return
    path = Path(out).absolute()  # the caller may change the current folder meanwhile
    with staged_file(path, force=force) as staged:
        require_space(path.parent, plan.nbytes)
        yield _Written(TensorFileWriter(plan, staged.fd), None, path)
