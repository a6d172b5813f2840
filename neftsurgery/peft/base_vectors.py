"""The vectors of the base that an adapter's neurons replace: of a live weight, or of the base's files."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError
from ..live.loading import meta_model
from ..live.loading_rules import LoadingRules
from ..live.placement import LivePlace, live_places
from ..live.weights import from_bytes, is_plain, to_bytes, torch_dtype
from ..neurons.layout import Layout
from ..neurons.vectors import find, gather
from ..tensors.arrays import Int64Array
from .config import NeftConfig

#: A tensor of the files, its layout, neurons in it, and their positions among those of a parameter.
FilePart: TypeAlias = tuple[str, Layout, Int64Array, Tensor]


def quantization_of(model: nn.Module, module: nn.Module) -> Any:
    """PEFT's way to read and write the weight of a module of the model; None if it is not quantized."""
    return resolve_quantization_backend(module, **get_quantization_kwargs(model))


def weight_shape(module: Any, attribute: str = "weight") -> tuple[int, ...]:
    """The shape of a parameter of a module, also of codes that are stored in another."""
    weight = module._parameters[attribute]
    codes = isinstance(module, nn.Linear) and not is_plain(weight)
    return (module.out_features, module.in_features) if codes else tuple(weight.shape)


def base_digest(vectors: Tensor) -> Tensor:
    """XXH3-128 of vectors ``[k, width]`` of the base in bfloat16, and so the same in any wider dtype."""
    digest = xxhash.xxh3_128_digest(to_bytes(vectors, "BF16").tobytes())
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def require_base(adapter: str, parameter: str, digest: Tensor, vectors: Tensor) -> None:
    """Raise a `MismatchError` unless ``vectors`` have the digest of an adapter's base, if that is known."""
    if digest.any() and not torch.equal(base_digest(vectors), digest.cpu()):
        what = f"the adapter {adapter} was trained on another base"
        raise MismatchError(what, tensor=parameter, hint="use its own base")


def _places_in(base: Checkpoint, config: NeftConfig) -> Iterator[tuple[str, LivePlace]]:
    """The tensors of the files that lie in an adapter's weights, with the axes of its neurons in them."""
    model: nn.Module = meta_model(base, "saved")
    rules, wanted = LoadingRules(model), {name: axes for name, (_, axes) in config.layouts().items()}
    for name, info in base.tensors.items():
        try:
            live, pattern = rules.find(name)
        except MismatchError:  # the model does not have it: a buffer, a head of another class
            continue
        if wanted.keys().isdisjoint([live] if pattern is None else rules.made_with(live, pattern)):
            continue
        for own in (axes for count in (1, 2) for axes in combinations(range(len(info.shape)), count)):
            with contextlib.suppress(MismatchError):
                for place in live_places(model, {name: Layout.of(info.shape, own)})[name]:
                    if place.layout.axes == wanted.get(place.parameter):
                        yield name, place


def neurons_in_files(
    base: Checkpoint, config: NeftConfig, wanted: Mapping[str, Int64Array]
) -> dict[str, list[FilePart]]:
    """Where the neurons ``wanted`` of parameters are in the base's files; only of those that are there."""
    found = defaultdict[str, list[FilePart]](list)
    for name, place in _places_in(base, config):
        if (index := wanted.get(place.parameter)) is None or torch_dtype(base.tensors[name].dtype) is None:
            continue
        slot, here = find(index, place.index_of(np.arange(place.file.count)))
        positions = torch.from_numpy(slot[here])
        found[place.parameter].append((name, place.file, np.flatnonzero(here), positions))
    whole = (name for name, parts in found.items() if sum(len(one[2]) for one in parts) == len(wanted[name]))
    return {name: found[name] for name in whole}


def file_vectors(base: Checkpoint, parts: Mapping[str, list[FilePart]]) -> dict[str, Tensor]:
    """The vectors of neurons in the base's files, by parameter, ``[k, width]``."""
    vectors = {}
    for parameter, several in parts.items():
        infos = [(base.tensors[name], layout, index) for name, layout, index, _ in several]
        rows = torch.cat([from_bytes(gather(base, *one), one[0].dtype) for one in infos])
        vectors[parameter] = rows[torch.cat([positions for *_, positions in several]).argsort()]
    return vectors
