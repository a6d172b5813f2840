"""A checkpoint on disk, one file or shards with an index: its tensors, its config, its files."""

from __future__ import annotations

import functools
import os
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptFileError, UsageError, boundary
from ..quantization.weight import QuantizedWeight
from ..sources.resolve import Source, resolve
from ..storage.page_cache import is_cached, map_cached
from ..storage.positioned import OpenFile, changed_file, most_descriptors
from ..storage.threads import Seen
from ..tensors.arrays import RawBytes
from ..tensors.document import read_object
from ..tensors.file_kinds import KINDS, tensor_kind, what_helps
from ..tensors.header import Header, TensorInfo, read_header
from ..text import lines, plural, printable, size
from .name_prefixes import Prefixes
from .unfinished import refuse_unfinished
from .weight_files import PIPELINE_NAME, WeightFiles, weight_files

_MANY_ROWS = 16
_FILE_BYTES = 1 << 48  # more than any file has
_cached_rows_lock = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One weight file of a checkpoint, and its status when it was opened."""

    path: Path
    name: str  # its path below the checkpoint's folder
    header: Header
    status: os.stat_result
    part: str = ""  # what comes before the names of its tensors, ``unet/``: see `weight_files`

    @classmethod
    def open(cls, root: Path, name: str, part: str = "") -> Shard:
        """Read the header of the file ``name`` in the folder ``root``, which holds tensors of ``part``."""
        path = root / name
        status = path.stat()
        header = read_header(path)
        if (kind := tensor_kind(header.metadata)) in KINDS.values():
            hint = what_helps("", kind, path)
            raise UsageError("expected a checkpoint", file=path, found=kind, hint=hint)
        return cls(path, name, header.renamed(lambda name: part + name) if part else header, status, part)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.status.st_size

    def raw_header(self) -> bytes:
        """The first bytes of the file, up to its data."""
        raw = bytearray(self.header.size)
        OpenFile.at(self.path).read_into(memoryview(raw), 0)
        return bytes(raw)

    def check_unchanged(self) -> None:
        """Raise a `MachineError` if the file was edited, replaced or removed since it was opened."""
        try:
            same = _version(self.path.stat()) == _version(self.status)
        except FileNotFoundError:
            same = False
        if not same:
            raise changed_file(self.path)


def _version(status: os.stat_result) -> tuple[int, int, int, int]:
    """What an edit or a replacement of a file changes."""
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """Tensors by name, wherever their shards are. Made by `Checkpoint.open`; holds no weights."""

    source: Source  # where it came from
    root: Path  # the folder of its files
    is_file: bool  # whether it was named as one file
    shards: tuple[Shard, ...]  # the weight files, by path
    tensors: Mapping[str, TensorInfo]  # in file order, under tied names too; ``info.name`` is in the file
    _home: Mapping[str, int] = field(repr=False)
    absent: tuple[str, ...] = ()  # names that the index lists and no file has
    indexes: tuple[str, ...] = ()  # those that led to its files, below its folder
    parts: tuple[str, ...] = ()  # ``unet/``: those that it lists, if it is made of parts
    opened: OpenShards = field(default_factory=lambda: OpenShards(), repr=False)
    prefixes: Prefixes | None = None  # how its names are changed
    original: Checkpoint | None = None  # with the names that its files have, if they are changed
    #: The weights that it shows as numbers while its files hold codes, by name; see `dequantized`.
    quantized: Mapping[str, QuantizedWeight] = field(default_factory=dict, repr=False)

    @classmethod
    @boundary
    def open(cls, named: str | os.PathLike[str] | Source) -> Checkpoint:
        """The checkpoint at a path or of a Hub id; reads headers only.

        Raises:
            UsageError: If there is no such checkpoint.
            CorruptFileError: If a header or the index is damaged, or points outside its folder.
            MachineError: If something cannot be read, or a change in place was interrupted: see
                `neftsurgery.heal`.
        """
        source = named if isinstance(named, Source) else resolve(named)
        refuse_unfinished(source)
        return cls.read(source)

    @classmethod
    def read(cls, source: Source) -> Checkpoint:
        """As `open`, but a change in place may be unfinished: for `heal` and `inspect`."""
        if source.path.is_dir():
            root, files = source.path, weight_files(source.path, source.index)
        else:
            root, files = source.path.parent, WeightFiles({source.path.name: ""})
        if source.remote is not None:
            source.remote.make(files.parts_of)
        shards = tuple(Shard.open(root, name, part) for name, part in files.parts_of.items())
        tensors: dict[str, TensorInfo] = {}
        home: dict[str, int] = {}
        for number, shard in enumerate(shards):
            for name, info in shard.header.tensors.items():
                if name in home:
                    raise CorruptFileError(
                        f"the tensor is in two files, {shards[home[name]].name} and {shard.name}",
                        file=root,
                        tensor=name,
                    )
                tensors[name], home[name] = info, number
        absent = tuple(sorted(name for name in files.listed if name not in tensors))
        rest = (absent, tuple(files.indexes), files.parts)
        return cls(source, root, not source.path.is_dir(), shards, tensors, home, *rest)

    @property
    def seen(self) -> Seen:
        """The weight files as this process sees them."""
        if (remote := self.source.remote) is not None:
            files = [remote.files[shard.name].ranged for shard in self.shards]
            return tuple((file.name, file.nbytes, file.version) for file in files)
        stats = [(os.path.abspath(s.path), s.status) for s in self.shards]
        return tuple((path, status.st_size, status.st_mtime_ns) for path, status in stats)

    def under(self, names: Mapping[str, str]) -> Checkpoint:
        """The same files, in which a tensor is also found under the names that ``names`` maps to its own."""
        if not names:
            return self
        more = {name: self.tensors[stored] for name, stored in names.items()}
        homes = {name: self._home[stored] for name, stored in names.items()}
        return replace(self, tensors={**self.tensors, **more}, _home={**self._home, **homes})

    def renamed(self, prefixes: Prefixes, base: Collection[str]) -> Checkpoint:
        """The same tensors under other names, as `Prefixes.changed` gives them; ``base``: those to meet."""
        new = prefixes.changed(self.tensors, base, self.name)
        shards = tuple(replace(s, header=s.header.renamed(new.__getitem__)) for s in self.shards)
        tensors = {new[name]: replace(info, name=new[name]) for name, info in self.tensors.items()}
        home = {new[name]: number for name, number in self._home.items()}
        return replace(self, shards=shards, tensors=tensors, _home=home, prefixes=prefixes, original=self)

    def __repr__(self) -> str:
        tensors = plural(len(self.stored), "tensor")
        return printable(f"<Checkpoint {self.name}: {tensors}, {size(self.nbytes)}>")

    def __str__(self) -> str:
        dtypes = Counter(info.dtype for info in self.stored)
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common(3))
        return lines(
            [
                f"checkpoint {self.name}: {plural(len(self.shards), 'file')}, {size(self.nbytes)}",
                f"  {plural(len(self.stored), 'tensor')} ({kinds}), {plural(self.parameters, 'parameter')}",
            ]
        )

    @property
    def name(self) -> str:
        """As the user named it."""
        return self.source.named

    @functools.cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The ``config.json`` beside the weights, if any; of parts, by part: ``{"unet/": {...}, ...}``."""
        own = self._described("config.json", PIPELINE_NAME if self.parts else "config.json")
        parts = {part: self._described(f"{part}config.json") or {} for part in self.parts if part}
        return {**(own or {}), **parts} if parts else own

    def _described(self, *names: str) -> Mapping[str, Any] | None:
        """The first of some JSON files that is there."""
        return next((read_object(self.root / name) for name in names if (self.root / name).is_file()), None)

    @property
    def stored(self) -> list[TensorInfo]:
        """The tensors of the files, each once."""
        return [info for name, info in self.tensors.items() if info.name == name]

    @property
    def parameters(self) -> int:
        """Elements of all floating-point tensors, packed ones included; buffers of integers do not count."""
        return sum(t.elements for t in self.stored if t.type.kind not in ("integer", "bool"))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor data."""
        return sum(info.nbytes for info in self.stored)

    def stored_bytes(self, name: str) -> int:
        """Bytes that the files hold of tensor ``name``."""
        return self.tensors[name].nbytes

    def shard_of(self, name: str) -> Shard:
        """The weight file that holds tensor ``name``."""
        return self.shards[self._home[name]]

    def position(self, name: str) -> tuple[int, int]:
        """Shard number and byte offset of tensor ``name``: sorting by it gives reading order."""
        return divmod(self._addresses[name], _FILE_BYTES)

    def address(self, name: str) -> int:
        """Where tensor ``name`` lies, as one number for all files; -1 if it is computed."""
        return self._addresses[name]

    @functools.cached_property
    def _addresses(self) -> Mapping[str, int]:
        offsets = [shard.header.offsets for shard in self.shards]
        homes = self._home
        return {n: _FILE_BYTES * homes[n] + offsets[homes[n]][info.name] for n, info in self.tensors.items()}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of tensor ``name`` from its byte ``start``. Thread-safe."""
        file = self.opened.get(self.shard_of(name))
        self.opened.count(len(buffer))
        file.read_into(buffer, self.position(name)[1] + start)

    def read_rows(self, name: str, rows: NDArray[np.integer], out: NDArray[np.uint8]) -> None:
        """Fill ``out``, ``[k, bytes of a row]``, with rows ``rows`` (ascending) of ``name``. Thread-safe."""
        file = self.opened.get(self.shard_of(name))
        self.opened.count(out.nbytes)
        offset, row = self.position(name)[1], out.shape[1]
        first, last = (int(rows[0]), int(rows[-1])) if len(rows) else (0, 0)
        # Cached rows are read by thousands of calls that never wait for a disk. Several threads at once would
        # only hand each other the GIL.
        local = len(rows) >= _MANY_ROWS and file.remote is None
        cached = local and is_cached(file.fileno(), offset + first * row, (last - first + 1) * row)
        with _cached_rows_lock if cached else nullcontext():
            file.read_rows(offset, rows, out)

    def window(self, name: str, start: int, room: RawBytes, mapped: bool) -> RawBytes | None:
        """As of `tensors.reader.WeightReader`. Not to be changed."""
        file = self.opened.get(self.shard_of(name))
        if file.remote is not None:
            self.read_into(name, start, room.data)
            return room
        found = map_cached(file.fileno(), self.position(name)[1] + start, room.size) if mapped else None
        if found is not None:
            self.opened.count(room.size)
        return found

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""
        return self.opened.bytes_read

    def keep_edges(self, names: Iterable[str], size: int) -> None:
        """Fetch the first and last ``size`` bytes of larger tensors at once, where they are behind a URL."""
        places: dict[int, set[tuple[int, int]]] = {}
        read = [name for name in names if name not in self.quantized] if self.source.remote else []
        for name in read:
            (shard, start), nbytes = self.position(name), self.tensors[name].nbytes
            places.setdefault(shard, set()).update({(start, size), (start + nbytes - size, size)})
        for number, found in places.items():
            if (remote := self.opened.get(self.shards[number]).remote) is not None:
                remote.keep(sorted(found))

    def check_unchanged(self) -> None:
        """Raise a `MachineError` if a weight file was edited or replaced since it was opened."""
        for shard in self.shards:
            shard.check_unchanged()

    def close(self) -> None:
        """Close the files that are open; they open again when read."""
        self.opened.clear()


