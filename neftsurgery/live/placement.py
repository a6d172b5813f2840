"""Where the neurons of a checkpoint's tensors lie in a live model.

Most tensors become a weight of the same shape, perhaps of another name. Where transformers merges, splits,
transposes or permutes tensors as it loads them (most mixtures of experts, many vision models), its converters
are run on the meta device, in true shapes, and what they move is recorded. What changes values, or cannot be
told element by element, is refused by name. Nothing is guessed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import MismatchError
from ..neurons.layout import Layout
from .element_moves import MoveRecorder, Offsets
from .loading_rules import LoadingRules
from .weights import copy_into, full_tensor

__all__ = ["LivePlace", "live_places", "same_weight"]

_Regions: TypeAlias = "list[tuple[int, _Region]] | str"
"""The regions of a tensor, with the numbers of their weights, or why there are none."""

_ELSEWHERE = -1
_SAMPLES = 512  # elements of each tensor, drawn at random, whose place is checked


@dataclass(frozen=True, eq=False)
class _Region:
    """The elements of a live weight that are a tensor of the files, or the slices of it along one axis.

    Element ``(i, j, ...)`` of the file lies at ``start + steps[0][i] + steps[1][j] + ...``, row-major.
    """

    shape: tuple[int, ...]  # of the weight
    start: int
    steps: tuple[
        Offsets, ...
    ]  # for each axis of the file, ``[size]``, from 0; `_ELSEWHERE`: not in this weight

    @property
    def here(self) -> list[Offsets]:
        """For each axis of the file, which of its slices are in this weight."""
        return [np.flatnonzero(steps != _ELSEWHERE) for steps in self.steps]

    def of(self, live: Tensor) -> tuple[Tensor, Any]:
        """A view of the contiguous weight ``live``, and the index that makes it `LivePlace.part`."""
        steps = [each[here] for each, here in zip(self.steps, self.here, strict=True)]
        strides = [int(each[1]) if len(each) > 1 else 1 for each in steps]
        if all(
            (each == np.arange(len(each)) * stride).all() for each, stride in zip(steps, strides, strict=True)
        ):
            sizes = [len(each) for each in steps]
            return live.as_strided(sizes, strides, live.storage_offset() + self.start), ...
        return live.view(-1), torch.from_numpy(self.start + sum(np.ix_(*steps)))


@dataclass(frozen=True, eq=False)
class LivePlace:
    """Where a tensor of the files lies in a weight of the model: all of it, or the slices that are there."""

    name: str  # of the tensor, in the files
    file: Layout  # of the tensor, in the files
    parameter: str  # the name of the weight
    region: _Region | None = None  # None: the weight is the tensor
    operations: str = ""  # of the loader

    @property
    def layout(self) -> Layout:
        """The layout of the weight in which the file's neurons are neurons; a `MismatchError` if none is."""
        if self.region is None:
            return self.file
        try:
            return _live_layout(self.region, self.file)
        except ValueError as error:
            raise _refusal(str(error), self.name, self.parameter, self.operations) from error

    def index_of(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """The neurons of the weight that neurons ``index`` of the file are; -1 for those in other weights."""
        if self.region is None:
            return index
        layout, axes = self.layout, self.file.axes
        coordinates = np.unravel_index(index, [self.file.shape[axis] for axis in axes])
        steps = [self.region.steps[axis][at] for axis, at in zip(axes, coordinates, strict=True)]
        here = np.all([each != _ELSEWHERE for each in steps], axis=0)
        live = np.unravel_index(np.where(here, self.region.start + sum(steps), 0), layout.shape)
        sizes = [layout.shape[axis] for axis in layout.axes]
        return np.where(here, np.ravel_multi_index([live[axis] for axis in layout.axes], sizes), -1)

    @property
    def part(self) -> Any:
        """What the file's tensor is indexed with for the part that lies here: ``...`` for all of it."""
        if self.region is None or all(map(np.array_equal, self.region.here, map(np.arange, self.file.shape))):
            return ...
        return tuple(
            slice(None) if len(here) == size else torch.from_numpy(here)
            for here, size in zip(self.region.here, self.file.shape, strict=True)
        )

    def read(self, live: Tensor) -> Tensor:
        """`part` of the file's tensor, from the weight: a copy, or the weight itself if it is the tensor."""
        if self.region is None:
            return live
        view, index = self.region.of(full_tensor(live).detach().contiguous())
        return view[index].clone()

    def write(self, live: Tensor, values: Tensor) -> None:
        """Write ``values``, `part` of the file's tensor, into the weight: `read` inverted."""
        if self.region is None:
            copy_into(live, values)
            return
        whole = full_tensor(live).detach()
        contiguous = whole.contiguous()
        view, index = self.region.of(contiguous)
        view[index] = values.to(device=view.device, dtype=view.dtype)
        if contiguous is not whole or whole.data_ptr() != live.data_ptr():
            copy_into(live, contiguous)


def live_places(model: nn.Module, tensors: Mapping[str, Layout]) -> dict[str, tuple[LivePlace, ...]]:
    """Where each tensor of the files lies in ``model``: in one weight, or in several, cut along an axis.

    ``tensors`` may be some of the files' tensors. A layout without neuron axes asks for the tensor alone.
    Only shapes are looked at: the model may be on the meta device.

    Raises
    ------
    MismatchError
        If a tensor is not in the model, or is not kept as it is in the files, element by element; if its
        neurons are not neurons of the model; if another tensor is the same weight.
    """
    rules = LoadingRules(model)
    plain: dict[str, str] = {}
    converted: dict[str, dict[str, Layout]] = {}
    for name, layout in tensors.items():
        live, pattern = rules.find(name)
        if pattern is not None:
            converted.setdefault(live, {})[name] = layout
        elif (other := plain.setdefault(live, name)) != name:
            raise same_weight(name, other, live)
    places: dict[str, tuple[LivePlace, ...]] = {
        name: (LivePlace(name, tensors[name], live),) for live, name in plain.items()
    }
    converters = _Converters(rules)
    for live, given in converted.items():
        places |= converters.places(live, given)
    for name, found in places.items():
        for place in found:
            if (other := plain.get(place.parameter, name)) != name:
                raise same_weight(name, other, place.parameter)
            if place.file.axes:
                _ = place.layout  # refuses neurons that the model does not have
    return {name: places[name] for name in tensors}


class _Converters:
    """The places of tensors that converters change. What is alike in many layers is found once."""

    def __init__(self, rules: LoadingRules) -> None:
        self._rules = rules
        self._known: dict[Any, list[_Regions]] = {}

    def places(self, live: str, given: Mapping[str, Layout]) -> dict[str, tuple[LivePlace, ...]]:
        """Those of the tensors ``given``, which become ``live``, perhaps together with others."""
        name, *_ = given
        pattern = str(self._rules.find(name)[1])
        targets, operations = self._rules.made_with(live, pattern), self._rules.operations(pattern)
        try:
            shapes = {one: given[one].shape for one in self._rules.in_order(given)}
            try:
                regions = self._regions(targets, shapes)
            except (
                Exception
            ):  # whatever the operations raise: some of the tensors that they need are not given
                shapes = self._all_shapes(live, targets, shapes)
                regions = self._regions(targets, shapes)
        except Exception as error:
            raise _refusal(f"{type(error).__name__}: {error}", name, live, operations) from error
        places = {}
        for name, found in zip(shapes, regions, strict=True):
            if name in given:
                if isinstance(found, str):
                    raise _refusal(found, name, live, operations)
                places[name] = tuple(
                    LivePlace(name, given[name], targets[number], region, operations)
                    for number, region in found
                )
        return places

    def _all_shapes(
        self, live: str, targets: Sequence[str], given: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """All tensors of the files that become ``live``, under their names in ``given`` if they are there."""
        rules = self._rules
        written = {
            name: shape for name, shape in rules.written(targets).items() if rules.find(name)[0] == live
        }
        endings = {name: f".{rules.renamed(name)}" for name in written}
        given_as = {}
        for name in given:
            end = f".{rules.renamed(name)}"  # with or without the prefix of the model
            same = [other for other, each in endings.items() if each.endswith(end) or end.endswith(each)]
            if len(same) != 1 or same[0] in given_as:
                raise ValueError(f"it is loaded together with {', '.join([*written][:2])}, ...")
            given_as[same[0]] = name
        return {
            given_as.get(name, name): given.get(given_as.get(name, name), written[name])
            for name in rules.in_order(written)
        }

    def _regions(self, targets: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> list[_Regions]:
        """For each tensor its regions, with the numbers of their targets, or why there are none."""
        live_shapes = [tuple(self._rules.weights[name].shape) for name in targets]
        key = str([live_shapes, [(self._rules.find(name)[1], shape) for name, shape in shapes.items()]])
        if key not in self._known:
            tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            with torch.no_grad(), MoveRecorder() as recorder:
                made = self._rules.convert(targets[0], tensors)
            for name, shape in zip(targets, live_shapes, strict=True):
                if tuple(made[name].shape) != shape:
                    raise ValueError(f"{name} would have shape {list(made[name].shape)}, not {list(shape)}")
            recorder.end([made[name] for name in targets])
            self._known[key] = [_follow(recorder, tensor, live_shapes) for tensor in tensors.values()]
        return self._known[key]


def _follow(recorder: MoveRecorder, tensor: Tensor, live_shapes: Sequence[tuple[int, ...]]) -> _Regions:
    axes = [np.arange(size) for size in tensor.shape]
    try:
        numbers = [
            recorder.follow(tensor, axis * step)[0] for axis, step in zip(axes, tensor.stride(), strict=True)
        ]
        if not numbers or not all(len(each) and each.min() >= 0 for each in numbers):
            raise ValueError("transformers leaves out a part of it")
        cut = [axis for axis, each in enumerate(numbers) if each.min() != each.max()]
        if len(cut) > 1:
            raise ValueError("transformers cuts it along several axes")
        found = []
        for number in np.unique(numbers[cut[0] if cut else 0]).tolist():
            here = [np.flatnonzero(each == number) if n in cut else axes[n] for n, each in enumerate(numbers)]
            found.append((number, _region(recorder, tensor, number, here, live_shapes[number])))
    except ValueError as error:
        return str(error)
    return found


def _region(
    recorder: MoveRecorder, tensor: Tensor, number: int, here: Sequence[Offsets], shape: tuple[int, ...]
) -> _Region:
    """From the elements along each axis, through the first one; random ones check that these tell all."""
    random = np.random.default_rng(0)
    samples = [random.choice(each, _SAMPLES) for each in here]
    strides = tensor.stride()
    origin = sum(int(each[0]) * stride for each, stride in zip(here, strides, strict=True))
    lines = [origin + (each - each[0]) * stride for each, stride in zip(here, strides, strict=True)]
    lines.append(np.sum([each * stride for each, stride in zip(samples, strides, strict=True)], axis=0))
    targets, offsets = recorder.follow(tensor, np.concatenate(lines))
    *along, sampled = np.split(offsets, np.cumsum([len(line) for line in lines[:-1]]))
    start, steps = int(along[0][0]), []
    for each, found, size in zip(here, along, tensor.shape, strict=True):
        start += int(found.min() - found[0])
        steps.append(np.full(size, _ELSEWHERE))
        steps[-1][each] = found - found.min()
    expected = start + np.sum([each[at] for each, at in zip(steps, samples, strict=True)], axis=0)
    if (targets != number).any() or (sampled != expected).any():
        raise ValueError("transformers mixes its axes")
    return _Region(shape, start, tuple(steps))


@functools.lru_cache(maxsize=4096)
def _live_layout(region: _Region, file: Layout) -> Layout:
    within = [axis for axis in range(len(file.shape)) if axis not in file.axes]
    if any((region.steps[axis] == _ELSEWHERE).any() for axis in within):
        raise ValueError("transformers cuts its neurons into several weights")
    vector = region.start + np.zeros(1, np.int64)  # the elements of a neuron
    for axis in within:
        vector = np.add.outer(vector, region.steps[axis]).ravel()
    coordinates = np.unravel_index(vector, region.shape)
    moving = [axis for axis, each in enumerate(coordinates) if each.min() != each.max()]
    for axis in file.axes:
        line = region.start + region.steps[axis][region.here[axis]]
        neurons = np.unravel_index(line, region.shape)
        if any(neurons[live].min() != neurons[live].max() for live in moving):
            raise ValueError("transformers merges axes of neurons with others")
    sizes = [region.shape[axis] for axis in moving]
    if math.prod(sizes) != file.width:
        raise ValueError("its neurons are parts of longer ones in the model")
    if (
        moving
        and (np.ravel_multi_index([coordinates[n] for n in moving], sizes) != np.arange(file.width)).any()
    ):
        raise ValueError("the elements of its neurons are in another order in the model")
    return Layout.of(region.shape, [axis for axis in range(len(region.shape)) if axis not in moving])


def same_weight(name: str, other: str, live: str) -> MismatchError:
    """The error for two tensors of the files that are one weight of the model."""
    return MismatchError(
        f"this tensor and {other} are the same weight of the model",
        tensor=name,
        found=live,
        hint="choose neurons of only one of the two",
    )


def _refusal(problem: str, name: str, live: str, operations: str) -> MismatchError:
    return MismatchError(
        f"the model does not have this tensor as the file has it: {problem}",
        tensor=name,
        found=f"loaded as {live} by {operations}",
        hint="choose neurons of other tensors",
    )
