"""How weights are read, wherever they are; and one safetensors file, open for positioned reads."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import MachineError, NeftError, UsageError, boundary, naming
from ..progress import Timing
from ..storage.copying import FileCopy
from ..storage.output import staged_file
from ..storage.output_checks import refuse_output, require_space
from ..storage.positioned import OpenFile, changed_file
from ..text import tilde_hint
from .arrays import IndexArray, RawBytes
from .file_kinds import folder_instead
from .header import Header, TensorInfo, read_header


class TensorReader(Protocol):
    """The tensors of a model, and their bytes by range, read into buffers of the caller."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors, by name."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of tensor ``name`` from its byte ``start``."""


class RowReader(TensorReader, Protocol):
    """Bytes of tensors by rows, too."""

    def read_rows(self, name: str, rows: IndexArray, out: RawBytes) -> None:
        """Fill ``out``, ``[k, bytes of a row]``, with rows ``rows`` (ascending) of tensor ``name``."""


class WeightReader(RowReader, Protocol):
    """All that scoring sees of a model. Thread-safe."""

    def window(self, name: str, start: int, room: RawBytes, mapped: bool) -> RawBytes | None:
        """Bytes of ``name`` to fill ``room``: fetched into it, or, if ``mapped``, mapped; else None."""

    def address(self, name: str) -> int:
        """Where tensor ``name`` lies, as one number for all files; -1 if it is computed.

        One `read_into` may go on over the tensors that lie behind it.
        """


def neighbours(nbytes: Sequence[int], addresses: Iterable[Sequence[int]], most: int) -> Iterator[range]:
    """Cut tensors into runs that lie one behind the other on every side, of at most ``most`` bytes.

    ``addresses`` are those of each side; a tensor with a negative one is a run of its own.
    """
    sizes = np.array(nbytes, np.int64)
    follows = np.ones(max(0, len(sizes) - 1), np.bool_)
    for side in addresses:
        at = np.array(side, np.int64)
        follows &= (at[1:] == at[:-1] + sizes[:-1]) & (at[1:] >= 0) & (at[:-1] >= 0)
    ends = np.cumsum(sizes)
    edges = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(sizes)]
    for start, stop in pairwise(edges if nbytes else []):
        while start < stop:
            limit = most + int(ends[start]) - nbytes[start]
            last = min(stop, max(start + 1, int(np.searchsorted(ends, limit, side="right"))))
            yield range(start, last)
            start = last


class OnDisk:
    """What is in a file, which is held open."""

    def __init__(self, file: OpenFile, path: Path | None) -> None:
        self._open = file
        #: None for one that was never saved, which ends with its last reference.
        self.path = path
        self._stamp = self._size_and_time()

    def _size_and_time(self) -> tuple[int, int]:
        status = self._open.status()
        return status.st_size, status.st_mtime_ns

    @property
    def seen(self) -> tuple[str, int, object]:
        """Its path, its size, and the time of its last change when it was opened."""
        return os.path.abspath(self.path or ""), *self._stamp

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self._open.status().st_size

    def check_in_place(self) -> None:
        """Raise a ``FileNotFoundError`` if the file was removed or replaced since it was opened."""
        if self.path is not None and not os.path.samestat(self._open.status(), self.path.stat()):
            raise FileNotFoundError(errno.ENOENT, "the file was replaced", str(self.path))

    def check_unchanged(self) -> None:
        """Raise a `MachineError` if the content was edited since the file was opened.

        A file that was removed or replaced since then still reads as it was.
        """
        if self.path is not None and self._size_and_time() != self._stamp:
            raise changed_file(self.path)

    def stream(self) -> BufferedReader:
        """The file's bytes from the start, as a file that the caller closes; open one at a time."""
        copy = os.dup(self._open.fileno())
        os.lseek(copy, 0, os.SEEK_SET)  # another stream may have moved it; positioned reads do not
        return os.fdopen(copy, "rb")

    def sha256(self) -> str:
        """The SHA-256 of the whole file, in hex, as ``sha256sum`` and the Hub show it; reads all of it."""
        with naming(self.path), self.stream() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def close(self) -> None:
        """Close the file; a nameless temporary one is deleted by that."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class TensorFile(OnDisk):
    """A safetensors file opened for positioned reads; nothing but its header is held."""

    def __init__(self, file: OpenFile, header: Header, path: Path | None) -> None:
        super().__init__(file, path)
        self.header = header

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TensorFile:
        """Open the file at ``path``; raises a `CorruptFileError` if it is not a valid safetensors file."""
        file = OpenFile.at(path)
        header = read_header(path)
        if not os.path.samestat(file.status(), os.stat(path)):
            raise MachineError("the file was replaced while it was opened", file=path, hint="try again")
        return cls(file, header, Path(path))

    @classmethod
    def named(cls, path: str | os.PathLike[str], key: str | None = None) -> TensorFile:
        """As `open`, for a path given by a user: raises a `UsageError` if there is no such file.

        ``key``: that of the document that the file should hold; the error for a folder says what helps.
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
            what = "expected a file, found a folder" if folder else "there is no such file"
            hint = folder_instead(path, key) if folder and key else tilde_hint(path)
            raise UsageError(what, file=path, hint=hint) from error

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors of the file, by name."""
        return self.header.tensors

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of tensor ``name`` from its byte ``start``."""
        self._open.read_into(buffer, self.header.offsets[name] + start)

    def array(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows ``[start, stop)`` of tensor ``name`` along its first axis, in memory.

        Only for element types that numpy has.
        """
        info = self.tensors[name]
        raw = self.array_bytes(name, start, stop)
        return raw.reshape(-1).view(info.type.numpy).reshape((len(raw), *info.shape[1:]))

    def array_bytes(self, name: str, start: int = 0, stop: int | None = None) -> RawBytes:
        """As `array`, as raw bytes: shape ``[stop - start, bytes of a row]``, for any type of whole bytes."""
        info = self.tensors[name]
        rows = info.shape[0] if info.shape else 1
        stop = rows if stop is None else min(stop, rows)
        row = info.type.nbytes(math.prod(info.shape[1:]))  # also if there are no rows
        raw = np.empty((stop - start, row), dtype=np.uint8)
        if raw.size:
            self.read_into(name, start * row, raw.data.cast("B"))
        return raw


class FileBacked(OnDisk):
    """A value whose content stays in its file, which it takes over open; saved by copying that file."""

    #: What making it took, where a verb made it.
    timing: Timing = Timing()

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._open, self.path, self._stamp = file._open, file.path, file._stamp

    @boundary
    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Copy it to the file ``path``, whole or not at all.

        A `UsageError` says that ``path`` exists (without ``force``), a `MachineError` that writing failed.
        """
        refuse_output(path, inputs=[], force=force, kind="file")
        with staged_file(path, force=force) as staged:
            require_space(Path(path).absolute().parent, self.nbytes)
            FileCopy(self._open, staged.fd, self._open.status()).run()
            self.check_unchanged()
