"""A checkpoint as it really is: one file, or shards with an index; its tensors, its config, its files."""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptFileError, MachineError, UsageError
from ..sources.resolve import Source
from ..storage.page_cache import is_cached, map_cached
from ..storage.positioned import OpenFile, read_exactly, read_rows_exactly
from ..tensors.header import Header, TensorInfo, loads, read_header
from ..text import plural, size

__all__ = ["INDEX_NAME", "SINGLE_NAME", "Checkpoint", "Shard", "weight_files"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 200_000_000
_OPEN_SHARDS = 64
_MANY_ROWS = 16
_TURN = threading.Lock()
_MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file of a checkpoint, with its state when it was opened."""

    path: Path
    header: Header
    size: int
    stamp: tuple[int, int, int]  # device, inode, mtime in ns: tells an edit or a replacement

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read the header of the file at ``path``."""
        status = path.stat()
        return cls(path, read_header(path), status.st_size, _stamp(status))

    def check_unchanged(self) -> None:
        """Raise a `MachineError` if the file was edited, replaced or removed since it was opened."""
        try:
            status = self.path.stat()
            same = (status.st_size, _stamp(status)) == (self.size, self.stamp)
        except FileNotFoundError:
            same = False
        if not same:
            raise self.changed()

    def changed(self) -> MachineError:
        """The error for a file that is not the one that was opened."""
        return MachineError(
            "the file was changed by someone else while it was in use",
            file=self.path,
            hint="nothing was written; run the command again when the file is at rest",
        )


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_mtime_ns


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """Tensors by name, wherever their shards are. Made by `Checkpoint.read`; holds no weights.

    Attributes
    ----------
    source:
        Where it came from.
    root:
        The folder the files lie in.
    is_file:
        Whether it was named as one file, not as a folder.
    shards:
        The weight files, by path.
    tensors:
        By name, in file order.
    """

    source: Source
    root: Path
    is_file: bool
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    _home: Mapping[str, int] = field(repr=False)
    _handles: _Handles = field(default_factory=lambda: _Handles(), repr=False)

    @classmethod
    def read(cls, source: Source) -> Checkpoint:
        """The checkpoint as its files are now; reads headers only.

        A checkpoint whose change in place was cut short is not healed here: see `open_checkpoint`.

        Raises
        ------
        UsageError
            If there is no such checkpoint.
        CorruptFileError
            If a header or the index is damaged, or points outside its folder.
        """
        if source.path.is_dir():
            root, paths = source.path, weight_files(source.path)
        else:
            root, paths = source.path.parent, [source.path]
        shards = tuple(Shard.open(path) for path in paths)
        tensors: dict[str, TensorInfo] = {}
        home: dict[str, int] = {}
        for number, shard in enumerate(shards):
            for name, info in shard.header.tensors.items():
                if name in home:
                    raise CorruptFileError(
                        f"the tensor is in two files, {shards[home[name]].path.name} and {shard.path.name}",
                        file=root,
                        tensor=name,
                    )
                tensors[name], home[name] = info, number
        return cls(source, root, not source.path.is_dir(), shards, tensors, home)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.name}: {plural(len(self.tensors), 'tensor')}, {size(self.nbytes)}>"

    def __str__(self) -> str:
        dtypes = Counter(info.dtype for info in self.tensors.values())
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common(3))
        return "\n".join(
            [
                f"checkpoint {self.name}: {plural(len(self.shards), 'file')}, {size(self.nbytes)}",
                f"  {plural(len(self.tensors), 'tensor')} ({kinds}), {plural(self.parameters, 'parameter')}",
            ]
        )

    @property
    def name(self) -> str:
        """As the user named it."""
        return self.source.named

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The ``config.json`` beside the weights; ``None`` if there is none."""
        path = self.root / "config.json"
        if not path.is_file():
            return None
        try:
            content = loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"not valid JSON: {error}", file=path) from error
        if not isinstance(content, dict):
            raise CorruptFileError("not a JSON object", file=path)
        return content

    @property
    def parameters(self) -> int:
        """Elements of all floating-point tensors, packed ones included; buffers of integers do not count."""
        return sum(t.elements for t in self.tensors.values() if t.type.kind not in ("integer", "bool"))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor data."""
        return sum(info.nbytes for info in self.tensors.values())

    def shard_of(self, name: str) -> Shard:
        """The file that holds tensor ``name``."""
        return self.shards[self._home[name]]

    def position(self, name: str) -> tuple[int, int]:
        """Shard number and byte offset of tensor ``name``: sorting by it gives reading order."""
        return self._home[name], self.shard_of(name).header.offsets[name]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of tensor ``name`` from its byte ``start``. Thread-safe."""
        shard = self.shard_of(name)
        file = self._handles.get(shard)
        self._handles.count(len(buffer))
        read_exactly(file.fileno(), buffer, shard.header.offsets[name] + start, shard.path)

    def read_rows(self, name: str, rows: NDArray[np.integer], out: NDArray[np.uint8]) -> None:
        """Fill ``out``, ``[k, bytes of a row]``, with rows ``rows`` (ascending) of ``name``. Thread-safe."""
        shard = self.shard_of(name)
        file = self._handles.get(shard)
        self._handles.count(out.nbytes)
        fd, offset, row = file.fileno(), shard.header.offsets[name], out.shape[1]
        first, last = (int(rows[0]), int(rows[-1])) if len(rows) else (0, 0)
        # Thousands of calls that never wait: threads that make them at once only hand each other the GIL.
        warm = len(rows) >= _MANY_ROWS and is_cached(fd, offset + first * row, (last - first + 1) * row)
        with _TURN if warm else nullcontext():
            read_rows_exactly(fd, offset, rows, out, shard.path)

    def window(self, name: str, start: int, size: int) -> NDArray[np.uint8] | None:
        """Bytes of tensor ``name`` where they lie in memory, not copied; None if they may not be there.

        Not to be written to. Thread-safe.
        """
        shard = self.shard_of(name)
        file = self._handles.get(shard)
        found = map_cached(file.fileno(), shard.header.offsets[name] + start, size)
        if found is not None:
            self._handles.count(size)
        return found

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""
        return self._handles.bytes_read

    def check_unchanged(self) -> None:
        """Raise a `MachineError` if a weight file was edited or replaced since `read`."""
        for shard in self.shards:
            shard.check_unchanged()

    def close(self) -> None:
        """Close the files that are open; they open again when read."""
        self._handles.clear()


class _Handles:
    """The most recently read shards, open. Hundreds of shards would exceed the limit on open files."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes_read = 0

    def count(self, size: int) -> None:
        with self._lock:
            self.bytes_read += size

    def get(self, shard: Shard) -> OpenFile:
        # An evicted file closes when its last reader drops it, not before: reads need no lock.
        with self._lock:
            file = self._open.get(shard.path)
            if file is None:
                shard.check_unchanged()
                file = self._open[shard.path] = OpenFile.at(shard.path)
                while len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard.path)
            return file

    def clear(self) -> None:
        with self._lock:
            self._open.clear()


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder; a single file beats an index beside it.

    Raises
    ------
    UsageError
        If there are none.
    CorruptFileError
        If the index is damaged, or points outside its folder.
    """
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed_files(folder, index)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    raise UsageError(
        f"the folder holds neither {SINGLE_NAME} nor {INDEX_NAME}",
        file=folder,
        hint=f"it does hold {', '.join(others[:3])}: name that file" if others else None,
    )


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise CorruptFileError(f"the index is larger than {_MAX_INDEX_BYTES} bytes", file=index)
    try:
        content = loads(index.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"the index is not valid JSON: {error}", file=index) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptFileError("the index has no weight_map of tensor names to file names", file=index)
    paths = []
    for name in sorted(set(weight_map.values())):
        # A shard lies in the folder itself. Symlinks are fine (the Hub cache is made of them):
        # they are the user's own, while the index comes with the model.
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise CorruptFileError(f"the index points outside its folder: {name[:200]!r}", file=index)
        path = folder / name
        if len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES or not path.is_file():
            raise CorruptFileError(
                f"the index names {name[:200]!r}, which is not there",
                file=index,
                hint="a shard is missing: fetch the checkpoint again",
            )
        paths.append(path)
    if not paths:
        raise CorruptFileError("the index names no file", file=index)
    return paths
