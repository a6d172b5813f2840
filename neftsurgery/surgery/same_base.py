"""The base of a patch: named, and whether a checkpoint is it by its fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance, fingerprint
from ..checkpoint.ties import tied_forms
from ..patch.overlap import RowSource, lay_over
from ..patch.patch import Patch
from ..storage.output_checks import AnyPath


def same_bases(
    checkpoint: Checkpoint, patches: Sequence[Patch], applied: Sequence[bool], undone: Sequence[RowSource]
) -> list[bool | None]:
    """For each patch whether the checkpoint is its base, or that with the patch; None if it cannot be known.

    The patches may follow each other or be made from one base, and any of them may be ``applied`` already. So
    a patch's base may be the checkpoint as it is, or without them, or with the earlier ones only; and its
    files may have held tied tensors in another form. ``undone`` are the vectors that patches replaced, as far
    as they are known, those of the last patch first.
    """
    known = {rows.patch for rows in undone}
    hidden = any(now and patch not in known for patch, now in zip(patches, applied, strict=True))

    plain = fingerprint(checkpoint)
    clear = all(patch.base.fingerprint in (None, plain) for patch in patches)
    forms, tied = ([], {}) if clear else tied_forms(checkpoint)

    @cache
    def found(layers: tuple[RowSource, ...], form: int) -> str:
        return fingerprint(checkpoint, partial(lay_over, layers, tied=tied), tied, forms[form])

    def same(number: int) -> bool | None:
        wanted = patches[number].base.fingerprint
        if wanted in (None, plain):
            return None if wanted is None else True
        earlier = [RowSource(one, one.values) for one in patches[:number]]
        ways = ((), tuple(undone), (*undone, *earlier))
        tries = (found(way, form) for form in range(len(forms)) for way in ways)
        return wanted in tries or (None if hidden else False)

    return [same(number) for number in range(len(patches))]


def named_base(named: AnyPath | None, patches: Sequence[Patch]) -> tuple[Checkpoint | None, list[Path]]:
    """The base, if one is named, in which the patches fit; and all files that an output must not replace."""
    inputs = [patch.path for patch in patches if patch.path is not None]
    if named is None:
        return None, inputs
    base = Checkpoint.open(named)
    for patch in patches:
        base = patch.require_fit(base)
    return base, [*inputs, base.source.path]


def other_base(named: Checkpoint | None, base: Provenance, what: str) -> list[str]:
    """A warning if a checkpoint that is named as the ``base`` of ``what`` has another fingerprint."""
    if named is None or base.fingerprint in (None, fingerprint(named)):
        return []
    forms, tied = tied_forms(named)
    if base.fingerprint in (fingerprint(named, tied=tied, names=form) for form in forms):
        return []
    return [f"{named.name} has another fingerprint than the base of {what}"]
