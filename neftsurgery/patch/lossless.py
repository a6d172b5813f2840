"""A whole fine-tune as a patch: base plus patch is the tuned checkpoint, to the bit, files and all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
import xxhash

from ..checkpoint.provenance import HASH_PREFIX, Provenance
from ..coding.blocks import Form
from ..errors import CorruptFileError, boundary
from ..neurons.tensor_names import layer_and_kind
from ..sources.resolve import Source, resolve_file
from ..tensors.document import bad, read_document
from ..tensors.reader import TensorFile
from ..text import plural, size
from .delta import ENTRIES, Delta
from .patch import LOSSLESS_VERSION, PATCH_KEY, PATCH_NAME, Patch, PatchFile
from .stored_weights import StoredWeights, stored_weights

__all__ = ["AnyPatch", "LosslessPatch", "content_hash", "load_any"]

_WHAT = "patch"


class LosslessPatch(PatchFile):
    """A lossless patch: a file with the difference of two checkpoints. Made by `extract` with ``lossless``.

    Attributes
    ----------
    manifest:
        The JSON document of the file.
    forward, backward:
        The ways from the base to the tuned checkpoint, and back; ``backward`` only in a reversible patch.
    source:
        What was named to open it; None for a patch that was made here.
    """

    def __init__(
        self, file: TensorFile, manifest: Mapping[str, object], source: Source | None = None
    ) -> None:
        super().__init__(file)
        self.manifest, self.source = manifest, source
        if manifest.get("kind") != "lossless":
            raise CorruptFileError(
                "the patch is of a kind that this version does not know",
                file=file.path,
                expected="lossless",
                found=str(manifest.get("kind"))[:100],
                hint="update neftsurgery",
            )
        code = file.tensors.get("code")
        if code is None or code.dtype != "U8" or len(code.shape) != 1:
            raise bad(file, _WHAT, "it has no code")
        self.forward = Delta(file, "forward")
        self.backward: Delta | None = None
        ways = [self.forward]
        if manifest.get("reversible") is True:
            self.backward = Delta(file, "backward", self.forward.code_end)
            ways.append(self.backward)
        if ways[-1].code_end != code.shape[0]:
            raise bad(file, _WHAT, "its code has another length")
        prefixes = ("forward", "backward")[: len(ways)]
        if file.tensors.keys() - {f"{prefix}:{name}" for prefix in prefixes for name in ENTRIES} != {"code"}:
            raise bad(file, _WHAT, "it has entries that belong to nothing")
        parts = (part for way in ways for part in way.index_bytes())
        if manifest.get("content_hash") != content_hash(manifest, parts):
            raise CorruptFileError(
                "the patch does not match its hash",
                file=file.path,
                hint="the patch is damaged or was altered: fetch it again",
            )

    @classmethod
    @boundary
    def load(cls, named: str | os.PathLike[str] | Source) -> LosslessPatch:
        """Open a patch; raises as `Patch.load`."""
        found = load_any(named)
        if not isinstance(found, cls):
            raise CorruptFileError(
                "the patch has chosen neurons only, not a whole fine-tune", file=found.name
            )
        return found

    @property
    def base(self) -> Provenance:
        """The checkpoint it was made from."""
        return Provenance.from_json(self.manifest.get("base"))

    @property
    def tuned(self) -> Provenance:
        """The checkpoint it makes."""
        return Provenance.from_json(self.manifest.get("tuned"))

    #: It counts no neurons.
    neurons = 0

    @property
    def what(self) -> str:
        """What it holds, in a few words."""
        return f"every change of {plural(len(self.forward.tensors), 'tensor')}"

    @property
    def reversible(self) -> bool:
        """Whether it holds the way back."""
        return self.backward is not None

    @property
    def not_carried(self) -> tuple[str, ...]:
        """Files beside the tuned weights that it does not hold."""
        found = self.manifest.get("not_carried")
        return tuple(str(name) for name in found) if isinstance(found, list) else ()

    @property
    def changed_blocks(self) -> int:
        """How many blocks of the tuned checkpoint differ from the base."""
        return int((self.forward.forms != Form.SAME).sum())

    def forms(self) -> dict[str, dict[str, int]]:
        """By form, in how many blocks it is used, of how many bytes, and in how many bytes of code."""
        nbytes = np.array([block.nbytes for block in self.forward.blocks], np.int64)
        found = {}
        for form in Form:
            used = self.forward.forms == form
            if blocks := int(used.sum()):
                sums = int(nbytes[used].sum()), int(self.forward.sizes[used].sum())
                found[form.name.lower()] = {"blocks": blocks, "bytes": sums[0], "code": sums[1]}
        return found

    def weights(self) -> dict[str, StoredWeights]:
        """How much of each tensor changed, and how it is stored."""
        return stored_weights(self.forward, {name: name for name in self.forward.tensors})

    def kinds(self) -> dict[str, StoredWeights]:
        """As `weights`, by kind of weight; those that take the most bytes first."""
        kinds = {name: layer_and_kind(name.split("."))[1] for name in self.forward.tensors}
        found = stored_weights(self.forward, kinds)
        return dict(sorted(found.items(), key=lambda item: -item[1].code))

    def __repr__(self) -> str:
        return f"<LosslessPatch {self._label}>"

    @property
    def _label(self) -> str:
        return f"{self.place or '(not saved)'}: {size(self.nbytes)} for {size(self.forward.nbytes)}"

    def __str__(self) -> str:
        undo = "reversible" if self.reversible else "not reversible: revert needs the base"
        return "\n".join(
            [
                f"lossless patch {self._label}",
                f"  {plural(len(self.forward.tensors), 'tensor')} in "
                f"{plural(len(self.forward.files), 'file')}, and {len(self.forward.side)} files beside them",
                f"  made from {self.base.label or 'unknown'}; {undo}",
            ]
        )


AnyPatch: TypeAlias = Patch | LosslessPatch | str | os.PathLike[str] | Source
"""A patch of either kind, or what names one."""


def content_hash(manifest: Mapping[str, object], parts: Iterable[tuple[str, bytes]]) -> str:
    """The hash of all that no block hash is over: the manifest without it, and the arrays by name."""
    state = xxhash.xxh3_128()
    known = {key: value for key, value in manifest.items() if key != "content_hash"}
    state.update(json.dumps(known, separators=(",", ":"), sort_keys=True, ensure_ascii=True).encode())
    for name, content in parts:
        state.update(f"\n{name}\n{len(content)}\n".encode())
        state.update(content)
    return HASH_PREFIX + state.hexdigest()


@boundary
def load_any(named: AnyPatch) -> Patch | LosslessPatch:
    """Open a patch of either kind; raises as `Patch.load`. One that is open stays as it is."""
    if isinstance(named, Patch | LosslessPatch):
        return named
    source = named if isinstance(named, Source) else resolve_file(named, PATCH_NAME)
    file = TensorFile.named(source.path, PATCH_KEY)
    try:
        manifest = read_document(file, PATCH_KEY, _WHAT, LOSSLESS_VERSION)
        if manifest["version"] < LOSSLESS_VERSION:
            return Patch.read(file, source)
        return LosslessPatch(file, manifest, source)
    except CorruptFileError as error:
        if source.repo is not None and error.file == str(source.path):
            error.file = source.named  # not where the cache keeps it
        raise
