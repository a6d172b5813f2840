"""What both kinds of patch file share: how one is opened and named, and its hashes (XXH3-128, big-endian)."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final, Self, TypeGuard, TypeVar

import numpy as np
import xxhash

from ..checkpoint.provenance import HASH_PREFIX, Provenance
from ..errors import CorruptFileError, MismatchError, boundary
from ..sources.resolve import Source, resolve_file
from ..tensors.arrays import RawBytes
from ..tensors.document import Fact, dump, read_document
from ..tensors.reader import FileBacked, TensorFile
from ..text import lines, printable

#: What stands for a hash until it is known.
NO_HASH = HASH_PREFIX + "0" * 32
_HASH = re.compile(HASH_PREFIX + "[0-9a-f]{32}")


def is_hash(value: object) -> TypeGuard[str]:
    """Whether a value of a manifest is a hash as text."""
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def digests(vectors: RawBytes) -> RawBytes:
    """The digest of each row of raw bytes, uint8 ``[k, 16]``."""
    rows = np.ascontiguousarray(vectors)
    joined = b"".join(map(xxhash.xxh3_128_digest, rows))
    return np.frombuffer(joined, np.uint8).reshape(len(rows), 16)


class DigestHash:
    """The hash of a tensor's digests in index order, fed block by block."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, block: RawBytes) -> None:
        """Take in the next digests, uint8 ``[k, 16]``."""
        self._state.update(np.ascontiguousarray(block).data)

    def text(self) -> str:
        """As the manifest writes it."""
        return HASH_PREFIX + self._state.hexdigest()


PATCH_VERSION: Final = 2
PATCH_KEY = "neuron_patch"
PATCH_NAME = "neuron_patch.safetensors"

#: Each kind of patch, as a refusal names it that expected another kind; and what helps.
_KINDS = {
    "neurons": ("the patch has chosen neurons only, not a whole fine-tune", None),
    "lossless": (
        "the patch is lossless: it holds a whole fine-tune, not chosen neurons",
        "write the tuned checkpoint with `neftsurgery apply BASE PATCH -o OUT`",
    ),
}


class PatchFile(FileBacked, ABC):
    """A file that holds a patch of either kind, and what was named to open it."""

    kind: ClassVar[str]
    base = Fact(Provenance.from_json, "manifest")  # what it was made from, as far as that is known

    def __init__(
        self, file: TensorFile, manifest: Mapping[str, Any] | None = None, source: Source | None = None
    ) -> None:
        """Of an open file, which the new object takes over; its manifest if it is known."""
        super().__init__(file)
        self.manifest = manifest or read_manifest(file)  # the JSON document of the file
        self.source = source  # what was named to open it; None for a patch that was made here

    @classmethod
    @boundary
    def load(cls, named: str | os.PathLike[str] | Source) -> Self:
        """Open a patch. Its structure and indices are checked; `Patch.check` checks the hashes of its values.

        Args:
            named: A file; or ``org/name`` or ``org/name@revision`` of the Hub, of which the patch alone is
                fetched into huggingface_hub's cache. A local path beats a Hub id.

        Raises:
            UsageError: If there is no such file, repository or revision.
            MismatchError: If the Hub repository holds no patch, or the patch is of the other kind.
            CorruptFileError: If it is no patch, damaged, or of a newer version.
            MachineError: If it cannot be read, or the Hub refuses or cannot be reached.
        """
        return open_patch(named, (cls,))

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.place) if self.place is not None else "the patch"

    @property
    def place(self) -> str | os.PathLike[str] | None:
        """Where errors say it is: a file, or as the Hub calls it; None for one that was never saved."""
        return self.source.named if self.source is not None and self.source.repo is not None else self.path

    @property
    @abstractmethod
    def reversible(self) -> bool:
        """Whether it holds all that it replaces."""

    @property
    @abstractmethod
    def what(self) -> str:
        """What it holds, in a few words."""

    def __repr__(self) -> str:
        return printable(f"<{type(self).__name__} {self._label}: {self.what}>")

    @property
    def _label(self) -> str:
        return str(self.place) if self.place is not None else "(not saved)"

    def _text(self, *about: str) -> str:
        """What printing it shows: what it is about, and what it was made from."""
        undo = "reversible" if self.reversible else "not reversible: revert needs the base"
        return lines([*about, f"  made from {self.base.label or 'unknown'}; {undo}"])


_File = TypeVar("_File", bound=PatchFile)


def open_patch(named: str | os.PathLike[str] | Source, kinds: Sequence[type[_File]]) -> _File:
    """The patch that is named, if it is of one of ``kinds``; raises as `PatchFile.load`."""
    source = named if isinstance(named, Source) else resolve_file(named, PATCH_NAME)
    file = TensorFile.named(source.path, PATCH_KEY)
    try:
        manifest = read_manifest(file)
        kind = "neurons" if manifest["version"] == 1 else manifest["kind"]
        for one in kinds:
            if one.kind == kind:
                return one(file, manifest, source)
        raise other_kind(kind, file.path)
    except (CorruptFileError, MismatchError) as error:
        if source.repo is not None and error.file == str(source.path):
            error.file = source.named  # not where the cache keeps it
        raise


def other_kind(kind: str, file: str | os.PathLike[str] | None, advice: str | None = None) -> MismatchError:
    """The error for a patch that is of the ``kind``, where the other one is wanted."""
    what, hint = _KINDS[kind]
    return MismatchError(what, file=file, hint=advice or hint)


def read_manifest(file: TensorFile) -> dict[str, Any]:
    """The manifest of a patch file, of a version and kind that are known."""
    manifest = read_document(file, PATCH_KEY, "patch", PATCH_VERSION)
    if manifest["version"] > 1 and manifest.get("kind") not in [*_KINDS]:
        raise CorruptFileError(
            "the patch is of a kind that this version does not know",
            file=file.path,
            expected=" or ".join(_KINDS),
            found=str(manifest.get("kind"))[:100],
            hint="update neftsurgery",
        )
    return manifest


def _content_hash(manifest: str, parts: Iterable[tuple[str, bytes]]) -> str:
    """The hash of the manifest's text, with `NO_HASH` for it, and ``parts``, entries that have no other."""
    state = xxhash.xxh3_128(manifest.encode())
    for name, content in parts:
        state.update(f"\n{name}\n{len(content)}\n".encode())
        state.update(content)
    return HASH_PREFIX + state.hexdigest()


def sealed(manifest: Mapping[str, object], parts: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """The metadata of a new patch file: its manifest, with the `content_hash` as the last key."""
    rest = {key: value for key, value in manifest.items() if key != "content_hash"}
    text = dump(PATCH_KEY, {**rest, "content_hash": NO_HASH})[PATCH_KEY]
    end = f'{NO_HASH}"}}'
    return {PATCH_KEY: f'{text.removesuffix(end)}{_content_hash(text, parts)}"}}'}


def require_seal(
    file: TensorFile, manifest: Mapping[str, object], parts: Iterable[tuple[str, bytes]]
) -> None:
    """Raise a `CorruptFileError` unless the file has the `content_hash` that its manifest says."""
    known, text = manifest.get("content_hash"), file.header.metadata[PATCH_KEY]
    if not is_hash(known) or known != _content_hash(text.replace(known, NO_HASH), parts):
        raise CorruptFileError(
            "the patch does not match its hash",
            file=file.path,
            hint="the patch is damaged or was altered: fetch it again",
        )
