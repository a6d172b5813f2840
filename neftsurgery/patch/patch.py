"""The patch: a manifest and a reader of rows. Values come into memory in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance, require_tensors
from ..checkpoint.ties import with_tied_names
from ..errors import CorruptFileError, boundary
from ..neurons.layout import Layout, described_tensor
from ..neurons.vectors import blocks, check_index
from ..selection.selection import Chosen, RowBlock, Selection, SelectionFacts
from ..sources.resolve import Source
from ..storage.output_checks import AnyPath
from ..storage.threads import Limits
from ..tensors.arrays import Int64Array, Mask, RawBytes
from ..tensors.document import Fact, Facts, bad, require_entry
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile
from ..text import plural, size
from ..version import __version__
from .groups import RowGroup, read_groups
from .patch_file import PATCH_VERSION, DigestHash, PatchFile, digests, is_hash, require_seal

_WHAT = "neuron patch"
#: Keys of the manifest that describe the file's content: those of another file are not taken over.
_OF_CONTENT = ("version", "kind", "tensors", "groups", "content_hash")
#: By part (``index``, ``base_digest``, ``value``, ``base``): the entry that holds a tensor's rows, where they
#: begin along its first axis, and how many steps of that a row takes.
RowPlaces = dict[str, tuple[str, int, int]]


class PatchEntries:
    """Which entries of a file hold the rows of the tensors that were added, in the order of their names.

    All share an entry of indices, one of digests, and for each dtype one of new and one of replaced values,
    where they lie one behind the other. In version 1 (``own``), each tensor has entries of its own.
    """

    def __init__(self, index_dtype: str, *, own: bool = False) -> None:
        self._own, self._index_dtype = own, index_dtype
        shared = (TensorInfo("index", index_dtype, (0,)), TensorInfo("base_digest", "U8", (0, 16)))
        self.infos = {} if own else {info.name: info for info in shared}

    def add(
        self, info: TensorInfo, layout: Layout, count: int, reversible: bool, index_dtype: str | None = None
    ) -> RowPlaces:
        """Place ``count`` rows of a tensor; ``index_dtype``: that of an index of its own."""
        values = (info.dtype, 1, (layout.width,)) if self._own else (info.dtype, layout.width, ())
        parts = {
            "index": (index_dtype or self._index_dtype, 1, ()),
            "base_digest": ("U8", 1, (16,)),
            "value": values,
        }
        places = RowPlaces()
        for part, (dtype, step, row) in (parts | ({"base": values} if reversible else {})).items():
            shared = f"{part}:{dtype}" if part in ("value", "base") else part
            entry = f"{info.name}:{part}" if self._own else shared
            first = self.infos[entry].shape[0] if entry in self.infos else 0
            self.infos[entry] = TensorInfo(entry, dtype, (first + count * step, *row))
            places[part] = entry, first, step
        return places


class Manifest(Facts):
    """What a patch says of itself. `PatchWriter` adds the version and the tensors."""

    base = Fact(Provenance.from_json)  # what it was made from
    selection = Fact(SelectionFacts.from_json)  # how its neurons were chosen
    training = Fact(Facts.from_json)  # how its values were trained; empty if that is not recorded

    @classmethod
    def of(
        cls, base: Provenance, selection: SelectionFacts, more: Mapping[str, object] | None = None
    ) -> Self:
        """The manifest of a patch that is made now; ``more`` is JSON, such as ``training``."""
        parts = {"base": base.to_json(), "selection": selection.to_json()}
        return cls({**parts, "created_by": f"neftsurgery {__version__}", **(more or {})})

    def written(self, tensors: Mapping[str, object], groups: Sequence[RowGroup] = ()) -> dict[str, object]:
        """The document of a new patch file that touches ``tensors``, but for its hash."""
        more = {"groups": [asdict(group) for group in groups]} if groups else {}
        rest = {key: value for key, value in self.items() if key not in _OF_CONTENT}
        return {"version": PATCH_VERSION, "kind": Patch.kind, **rest, **more, "tensors": tensors}


@dataclass(frozen=True, slots=True)
class PatchTensor:
    """What a patch does to one tensor."""

    info: TensorInfo
    layout: Layout
    count: int  # neurons it replaces
    base_hash: str  # over the vectors' digests in index order, before and after
    patched_hash: str
    reversible: bool  # whether the replaced values are in the patch as well

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector."""
        return self.layout.width * self.info.type.itemsize

    def blocks(self, block: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of neurons (positions in the index) of bounded size."""
        return blocks(self.info, self.layout, self.count, block)


class Patch(PatchFile):
    """A neuron patch, opened. Nothing in it is ever executed, and it names no file."""

    kind = "neurons"
    tensors: dict[str, PatchTensor]  # what it touches, ordered by name
    groups: list[RowGroup]  # which of these are the codes and scales of one quantized weight
    facts = Fact(SelectionFacts.from_json, "manifest", "selection")  # how its neurons were chosen
    training = Fact(Facts.from_json, "manifest")  # how its values were trained; empty if not recorded

    def __init__(
        self, file: TensorFile, manifest: Mapping[str, Any] | None = None, source: Source | None = None
    ) -> None:
        super().__init__(file, manifest, source)
        manifest = self.manifest
        self.tensors = {name: _tensor(file, name, manifest) for name in sorted(manifest["tensors"])}
        self._places = _require_entries(file, manifest, self.tensors)
        self.groups = []
        self._last_index = "", np.empty(0, np.int64)  # the entry that was read last
        if manifest["version"] > 1:
            require_seal(file, manifest, [("index", file.array_bytes("index").tobytes())])
            self.groups = read_groups(file, manifest, self.tensors)
        for name, tensor in self.tensors.items():
            if why := check_index(self.index(name), tensor.layout.count):
                raise bad(file, _WHAT, why, name)
        for group in self.groups:
            if why := group.fault(self.tensors, self.index, self._is_new):
                raise bad(file, _WHAT, f"a group makes no sense: {why}", group.codes)

    def __str__(self) -> str:
        return self._text(
            f"patch {self._label}, {size(self.nbytes)}",
            f"  {self.what}, {plural(self.parameters, 'parameter')}",
        )

    @cached_property
    def neurons(self) -> int:
        """How many neurons it replaces; companion biases and scales do not count."""
        return sum(tensor.count for tensor in self.own.values())

    @property
    def own(self) -> dict[str, PatchTensor]:
        """What it touches, without companion biases."""
        biases = self.facts.companion_biases
        return {name: tensor for name, tensor in self.tensors.items() if name not in biases}

    @cached_property
    def parameters(self) -> int:
        """How many elements it replaces."""
        return sum(tensor.count * tensor.layout.width for tensor in self.tensors.values())

    @cached_property
    def value_bytes(self) -> int:
        """Bytes of the new values."""
        return sum(tensor.count * tensor.vector_bytes for tensor in self.tensors.values())

    @property
    def reversible(self) -> bool:
        """Whether every replaced value is in the patch."""
        return all(tensor.reversible for tensor in self.tensors.values())

    @property
    def what(self) -> str:
        """What it holds, in a few words."""
        return f"{plural(self.neurons, 'neuron')} of {plural(len(self.tensors), 'tensor')}"

    @property
    def selection(self) -> Selection:
        """Which neurons it replaces."""
        chosen = {name: Chosen(t.info, t.layout, self.index(name)) for name, t in self.tensors.items()}
        return Selection(chosen, self.facts)

    def index(self, name: str) -> Int64Array:
        """The neurons of tensor ``name``, ascending, int64 ``[k]``."""
        entry, first, _ = self._places[name]["index"]
        last, index = self._last_index
        if entry != last:
            index = self._file.array(entry)
            self._last_index = entry, index
        return index[first : first + self.tensors[name].count].astype(np.int64)

    def values(self, name: str, start: int = 0, stop: int | None = None) -> RawBytes:
        """New values ``[start, stop)`` (positions in the index) as raw bytes, ``[k, width * itemsize]``."""
        return self._rows(name, "value", start, stop)

    def base_values(self, name: str, start: int = 0, stop: int | None = None) -> RawBytes:
        """The replaced values, of a reversible tensor; as `values`."""
        return self._rows(name, "base", start, stop)

    def base_digests(self, name: str, start: int = 0, stop: int | None = None) -> RawBytes:
        """The digests of the replaced vectors, uint8 ``[k, 16]``."""
        return self._rows(name, "base_digest", start, stop)

    def _rows(self, name: str, part: str, start: int = 0, stop: int | None = None) -> RawBytes:
        count = self.tensors[name].count
        stop = count if stop is None else min(stop, count)
        entry, first, step = self._places[name][part]
        raw = self._file.array_bytes(entry, first + start * step, first + stop * step)
        return raw.reshape(stop - start, step * raw.shape[1])

    def blocks(self, block: int | None = None) -> Iterator[RowBlock]:
        """All of its rows, tensor by tensor, in ranges of bounded size; an empty one if a tensor has none."""
        for name, tensor in self.tensors.items():
            for start, stop in [*tensor.blocks(block)] or [(0, 0)]:
                yield RowBlock(name, start, stop, (stop - start) * tensor.vector_bytes)

    def _is_new(self, name: str) -> Mask:
        """Of each row of a small tensor whether its value is not the one that it replaces."""
        new: Mask = (digests(self.values(name)) != self.base_digests(name)).any(axis=1)
        return new

    @classmethod
    def from_adapter(
        cls, adapter: AnyPath, base: AnyPath, out: AnyPath | None = None, *, force: bool = False
    ) -> Patch:
        """The patch on the files of ``base`` that an adapter of `neftsurgery.peft` is.

        Its values are the adapter's, rounded to the dtype of the files. ``out``: where to write it; None: to
        a temporary file, until it is saved. Needs the training extra and PEFT. Raises a `UsageError` if the
        adapter is of another method, or also holds whole modules, a `MismatchError` if it is not of ``base``,
        and a `CorruptFileError` if it is damaged.
        """
        from ..peft.conversion import patch_of_adapter

        return patch_of_adapter(adapter, base, out, force=force)

    def to_adapter(self, adapter: AnyPath, base: AnyPath, *, force: bool = False) -> None:
        """Write the folder of the adapter of `neftsurgery.peft` that this patch on ``base`` is, exactly.

        Raises a `UsageError` for neurons that cannot be an adapter, such as those of biases, and a
        `MismatchError` if the model of ``base`` does not have them. Needs the training extra and PEFT.
        """
        from ..peft.conversion import adapter_of_patch

        adapter_of_patch(self, adapter, base, force=force)

    def require_fit(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with the touched tensors under their names; a `MismatchError` if it lacks one."""
        infos = [tensor.info for tensor in self.tensors.values()]
        fitting = with_tied_names(checkpoint, infos)
        require_tensors(fitting, infos, self.name, self.base)
        return fitting

    @boundary
    def check(self, *, limits: Limits | None = None) -> None:
        """Compare the patch's hashes with its content, all of it; a `CorruptFileError` if one is wrong."""
        for name, tensor in self.tensors.items():
            before, after = DigestHash(), DigestHash()
            for start, stop in tensor.blocks(None if limits is None else limits.block):
                stored = self.base_digests(name, start, stop)
                before.update(stored)
                after.update(digests(self.values(name, start, stop)))
                self.check_base_rows(name, stored, start, stop)
            self.check_hashes(name, before, after)

    def check_base_rows(self, name: str, stored: RawBytes, start: int, stop: int) -> None:
        """Compare the replaced values of a reversible tensor with their digests."""
        if self.tensors[name].reversible and not np.array_equal(
            digests(self.base_values(name, start, stop)), stored
        ):
            raise self._mismatch(name, "the replaced values do not match their digests")

    def check_hashes(self, name: str, before: DigestHash, after: DigestHash) -> None:
        """Compare the hashes of a tensor's digests, before and after, with the manifest's."""
        tensor = self.tensors[name]
        if before.text() != tensor.base_hash:
            raise self._mismatch(name, "the base digests do not match base_hash")
        if after.text() != tensor.patched_hash:
            raise self._mismatch(name, "the values do not match patched_hash")

    def _mismatch(self, name: str, what: str) -> CorruptFileError:
        return CorruptFileError(
            what, file=self.place, tensor=name, hint="the patch is damaged or was altered: fetch it again"
        )


def _tensor(file: TensorFile, name: str, manifest: Mapping[str, Any]) -> PatchTensor:
    entry = manifest["tensors"][name]
    info, layout = described_tensor(file, _WHAT, name, entry)
    before, after = entry.get("base_hash"), entry.get("patched_hash")
    if not is_hash(before) or not is_hash(after):
        raise bad(file, _WHAT, "its base_hash or patched_hash is missing or no hash", name)
    if manifest["version"] == 1:
        index = file.tensors.get(f"{name}:index")
        if index is None or index.dtype not in ("I32", "I64") or len(index.shape) != 1:
            raise bad(file, _WHAT, "it has no index, or not one of whole numbers", name)
        return PatchTensor(info, layout, index.shape[0], before, after, f"{name}:base" in file.tensors)
    rows, reversible = entry.get("rows"), entry.get("reversible", False)
    if type(rows) is not int or not 0 <= rows <= layout.count or not isinstance(reversible, bool):
        raise bad(file, _WHAT, "its rows or reversible are missing or make no sense", name)
    return PatchTensor(info, layout, rows, before, after, reversible)


def _require_entries(
    file: TensorFile, manifest: Mapping[str, Any], tensors: Mapping[str, PatchTensor]
) -> dict[str, RowPlaces]:
    """Where the rows of each tensor lie; a `CorruptFileError` unless the file has just their entries."""
    own, index = manifest["version"] == 1, file.tensors.get("index")
    entries = PatchEntries("I64" if index is not None and index.dtype == "I64" else "I32", own=own)
    places = {}
    for name, tensor in tensors.items():
        dtype = file.tensors[f"{name}:index"].dtype if own else None
        places[name] = entries.add(tensor.info, tensor.layout, tensor.count, tensor.reversible, dtype)
    for entry in entries.infos.values():
        require_entry(file, _WHAT, entry)
    for name in file.tensors:
        if name not in entries.infos:
            raise bad(file, _WHAT, "an entry that belongs to no tensor of the manifest", name)
    return places
