"""apply_live: put a patch into the tensors of a model in memory, all or nothing, checked before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

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
from .weights import read_vectors, write_vectors

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # all that torch can index
_Changes = Callable[[], Iterator[tuple[str, Tensor]]]  # tensors of the files, and what they become


@boundary
def apply_live(model: nn.Module | Mapping[str, Tensor], patch: AnyPatch) -> None:
    """Put a patch into a live model: its tensors get the values that the patched checkpoint has, to the bit.

    Everything is checked before the first tensor changes. Applying it twice is the same as applying it once.

    Args:
        model: A module, or its ``state_dict()``: a mapping of names to tensors, which are changed in place.
            What transformers has merged, split or transposed is changed where it lies.
        patch: A patch of either kind, or its path. A lossless one must have the tensors that the model has.

    Raises:
        MismatchError: If a tensor is missing, is changed when the model is loaded, has another shape or
            dtype, or other values than the base; nothing is changed.
        CorruptFileError: If the patch does not match its hashes; nothing is changed.
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
                yield name, torch.from_numpy(raw).view(tensors[name].dtype).reshape(info.shape)

    return changes


def _rows(patch: Patch, tensors: Mapping[str, Tensor]) -> _Changes:
    patch.check()

    def changes() -> Iterator[tuple[str, Tensor]]:
        for name, part in patch.tensors.items():
            whole = torch.from_numpy(np.array(tensor_bytes(tensors[name])))
            grid = whole.view(_INTEGERS[part.info.type.itemsize]).reshape(part.info.shape)
            index, new = torch.from_numpy(patch.index(name)), torch.from_numpy(np.array(patch.values(name)))
            old = read_vectors(grid, part.layout, index).view(torch.uint8)
            known = (digests(old.numpy()) == patch.base_digests(name)).all(axis=1)
            if not (known | (old == new).all(dim=1).numpy()).all():
                raise _other(patch, name)
            write_vectors(grid, part.layout, index, new.view(grid.dtype))
            yield name, grid.view(tensors[name].dtype)

    return changes


def _other(patch: Patch | LosslessPatch, name: str) -> MismatchError:
    return MismatchError(
        f"{patch.name} was made from another base than this model",
        tensor=name,
        hint="nothing was changed; load the base that the patch was made from",
    )
