"""Where the neurons of a checkpoint's tensors lie in a live model.

Most tensors become a weight of the same shape, perhaps of another name. Where transformers merges, splits,
transposes or permutes tensors as it loads them (most mixtures of experts, many vision models), its converters
are run on the meta device, in true shapes, and what they move is recorded. What changes values, or cannot be
told element by element, is refused by name. Nothing is guessed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MismatchError, UsageError
from ..neurons.layout import Layout
from ..selection.selection import Chosen
from ..tensors.arrays import Int64Array
from .element_moves import MoveRecorder, Offsets
from .loading_rules import LoadingRules
from .weights import copy_into, full_tensor

_ELSEWHERE = -1
_SAMPLES = 512  # elements of each tensor, drawn at random, whose place is checked: at least


@dataclass(frozen=True, eq=False)
class _Region:
    """The elements of a live weight that are a tensor of the files, or some of its slices along one axis.

    Element ``(i, j, ...)`` of the file lies at ``start + steps[0][i] + steps[1][j] + ...``, row-major.
    """

    shape: tuple[int, ...]  # of the weight
    start: int
    steps: tuple[Offsets, ...]  # for each axis of the file, ``[size]``: at least 0; `_ELSEWHERE`: not here

    @cached_property
    def here(self) -> list[Offsets]:
        """For each axis of the file, which of its slices are here."""
        return [np.flatnonzero(steps != _ELSEWHERE) for steps in self.steps]

    def of(self, live: Tensor) -> tuple[Tensor, Any]:
        """A view of the contiguous weight ``live``, and what to index it with for `LivePlace.part`."""
        steps = [each[here] for each, here in zip(self.steps, self.here, strict=True)]
        strides = [int(each[1]) if len(each) > 1 else 1 for each in steps]
        even = (np.arange(len(each)) * stride for each, stride in zip(steps, strides, strict=True))
        if all(map(np.array_equal, steps, even)):
            sizes = [len(each) for each in steps]
            return live.as_strided(sizes, strides, live.storage_offset() + self.start), ...
        return live.view(-1), torch.from_numpy(self.start + sum(np.ix_(*steps)))


@dataclass(frozen=True, eq=False)
class LivePlace:
    """Where a tensor of the files lies in a weight of the model: all of it, or the slices that are there."""

    parameter: str  # the name of the weight
    layout: Layout  # of the weight: its shape, and the axes along which the file's neurons are its neurons
    file: Layout  # of the tensor in the files
    region: _Region | None = None  # None: the weight is the tensor

    def index_of(self, index: Int64Array) -> Int64Array:
        """The neurons of the weight that neurons ``index`` of the file are; -1 for those in other weights."""
        if self.region is None:
            return index
        at = np.unravel_index(index, [self.file.shape[axis] for axis in self.file.axes])
        steps = [self.region.steps[axis][each] for axis, each in zip(self.file.axes, at, strict=True)]
        here = np.all([each != _ELSEWHERE for each in steps], axis=0)
        live = np.unravel_index(np.where(here, self.region.start + sum(steps), 0), self.layout.shape)
        sizes = [self.layout.shape[axis] for axis in self.layout.axes]
        return np.where(here, np.ravel_multi_index([live[axis] for axis in self.layout.axes], sizes), -1)

    @property
    def part(self) -> Any:
        """What the file's tensor is indexed with for the part that lies here: ``...`` for all of it."""
        if self.region is None or sum(map(len, self.region.here)) == sum(self.file.shape):
            return ...
        slices = zip(self.region.here, self.file.shape, strict=True)
        return tuple(slice(None) if len(each) == size else torch.from_numpy(each) for each, size in slices)

    def read(self, live: Tensor) -> Tensor:
        """`part` of the file's tensor, from the weight: a contiguous view if that can be, else a copy."""
        if self.region is None:
            return live
        view, index = self.region.of(full_tensor(live).detach().contiguous())
        return view[index].contiguous()

    def write(self, live: Tensor, values: Tensor) -> None:
        """Write ``values``, `part` of the file's tensor, into the weight: `read` inverted."""
        if self.region is None:
            copy_into(live, values)
            return
        whole = full_tensor(live).detach().contiguous()
        view, index = self.region.of(whole)
        view[index] = values.to(device=view.device, dtype=view.dtype)
        if whole.data_ptr() != live.data_ptr():  # a copy: of a shard, or of a weight in another order
            copy_into(live, whole)


class FileTensors(Mapping[str, Tensor]):
    """The tensors of the files, read from the weights of a model when they are asked for."""

    def __init__(self, weights: Mapping[str, Tensor], places: Mapping[str, tuple[LivePlace, ...]]) -> None:
        self._weights, self._places = weights, places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> Tensor:
        first, *others = self._places[name]
        found = first.read(self._weights[first.parameter])
        if not others:
            return found
        whole = found.new_empty(first.file.shape)
        for place in (first, *others):
            whole[place.part] = place.read(self._weights[place.parameter])
        return whole

    def write(self, name: str, values: Tensor) -> None:
        """Put ``values``, in the shape of the tensor in the files, into the weights."""
        for place in self._places[name]:
            place.write(self._weights[place.parameter], values[place.part])


