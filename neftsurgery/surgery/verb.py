"""What verbs share: the keywords of a run, warnings, the base of a patch, and what patches replaced."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance, fingerprint
from ..checkpoint.ties import tied_forms
from ..errors import CorruptFileError, MismatchError, UsageError, keyword, spelled
from ..neurons.vectors import gather
from ..options import RunAnywhereOptions, RunOptions, split
from ..patch.overlap import RowSource, lay_over
from ..patch.patch import Patch, PatchTensor
from ..patch.patch_file import digests
from ..progress import Progress, silent
from ..selection.selection import Chosen
from ..storage.output_checks import AnyPath
from ..storage.threads import Limits
from ..tensors.arrays import IndexArray, RawBytes
from ..text import printable


class Running(TypedDict):
    """The keywords of the ``run`` of a plan."""

    limits: Limits
    progress: Progress


def running(options: Mapping[str, Any]) -> Running:
    """The keywords of a run that `RunOptions` name."""
    limits = Limits.of(options.get("threads"), options.get("memory"))
    limits = replace(limits, executor=options.get("executor"))
    return {"limits": limits, "progress": options.get("progress") or silent}


def run_keywords(verb: str, options: Mapping[str, Any]) -> Running:
    """As `running`, for a verb that takes no other options."""
    return running(*split(verb, options, RunAnywhereOptions if verb == "verify" else RunOptions))


def require_sha256(place: AnyPath | None, wanted: str, found: str) -> None:
    """Raise a `CorruptFileError` if the file at ``place`` has another SHA-256 than was ``wanted``."""
    if found != wanted:
        hint = "nothing was written; find out why it is another file before you use it"
        what = "this is not the file whose [[sha256]] was given"
        raise CorruptFileError(what, file=place, expected=wanted, found=found, hint=hint)


def check_sha256(given: str | Sequence[str] | None, patches: int) -> list[str | None]:
    """The SHA-256 that each of so many patches must have, in order; None if none is given."""
    wanted = [given] if isinstance(given, str) else list(given or ())
    for one in wanted:
        if re.fullmatch("[0-9a-fA-F]{64}", one) is None:
            raise UsageError("[[sha256]] is not a SHA-256", expected="64 hexadecimal digits", found=repr(one))
    if wanted and len(wanted) != patches:
        raise UsageError("expected one [[sha256]] per patch, in order", expected=patches, found=len(wanted))
    return [one.lower() for one in wanted] or [None] * patches


def warn(module: str, warnings: Sequence[str]) -> None:
    """Log what a plan found, in the words of Python, as of the ``module`` of the verb."""
    for warning in warnings:
        logging.getLogger(module).warning("%s", printable(spelled(warning, keyword)))


def replaced_rows(patch: Patch, base: Checkpoint | None, name: str, start: int, stop: int) -> RawBytes:
    """The replaced vectors ``[start, stop)`` (positions in the index), checked against their digests."""
    stored = patch.base_digests(name, start, stop)
    if base is None:
        patch.check_base_rows(name, stored, start, stop)
        return patch.base_values(name, start, stop)
    tensor = patch.tensors[name]
    return base_rows(base, tensor, patch.index(name)[start:stop], stored, "the patch was")


def base_rows(
    base: Checkpoint, tensor: PatchTensor | Chosen, index: IndexArray, stored: RawBytes, made: str
) -> RawBytes:
    """Vectors of the base, checked against their digests; ``made``: what was made from it, for the error."""
    rows = gather(base, tensor.info, tensor.layout, index)
    if not np.array_equal(digests(rows), stored):
        raise MismatchError(
            f"this is not the base that {made} made from",
            file=base.name,
            tensor=tensor.info.name,
            hint="name the right one with [[base=...]]",
        )
    return rows


def require_replaced(patch: Patch, what: str) -> None:
    """Raise a `UsageError` unless the patch holds the vectors it replaced, which ``what`` needs."""
    if not patch.reversible:
        raise UsageError(
            f"{what} needs the values that the patch replaced, and the patch does not hold them",
            file=patch.place,
            hint="name the checkpoint it was made from with [[base=...]]; [[reversible=True]] makes patches "
            "that hold them",
        )


def same_bases(
    checkpoint: Checkpoint, patches: Sequence[Patch], applied: Sequence[bool], undone: Sequence[RowSource]
) -> list[bool | None]:
    """For each patch whether the checkpoint is its base, or that with the patch; None if it cannot be known.

    Patches may follow each other or be made from one base, and be ``applied`` already: a patch's base may be
    the checkpoint as it is, or without them, or with the earlier ones only, and tied tensors in another form.
    ``undone`` are the vectors that patches replaced, where they are known, those of the last patch first.
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
