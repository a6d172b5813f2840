"""The base of a live model: the checkpoint it was loaded from, if that is available, else its own weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance
from ..checkpoint.weight_files import listed_parts
from ..errors import MismatchError, NeftError
from ..live.weights import can_represent, equal_vectors, from_bytes, to_bytes, torch_dtype
from ..neurons.submodels import split_part
from ..neurons.vectors import blocks, gather
from ..patch.patch import Patch
from ..patch.patch_file import DigestHash, digests
from ..selection.selection import Chosen
from ..sources.resolve import Source

log = logging.getLogger(__name__)

BaseOption: TypeAlias = str | os.PathLike[str] | Literal[False] | None


def find_base(model: nn.Module, base: BaseOption, names: Collection[str] = ()) -> Checkpoint | None:
    """The checkpoint of ``base``; None: the one that the model names, if it is on this machine.

    If the ``names`` of tensors are those of a part of a checkpoint, it is the whole that the part is in.
    """
    found = _named_base(model, base)
    part = next((part for name in names if (part := split_part(name)[0])), "")
    if found is None or part != f"{found.root.name}/" or not listed_parts(found.root.parent):
        return found
    return Checkpoint.open(found.root.parent)


def _named_base(model: nn.Module, base: BaseOption) -> Checkpoint | None:
    if base is False:
        return None
    if base is not None:
        return Checkpoint.open(base)
    named = getattr(model, "name_or_path", None) or getattr(
        getattr(model, "config", None), "_name_or_path", None
    )
    if not isinstance(named, str) or not named:
        return None
    try:
        source = _local_source(named, getattr(model.config, "_commit_hash", None))
        return None if source is None else Checkpoint.open(source)
    except NeftError as error:
        log.debug("the base that the model names cannot be opened: %s", error)
        return None


def _local_source(named: str, commit: object) -> Source | None:
    """The path or cached Hub repository that a model names; nothing is downloaded."""
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


def base_provenance(base: Checkpoint | None, model: nn.Module) -> Provenance:
    """The ``base`` of a patch's manifest."""
    if base is not None:
        return Provenance.of(base)
    named = getattr(model, "name_or_path", None)
    return Provenance({"name": Path(named).name if named else type(model).__name__, "fingerprint": None})


def float_dtype(chosen: Chosen) -> torch.dtype:
    """The torch dtype of the chosen neurons' tensor; one of plain numbers, or a `MismatchError`."""
    dtype = torch_dtype(chosen.info.dtype)
    if dtype is None:
        raise MismatchError(
            "only plain floating-point values can be attached to a model",
            tensor=chosen.info.name,
            expected="F64, F32, F16 or BF16",
            found=chosen.info.dtype,
        )
    return dtype


def finite_bytes(chosen: Chosen, vectors: Tensor) -> NDArray[np.uint8]:
    """The bytes of trained ``vectors``, ``[k, width]``, in the dtype of the files; an error names NaN."""
    values = vectors.to(float_dtype(chosen))
    if bad := int((~values.isfinite()).any(dim=1).sum()):
        raise MismatchError(
            "the trained values are not finite",
            tensor=chosen.info.name,
            expected=f"values that {chosen.info.dtype} can hold",
            found=f"NaN or infinity in {bad} of {len(values)} neurons",
            hint="training has diverged: go back to an earlier save, with a lower learning rate",
        )
    return to_bytes(values, chosen.info.dtype)


def _representable(vectors: Tensor, dtype: torch.dtype) -> NDArray[np.bool_]:
    """Which of ``vectors`` the dtype represents exactly, ``[k]``."""
    if can_represent(dtype, vectors.dtype):
        return np.ones(len(vectors), np.bool_)
    return equal_vectors(vectors, vectors.to(dtype).to(vectors.dtype))


