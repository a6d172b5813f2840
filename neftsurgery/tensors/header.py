"""The header of a safetensors file: untrusted when read, written with space for the final metadata.

The safetensors package decides what a valid file is: it opens every file first. It does not report byte
offsets, so these are read from the same header afterwards. It accepts duplicate keys (the last one wins);
they are refused here, because two readers of such a file could see two models.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from json.encoder import encode_basestring_ascii
from weakref import WeakValueDictionary

from safetensors import SafetensorError, safe_open

from ..errors import CorruptFileError, MachineError, naming
from .dtypes import DTYPES, DType
from .file_kinds import foreign_file
from .json_text import loads, require_bounded

MAX_HEADER_BYTES = 100_000_000
_DAMAGED = "the file is damaged or truncated: fetch or write it again"
_PREFIX = struct.Struct("<Q")
_headers: WeakValueDictionary[bytes, Header] = WeakValueDictionary()  # those in use, by SHA-256


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor: ``dtype`` as safetensors names it, ``shape`` in elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def type(self) -> DType:
        """The element type."""
        return DTYPES[self.dtype]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return _nbytes(self.dtype, self.shape)

    def describe(self) -> str:
        """For messages: ``BF16 [4096, 11008]``."""
        return f"{self.dtype} {list(self.shape)}"


@functools.lru_cache(maxsize=1 << 12)
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPES[dtype].nbytes(math.prod(shape))


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Header:
    """A parsed header."""

    tensors: Mapping[str, TensorInfo]  # in file order
    offsets: Mapping[str, int]  # where each tensor's data starts, in bytes from the start of the file
    metadata: Mapping[str, str]
    size: int  # bytes of prefix and header together: where the data area starts

    def renamed(self, name_of: Callable[[str], str]) -> Header:
        """The header with other names of tensors; no two become one."""
        infos = [replace(info, name=name_of(name)) for name, info in self.tensors.items()]
        offsets = {name_of(name): offset for name, offset in self.offsets.items()}
        return replace(self, tensors={info.name: info for info in infos}, offsets=offsets)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of the file at ``path``; no tensor data is read.

    A `CorruptFileError` says what is wrong with it, or what the file is instead, if that is known.
    """
    with naming(path), open(path, "rb") as file:
        prefix = file.read(_PREFIX.size)
        length = _PREFIX.unpack(prefix)[0] if len(prefix) == _PREFIX.size else -1
        most = min(MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size - _PREFIX.size)
        raw = file.read(length) if 0 <= length <= most else b""
        try:
            require_bounded(raw)
            with safe_open(os.fspath(path), framework="numpy"):
                pass
        except FileNotFoundError as error:  # raised by the package whenever it cannot open a file
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))  # raises the true reason
            raise MachineError("the file could not be opened a second time", file=path) from error
        except SafetensorError as error:
            kind, hint = foreign_file(path) or (None, _DAMAGED)
            why = "" if kind else f": {str(error).removeprefix('Error while deserializing header: ')}"
            what = f"not a valid safetensors file{why}"
            raise CorruptFileError(what, file=path, found=kind, hint=hint) from error
        except ValueError as error:
            raise CorruptFileError(f"the header is {error}", file=path) from error
    if len(raw) != length:
        raise CorruptFileError("the file was changed while it was opened", file=path)
    # A base and what was tuned from it have the same headers, of up to 70,000 tensors.
    digest = hashlib.sha256(raw).digest()
    if (header := _headers.get(digest)) is None:
        header = _headers[digest] = parse_header(raw, path)
    return header


