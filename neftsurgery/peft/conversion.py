"""Adapters as patches and patches as adapters: the same neurons with the same values."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance
from ..errors import CorruptFileError, MismatchError, UsageError, boundary
from ..live.loading import meta_model
from ..live.loading_rules import LoadingRules
from ..live.placement import LivePlace, live_places
from ..live.weights import to_bytes
from ..neurons.layout import Layout
from ..neurons.vectors import find, gather
from ..patch.patch import Manifest, Patch
from ..patch.patch_file import digests
from ..patch.write import NewPatch
from ..selection.selection import Chosen, RowBlock, Selection
from ..storage.output import staged_directory
from ..tensors.arrays import Int64Array, RawBytes
from .choosing import neurons_of
from .config import NeftConfig

_WEIGHTS = "adapter_model.safetensors"
_START = "base_model.model."


@boundary
def patch_of_adapter(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
) -> Patch:
    """The patch on the files of ``base`` that an adapter folder is; see `Patch.from_adapter`."""
    folder = Path(adapter)
    config = _config(folder)
    if config.modules_to_save:
        raise UsageError(
            "the adapter also holds whole modules, which a neuron patch does not",
            file=folder,
            found=", ".join(config.modules_to_save),
            hint="merge it into the model and use extract",
        )
    checkpoint = Checkpoint.open(base)
    stored = _stored_neurons(folder, config)
    parts = defaultdict[str, list[tuple[Layout, Int64Array, Tensor]]](list)
    left = {parameter: len(index) for parameter, (index, _) in stored.items()}
    for name, place in _places_in(checkpoint, config):
        index, rows = stored[place.parameter]
        slot, here = find(index, place.index_of(np.arange(place.file.count)))
        if here.any():
            parts[name].append((place.file, np.flatnonzero(here), rows[torch.from_numpy(slot[here])]))
            left[place.parameter] -= int(np.count_nonzero(here))
    if missing := next((parameter for parameter, count in left.items() if count), None):
        raise MismatchError(
            "the base's files do not have these neurons",
            file=checkpoint.name,
            tensor=missing,
            hint="name the base that the adapter was trained on",
        )
    chosen, values = dict[str, Chosen](), dict[str, Tensor]()
    for name, ((layout, *_), *_) in sorted(parts.items()):  # a tensor may lie in several weights
        index = np.concatenate([one for _, one, _ in parts[name]])
        order = np.argsort(index)
        chosen[name] = Chosen(checkpoint.tensors[name], layout, index[order])
        values[name] = torch.cat([rows for *_, rows in parts[name]])[torch.from_numpy(order)]
    given = {"neurons": config.neurons, "params": config.params}
    budget = {key: value for key, value in given.items() if value is not None}
    facts = {"anatomy": config.anatomy, "policy": config.policy, "budget": budget}
    selection = Selection(chosen, facts)
    manifest = Manifest.of(Provenance.of(checkpoint), selection.facts)

    def written(block: RowBlock) -> tuple[RawBytes, RawBytes, RawBytes]:
        one, part = chosen[block.name], slice(block.start, block.stop)
        old = gather(checkpoint, one.info, one.layout, one.index[part])
        return to_bytes(values[block.name][part], one.info.dtype), old, digests(old)

    with NewPatch(selection, manifest).written(out, force=force) as writer:
        writer.write_blocks(written)
    return writer.patch


def _stored_neurons(folder: Path, config: NeftConfig) -> dict[str, tuple[Int64Array, Tensor]]:
    """The numbers and the vectors of the neurons of each weight of an adapter."""
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CorruptFileError(f"the adapter cannot be read: {error}", file=folder / _WEIGHTS) from error
    stored: dict[str, tuple[Int64Array, Tensor]] = {}
    for parameter, (count, _) in config.layouts().items():
        stem = _START + parameter.removesuffix(".weight")
        numbers, vectors = tensors.get(f"{stem}.neft_index"), tensors.get(f"{stem}.neft_rows")
        if numbers is None or vectors is None or len(numbers) != count or len(vectors) != count:
            raise CorruptFileError(
                "the adapter does not have the neurons of its config", file=folder, tensor=parameter
            )
        stored[parameter] = numbers.numpy(), vectors
    return stored


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


def _config(folder: Path) -> NeftConfig:
    try:
        config = NeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"this is not the folder of an adapter: {error}", file=folder) from error
    if not isinstance(config, NeftConfig):
        raise UsageError(
            "this is an adapter of another method", file=folder, expected="NEFT", found=str(config.peft_type)
        )
    return config


@boundary
def adapter_of_patch(
    patch: Patch,
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    force: bool = False,
) -> None:
    """Write the adapter folder that a neuron patch on ``base`` is; see `Patch.to_adapter`."""
    patch.check()
    checkpoint = Checkpoint.open(base)
    found = neurons_of(meta_model(checkpoint, "saved"), patch)
    if other := next((name for name in found if not name.endswith(".weight")), None):
        raise UsageError(
            "only neurons of the weights of modules can be an adapter",
            tensor=other,
            hint="use neftsurgery.attach, or write the patched checkpoint: `neftsurgery apply`",
        )
    config = NeftConfig(
        base_model_name_or_path=checkpoint.source.repo or checkpoint.name,
        anatomy=patch.facts.anatomy or "rows",
        target_modules=sorted(name.removesuffix(".weight") for name in found),
        counts={name: [len(one.index), *one.layout.axes] for name, one in sorted(found.items())},
        inference_mode=True,
    )
    tensors = {}
    for name, one in found.items():
        assert one.values is not None  # a patch has them
        stem = _START + name.removesuffix(".weight")
        wide = torch.float64 if one.values.dtype == torch.float64 else torch.float32
        tensors[f"{stem}.neft_index"] = torch.from_numpy(one.index)
        tensors[f"{stem}.neft_rows"] = one.values.to(wide)
    with staged_directory(adapter, force=force) as folder:
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(folder)
