"""Writing a patch: its entries are placed first, its rows follow in any order, its hashes come last."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..selection.selection import Chosen, RowBlock, Selection, index_dtype
from ..storage.threads import in_order
from ..tensors.arrays import RawBytes
from ..tensors.dtypes import DTYPES
from ..tensors.header import TensorInfo
from ..tensors.writer import TensorFileWriter, planned_bytes, written_file
from .groups import RowGroup
from .patch import Manifest, Patch, PatchEntries, RowPlaces
from .patch_file import NO_HASH, DigestHash, digests, sealed


@dataclass(frozen=True)
class NewPatch:
    """A patch that is still to be written: what its file holds, and where."""

    selection: Selection
    manifest: Manifest
    reversible: bool = False
    groups: Sequence[RowGroup] = ()

    @cached_property
    def tensors(self) -> dict[str, Chosen]:
        """The chosen neurons, in the order of their rows in the file."""
        return dict(sorted(self.selection.tensors.items()))

    @cached_property
    def placed(self) -> tuple[list[TensorInfo], dict[str, RowPlaces]]:
        """The entries of the file, and where in them the rows of each tensor lie."""
        most = max((chosen.layout.count for chosen in self.selection), default=0)
        entries = PatchEntries(index_dtype(most))
        places = {
            name: entries.add(chosen.info, chosen.layout, len(chosen.index), self.reversible)
            for name, chosen in self.tensors.items()
        }
        return [*entries.infos.values()], places

    @cached_property
    def index(self) -> NDArray[np.signedinteger]:
        """The neurons of all tensors, one behind the other."""
        dtype = DTYPES[self.placed[0][0].dtype].numpy
        return np.concatenate([np.empty(0, dtype), *(c.index.astype(dtype) for c in self.tensors.values())])

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return planned_bytes(self.placed[0], self.metadata())

    def metadata(self, hashes: Mapping[str, tuple[str, str]] | None = None) -> dict[str, str]:
        """That of the file; without the hashes of all tensors, one as long as with them."""
        more = {"reversible": True} if self.reversible else {}
        tensors = dict[str, object]()
        for name, chosen in self.tensors.items():
            before, after = (NO_HASH, NO_HASH) if hashes is None else hashes[name]
            facts = chosen.describe() | {"rows": len(chosen.index), **more}
            tensors[name] = facts | {"base_hash": before, "patched_hash": after}
        return sealed(self.manifest.written(tensors, self.groups), [("index", self.index.tobytes())])

    @contextmanager
    def written(self, out: str | os.PathLike[str] | None, *, force: bool = False) -> Iterator[PatchWriter]:
        """Write it, all or nothing; ``out`` None: into a nameless temporary file."""
        with written_file(self.placed[0], self.metadata(), out, force=force) as written:
            writer = PatchWriter(written, self)
            yield writer
            writer.finish()
        writer.patch = Patch(written.reader())


class PatchWriter:
    """Takes the rows of all blocks. ``patch`` is set once all is written."""

    patch: Patch

    def __init__(self, writer: TensorFileWriter, plan: NewPatch) -> None:
        self._writer, self._plan, self._places = writer, plan, plan.placed[1]
        self._hashes = {name: (DigestHash(), DigestHash()) for name in self._places}
        writer.write("index", 0, plan.index)

    def write_blocks(
        self,
        rows: Callable[[RowBlock], tuple[RawBytes, RawBytes | None, RawBytes]],
        workers: int = 1,
        block: int | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Write all blocks; ``rows`` gives the new rows of one, the replaced ones, and their digests.

        It is called in other threads. Only a reversible patch needs the replaced rows.
        """

        def write(part: RowBlock) -> tuple[RawBytes, RawBytes]:
            values, base, before = rows(part)
            for kind, written in (("value", values), ("base_digest", before), ("base", base)):
                if kind in self._places[part.name]:
                    assert written is not None  # whoever plans a reversible patch has the replaced rows
                    entry, first, step = self._places[part.name][kind]
                    self._writer.write(entry, first + part.start * step, written)
            return before, digests(values)

        blocks = self._plan.selection.blocks(block)
        for part, found in in_order(write, blocks, workers, nbytes=lambda part: part.nbytes):
            for state, some in zip(self._hashes[part.name], found, strict=True):
                state.update(some)
            advance(part.nbytes)

    def finish(self) -> None:
        """Write the manifest."""
        hashes = {name: (before.text(), after.text()) for name, (before, after) in self._hashes.items()}
        self._writer.finish(self._plan.metadata(hashes))