def parse_header(raw: bytes, path: str | os.PathLike[str] | None) -> Header:
    """The header in the JSON text ``raw``, with its padding, of a file that the safetensors package accepts.

    Raises a `CorruptFileError` about ``path`` if it is not valid JSON, or a key occurs twice.
    """
    try:
        content = loads(raw)
    except ValueError as error:
        raise CorruptFileError(
            f"the header is {error}", file=path, hint="write the file again with the safetensors package"
        ) from error
    metadata = content.pop("__metadata__", None) or {}
    start = _PREFIX.size + len(raw)
    tensors: dict[str, TensorInfo] = {}
    offsets: dict[str, int] = {}
    for name, entry in content.items():
        # The safetensors package also accepts an entry as a list of its fields, and a dtype as an object
        # with one key. No writer makes those, and other readers understand them differently.
        if not isinstance(entry, dict) or not isinstance(entry["dtype"], str):
            raise CorruptFileError(
                "the header entry of the tensor does not follow the format", file=path, tensor=name
            )
    for name, entry in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
        tensors[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]))
        offsets[name] = start + entry["data_offsets"][0]
    return Header(tensors, offsets, metadata, start)


@dataclass(frozen=True)
class FilePlan:
    """Where everything lies in a safetensors file that is about to be written. Made by `of`.

    The metadata may change until it is written, within the space reserved for it.
    """

    tensors: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]  # where each tensor's data starts, in bytes from the start of the file
    start: int  # bytes of prefix and header together, a multiple of 8
    nbytes: int
    _entries: memoryview

    @classmethod
    def of(cls, entries: Iterable[TensorInfo], room: Mapping[str, str]) -> FilePlan:
        """Place ``entries`` one after the other, after a header with space for metadata as long as ``room``.

        Larger element types come first, so that every entry is aligned. Raises a ValueError if two entries
        have one name, or the header would be larger than the format allows, or than it may be to be read.
        """
        tensors: dict[str, TensorInfo] = {}
        offsets: dict[str, int] = {}
        packed = io.BytesIO()
        position = 0
        for entry in sorted(entries, key=lambda e: -e.type.bits):
            if entry.name in tensors:
                raise ValueError(f"two entries are named {entry.name!r}")
            end = position + entry.nbytes
            shape = ",".join(map(str, entry.shape))
            text = f'{encode_basestring_ascii(entry.name)}:{{"dtype":"{entry.dtype}","shape":[{shape}],'
            packed.write(f'{"," if tensors else ""}{text}"data_offsets":[{position},{end}]}}'.encode("ascii"))
            tensors[entry.name], offsets[entry.name] = entry, position
            position = end
        metadata = _metadata_text(room, bool(tensors))
        size = 2 + packed.tell() + len(metadata)
        start = _PREFIX.size + (size + 7) // 8 * 8
        if start - _PREFIX.size > MAX_HEADER_BYTES:
            raise ValueError(f"the header takes {start - _PREFIX.size} bytes; at most {MAX_HEADER_BYTES} fit")
        require_bounded(metadata + packed.getvalue())
        for name in offsets:
            offsets[name] += start
        return cls(tensors, offsets, start, start + position, packed.getbuffer())

    def shrunk(self, name: str, rows: int) -> FilePlan:
        """The plan with fewer rows of the entry that lies last; nothing else moves."""
        last = self.tensors[name]
        assert self.offsets[name] + last.nbytes == self.nbytes  # nothing lies behind it
        entries = dict(self.tensors) | {name: TensorInfo(name, last.dtype, (rows, *last.shape[1:]))}
        plan = FilePlan.of(entries.values(), {})
        size = self.offsets[name] + entries[name].nbytes
        return FilePlan(plan.tensors, self.offsets, self.start, size, plan._entries)

    def pack(self, metadata: Mapping[str, str]) -> list[bytes | memoryview]:
        """Prefix and header as bytes, padded with spaces, in parts to write one after the other.

        Raises a ValueError if ``metadata`` is larger than the reserved space.
        """
        text = _metadata_text(metadata, bool(self.tensors))
        room = self.start - _PREFIX.size
        size = 2 + len(text) + len(self._entries)
        if size > room:
            raise ValueError(f"the header takes {size} bytes; at most {room} fit")
        return [_PREFIX.pack(room), b"{", text, self._entries, b"}", b" " * (room - size)]


def _metadata_text(metadata: Mapping[str, str], followed: bool) -> bytes:
    """The metadata as the header's first entry, ``followed`` by others or not."""
    if not metadata:
        return b""
    text = json.dumps(dict(metadata), separators=(",", ":"))
    return f'"__metadata__":{text}{"," if followed else ""}'.encode()
