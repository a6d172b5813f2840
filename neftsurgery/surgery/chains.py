"""Lossless patches that follow each other: the chain in a folder, and where a checkpoint is in it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance, fingerprint
from ..errors import MismatchError, UsageError
from ..patch.lossless import AnyPatch, LosslessPatch, load_any
from ..patch.patch import Patch
from ..patch.patch_file import PATCH_KEY
from ..storage.output_checks import AnyPath
from ..tensors.header import read_header
from .lossless import LosslessPlan, plan_between
from .model_files import ModelFiles, RebuiltWeights
from .verb import check_sha256, require_sha256


def opened_patches(
    named: Sequence[AnyPatch], sha256: str | Sequence[str] | None = None, to: int | None = None
) -> list[Patch | LosslessPatch]:
    """The patches, opened; a folder stands for its chain up to ``to``.

    A `CorruptFileError` says that one has another SHA-256: see `check_sha256`.
    """
    places = list[AnyPatch]()
    for one in named:
        chain = chain_of(Path(one), to) if isinstance(one, str | os.PathLike) and os.path.isdir(one) else []
        places += chain or [one]
    found = [load_any(place) for place in places]
    for patch, wanted in zip(found, check_sha256(sha256, len(found)), strict=True):
        if wanted is not None:
            require_sha256(patch.place, wanted, patch.sha256())
            patch.check_unchanged()
    return found


def require_chain(patches: Sequence[LosslessPatch]) -> None:
    """Raise a `MismatchError` unless each patch but the first was made from what the one before it makes."""
    for earlier, later in pairwise(patches):
        if later.base.fingerprint != earlier.tuned.fingerprint:
            raise MismatchError(
                f"{later.name} does not follow {earlier.name}",
                file=later.place,
                expected=f"fingerprint {earlier.tuned.fingerprint}",
                found=later.base.fingerprint,
                hint="a link of the chain is missing, or the patches are in another order",
            )
        if later.weights_only != earlier.weights_only:
            raise MismatchError(
                "one patch of the chain holds weights only, and another the files beside them too",
                file=later.place,
                hint="apply them one after the other",
            )


def links_from(checkpoint: Checkpoint, patches: Sequence[LosslessPatch]) -> Sequence[LosslessPatch]:
    """The patches of a chain from a checkpoint on: the base of one of them, or what the last one makes."""
    require_chain(patches)
    found = fingerprint(checkpoint)
    for number, patch in enumerate(patches):
        if patch.base.fingerprint == found:
            return patches[number:]
    require_end(patches[0], checkpoint, patches[0].base, patches[-1].tuned)
    return patches[-1:]


def plan_chain(named: Sequence[AnyPatch], base: AnyPath | None, coding: Mapping[str, Any]) -> LosslessPlan:
    """Check all that is needed to make one patch of a chain; ``coding``, None: as all of its patches are."""
    loaded = opened_patches(named)
    patches = [patch for patch in loaded if isinstance(patch, LosslessPatch)]
    if len(patches) < max(1, len(loaded)):
        raise UsageError("[[chain]] is for lossless patches", file=loaded[0].place if loaded else None)
    require_chain(patches)
    first = patches[0]
    if base is None:
        raise UsageError(
            "one patch of a chain is made by comparing its last checkpoint with its first",
            file=first.place,
            hint=f"name the first one with [[base=...]]: {first.base.label or 'no name is recorded'}",
        )
    checkpoint = Checkpoint.open(base)
    require_end(first, checkpoint, first.base)
    alike = ("reversible", "fast", "weights_only")
    same = {name: all(getattr(patch, name) for patch in patches) for name in alike}
    return plan_between(
        replace(ModelFiles.of(checkpoint), origin=lambda: first.base),
        RebuiltWeights.model(checkpoint, patches, "patched"),
        [checkpoint.source.path, *(patch.path for patch in patches if patch.path is not None)],
        **(same | {name: value for name, value in coding.items() if value is not None}),
    )


def require_end(patch: LosslessPatch, checkpoint: Checkpoint, *ends: Provenance) -> None:
    """Raise a `MismatchError` unless the checkpoint is one of the ``ends`` of a patch."""
    found = fingerprint(checkpoint)
    if found not in [end.fingerprint for end in ends]:
        raise MismatchError(
            f"{patch.name} was made from another checkpoint",
            file=checkpoint.name,
            expected=f"fingerprint {ends[0].fingerprint}",
            found=found,
            hint=f"expected {ends[0].label}" if ends[0].label else None,
        )


def chain_of(folder: Path, last: int | None) -> list[LosslessPatch]:
    """The chain of patches in a folder, up to the one with ``last`` in its name; empty if there is none."""
    paths = [path for path in sorted(folder.glob("*.safetensors")) if PATCH_KEY in read_header(path).metadata]
    found = [patch for patch in map(load_any, paths) if isinstance(patch, LosslessPatch)]
    if not found:
        return []
    after = {patch.base.fingerprint: patch for patch in found}
    made = {patch.tuned.fingerprint for patch in found}
    first = [patch for patch in found if patch.base.fingerprint not in made]
    if len(after) != len(found) or len(first) != 1:
        starts = ", ".join(Path(str(patch.path)).name for patch in first) or "none"
        raise MismatchError(
            "the patches of the folder are not one chain",
            file=folder,
            expected="one patch that follows no other",
            found=starts,
            hint="a link is missing, or patches of several chains lie here",
        )
    chain = [first[0]]
    while (following := after.get(chain[-1].tuned.fingerprint)) is not None and following not in chain:
        chain.append(following)
    if last is None:
        return chain
    for count, patch in enumerate(chain, 1):
        digits = re.findall(r"\d+", Path(str(patch.path)).stem)
        if digits and int(digits[-1]) == last:
            return chain[:count]
    raise UsageError(f"no patch of the chain has the number {last}", file=folder)