def live_places(model: nn.Module, tensors: Mapping[str, Layout]) -> dict[str, tuple[LivePlace, ...]]:
    """Where each tensor of the files lies in ``model``: in one weight, or in several, cut along an axis.

    A layout without neuron axes asks for the tensor alone. The model may be on the meta device. Raises a
    `MismatchError` if a tensor is not in the model, or is not kept as it is in the files, element by element;
    if its neurons are not neurons of the model; if another tensor is the same weight.
    """
    rules = LoadingRules(model)
    plain: dict[str, str] = {}
    converted: dict[str, dict[str, Layout]] = {}
    for name, layout in tensors.items():
        live, pattern = rules.find(name)
        if layout.axes and not isinstance(rules.weights[live], nn.Parameter):
            raise MismatchError("a buffer of the model has no neurons", tensor=name, found=live)
        if pattern is not None:
            converted.setdefault(live, {})[name] = layout
        elif (other := plain.setdefault(live, name)) != name:
            raise _same_weight(name, other, live)
    places: dict[str, tuple[LivePlace, ...]] = {
        name: (LivePlace(live, tensors[name], tensors[name]),) for live, name in plain.items()
    }
    converters = _Converters(rules)
    for live, given in converted.items():
        for name, found in converters.places(live, given).items():
            for place in found:
                if place.parameter in plain:
                    raise _same_weight(name, plain[place.parameter], place.parameter)
            places[name] = found
    return {name: places[name] for name in tensors}


def neurons_by_weight(
    model: nn.Module, tensors: Mapping[str, Chosen]
) -> dict[str, tuple[Layout, list[tuple[str, Int64Array, Int64Array]]]]:
    """Where chosen neurons of tensors of the files lie: by the weights of ``model`` that have some.

    For each, its layout, and of each tensor in it: the name, which of its chosen neurons are here (positions
    in ``index``), and which neurons of the weight they are. Errors as of `live_places`, and a `UsageError`.
    """
    found: dict[str, tuple[Layout, list[tuple[str, Int64Array, Int64Array]]]] = {}
    for name, places in live_places(model, {name: one.layout for name, one in tensors.items()}).items():
        for place in places:
            index = place.index_of(tensors[name].index)
            here = np.flatnonzero(index >= 0)
            if not len(here):
                continue
            layout, held = found.setdefault(place.parameter, (place.layout, []))
            if layout != place.layout:
                raise UsageError(
                    f"{held[0][0]} has neurons along another axis of the same weight",
                    tensor=name,
                    hint="choose neurons along one of the axes",
                )
            held.append((name, here, index[here]))
    return found


