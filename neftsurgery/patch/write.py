"""Writing a patch: its entries are placed first, its rows follow in any order, its hashes come last."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..checkpoint.provenance import HASH_PREFIX
from ..selection.selection import Selection, index_dtype
from ..tensors.arrays import RawBytes
from ..tensors.document import dump
from ..tensors.dtypes import DTYPES
from ..tensors.header import TensorInfo
from ..tensors.writer import TensorFileWriter, planned_bytes, written_file
from .digests import DigestHash, digests
from .patch import PATCH_KEY, Manifest, Patch

__all__ = ["PatchWriter", "patch_bytes", "written_patch"]

_NO_HASH = HASH_PREFIX + "0" * 32


def _entries(selection: Selection, reversible: bool) -> list[TensorInfo]:
    entries = []
    for name, chosen in selection.tensors.items():
        count, width = len(chosen.index), chosen.layout.width
        entries.append(TensorInfo(f"{name}:index", index_dtype(chosen.layout.count), (count,)))
        entries.append(TensorInfo(f"{name}:base_digest", "U8", (count, 16)))
        parts = ("value", "base") if reversible else ("value",)
        entries += [TensorInfo(f"{name}:{part}", chosen.info.dtype, (count, width)) for part in parts]
    return entries


def patch_bytes(selection: Selection, manifest: Manifest, reversible: bool) -> int:
    """Bytes of the file that `written_patch` would write."""
    return planned_bytes(_entries(selection, reversible), _room(selection, manifest))


class PatchWriter:
    """Takes rows, each tensor's blocks in index order. ``patch`` is set once `written_patch` has ended."""

    patch: Patch

    def __init__(
        self, writer: TensorFileWriter, selection: Selection, manifest: Manifest, reversible: bool
    ) -> None:
        self._writer = writer
        self._selection = selection
        self._manifest = manifest
        self._reversible = reversible
        self._hashes = {name: (DigestHash(), DigestHash()) for name in selection.tensors}
        for name, chosen in selection.tensors.items():
            kind = DTYPES[index_dtype(chosen.layout.count)].numpy
            writer.write(f"{name}:index", 0, chosen.index.astype(kind))

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
        self._writer.write(f"{name}:value", start, values)
        self._writer.write(f"{name}:base_digest", start, before)
        if self._reversible:
            assert base is not None  # whoever plans a reversible patch has them
            self._writer.write(f"{name}:base", start, base)
        return digests(values)

    def add_digests(self, name: str, before: RawBytes, after: RawBytes) -> None:
        """Take the digests of a tensor's next rows into its hashes: in index order."""
        for state, block in zip(self._hashes[name], (before, after), strict=True):
            state.update(block)

    def finish(self) -> None:
        """Write the manifest."""
        hashes = {name: (before.text(), after.text()) for name, (before, after) in self._hashes.items()}
        self._writer.finish(_metadata(self._selection, self._manifest, hashes))


def _room(selection: Selection, manifest: Manifest) -> dict[str, str]:
    """Metadata as long as the final one."""
    return _metadata(selection, manifest, dict.fromkeys(selection.tensors, (_NO_HASH, _NO_HASH)))


def _metadata(
    selection: Selection, manifest: Manifest, hashes: Mapping[str, tuple[str, str]]
) -> dict[str, str]:
    tensors = {
        name: chosen.describe() | {"base_hash": hashes[name][0], "patched_hash": hashes[name][1]}
        for name, chosen in selection.tensors.items()
    }
    return dump(PATCH_KEY, manifest.written(tensors))


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
    room = _room(selection, manifest)
    with written_file(_entries(selection, reversible), room, out, force=force) as written:
        writer = PatchWriter(written, selection, manifest, reversible)
        yield writer
        writer.finish()
    writer.patch = Patch.read(written.reader())