@dataclass(frozen=True, repr=False, kw_only=True)
class ComputedWeights(Checkpoint, ABC):
    """A checkpoint of whose ``files`` some tensors are computed when they are read, whole rows at once."""

    files: Checkpoint
    shown: Mapping[str, object]  # what the tensors that are computed are made of

    def row_elements(self, info: TensorInfo) -> int:
        """Elements of the rows of a tensor that `fill` computes."""
        return info.shape[-1]

    @abstractmethod
    def fill(self, name: str, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Fill ``out``, ``[k, bytes of a row]``, with ascending rows of a computed tensor."""

    def address(self, name: str) -> int:
        """As of `Checkpoint`."""
        stored = self.tensors[name].name
        return -1 if stored in self.shown else self.files.address(stored)

    def window(self, name: str, start: int, room: RawBytes, mapped: bool) -> RawBytes | None:
        """As of `Checkpoint`; computed tensors are not in memory."""
        stored = self.tensors[name].name
        return None if stored in self.shown else self.files.window(stored, start, room, mapped)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """As of `Checkpoint`."""
        info = self.tensors[name]
        if info.name not in self.shown:
            self.files.read_into(info.name, start, buffer)
            return
        row = info.type.nbytes(self.row_elements(info))
        low, high = start // row, -(-(start + len(buffer)) // row)
        whole = len(buffer) == (high - low) * row
        raw = np.frombuffer(buffer, np.uint8) if whole else np.empty((high - low) * row, np.uint8)
        self.fill(info.name, np.arange(low, high), raw.reshape(-1, row))
        if not whole:
            buffer[:] = raw[start - low * row :][: len(buffer)].data

    def read_rows(self, name: str, rows: NDArray[np.integer], out: NDArray[np.uint8]) -> None:
        """As of `Checkpoint`."""
        info = self.tensors[name]
        if info.name not in self.shown:
            self.files.read_rows(info.name, rows, out)
        elif out.shape[1] == info.type.nbytes(self.row_elements(info)):
            self.fill(info.name, rows.astype(np.int64), out)
        else:  # rows of the caller, not of the matrix
            for row, place in zip(rows.tolist(), out, strict=True):
                self.read_into(name, row * out.shape[1], place.data)


class OpenShards:
    """The most recently read shards, open: at most 64, or an eighth of the files that a process may open."""

    def __init__(self, most: int | None = None) -> None:
        # An evicted file closes when its last reader drops it, not before: reads need no lock.
        self._opened = functools.lru_cache(most or max(1, min(64, most_descriptors() // 8)))(_opened)
        self._lock = threading.Lock()
        self.bytes_read = 0

    def count(self, size: int) -> None:
        """Add to the bytes read."""
        with self._lock:
            self.bytes_read += size

    def get(self, shard: Shard) -> OpenFile:
        """The open file of a shard, which must be unchanged."""
        with self._lock:
            return self._opened(shard)

    def clear(self) -> None:
        """Close all files."""
        self._opened.cache_clear()


def _opened(shard: Shard) -> OpenFile:
    shard.check_unchanged()
    return OpenFile.at(shard.path)
