"""Every tensor that ``save_pretrained`` writes, found again in the live model: its elements, and its neurons.

``in_children(placed, model_types(), folder)`` does it for all model types.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from neftsurgery.errors import MismatchError
from neftsurgery.live.loading import without_progress_bars
from neftsurgery.live.placement import LivePlace, live_places
from neftsurgery.live.weights import read_vectors
from neftsurgery.neurons.layout import Layout

from .tiny_models import LADDER, build

__all__ = ["placed", "filled", "check_files"]


def placed(model_type: str) -> dict[str, dict[str, Any]]:
    """Of the first and the last class of a type, how many tensors are right, and which refused or wrong."""
    found: dict[str, dict[str, Any]] = {}
    ladder = ((64, 2), *LADDER)  # what takes part in a conversion is there in two layers
    models = [(name, model) for name, model, _ in build(model_type, ladder) if model is not None]
    for name, model in dict([*models[:1], *models[-1:]]).items():
        with tempfile.TemporaryDirectory() as folder:
            live = filled(model)
            try:
                with without_progress_bars():
                    live.save_pretrained(folder)
            except Exception as error:
                found[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
                continue
            found[name] = check_files(live, Path(folder))
    return found


def filled(model: Any) -> Any:
    """A model of the meta device in memory, all its weights different numbers."""
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in {id(each): each for each in (*model.parameters(), *model.buffers())}.values():
        if weight.is_floating_point():
            weight.data.uniform_(-1, 1, generator=generator)
        else:
            weight.data.zero_()
    return model


def check_files(model: Any, folder: Path) -> dict[str, Any]:
    """How many tensors of the files in ``folder`` are right in ``model``, and which are refused or wrong."""
    files = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    live = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    told: dict[str, Any] = {"right": 0, "converted": 0, "refused": {}, "wrong": {}, "neurons": 0}
    try:
        together = live_places(model, {name: Layout(tuple(value.shape), ()) for name, value in files.items()})
    except MismatchError as error:
        together, told["together"] = {}, str(error)[:400]
    kinds = {re.sub(r"\.\d+\.", ".*.", name): name for name in files}
    for name, value in files.items():
        try:
            places = together.get(name) or live_places(model, {name: Layout(tuple(value.shape), ())})[name]
        except MismatchError as error:
            told["refused"][name] = str(error)[:300]
            continue
        wrong = _wrong(value, places, live)
        told["converted"] += places[0].region is not None
        checked = places[0].region is not None and name in kinds.values() and not wrong
        for axes in _axes(value) if checked else ():
            try:
                found = live_places(model, {name: Layout(tuple(value.shape), axes)})[name]
            except MismatchError:
                continue
            told["neurons"] += 1
            wrong = wrong or _wrong_neurons(value, found, live)
        if wrong:
            told["wrong"][name] = wrong
        else:
            told["right"] += 1
    return told


def _wrong(value: Any, places: tuple[LivePlace, ...], live: dict[str, Any]) -> str:
    read = torch.full_like(value, 9)
    for place in places:
        read[place.part] = place.read(live[place.parameter])
    if not torch.equal(read, value):
        return "other values are read"
    for place in places:
        if place.region is None:
            continue
        weight = live[place.parameter]
        before = weight.detach().clone()
        place.write(weight, value[place.part] + 2 if value.is_floating_point() else value[place.part])
        changed = (weight != before).sum().item()
        if value.is_floating_point() and changed != value[place.part].numel():
            return "other elements are written"
        place.write(weight, value[place.part])
        if not torch.equal(weight, before):
            return "the values are not written back"
    return ""


def _axes(value: Any) -> Iterator[tuple[int, ...]]:
    for count in range(1, min(value.ndim, 2) + 1):
        yield from itertools.combinations(range(value.ndim), count)


def _wrong_neurons(value: Any, places: tuple[LivePlace, ...], live: dict[str, Any]) -> str:
    layout = places[0].file
    index = np.arange(layout.count)
    vectors = read_vectors(value, layout, torch.from_numpy(index))
    homes = np.zeros(layout.count, int)
    for place in places:
        at = place.index_of(index)
        homes += at >= 0
        here = torch.from_numpy(at[at >= 0])
        if not torch.equal(
            read_vectors(live[place.parameter].detach(), place.layout, here), vectors[at >= 0]
        ):
            return f"other neurons along axes {layout.axes}"
    return "" if (homes == 1).all() else f"neurons along axes {layout.axes} are in no weight, or in several"
