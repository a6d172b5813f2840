"""How a lossless patch stores a fine-tune: sums over the blocks of each tensor, or of each kind of weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..coding.blocks import Form
from ..text import percent
from .delta import Delta

__all__ = ["StoredWeights", "form_shares", "stored_weights"]


@dataclass
class StoredWeights:
    """Tensors of a fine-tune, and how a lossless patch stores them."""

    tensors: int = 0
    elements: int = 0
    changed: int = 0  # elements that differ from the base
    tuned_bytes: int = 0  # in the tuned files
    code: int = 0  # bytes in the patch
    forms: dict[str, int] = field(default_factory=dict)  # tuned bytes by the form of their blocks


def stored_weights(delta: Delta, groups: Mapping[str, str]) -> dict[str, StoredWeights]:
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
