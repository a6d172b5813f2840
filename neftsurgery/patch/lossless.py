"""A whole fine-tune as a patch: base plus patch is the tuned checkpoint, to the bit, files and all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from ..checkpoint.provenance import Provenance
from ..coding.blocks import Form
from ..errors import boundary
from ..neurons.tensor_names import layer_and_kind
from ..sources.resolve import Source
from ..tensors.document import Fact, bad
from ..tensors.reader import TensorFile
from ..text import percent, plural, size
from .delta import ENTRIES, Delta
from .patch import Patch
from .patch_file import PatchFile, open_patch, require_seal

_WHAT = "patch"


@dataclass
class StoredWeights:
    """Tensors of a fine-tune, and how a lossless patch stores them."""

    tensors: int = 0
    elements: int = 0
    changed: int = 0  # elements that differ from the base
    tuned_bytes: int = 0  # in the tuned files
    code: int = 0  # bytes in the patch
    forms: dict[str, int] = field(default_factory=dict)  # tuned bytes by the form of their blocks


def _is_true(value: object) -> bool:
    return value is True


def _names(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


class LosslessPatch(PatchFile):
    """A file with the difference of two checkpoints. Made by `extract` with ``lossless``."""

    kind = "lossless"
    forward: Delta  # the way from the base to the tuned checkpoint
    backward: Delta | None = None  # the way back, in a reversible patch
    neurons = 0  # it counts none
    tuned = Fact(Provenance.from_json, "manifest")  # the checkpoint it makes
    fast = Fact(_is_true, "manifest")  # whether all forms decode about as fast as memory is copied
    weights_only = Fact(_is_true, "manifest")  # whether files beside the weights were left out
    not_carried = Fact(_names, "manifest")  # files beside the tuned weights that it does not hold

    def __init__(
        self, file: TensorFile, manifest: Mapping[str, Any] | None = None, source: Source | None = None
    ) -> None:
        super().__init__(file, manifest, source)
        code = file.tensors.get("code")
        if code is None or code.dtype != "U8" or len(code.shape) != 1:
            raise bad(file, _WHAT, "it has no code")
        self.forward = Delta(file, "forward")
        ways = [self.forward]
        if self.manifest.get("reversible") is True:
            self.backward = Delta(file, "backward", self.forward.code_end)
            ways.append(self.backward)
        if ways[-1].code_end != code.shape[0]:
            raise bad(file, _WHAT, "its code has another length")
        prefixes = ("forward", "backward")[: len(ways)]
        if file.tensors.keys() - {f"{prefix}:{name}" for prefix in prefixes for name in ENTRIES} != {"code"}:
            raise bad(file, _WHAT, "it has entries that belong to nothing")
        require_seal(file, self.manifest, (part for way in ways for part in way.index_bytes()))

    @property
    def what(self) -> str:
        """What it holds, in a few words."""
        return f"every change of {plural(len(self.forward.tensors), 'tensor')}"

    @property
    def reversible(self) -> bool:
        """Whether it holds the way back."""
        return self.backward is not None

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
        return _stored_weights(self.forward, {name: name for name in self.forward.tensors})

    def kinds(self) -> dict[str, StoredWeights]:
        """As `weights`, by kind of weight; those that take the most bytes first."""
        kinds = {name: layer_and_kind(name)[1] for name in self.forward.tensors}
        found = _stored_weights(self.forward, kinds)
        return dict(sorted(found.items(), key=lambda item: -item[1].code))

    def __str__(self) -> str:
        files = plural(len(self.forward.files), "file")
        return self._text(
            f"lossless patch {self._label}: {size(self.nbytes)} for {size(self.forward.nbytes)}",
            f"  {plural(len(self.forward.tensors), 'tensor')} in {files}, "
            f"and {plural(len(self.forward.side), 'file')} beside them",
        )


AnyPatch: TypeAlias = Patch | LosslessPatch | str | os.PathLike[str] | Source
"""A patch of either kind, or what names one."""


@boundary
def load_any(named: AnyPatch) -> Patch | LosslessPatch:
    """Open a patch of either kind; raises as `Patch.load`. One that is open stays as it is."""
    if isinstance(named, Patch | LosslessPatch):
        return named
    kinds: Sequence[type[Patch | LosslessPatch]] = (Patch, LosslessPatch)
    return open_patch(named, kinds)


def _stored_weights(delta: Delta, groups: Mapping[str, str]) -> dict[str, StoredWeights]:
    """The tensors of each group, in the order of the files; ``groups`` has the group of each tensor."""
    found: dict[str, StoredWeights] = {}
    for name in delta.tensors:
        found.setdefault(groups[name], StoredWeights()).tensors += 1
    names = [form.name.lower() for form in Form]
    arrays = (delta.forms.tolist(), delta.changed.tolist(), delta.sizes.tolist())
    for block, form, changed, code in zip(delta.blocks, *arrays, strict=True):
        one, nbytes = found[groups[block.info.name]], block.nbytes
        one.elements += len(block)
        one.changed += changed
        one.tuned_bytes += nbytes
        one.code += code
        one.forms[names[form]] = one.forms.get(names[form], 0) + nbytes
    return found


def form_shares(forms: Mapping[str, int]) -> str:
    """The forms with their shares of the bytes, as text."""
    whole = sum(forms.values())
    ordered = sorted(forms.items(), key=lambda form: -form[1])
    return ", ".join(f"{form} {percent(nbytes / whole)}" for form, nbytes in ordered) or "-"
