"""apply_live: put a patch into the tensors of a model in memory, all or nothing, checked before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.in_memory import TensorsInMemory, tensor_bytes, tensor_info
from ..checkpoint.provenance import same_tensor
from ..errors import MismatchError, boundary
from ..neurons.layout import Layout
from ..patch.lossless import AnyPatch, LosslessPatch, load_any
from ..patch.patch import Patch
from ..patch.patch_file import digests
from ..surgery.model_files import RebuiltWeights
from ..tensors.header import TensorInfo
from .loading_rules import live_weights
from .placement import FileTensors, LivePlace, live_places

_Changes = Callable[[], Iterator[tuple[str, Tensor]]]  # tensors of the files, and what they become


@boundary
def apply_live(model: nn.Module | Mapping[str, Tensor], patch: AnyPatch) -> None:
    """Put a patch into a live model: its tensors get the values that the patched checkpoint has, to the bit.

    Everything is checked before the first tensor changes: that what the patch is about is as in its base, or
    patched already, and that every new value has its hash. Applying it twice is the same as applying it once.

    Parameters
    ----------
    model:
        A module, or its ``state_dict()``: a mapping of names to tensors, which are changed in place. Tensors
        stay where they are. A module of transformers may have merged, split or transposed the tensors of the
        files: these are changed where they lie.
    patch:
        A patch of either kind, or its path. A lossless one must have the tensors that the model has.

    Raises
    ------
    MismatchError
        If a tensor is missing, is changed when the model is loaded, has another shape or dtype, or other
        values than the base; nothing is changed.
    CorruptFileError
        If the patch does not match its hashes; nothing is changed.
    """
    loaded = load_any(patch)
    if isinstance(loaded, LosslessPatch):
        infos, changes_of = loaded.forward.tensors, partial(_whole, loaded)
    else:
        infos = {name: tensor.info for name, tensor in loaded.tensors.items()}
        changes_of = partial(_rows, loaded)
    tensors = _tensors(model, infos)
    for name, info in infos.items():
        found = tensor_info(name, tensors[name])
        if not same_tensor(found, info):
            raise MismatchError(
                "the model has another tensor", tensor=name, expected=info.describe(), found=found.describe()
            )
    changes = changes_of(tensors)
    for _ in changes():  # all is checked
        pass
    for name, values in changes():
        tensors.write(name, values)


def _tensors(model: nn.Module | Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> FileTensors:
    layouts = {name: Layout.of(info.shape, ()) for name, info in infos.items()}
    if isinstance(model, nn.Module):
        return FileTensors(live_weights(model), live_places(model, layouts))
    for name in infos:
        if name not in model:
            raise MismatchError("the model has no such tensor", tensor=name)
    return FileTensors(model, {name: (LivePlace(name, layout, layout),) for name, layout in layouts.items()})


def _whole(patch: LosslessPatch, tensors: Mapping[str, Tensor]) -> _Changes:
    made = RebuiltWeights(TensorsInMemory(tensors, "the model"), [patch], [patch.forward])
    left = dict(made.tensors)

    def changes() -> Iterator[tuple[str, Tensor]]:
        for name, info in [*left.items()]:
            raw = np.empty(info.nbytes, np.uint8)
            try:
                made.read_into(name, 0, raw.data)
            except MismatchError as error:
                raise _other(patch, name) from error
            if np.array_equal(raw, tensor_bytes(tensors[name])):
                del left[name]
            else:
                yield name, _as_tensor(raw, info, tensors[name])

    return changes


def _rows(patch: Patch, tensors: Mapping[str, Tensor]) -> _Changes:
    patch.check()

    def changes() -> Iterator[tuple[str, Tensor]]:
        for name, part in patch.tensors.items():
            raw, index, axes = np.array(tensor_bytes(tensors[name])), patch.index(name), part.layout.axes
            others = [axis for axis in range(len(part.info.shape)) if axis not in axes]
            grid = raw.view(part.info.type.carrier).reshape(part.info.shape).transpose(*axes, *others)
            grid = grid if axes else grid[np.newaxis]  # the whole tensor is one neuron
            where = np.unravel_index(index, grid.shape[: len(axes) or 1])
            new, now = patch.values(name), grid[where]
            old = np.ascontiguousarray(now).reshape(len(index), -1).view(np.uint8)
            known = (digests(old) == patch.base_digests(name)).all(axis=1) | (old == new).all(axis=1)
            if not known.all():
                raise _other(patch, name)
            grid[where] = new.view(part.info.type.carrier).reshape(now.shape)
            yield name, _as_tensor(raw, part.info, tensors[name])

    return changes


def _as_tensor(raw: Any, info: TensorInfo, like: Tensor) -> Tensor:
    return torch.from_numpy(raw).view(like.dtype).reshape(info.shape)


def _other(patch: Patch | LosslessPatch, name: str) -> MismatchError:
    return MismatchError(
        f"{patch.name} was made from another base than this model",
        tensor=name,
        hint="nothing was changed; load the base that the patch was made from",
    )
