"""The way from one checkpoint to another: the target's files, and how each block follows from the source's.

A *block* is a range of at most 2^20 elements of one tensor. The blocks of a delta are those of the target's
weight files, in order: of the files, of the data in each, and of the elements in each tensor. They are
compared with the same tensor of the source, as far as it reaches.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..checkpoint.folder_files import MOST_SIDE_BYTES, is_side
from ..checkpoint.weight_files import is_plain_path
from ..coding.blocks import Form, decode
from ..coding.compression import compress, content_size, decompress
from ..coding.elements import BLOCK, Carrier, Elements
from ..coding.tables import FrequencyTable, unpack
from ..errors import MismatchError
from ..neurons.submodels import split_part
from ..tensors.document import bad, require_entry
from ..tensors.header import MAX_HEADER_BYTES, Header, TensorInfo, parse_header
from ..tensors.json_text import loads
from ..tensors.reader import TensorFile, TensorReader

#: The arrays with an element per block, and their types in the file.
ARRAYS = {
    "form": "U8", "table": "U16", "size": "U32", "changed": "U32", "before": "U64", "after": "U64",
}  # fmt: skip
#: All entries of a delta, by the part of their names behind the prefix.
ENTRIES = (*ARRAYS, "layout", "tables", "side")
_PREFIX = struct.Struct("<Q")
_BLOCK_BYTES = 27  # in the arrays
_LAYOUT_LEVEL = 10
_WHAT = "patch"


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A weight file of the target: its name, and its header, byte for byte."""

    name: str  # its path: ``unet/model.safetensors`` in the part ``unet/``, whose tensors are called so, too
    header: Header
    raw: bytes  # the header's JSON text with its padding

    @property
    def start(self) -> bytes:
        """The first bytes of the file, up to its data."""
        return _PREFIX.pack(len(self.raw)) + self.raw

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.header.size + sum(info.nbytes for info in self.header.tensors.values())


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file beside the weights that the patch carries."""

    name: str
    nbytes: int
    sha256: str
    packed: int  # bytes in the patch, compressed by zstd; 0: it is the source's file of that name


@dataclass(frozen=True, slots=True)
class DeltaBlock:
    """A range of elements of a tensor of the target."""

    number: int
    file: WeightFile
    info: TensorInfo
    start: int  # in elements of `Elements.of`
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def elements(self) -> Elements:
        """How its elements are compared."""
        return Elements.of(self.info.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return len(self) * self.elements.size

    @property
    def offset(self) -> int:
        """Where it begins in the file."""
        return self.file.header.offsets[self.info.name] + self.start * self.elements.size


def blocks_of(files: Sequence[WeightFile]) -> Iterator[DeltaBlock]:
    """All blocks of weight files, in order."""
    number = 0
    for file in files:
        for info in file.header.tensors.values():
            count = info.nbytes // Elements.of(info.dtype).size
            for start in range(0, count, BLOCK):
                yield DeltaBlock(number, file, info, start, min(start + BLOCK, count))
                number += 1


def _block_count(files: Sequence[WeightFile]) -> int:
    """How many `blocks_of` there are, counted without making them."""
    tensors = (info for file in files for info in file.header.tensors.values())
    return sum(-(-info.nbytes // Elements.of(info.dtype).size // BLOCK) for info in tensors)


def _most_layout(nbytes: int) -> int:
    """Bytes that the layout in a patch of ``nbytes`` may have, so that a small patch takes little memory."""
    return (4 << 20) + 8 * nbytes


def counterpart(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """What a tensor of the target is compared with: same name, same dtype, rows of the same shape."""
    found = tensors.get(info.name)
    if found is None or found.dtype != info.dtype:
        return None
    return found if len(found.shape) == len(info.shape) and found.shape[1:] == info.shape[1:] else None


def read_block(weights: TensorReader, block: DeltaBlock) -> Carrier:
    """A block of weights that have all of it."""
    found = np.empty(len(block), block.elements.carrier)
    weights.read_into(block.info.name, block.start * block.elements.size, found.view(np.uint8).data)
    return found


def block_state(weights: TensorReader, block: DeltaBlock) -> tuple[Carrier | None, int, bool]:
    """What weights have of a block: its elements, filled up with zeros; their hash; whether it is whole."""
    info, size = counterpart(block.info, weights.tensors), block.elements.size
    there = 0 if info is None else min(block.stop, info.nbytes // size) - block.start
    if there <= 0:
        return None, 0, False
    found = np.zeros(len(block), block.elements.carrier)
    weights.read_into(block.info.name, block.start * size, found[:there].view(np.uint8).data)
    return found, block_hash(found[:there]), there == len(found)


def block_hash(elements: Carrier) -> int:
    """XXH3-64 of the bytes of elements."""
    return xxhash.xxh3_64_intdigest(elements.data.cast("B")) if len(elements) else 0


def pack_layout(files: Sequence[WeightFile], side: Sequence[SideFile], *, single: bool) -> bytes:
    """The layout of a target, packed; a `MismatchError` if it is out of proportion to its blocks."""
    content = {
        "single": single,
        "files": [{"name": file.name, "header": file.raw.decode()} for file in files],
        "side": [
            {"name": one.name, "bytes": one.nbytes, "sha256": one.sha256, "packed": one.packed}
            for one in side
        ],
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    packed = compress(text, _LAYOUT_LEVEL)
    if len(text) > _most_layout(len(packed) + _BLOCK_BYTES * _block_count(files)):
        raise MismatchError("the headers of the weight files are too large for what they describe")
    return packed


class Delta:
    """A delta of a patch file, under a prefix, checked; its blocks begin at ``code`` in the file's code."""

    def __init__(self, file: TensorFile, prefix: str, code: int = 0) -> None:
        self._file, self._prefix = file, prefix
        layout = self._layout()
        self.single = layout.get("single") is True
        self.files = tuple(self._weight_file(entry) for entry in _objects(layout.get("files")))
        self.side = tuple(self._side_file(entry) for entry in _objects(layout.get("side")))
        if sum(len(file.header.tensors) for file in self.files) != len(self.tensors):
            raise self._bad("a tensor is in two files")
        count = _block_count(self.files)
        for name, dtype in ARRAYS.items():  # before anything is made for each block
            require_entry(file, _WHAT, TensorInfo(f"{prefix}:{name}", dtype, (count,)))
        self.blocks = tuple(blocks_of(self.files))
        self.forms: NDArray[np.uint8] = self._array("form")
        self.sizes = self._array("size").astype(np.int64)
        self.changed = self._array("changed").astype(np.int64)  # elements that differ from the source
        self.before: NDArray[np.uint64] = self._array("before")
        self.after: NDArray[np.uint64] = self._array("after")
        self.table_of: NDArray[np.uint16] = self._array("table")
        self._starts = code + np.cumsum(self.sizes) - self.sizes
        self.code_end = code + int(self.sizes.sum())
        names = [file.name for file in self.files] + [one.name for one in self.side]
        folders = {name.partition("/")[0] for name in names if "/" in name}
        own = len({*names, *folders}) == len(names) + len(folders)
        if not (self.files and own and all(map(is_plain_path, names))):
            raise self._bad("its files have no plain names of their own")
        if not self.single and not all(file.name.endswith(".safetensors") for file in self.files):
            raise self._bad("a weight file has another ending than .safetensors")
        if self.single and len(self.files) + len(self.side) > 1:
            raise self._bad("it makes a single file, and holds several")
        if not all(is_side(one.name) for one in self.side):
            raise self._bad("it holds a file that does not belong beside weights")
        if self.forms.size and int(self.forms.max()) > max(Form):
            raise self._bad("a block has an unknown form")
        packed = sum(one.packed for one in self.side)
        require_entry(file, _WHAT, TensorInfo(f"{prefix}:side", "U8", (packed,)))
        try:
            self.tables: Sequence[FrequencyTable] = unpack(self._content("tables"), count)
        except ValueError as error:
            raise self._bad(str(error)) from error
        coded = self.table_of[self.forms == Form.CODED]
        if coded.size and int(coded.max()) >= len(self.tables):
            raise self._bad("a block names a table that is not there")

    @property
    def nbytes(self) -> int:
        """Bytes of the target's weight files."""
        return sum(file.nbytes for file in self.files)

    @property
    def block_bytes(self) -> int:
        """Bytes of all blocks: what work on each of them makes progress by."""
        return sum(block.nbytes for block in self.blocks)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors of the target, by name."""
        return {info.name: info for file in self.files for info in file.header.tensors.values()}

    def decoded(self, block: DeltaBlock, base: Carrier | None) -> Carrier:
        """The target's block, from that of the source; a `CorruptFileError` if it has another hash."""
        number = block.number
        if self.sizes[number] > block.nbytes:
            raise self._bad("a block takes more bytes than it has", block.info.name)
        code = bytearray(int(self.sizes[number]))
        self._file.read_into("code", int(self._starts[number]), memoryview(code))
        out = np.empty(len(block), block.elements.carrier)
        form = int(self.forms[number])
        table = self.tables[int(self.table_of[number])] if form == Form.CODED else None
        try:
            decode(form, bytes(code), base, out, block.elements, table)
        except ValueError as error:
            raise self._bad(f"the code of a block does not hold: {error}", block.info.name) from error
        if block_hash(out) != int(self.after[number]):
            raise self._bad("a block does not have the hash of its result", block.info.name)
        return out

    def compared(self, block: DeltaBlock, weights: TensorReader) -> tuple[Carrier | None, bool, bool]:
        """What weights have of a block, and whether that is the source's, and whether the target's."""
        found, digest, whole = block_state(weights, block)
        is_target = whole and digest == int(self.after[block.number])
        return found, digest == int(self.before[block.number]), is_target

    def block_at(self, name: str, start: int) -> DeltaBlock | None:
        """The block of tensor ``name`` that begins at element ``start``; None beyond its end."""
        number = self._first.get(name, len(self.blocks)) + start // BLOCK
        block = self.blocks[number] if number < len(self.blocks) else None
        return block if block is not None and (block.info.name, block.start) == (name, start) else None

    @cached_property
    def _first(self) -> dict[str, int]:
        return {block.info.name: block.number for block in reversed(self.blocks)}

    def side_content(self, side: SideFile, source: Callable[[], bytes]) -> bytes:
        """The content of a side file, from the patch or from ``source``; its hash is checked."""
        if side.packed == 0:
            content = source()
            if hashlib.sha256(content).hexdigest() != side.sha256:
                raise MismatchError(
                    f"the {side.name} beside the weights is not the one that the patch was made with",
                    file=self._file.path,
                    hint="restore it, or use the checkpoint that the patch was made from",
                )
            return content
        start = sum(one.packed for one in self.side[: self.side.index(side)])
        packed = bytearray(side.packed)
        self._file.read_into(f"{self._prefix}:side", start, memoryview(packed))
        try:
            found = decompress(bytes(packed), side.nbytes)
        except ValueError as error:
            raise self._bad(f"the side file {side.name} is damaged") from error
        if hashlib.sha256(found).hexdigest() != side.sha256:
            raise self._bad(f"the side file {side.name} does not match its hash")
        return found

    def index_bytes(self) -> Iterator[tuple[str, bytes]]:
        """Everything but the code, by name: what the patch's own hash is over."""
        for name in ENTRIES:
            yield f"{self._prefix}:{name}", self._file.array_bytes(f"{self._prefix}:{name}").tobytes()

    def _content(self, name: str) -> bytes:
        entry = self._file.tensors.get(f"{self._prefix}:{name}")
        if entry is None or entry.dtype != "U8" or len(entry.shape) != 1:
            raise self._bad(f"it has no {name}")
        return self._file.array_bytes(entry.name).tobytes()

    def _layout(self) -> dict[str, Any]:
        packed = self._content("layout")
        try:
            size = content_size(packed)
            if size > _most_layout(self._file.nbytes):
                raise self._bad("its layout is too large")
            found = loads(decompress(packed, size))
        except (ValueError, RecursionError) as error:
            raise self._bad("its layout is not valid") from error
        if not isinstance(found, dict):
            raise self._bad("its layout is not an object")
        return found

    def _weight_file(self, entry: Mapping[str, Any]) -> WeightFile:
        name, text = entry.get("name"), entry.get("header")
        if not isinstance(name, str) or not isinstance(text, str):
            raise self._bad("a weight file has no name or header")
        raw = text.encode("utf-8", "surrogatepass")
        try:
            header = parse_header(raw, self._file.path)
            if len(raw) > MAX_HEADER_BYTES or not _is_valid(header, loads(raw)):
                raise ValueError("not a header that the safetensors package accepts")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._bad("the header of a weight file does not follow the format") from error
        part, _ = split_part(name)
        return WeightFile(name, header.renamed(lambda own: part + own), raw)

    def _side_file(self, entry: Mapping[str, Any]) -> SideFile:
        values: list[Any] = [entry.get(key) for key in ("name", "bytes", "sha256", "packed")]
        kinds = [str, int, str, int]
        if [type(value) for value in values] != kinds or not all(
            0 <= number <= 2 * MOST_SIDE_BYTES for number in values[1::2]
        ):
            raise self._bad("a side file is not described")
        return SideFile(*values)

    def _array(self, name: str) -> NDArray[Any]:
        return self._file.array(f"{self._prefix}:{name}")

    def _bad(self, why: str, tensor: str | None = None) -> Exception:
        return bad(self._file, _WHAT, why, tensor)


def _is_valid(header: Header, content: Mapping[str, Any]) -> bool:
    """Whether the safetensors package accepts a header, with data that fills the file from end to end."""
    metadata = content.get("__metadata__") or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        return False
    end = 0
    for name, info in header.tensors.items():
        begin, stop = content[name]["data_offsets"]
        if not all(type(number) is int and 0 <= number < 1 << 64 for number in (begin, stop, *info.shape)):
            return False
        if any(size >= 1 << 64 for size in accumulate(info.shape, mul)):
            return False
        if begin != end or stop != begin + info.nbytes or info.elements * info.type.bits % 8:
            return False
        end = stop
    return True


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
