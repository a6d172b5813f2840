"""apply_live: put a patch into the tensors of a model in memory, all or nothing, checked before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.in_memory import tensor_bytes, tensor_info
from ..checkpoint.provenance import same_tensor
from ..coding.elements import Carrier
from ..errors import MismatchError, boundary
from ..neurons.layout import Layout
from ..patch.delta import DeltaBlock, block_hash
from ..patch.digests import digests
from ..patch.lossless import AnyPatch, LosslessPatch, load_any
from ..patch.patch import Patch
from ..tensors.header import TensorInfo
from .names import live_names
from .weights import copy_into

__all__ = ["apply_live"]

_Changes = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # tensors of the model, and what they become


@boundary
def apply_live(model: nn.Module | Mapping[str, Tensor], patch: AnyPatch) -> None:
    """Put a patch into a live model: its tensors get the values that the patched checkpoint has, to the bit.

    Everything is checked before the first tensor changes: that the model is the base of the patch, or that
    and patched in part, and that every new value has its hash. Applying a patch twice is applying it once.

    Parameters
    ----------
    model:
        A module, or its ``state_dict()``: a mapping of names to tensors, which are changed in place. Tensors
        stay where they are.
    patch:
        A patch of either kind, or its path. A lossless one must have the tensors that the model has.

    Raises
    ------
    MismatchError
        If a tensor is missing, has another shape or dtype, or other values than the base; nothing is changed.
    CorruptFileError
        If the patch does not match its hashes; nothing is changed.
    """
    loaded = load_any(patch)
    names = list(loaded.forward.tensors if isinstance(loaded, LosslessPatch) else loaded.tensors)
    tensors = _tensors(model, names)
    infos = (
        loaded.forward.tensors
        if isinstance(loaded, LosslessPatch)
        else {name: tensor.info for name, tensor in loaded.tensors.items()}
    )
    for name, info in infos.items():
        found = tensor_info(name, tensors[name])
        if not same_tensor(found, info):
            raise MismatchError(
                "the model has another tensor", tensor=name, expected=info.describe(), found=found.describe()
            )
    changes = _whole(loaded, tensors) if isinstance(loaded, LosslessPatch) else _rows(loaded, tensors)
    for _ in changes():  # all is checked
        pass
    for tensor, values in changes():
        copy_into(tensor, values)


def _tensors(model: nn.Module | Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        buffers = dict(model.named_buffers())
        own = [name for name in names if name not in buffers]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        live = live_names(model, own)
        return {name: buffers[name] if name in buffers else parameters[live[name]] for name in names}
    for name in names:
        if name not in model:
            raise MismatchError("the model has no such tensor", tensor=name)
    return dict(model)


def _whole(patch: LosslessPatch, tensors: Mapping[str, Tensor]) -> _Changes:
    delta = patch.forward
    blocks: dict[str, list[DeltaBlock]] = {name: [] for name in delta.tensors}
    for block in delta.blocks:
        blocks[block.info.name].append(block)

    def changes() -> Iterator[tuple[Tensor, Tensor]]:
        for name, parts in blocks.items():
            if not parts or all(delta.before[part.number] == delta.after[part.number] for part in parts):
                continue
            raw = np.array(tensor_bytes(tensors[name]))
            elements = raw.view(parts[0].elements.carrier)
            for part in parts:
                now = np.ascontiguousarray(elements[part.start : part.stop])
                made = delta.made(part, now, block_hash(now))
                if made is None:
                    raise _other(patch, name)
                elements[part.start : part.stop] = made
            yield tensors[name], _as_tensor(raw, delta.tensors[name], tensors[name])

    return changes


def _rows(patch: Patch, tensors: Mapping[str, Tensor]) -> _Changes:
    patch.check()

    def changes() -> Iterator[tuple[Tensor, Tensor]]:
        for name, part in patch.tensors.items():
            raw = np.array(tensor_bytes(tensors[name]))
            grid = raw.view(part.info.type.carrier).reshape(part.info.shape)
            vectors = _neurons_first(grid, part.layout)
            index, new = patch.index(name), patch.values(name)
            old = np.ascontiguousarray(vectors[index]).view(np.uint8).reshape(new.shape)
            known = (digests(old) == patch.base_digests(name)).all(axis=1) | (old == new).all(axis=1)
            if not known.all():
                raise _other(patch, name)
            vectors[index] = new.view(part.info.type.carrier)
            shape = [part.info.shape[axis] for axis in _order(part.layout)]
            back = np.argsort(_order(part.layout))
            grid[...] = vectors.reshape(shape).transpose(back)
            yield tensors[name], _as_tensor(raw, part.info, tensors[name])

    return changes


def _order(layout: Layout) -> list[int]:
    return [*layout.axes, *(axis for axis in range(len(layout.shape)) if axis not in layout.axes)]


def _neurons_first(grid: Carrier, layout: Layout) -> Carrier:
    return np.ascontiguousarray(grid.transpose(_order(layout))).reshape(layout.count, layout.width)


def _as_tensor(raw: Any, info: TensorInfo, like: Tensor) -> Tensor:
    return torch.from_numpy(raw).view(like.dtype).reshape(info.shape)


def _other(patch: Patch | LosslessPatch, name: str) -> MismatchError:
    return MismatchError(
        f"{patch.name} was made from another base than this model",
        tensor=name,
        hint="nothing was changed; load the base that the patch was made from",
    )
