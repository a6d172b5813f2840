"""Writing a patch: its entries are placed first, its rows follow in any order, its hashes come last."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from ..selection.selection import Selection, index_dtype
from ..tensors.arrays import RawBytes
from ..tensors.dtypes import DTYPES
from ..tensors.writer import TensorFileWriter, planned_bytes, written_file
from .digests import NO_HASH, DigestHash, digests
from .entries import PatchEntries
from .groups import RowGroup
from .patch import Manifest, Patch
from .patch_file import sealed


class _Plan:
    """What the file of a patch holds, and where."""

    def __init__(
        self, selection: Selection, manifest: Manifest, reversible: bool, groups: Sequence[RowGroup]
    ) -> None:
        self.manifest, self.reversible, self.groups = manifest, reversible, groups
        self.tensors = dict(sorted(selection.tensors.items()))  # the order of their rows in the file
        dtype = index_dtype(max((chosen.layout.count for chosen in selection), default=0))
        entries = PatchEntries(dtype)
        self.places = {
            name: entries.add(chosen.info, chosen.layout, len(chosen.index), reversible)
            for name, chosen in self.tensors.items()
        }
        self.entries = list(entries.infos.values())
        index = [chosen.index.astype(DTYPES[dtype].numpy) for chosen in self.tensors.values()]
        self.index = np.concatenate(index) if index else np.empty(0, DTYPES[dtype].numpy)

    def metadata(self, hashes: Mapping[str, tuple[str, str]] | None = None) -> dict[str, str]:
        """That of the file; without the hashes of all tensors, one as long as with them."""
        more = {"reversible": True} if self.reversible else {}
        tensors = dict[str, object]()
        for name, chosen in self.tensors.items():
            before, after = (NO_HASH, NO_HASH) if hashes is None else hashes[name]
            facts = chosen.describe() | {"rows": len(chosen.index), **more}
            tensors[name] = facts | {"base_hash": before, "patched_hash": after}
        return sealed(self.manifest.written(tensors, self.groups), [("index", self.index.tobytes())])


def patch_bytes(
    selection: Selection, manifest: Manifest, reversible: bool, groups: Sequence[RowGroup] = ()
) -> int:
    """Bytes of the file that `written_patch` would write."""
    plan = _Plan(selection, manifest, reversible, groups)
    return planned_bytes(plan.entries, plan.metadata())


class PatchWriter:
    """Takes rows, each tensor's blocks in index order. ``patch`` is set once `written_patch` has ended."""

    patch: Patch

    def __init__(self, writer: TensorFileWriter, plan: _Plan) -> None:
        self._writer, self._plan = writer, plan
        self._hashes = {name: (DigestHash(), DigestHash()) for name in plan.places}
        writer.write("index", 0, plan.index)

    def write_rows(
        self, name: str, start: int, base: RawBytes, values: RawBytes
    ) -> tuple[RawBytes, RawBytes]:
        """Write rows from ``start``, from any thread; returns digests before and after, for `add_digests`."""
        before = digests(base)
        return before, self.write_values(name, start, before, values, base)

    def write_values(
        self, name: str, start: int, before: RawBytes, values: RawBytes, base: RawBytes | None
    ) -> RawBytes:
        """As `write_rows`, given the digests of the replaced rows; a reversible patch needs ``base``."""
        self._write(name, "value", start, values)
        self._write(name, "base_digest", start, before)
        if self._plan.reversible:
            assert base is not None  # whoever plans a reversible patch has them
            self._write(name, "base", start, base)
        return digests(values)

    def _write(self, name: str, part: str, start: int, rows: RawBytes) -> None:
        entry, first, step = self._plan.places[name][part]
        self._writer.write(entry, first + start * step, rows)

    def add_digests(self, name: str, before: RawBytes, after: RawBytes) -> None:
        """Take the digests of a tensor's next rows into its hashes: in index order."""
        for state, block in zip(self._hashes[name], (before, after), strict=True):
            state.update(block)

    def finish(self) -> None:
        """Write the manifest."""
        hashes = {name: (before.text(), after.text()) for name, (before, after) in self._hashes.items()}
        self._writer.finish(self._plan.metadata(hashes))


@contextmanager
def written_patch(
    selection: Selection,
    manifest: Manifest,
    out: str | os.PathLike[str] | None,
    *,
    reversible: bool,
    groups: Sequence[RowGroup] = (),
    force: bool = False,
) -> Iterator[PatchWriter]:
    """Write a patch of ``selection``, all or nothing; ``out`` None: into a nameless temporary file."""
    plan = _Plan(selection, manifest, reversible, groups)
    with written_file(plan.entries, plan.metadata(), out, force=force) as written:
        writer = PatchWriter(written, plan)
        yield writer
        writer.finish()
    writer.patch = Patch.read(written.reader())
