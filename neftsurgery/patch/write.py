"""Writing a patch: its entries are placed first, its rows follow in any order, its hashes come last."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from ..selection.selection import Selection, index_dtype
from ..tensors.arrays import RawBytes
from ..tensors.dtypes import DTYPES
from ..tensors.writer import TensorFileWriter, planned_bytes, written_file
from .digests import NO_HASH, DigestHash, digests
from .patch import Manifest, Patch
from .patch_file import sealed
from .shared_entries import SharedEntries

__all__ = ["PatchWriter", "patch_bytes", "written_patch"]


class _Entries:
    """What the file of a patch of ``selection`` holds, and where."""

    def __init__(self, selection: Selection, reversible: bool) -> None:
        shared = SharedEntries()
        self.places = {
            name: shared.add(chosen.info, chosen.layout, len(chosen.index), reversible)
            for name, chosen in selection.tensors.items()
        }
        most = max((chosen.layout.count for chosen in selection), default=0)
        self.infos = shared.entries(index_dtype(most))
        self.index = np.concatenate([np.empty(0, np.int64), *(chosen.index for chosen in selection)])
        self.index = self.index.astype(DTYPES[index_dtype(most)].numpy)


def patch_bytes(selection: Selection, manifest: Manifest, reversible: bool) -> int:
    """Bytes of the file that `written_patch` would write."""
    room = sealed(_document(selection, manifest, reversible), ())
    return planned_bytes(_Entries(selection, reversible).infos, room)


class PatchWriter:
    """Takes rows, each tensor's blocks in index order. ``patch`` is set once `written_patch` has ended."""

    patch: Patch

    def __init__(
        self,
        writer: TensorFileWriter,
        entries: _Entries,
        selection: Selection,
        manifest: Manifest,
        reversible: bool,
    ) -> None:
        self._writer = writer
        self._entries = entries
        self._selection = selection
        self._manifest = manifest
        self._reversible = reversible
        self._hashes = {name: (DigestHash(), DigestHash()) for name in selection.tensors}
        writer.write("index", 0, entries.index)

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
        if self._reversible:
            assert base is not None  # whoever plans a reversible patch has them
            self._write(name, "base", start, base)
        return digests(values)

    def _write(self, name: str, part: str, start: int, rows: RawBytes) -> None:
        entry, first, step = self._entries.places[name].of(part)
        self._writer.write(entry, first + start * step, rows)

    def add_digests(self, name: str, before: RawBytes, after: RawBytes) -> None:
        """Take the digests of a tensor's next rows into its hashes: in index order."""
        for state, block in zip(self._hashes[name], (before, after), strict=True):
            state.update(block)

    def finish(self) -> None:
        """Write the manifest."""
        hashes = {name: (before.text(), after.text()) for name, (before, after) in self._hashes.items()}
        document = _document(self._selection, self._manifest, self._reversible, hashes)
        self._writer.finish(sealed(document, [("index", self._entries.index.tobytes())]))


def _document(
    selection: Selection,
    manifest: Manifest,
    reversible: bool,
    hashes: Mapping[str, tuple[str, str]] | None = None,
) -> dict[str, object]:
    """The manifest; without ``hashes``, one as long as with them."""
    tensors = dict[str, object]()
    for name, chosen in selection.tensors.items():
        before, after = (NO_HASH, NO_HASH) if hashes is None else hashes[name]
        facts = chosen.describe() | {"rows": len(chosen.index)} | ({"reversible": True} if reversible else {})
        tensors[name] = facts | {"base_hash": before, "patched_hash": after}
    return manifest.written(tensors)


@contextmanager
def written_patch(
    selection: Selection,
    manifest: Manifest,
    out: str | os.PathLike[str] | None,
    *,
    reversible: bool,
    force: bool = False,
) -> Iterator[PatchWriter]:
    """Write a patch of ``selection``, all or nothing; ``out`` None: into a nameless temporary file."""
    entries, room = _Entries(selection, reversible), sealed(_document(selection, manifest, reversible), ())
    with written_file(entries.infos, room, out, force=force) as written:
        writer = PatchWriter(written, entries, selection, manifest, reversible)
        yield writer
        writer.finish()
    writer.patch = Patch.read(written.reader())
