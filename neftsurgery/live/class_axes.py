"""The neuron axes that the layers of a live class tell: for what the table of architectures does not know."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError
from ..neurons.layout import Layout
from .loading import meta_model
from .loading_rules import LoadingRules
from .placement import live_places

_ORDERS = ((0,), (1,), (0, 1), (0, 2))
_FIRST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.MultiheadAttention)
_SECOND = (Conv1D, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def class_axes(checkpoint: Checkpoint, kinds: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The neuron axes of each kind, a glob; none for embeddings; absent if no layer of the class tells."""
    model = meta_model(checkpoint, "saved")
    rules = LoadingRules(model)
    live: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        try:
            live.setdefault(rules.find(name)[0], []).append(name)
        except MismatchError:
            continue
    told: dict[str, tuple[int, ...]] = {}
    for kind in kinds:
        of_kind = ((one, name) for one, names in live.items() for name in names if fnmatchcase(name, kind))
        weight, name = next(of_kind, ("", ""))
        axes = _file_axes(model, checkpoint, weight, name, live[weight]) if name else None
        if axes is not None:
            told[kind] = axes
    return told


def _file_axes(
    model: nn.Module, checkpoint: Checkpoint, live: str, name: str, names: list[str]
) -> tuple[int, ...] | None:
    """The neuron axes in the files of ``name``, one of the ``names`` of which the weight ``live`` is made."""
    wanted = _live_axes(model, live)
    if not wanted:
        return wanted
    shapes = {one: checkpoint.tensors[one].shape for one in names}
    for axes in _ORDERS:
        if axes[-1] < len(shapes[name]):
            layouts = {one: Layout(shape, axes if one == name else ()) for one, shape in shapes.items()}
            try:
                places = live_places(model, layouts)[name]
            except MismatchError:
                continue
            if all(place.layout.axes == _live_axes(model, place.parameter) for place in places):
                return axes
    return None


def _live_axes(model: nn.Module, weight: str) -> tuple[int, ...] | None:
    path, _, name = weight.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        return ()
    if hasattr(module, "is_transposed") and getattr(module, name).ndim == 3:  # transformers' experts
        return (0, 2) if module.is_transposed else (0, 1)
    sizes = tuple(getattr(module, size, None) for size in ("num_experts", "output_size", "input_size"))
    if tuple(getattr(module, name).shape) == sizes:  # those of JetMoe
        return (0, 1)
    if isinstance(module, _FIRST) and "weight" in name:
        return (0,)
    whole = isinstance(module, _SECOND) and getattr(module, "groups", 1) == 1
    return (1,) if whole and name == "weight" else None