def check_weights(vectors: Tensor, chosen: Chosen, base: Checkpoint | None) -> None:
    """Raise a `MismatchError` unless ``vectors``, ``[k, width]`` of a live weight, are the base's.

    They must equal its vectors, cast to the live dtype; without a ``base``, fit the selection's dtype.
    """
    name, dtype = chosen.info.name, chosen.info.dtype
    for start, stop in blocks(chosen.info, chosen.layout, len(chosen.index)):
        block = vectors[start:stop]
        if base is None:
            if not _representable(block, float_dtype(chosen)).all():
                raise MismatchError(
                    "the model's weights are not those of a checkpoint of the selection's dtype",
                    tensor=name,
                    expected=f"values of {dtype}",
                    found=f"{vectors.dtype} values that {dtype} cannot hold",
                    hint="the model was changed after it was loaded: load it again, or save it and use that",
                )
            continue
        theirs = gather(base, chosen.info, chosen.layout, chosen.index[start:stop])
        equal = equal_vectors(block, from_bytes(theirs, dtype).to(vectors.dtype))
        if not equal.all():
            raise MismatchError(
                "the model's weights differ from the base's",
                file=base.name,
                tensor=name,
                expected="equal vectors",
                found=f"{np.count_nonzero(~equal)} of {len(equal)} that differ",
                hint="load the model again, name the checkpoint it was loaded from with base=FOLDER, "
                "or use base=False for a patch on the weights as they are",
            )


def checked_values(
    patch: Patch, part: Chosen, first: int, vectors: Tensor | None, base: Checkpoint | None
) -> Tensor:
    """A patch's values of ``part``, ``[k, width]`` in its dtype, after checking that the patch fits.

    ``part`` holds the neurons of one tensor from position ``first`` on. ``vectors``: those of the live
    weight, None if it is quantized; the base is read if they cannot tell.
    """
    name, last = part.info.name, first + len(part.index)
    tensor = patch.tensors[name]
    before, after = DigestHash(), DigestHash()
    values, different, unknown = [], 0, False
    for start, stop in tensor.blocks():
        stored = patch.base_digests(name, start, stop)
        new = patch.values(name, start, stop)
        before.update(stored)
        after.update(digests(new))
        low, high = max(start, first), min(stop, last)
        if low >= high:
            continue
        values.append(from_bytes(new[low - start : high - start], tensor.info.dtype))
        own = slice(low - first, high - first)
        chosen = Chosen(tensor.info, tensor.layout, part.index[own])
        found = _base_digests(chosen, None if vectors is None else vectors[own], base)
        if found is None:
            unknown = True
        else:
            different += int(np.count_nonzero((found != stored[low - start : high - start]).any(axis=1)))
    patch.check_hashes(name, before, after)
    if different:
        raise MismatchError(
            f"{patch.name} was made from another base",
            tensor=name,
            expected="the vectors of its base",
            found=f"{different} of {len(part.index)} vectors that differ",
            hint="detach() other patches first; `neftsurgery verify` tells which base a checkpoint is",
        )
    if unknown:
        log.warning(
            "%s: %s: the model's dtype is narrower than the patch's, so its base cannot be checked",
            patch.name,
            name,
        )
    return torch.cat(values)


def _base_digests(
    chosen: Chosen, vectors: Tensor | None, base: Checkpoint | None
) -> NDArray[np.uint8] | None:
    """Digests of the base's vectors; zeros where the live ones differ. None if nothing can tell them."""
    dtype = float_dtype(chosen)
    if vectors is not None and can_represent(vectors.dtype, dtype):
        found = digests(to_bytes(vectors, chosen.info.dtype)).copy()
        found[~_representable(vectors, dtype)] = 0
        return found
    if base is None:
        return None
    raw = gather(base, chosen.info, chosen.layout, chosen.index)
    found = digests(raw).copy()
    if vectors is not None:
        found[~equal_vectors(vectors, from_bytes(raw, chosen.info.dtype).to(vectors.dtype))] = 0
    return found
