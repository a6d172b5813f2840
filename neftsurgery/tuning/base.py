"""The base of live neurons: its files where they are at hand, else the live weights themselves."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.opening import open_checkpoint
from ..errors import MismatchError, NeftError
from ..neurons.vectors import gather
from ..patch.digests import DigestHash, digests
from ..patch.patch import Patch, Raw
from ..selection.selection import Chosen
from ..sources.resolve import Source
from ..surgery.diff import describe_side
from .vectors import blocks_of, from_bytes, holds, to_bytes, torch_dtype

__all__ = [
    "BaseOption",
    "base_files",
    "base_facts",
    "check_live",
    "checked_values",
    "file_rows",
    "selection_facts",
]

log = logging.getLogger(__name__)

BaseOption: TypeAlias = str | os.PathLike[str] | Literal[False] | None


def base_files(model: nn.Module, base: BaseOption) -> Checkpoint | None:
    """The files the model was loaded from.

    Parameters
    ----------
    base:
        Where they are. None: where the model says, if they are on this machine; False: nowhere.

    Raises
    ------
    NeftError
        If the user named them, and they are not there or damaged.
    """
    if base is False:
        return None
    if base is not None:
        return open_checkpoint(base)
    named = getattr(model, "name_or_path", None) or getattr(
        getattr(model, "config", None), "_name_or_path", None
    )
    if not isinstance(named, str) or not named:
        return None
    try:
        source = _local(named, getattr(model.config, "_commit_hash", None))
        return None if source is None else open_checkpoint(source)
    except NeftError as error:
        log.debug("the base of the model is not at hand: %s", error)
        return None


def _local(named: str, commit: object) -> Source | None:
    """What a model's name means on this machine; nothing is fetched."""
    if Path(named).exists():
        return Source(Path(named), named)
    if named.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(named, "config.json", revision=commit if isinstance(commit, str) else None)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return Source(folder, named, named, folder.name)


def base_facts(files: Checkpoint | None, model: nn.Module) -> dict[str, Any]:
    """What a patch's manifest says of its base."""
    if files is not None:
        return describe_side(files)
    named = getattr(model, "name_or_path", None)
    return {"name": Path(named).name if named else type(model).__name__, "fingerprint": None}


def file_rows(files: Checkpoint, chosen: Chosen) -> Raw:
    """The chosen vectors as the files have them, raw ``[k, width * itemsize]``."""
    return gather(files, chosen.info, chosen.layout, chosen.index)


def _rounded_rows(rows: Tensor, dtype: str) -> NDArray[np.bool_]:
    """Which of ``rows`` the element type ``dtype`` cannot hold, bool ``[k]``."""
    kind = torch_dtype(dtype)
    assert kind is not None  # checked when it was planned
    return (
        np.zeros(len(rows), np.bool_)
        if holds(kind, rows.dtype)
        else ~_same_rows(rows, rows.to(kind).to(rows.dtype))
    )


_NAMES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def check_live(live: Tensor, chosen: Chosen, files: Checkpoint | None) -> None:
    """Raise a `MismatchError` unless the live vectors ``[k, width]`` are those of the base.

    With ``files``: the same, in the live type. Without: values of the selection's type.
    """
    name, dtype = chosen.info.name, chosen.info.dtype
    for start, stop in blocks_of(len(chosen.index), chosen.layout.width):
        block = live[start:stop]
        if files is None:
            if _rounded_rows(block, dtype).any():
                raise MismatchError(
                    "the live weights are not those of a checkpoint of the selection's type",
                    tensor=name,
                    expected=f"values of {dtype}",
                    found=f"{live.dtype} values that {dtype} cannot hold",
                    hint="the model was changed after it was loaded: load it again, or save it and use that",
                )
            continue
        part = Chosen(chosen.info, chosen.layout, chosen.index[start:stop])
        theirs = from_bytes(file_rows(files, part), dtype).to(live.dtype)
        same = _same_rows(block, theirs)
        if not same.all():
            raise MismatchError(
                "the live weights are not those of the base",
                file=files.name,
                tensor=name,
                expected="equal vectors",
                found=f"{np.count_nonzero(~same)} of {len(part.index)} that differ",
                hint="load the base again, or give base=FOLDER of what was loaded, "
                "or base=False for a patch on the weights as they are",
            )


def _same_rows(a: Tensor, b: Tensor) -> NDArray[np.bool_]:
    kind = _NAMES[str(a.dtype)]
    same: NDArray[np.bool_] = (to_bytes(a, kind) == to_bytes(b, kind)).all(axis=1)
    return same


def checked_values(patch: Patch, name: str, live: Tensor | None, files: Checkpoint | None) -> Tensor:
    """The new values of a tensor of a patch, ``[k, width]`` in the patch's type, after comparing its base.

    Parameters
    ----------
    live:
        The live vectors; None if they are codes.
    files:
        The base files, to be looked at where the live vectors cannot tell.

    Raises
    ------
    MismatchError
        If the live model is not what the patch was made from.
    CorruptFileError
        If the patch does not match its own hashes.
    """
    tensor = patch.tensors[name]
    before, after = DigestHash(), DigestHash()
    values, wrong, unknown = [], 0, False
    for start, stop in tensor.blocks():
        stored = patch.base_digests(name, start, stop)
        new = patch.values(name, start, stop)
        before.update(stored)
        after.update(digests(new))
        values.append(from_bytes(new, tensor.info.dtype))
        chosen = Chosen(tensor.info, tensor.layout, patch.index(name)[start:stop])
        found = _base_digests(chosen, None if live is None else live[start:stop], files)
        if found is None:
            unknown = True
        else:
            wrong += int(np.count_nonzero((found != stored).any(axis=1)))
    patch.check_hashes(name, before, after)
    if wrong:
        raise MismatchError(
            f"{patch.name} was made from another base",
            tensor=name,
            expected="the vectors of its base",
            found=f"{wrong} of {tensor.count} live ones that are none",
            hint="see `neftsurgery verify` for files; what is attached comes off with detach()",
        )
    if unknown:
        log.warning("%s: %s has lost bits of the base, so it cannot be checked", patch.name, name)
    return torch.cat(values)


def _base_digests(chosen: Chosen, live: Tensor | None, files: Checkpoint | None) -> Raw | None:
    """The digests of the base's vectors; None if neither the live ones nor files can tell."""
    kind = torch_dtype(chosen.info.dtype)
    assert kind is not None  # checked when it was planned
    if live is not None and holds(live.dtype, kind):
        found = digests(to_bytes(live, chosen.info.dtype)).copy()
        found[_rounded_rows(live, chosen.info.dtype)] = 0
        return found
    if files is None:
        return None
    raw = file_rows(files, chosen)
    found = digests(raw).copy()
    if live is not None:
        found[~_same_rows(live, from_bytes(raw, chosen.info.dtype).to(live.dtype))] = 0
    return found


def selection_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a patch's manifest says of how its neurons were chosen.

    What their selection captured of another change is not said: these values were trained.
    """
    return {
        key: value
        for key, value in facts.items()
        if key not in ("base", "tuned") and not key.startswith("captured")
    }
