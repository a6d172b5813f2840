"""The patch: a manifest and a reader of rows. Values come into memory in blocks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance, require_tensors
from ..checkpoint.ties import with_tied_names
from ..errors import CorruptFileError, MismatchError, boundary
from ..neurons.layout import Layout, described_tensor
from ..neurons.vectors import blocks, check_index
from ..selection.selection import Chosen, Selection, SelectionFacts
from ..sources.resolve import Source, resolve_file
from ..storage.threads import Limits
from ..tensors.arrays import Int64Array, RawBytes
from ..tensors.document import Facts, bad, read_document, require_entry
from ..tensors.header import TensorInfo
from ..tensors.reader import FileBacked, TensorFile
from ..text import lines, plural, printable, size
from ..version import __version__
from .digests import DigestHash, digests

__all__ = ["PATCH_KEY", "PATCH_NAME", "PATCH_VERSION", "Manifest", "Patch", "PatchFile", "PatchTensor"]

PATCH_VERSION: Final = 1
#: The version from which the file holds a whole fine-tune: see `neftsurgery.patch.lossless`.
LOSSLESS_VERSION: Final = 2
PATCH_KEY = "neuron_patch"
PATCH_NAME = "neuron_patch.safetensors"
_WHAT = "neuron patch"
_HASH = re.compile(r"xxh3-128:[0-9a-f]{32}")


class Manifest(Facts):
    """What a patch says of itself. `PatchWriter` adds the version and the tensors."""

    @classmethod
    def of(
        cls, base: Provenance, selection: SelectionFacts, more: Mapping[str, object] | None = None
    ) -> Self:
        """The manifest of a patch that is made now; ``more`` is JSON, such as ``training``."""
        parts = {"base": base.to_json(), "selection": selection.to_json()}
        return cls({**parts, "created_by": f"neftsurgery {__version__}", **(more or {})})

    @property
    def base(self) -> Provenance:
        """What the patch was made from."""
        return Provenance.from_json(self.get("base"))

    @property
    def selection(self) -> SelectionFacts:
        """How its neurons were chosen."""
        return SelectionFacts.from_json(self.get("selection"))

    @property
    def training(self) -> Facts:
        """How its values were trained; empty if that is not recorded."""
        return Facts.from_json(self.get("training"))

    def written(self, tensors: Mapping[str, object]) -> dict[str, object]:
        """The document of a new patch file that touches ``tensors``."""
        rest = {key: value for key, value in self.items() if key not in ("version", "tensors")}
        return {"version": PATCH_VERSION, **rest, "tensors": tensors}


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


class PatchFile(FileBacked):
    """A file that holds a patch of either kind, and what was named to open it."""

    source: Source | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.place) if self.place is not None else "the patch"

    @property
    def place(self) -> str | os.PathLike[str] | None:
        """Where errors say it is: a file, or as the Hub calls it; None for one that was never saved."""
        return self.source.named if self.source is not None and self.source.repo is not None else self.path


class Patch(PatchFile):
    """A neuron patch, opened. Nothing in it is ever executed, and it names no file.

    Attributes
    ----------
    manifest:
        The JSON document of the file; `base`, `facts` and `training` are its parts.
    tensors:
        What it touches, ordered by name.
    source:
        What was named to open it; None for a patch that was made here.
    """

    def __init__(
        self,
        file: TensorFile,
        manifest: Mapping[str, object],
        tensors: Mapping[str, PatchTensor],
        source: Source | None = None,
    ) -> None:
        super().__init__(file)
        self.manifest = manifest
        self.tensors = tensors
        self.source = source

    def __repr__(self) -> str:
        what = f"{plural(self.neurons, 'neuron')} of {plural(len(self.tensors), 'tensor')}"
        return printable(f"<Patch {self._label}: {what}>")

    def __str__(self) -> str:
        undo = "reversible" if self.reversible else "not reversible: revert needs the base"
        return lines(
            [
                f"patch {self._label}, {size(self.nbytes)}",
                f"  {plural(self.neurons, 'neuron')} of {plural(len(self.tensors), 'tensor')}, "
                f"{plural(self.parameters, 'parameter')}",
                f"  made from {self.base.label or 'unknown'}; {undo}",
            ]
        )

    @property
    def _label(self) -> str:
        return str(self.place) if self.place is not None else "(not saved)"

    @classmethod
    @boundary
    def load(cls, named: str | os.PathLike[str] | Source) -> Patch:
        """Open a patch. Its structure and indices are checked; `check` checks its hashes.

        Parameters
        ----------
        named:
            A file; or ``org/name`` or ``org/name@revision`` of the Hub, of which the patch alone is fetched
            into huggingface_hub's cache. A local path beats a Hub id.

        Raises
        ------
        UsageError
            If there is no such file, repository or revision.
        MismatchError
            If the Hub repository holds no patch.
        CorruptFileError
            If it is no patch, damaged, or of a newer version.
        MachineError
            If it cannot be read, or the Hub refuses or cannot be reached.
        """
        source = named if isinstance(named, Source) else resolve_file(named, PATCH_NAME)
        return cls.read(TensorFile.named(source.path, PATCH_KEY), source)

    @classmethod
    def read(cls, file: TensorFile, source: Source | None = None) -> Patch:
        """The patch in an open file, which is the new object's from now on."""
        manifest = read_document(file, PATCH_KEY, _WHAT, LOSSLESS_VERSION)
        if manifest["version"] >= LOSSLESS_VERSION:
            raise MismatchError(
                "the patch is lossless: it holds a whole fine-tune, not chosen neurons",
                file=file.path,
                hint="write the tuned checkpoint with `neftsurgery apply BASE PATCH -o OUT`",
            )
        tensors = {
            name: _tensor(file, name, manifest["tensors"][name]) for name in sorted(manifest["tensors"])
        }
        known = {f"{name}:{entry}" for name in tensors for entry in ("index", "value", "base_digest", "base")}
        for name in file.tensors:
            if name not in known:
                raise bad(file, _WHAT, "an entry that belongs to no tensor of the manifest", name)
        patch = cls(file, manifest, tensors, source)
        for name, tensor in tensors.items():
            if why := check_index(patch.index(name), tensor.layout.count):
                raise bad(file, _WHAT, why, name)
        return patch

    @cached_property
    def neurons(self) -> int:
        """How many neurons it replaces, companion biases not counted."""
        biases = self.facts.companion_biases
        return sum(tensor.count for name, tensor in self.tensors.items() if name not in biases)

    @cached_property
    def parameters(self) -> int:
        """How many elements it replaces."""
        return sum(tensor.count * tensor.layout.width for tensor in self.tensors.values())

    @property
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
    def facts(self) -> SelectionFacts:
        """How its neurons were chosen, as far as that is known."""
        return Manifest(self.manifest).selection

    @property
    def base(self) -> Provenance:
        """What it was made from, as far as that is known."""
        return Manifest(self.manifest).base

    @property
    def training(self) -> Facts:
        """How its values were trained; empty if that is not recorded."""
        return Manifest(self.manifest).training

    @property
    def selection(self) -> Selection:
        """Which neurons it replaces."""
        chosen = {name: Chosen(t.info, t.layout, self.index(name)) for name, t in self.tensors.items()}
        return Selection(chosen, self.facts)

    def index(self, name: str) -> Int64Array:
        """The neurons of tensor ``name``, ascending, int64 ``[k]``."""
        return self._file.array(f"{name}:index").astype(np.int64)

    def values(self, name: str, start: int = 0, stop: int | None = None) -> RawBytes:
        """New values ``[start, stop)`` (positions in the index) as raw bytes, ``[k, width * itemsize]``."""
        return self._file.array_bytes(f"{name}:value", start, stop)

    def base_values(self, name: str, start: int = 0, stop: int | None = None) -> RawBytes:
        """The replaced values, of a reversible tensor; as `values`."""
        return self._file.array_bytes(f"{name}:base", start, stop)

    def base_digests(self, name: str, start: int = 0, stop: int | None = None) -> RawBytes:
        """The digests of the replaced vectors, uint8 ``[k, 16]``."""
        return self._file.array(f"{name}:base_digest", start, stop)

    def require_fit(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint, in which the touched tensors are found under their names in the patch.

        Raises a `MismatchError` unless it has them, in shape and dtype.
        """
        infos = [tensor.info for tensor in self.tensors.values()]
        fitting = with_tied_names(checkpoint, infos)
        require_tensors(fitting, infos, self.name, self.base)
        return fitting

    @boundary
    def check(self, *, limits: Limits | None = None) -> None:
        """Compare the patch's hashes with its content; reads all of it.

        Raises
        ------
        CorruptFileError
            If they do not match.
        """
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


def _tensor(file: TensorFile, name: str, entry: object) -> PatchTensor:
    info, layout = described_tensor(file, _WHAT, name, entry)
    assert isinstance(entry, dict)  # described_tensor has checked it
    index = file.tensors.get(f"{name}:index")
    if index is None or index.dtype not in ("I32", "I64") or len(index.shape) != 1:
        raise bad(file, _WHAT, "it has no index, or not one of whole numbers", name)
    count = index.shape[0]
    shapes = {"value": (info.dtype, (count, layout.width)), "base_digest": ("U8", (count, 16))}
    if reversible := f"{name}:base" in file.tensors:
        shapes["base"] = shapes["value"]
    for part, (dtype, shape) in shapes.items():
        require_entry(file, _WHAT, name, part, dtype, shape)
    hashes = [str(entry.get(key)) for key in ("base_hash", "patched_hash")]
    if not all(_HASH.fullmatch(text) for text in hashes):
        raise bad(file, _WHAT, "its base_hash or patched_hash is missing or no hash", name)
    return PatchTensor(info, layout, count, hashes[0], hashes[1], reversible)
