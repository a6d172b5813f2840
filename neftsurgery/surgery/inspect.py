"""inspect: what is in a checkpoint, a scores file, a selection or a patch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, Unpack

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.folder_files import folder_files
from ..checkpoint.unfinished import find_journals, journal_path
from ..errors import MismatchError, UsageError, boundary
from ..neurons.anatomy import read_anatomy
from ..options import Scope, ScopeOptions, split
from ..patch.overlap import overlap
from ..patch.patch import PATCH_KEY, PATCH_NAME, Patch
from ..scoring.scores import SCORES_KEY, Scores
from ..selection.selection import SELECTION_KEY, Selection
from ..sources.resolve import Source, is_hub_id, resolve, resolve_file
from ..tensors.header import read_header
from .summary import summarize

__all__ = ["inspect"]


@boundary
def inspect(
    named: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    **options: Unpack[ScopeOptions],
) -> dict[str, Any]:
    """Tell what a file or folder holds; its ``kind`` first.

    Parameters
    ----------
    named:
        A checkpoint (file, folder or Hub id), scores, a selection or a patch (file or Hub id); or several
        patches. A Hub repository that holds a patch is that patch.
    anatomy, axis, include, exclude, only:
        For a checkpoint: what counts as a neuron, as in `neftsurgery.diff`.

    Returns
    -------
    dict
        Plain values that JSON can hold. ``kind`` is ``checkpoint``, ``scores``, ``selection`` or
        ``patch``; ``tensors`` lists the tensors. Of several patches it is ``patches``, and ``overlaps``
        tells of each two of them what they have in common.

    Raises
    ------
    UsageError
        If there is nothing of that name, or several things are named that are not all patches.
    CorruptFileError
        If it is damaged.
    """
    (given,) = split("inspect", options, ScopeOptions)
    scope = Scope(**given)
    if not isinstance(named, (str, os.PathLike)):
        if len(named) != 1:
            return _patches(named)
        named = named[0]
    source = _found(named)
    if source.path.is_file():
        metadata = read_header(source.path).metadata
        if PATCH_KEY in metadata:
            return _patch(Patch.load(source))
        if SCORES_KEY in metadata:
            return _scores(Scores.load(source.path))
        if SELECTION_KEY in metadata:
            return _selection(Selection.load(source.path), os.fspath(named))
    checkpoint = Checkpoint.read(source)
    found = read_anatomy(scope.anatomy, checkpoint.tensors, checkpoint.config, **scope.patterns)
    facts = _checkpoint(checkpoint)
    tensors: list[dict[str, Any]] = [
        {
            "name": tensor.info.name,
            "dtype": tensor.info.dtype,
            "shape": list(tensor.info.shape),
            "neuron_axes": list(tensor.axes),
            "neurons": tensor.layout.count if tensor.part is None else tensor.part.count,
            "kind": tensor.kind,
        }
        for tensor in found.scored
    ]
    facts |= {
        "anatomy": found.name,
        "neurons": sum(tensor["neurons"] for tensor in tensors),
        "units": found.unit_count,
        "warnings": list(found.warnings),
    }
    listed: list[dict[str, Any]] = [
        {
            "name": entry.info.name,
            "dtype": entry.info.dtype,
            "shape": list(entry.info.shape),
            "reason": entry.reason,
        }
        for entry in found.listed
    ]
    return facts | {"tensors": sorted([*tensors, *listed], key=lambda tensor: str(tensor["name"]))}


def _found(named: str | os.PathLike[str]) -> Source:
    """What is to be inspected. Of a Hub repository that holds a patch nothing else is fetched."""
    if is_hub_id(named):
        try:
            return resolve_file(named, PATCH_NAME)
        except MismatchError:  # it holds none: a checkpoint, then
            pass
    return resolve(named)


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    dtypes = Counter(info.dtype for info in checkpoint.tensors.values())
    config = checkpoint.config or {}
    facts: dict[str, Any] = {
        "kind": "checkpoint",
        "name": checkpoint.name,
        "repo": checkpoint.source.repo,
        "revision": checkpoint.source.revision,
        "files": [shard.path.name for shard in checkpoint.shards],
        "bytes": checkpoint.nbytes,
        "parameters": checkpoint.parameters,
        "dtypes": dict(dtypes.most_common()),
        "model_type": config.get("model_type"),
        "unfinished": [str(journal_path(one)) for one in find_journals(checkpoint.source)],
    }
    if not checkpoint.is_file:
        facts["left_behind_by_apply"] = [str(path) for path in folder_files(checkpoint).left]
    return facts


def _patch(patch: Patch) -> dict[str, Any]:
    return {
        "kind": "patch",
        "name": patch.name,
        "version": patch.manifest["version"],
        "bytes": patch.nbytes,
        "neurons": patch.neurons,
        "parameters": patch.parameters,
        "reversible": patch.reversible,
        "base": dict(patch.base),
        "selection": dict(patch.facts),
        "created_by": patch.manifest.get("created_by"),
        "tensors": [
            {
                "name": name,
                "dtype": tensor.info.dtype,
                "shape": list(tensor.info.shape),
                "neuron_axes": list(tensor.layout.axes),
                "neurons": tensor.count,
                "of": tensor.layout.count,
            }
            for name, tensor in patch.tensors.items()
        ],
    }


def _patches(named: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """Several patches beside each other, and what each two of them have in common."""
    if not named:
        raise UsageError("there is nothing to inspect")
    patches = []
    for path in named:
        source = _found(path)
        if not source.path.is_file() or PATCH_KEY not in read_header(source.path).metadata:
            raise UsageError(
                "only patches can be inspected together", file=path, hint="name one thing, or patches only"
            )
        patches.append(Patch.load(source))
    overlaps = [
        {"first": a, "second": b, "agree": found.agree, **_listed(asdict(found))}
        for a, b in combinations(range(len(patches)), 2)
        for found in [overlap(patches[a], patches[b])]
    ]
    return {"kind": "patches", "patches": [_patch(patch) for patch in patches], "overlaps": overlaps}


def _listed(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}


def _selection(selection: Selection, name: str) -> dict[str, Any]:
    return {
        "kind": "selection",
        "name": name,
        "neurons": selection.neurons,
        "parameters": selection.parameters,
        "selection": dict(selection.facts),
        "tensors": [
            {"name": tensor, **chosen.describe(), "neurons": len(chosen.index), "of": chosen.layout.count}
            for tensor, chosen in selection.tensors.items()
        ],
    }


def _scores(scores: Scores) -> dict[str, Any]:
    summary = summarize(scores)
    known = ("base", "tuned", "only_in_base", "only_in_tuned", "differing", "seed")
    return {
        "kind": "scores",
        "name": str(scores.path),
        "score": scores.score,
        "anatomy": scores.anatomy,
        "neurons": scores.neurons,
        "units": scores.units,
        "parameters": scores.parameters,
        **{key: scores.facts[key] for key in known if key in scores.facts},
        **summary.describe(),
        "tensors": [
            {
                "name": name,
                "dtype": tensor.info.dtype,
                "shape": list(tensor.info.shape),
                "neuron_axes": list(tensor.layout.axes),
                "neurons": tensor.layout.count,
            }
            for name, tensor in scores.tensors.items()
        ],
    }