class _Converters:
    """The places of tensors that converters change. What is alike in many layers is found once."""

    def __init__(self, rules: LoadingRules) -> None:
        self._rules = rules
        self._known: dict[str, list[list[tuple[int, _Region]]]] = {}

    def places(self, live: str, given: Mapping[str, Layout]) -> dict[str, tuple[LivePlace, ...]]:
        """Those of the tensors ``given``, which become ``live``, perhaps together with others."""
        name, *_ = given
        pattern = str(self._rules.find(name)[1])
        targets = self._rules.made_with(live, pattern)
        shapes = {one: given[one].shape for one in self._rules.in_order(given)}
        places = {}
        try:
            try:
                regions = self._regions(targets, shapes)
            except Exception:  # whatever an operation raises to which not all tensors are given that it needs
                shapes = self._all_shapes(live, targets, shapes)
                regions = self._regions(targets, shapes)
            for name, found in zip(shapes, regions, strict=True):
                if name in given:
                    file = given[name]
                    places[name] = tuple(
                        LivePlace(targets[number], _live_layout(region, file), file, region)
                        for number, region in found
                    )
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise MismatchError(
                f"the model does not have this tensor as the files have it: {kind}{error}",
                tensor=name,
                found=f"loaded as {live} by {self._rules.operations(pattern)}",
                hint="choose neurons of other tensors",
            ) from error
        return places

    def _all_shapes(
        self, live: str, targets: Sequence[str], given: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """All tensors of the files that become ``live``, under their names in ``given`` if they are there."""
        rules, written = self._rules, self._rules.written(targets)
        names = [name for name in rules.in_order(written) if rules.find(name)[0] == live]
        endings = {name: f".{rules.renamed(name)}" for name in names} if given.keys() - written.keys() else {}
        given_as = {}
        for name in given:
            end = f".{rules.renamed(name)}"  # with or without the prefix of the model
            alike = [one for one, each in endings.items() if each.endswith(end) or end.endswith(each)]
            same = [name] if name in written else alike
            if len(same) != 1 or same[0] in given_as:
                raise ValueError(f"it is loaded together with {', '.join(names[:2])}, ...")
            given_as[same[0]] = name
        return {given_as.get(one, one): given.get(given_as.get(one, one), written[one]) for one in names}

    def _regions(
        self, targets: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
    ) -> list[list[tuple[int, _Region]]]:
        """For each tensor its regions, with the numbers of their targets."""
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
            samples = _SAMPLES + 16 * max(0, recorder.moves - len(tensors))  # each piece is likely to be hit
            self._known[key] = [
                [
                    (number, _region(recorder, tensor, number, here, live_shapes[number], samples))
                    for number, here in _cut(recorder, tensor, len(targets))
                ]
                for tensor in tensors.values()
            ]
        return self._known[key]


def _cut(recorder: MoveRecorder, tensor: Tensor, results: int) -> Iterator[tuple[int, list[Offsets]]]:
    """The number of each result that has elements of ``tensor``, and which slices of it along each axis."""
    slices = [np.arange(size) for size in tensor.shape]
    if results == 1:
        yield 0, slices
        return
    lines = [each * stride for each, stride in zip(slices, tensor.stride(), strict=True)]
    numbers = [recorder.follow(tensor, line)[0] for line in lines]
    cut = [axis for axis, each in enumerate(numbers) if each.min() != each.max()]
    if len(cut) > 1:
        raise ValueError("transformers cuts it along several axes")
    for number in np.unique(numbers[cut[0] if cut else 0]).tolist():
        here = {axis: np.flatnonzero(numbers[axis] == number) for axis in cut}
        yield number, [here.get(axis, each) for axis, each in enumerate(slices)]


def _region(
    recorder: MoveRecorder,
    tensor: Tensor,
    number: int,
    here: Sequence[Offsets],
    shape: tuple[int, ...],
    samples: int,
) -> _Region:
    """From the elements along each axis, through the first one; random ones check that these tell all."""
    random, strides = np.random.default_rng(0), np.array(tensor.stride())
    drawn = np.array([random.choice(each, samples) for each in here])
    first = np.array([each[0] for each in here]) @ strides
    lines = [first + (each - each[0]) * stride for each, stride in zip(here, strides, strict=True)]
    targets, offsets = recorder.follow(tensor, np.concatenate([*lines, strides @ drawn]))
    *along, found = np.split(offsets, np.cumsum([len(line) for line in lines]))
    start, steps = int(along[0][0]), []
    for each, line, size in zip(here, along, tensor.shape, strict=True):
        start += int(line.min() - line[0])
        steps.append(np.full(size, _ELSEWHERE))
        steps[-1][each] = line - line.min()
    if (targets < 0).any():
        raise ValueError("transformers changes its values, or leaves some out")
    expected = start + np.sum([each[at] for each, at in zip(steps, drawn, strict=True)], axis=0)
    if (targets != number).any() or (found != expected).any():
        raise ValueError("transformers mixes its axes")
    return _Region(shape, start, tuple(steps))


@functools.lru_cache(maxsize=4096)
def _live_layout(region: _Region, file: Layout) -> Layout:
    """The layout of the weight in which the file's neurons are neurons; a ValueError if none is."""
    if not file.axes:
        return Layout.of(region.shape, ())
    within = [axis for axis in range(len(file.shape)) if axis not in file.axes]
    if any(len(region.here[axis]) < file.shape[axis] for axis in within):
        raise ValueError("transformers cuts its neurons into several weights")
    vector = np.array([region.start])  # the elements of a neuron
    for axis in within:
        vector = np.add.outer(vector, region.steps[axis]).ravel()
    coordinates = np.unravel_index(vector, region.shape)
    moving = [axis for axis, each in enumerate(coordinates) if each.min() != each.max()]
    sizes = [region.shape[axis] for axis in moving]
    lines = (region.start + region.steps[axis][region.here[axis]] for axis in file.axes)
    neurons = [np.unravel_index(line, region.shape) for line in lines]
    if math.prod(sizes) != file.width or any(np.ptp(each[axis]) for each in neurons for axis in moving):
        raise ValueError("its neurons are not neurons of the model, but parts of some")
    place = np.ravel_multi_index([coordinates[axis] for axis in moving], sizes) if moving else np.zeros(1)
    if (place != np.arange(file.width)).any():
        raise ValueError("its neurons have their elements in another order in the model")
    return Layout.of(region.shape, [axis for axis in range(len(region.shape)) if axis not in moving])


def _same_weight(name: str, other: str, live: str) -> MismatchError:
    return MismatchError(
        f"this tensor and {other} are the same weight of the model",
        tensor=name,
        found=live,
        hint="choose neurons of only one of the two",
    )
