"""Writes safetensors files by position: block by block, in any order, all or nothing."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MismatchError, naming
from ..storage.output import begin_writeback, staged_file
from ..storage.output_checks import require_space
from ..storage.positioned import OpenFile, write_exactly
from .header import FilePlan, Header, TensorInfo
from .reader import TensorFile

_SMALL_BYTES = 32 << 10
_BUFFER_BYTES = 4 << 20


class TensorFileWriter:
    """Writes a safetensors file whose entries are known, and whose metadata may still change.

    Writes may come in any order, and from several threads. Those below ``small_bytes`` are collected.
    """

    def __init__(
        self,
        plan: FilePlan,
        fd: int,
        home: Path | OpenFile,
        *,
        small_bytes: int = _SMALL_BYTES,
        buffer_bytes: int = _BUFFER_BYTES,
    ) -> None:
        self._plan, self._fd, self._home = plan, fd, home
        self._small_bytes = small_bytes
        self._small = _SmallWrites(fd, buffer_bytes)
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
        if data.nbytes < self._small_bytes:
            self._small.add(position, data.tobytes())
        else:
            write_exactly(self._fd, np.ascontiguousarray(data).data.cast("B"), position)
            begin_writeback(self._fd, position, data.nbytes)

    def shrink(self, name: str, rows: int) -> None:
        """Cut the entry that lies last off behind ``rows`` rows."""
        self._plan = self._plan.shrunk(name, rows)
        self._small.flush()
        os.ftruncate(self._fd, self._plan.nbytes)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header with the final ``metadata``, which must fit the space reserved for it."""
        self._small.flush()
        position = 0
        for part in self._plan.pack(metadata):
            write_exactly(self._fd, part, position)
            position += len(part)
        self.header = Header(self._plan.tensors, self._plan.offsets, dict(metadata), self._plan.start)

    def sha256(self) -> str:
        """The SHA-256 of the finished file, in hex."""
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()

    def reader(self) -> TensorFile:
        """The file, once `written_file` has ended. Its header is not read and checked again."""
        if self.header is None:
            raise ValueError("the file is not finished")
        if isinstance(self._home, OpenFile):
            return TensorFile(self._home, self.header, None)
        return TensorFile(OpenFile.at(self._home), self.header, self._home)


class _SmallWrites:
    """Collects small writes and joins neighbours, so that few calls are made. Thread-safe."""

    def __init__(self, fd: int, buffer_bytes: int) -> None:
        self._fd = fd
        self._buffer_bytes = buffer_bytes
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, bytes]] = []
        self._size = 0

    def add(self, position: int, data: bytes) -> None:
        with self._lock:
            self._waiting.append((position, data))
            self._size += len(data)
            full = self._size >= self._buffer_bytes
        if full:
            self.flush()

    def flush(self) -> None:
        with self._lock:
            waiting, self._waiting, self._size = self._waiting, [], 0
        start, end, parts = 0, 0, list[bytes]()
        for position, data in sorted(waiting):
            if position != end:
                write_exactly(self._fd, b"".join(parts), start)
                start, parts = position, []
            parts.append(data)
            end = position + len(data)
        write_exactly(self._fd, b"".join(parts), start)


@contextmanager
def written_file(
    entries: Sequence[TensorInfo],
    room: Mapping[str, str],
    out: str | os.PathLike[str] | None,
    *,
    force: bool = False,
    space: int | None = None,
) -> Iterator[TensorFileWriter]:
    """Write a safetensors file with ``entries``, all or nothing; without ``out``, a nameless temporary one.

    ``room`` is metadata as large as the final metadata can get; ``space`` how many bytes must be free, by
    default the file's. A `MismatchError` says that names clash or do not fit a header; else it raises as
    `staged_file`.
    """
    plan = _planned(entries, room, out)
    if out is None:
        with tempfile.TemporaryFile(prefix="neft-", buffering=0) as nameless:
            spool = OpenFile(os.dup(nameless.fileno()))
        require_space(tempfile.gettempdir(), plan.nbytes if space is None else space)
        with naming(tempfile.gettempdir()):
            yield TensorFileWriter(plan, spool.fileno(), spool)
        return
    path = Path(out).absolute()  # the caller may change the current folder meanwhile
    with staged_file(path, force=force) as staged:
        require_space(path.parent, plan.nbytes if space is None else space)
        yield TensorFileWriter(plan, staged.fd, path)


def planned_bytes(entries: Sequence[TensorInfo], room: Mapping[str, str]) -> int:
    """Bytes of the file that `written_file` would write."""
    return _planned(entries, room).nbytes


def _planned(
    entries: Sequence[TensorInfo], room: Mapping[str, str], out: str | os.PathLike[str] | None = None
) -> FilePlan:
    try:
        return FilePlan.of(entries, room)
    except ValueError as error:
        raise MismatchError(f"these tensors do not fit one safetensors file: {error}", file=out) from error
