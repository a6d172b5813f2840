"""Adapters as patches and patches as adapters: the same neurons with the same values."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
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
from ..live.weights import block_ranges, to_bytes
from ..neurons.layout import Layout
from ..neurons.vectors import gather
from ..patch.patch import Manifest, Patch
from ..patch.write import NewPatch
from ..selection.selection import Chosen, Selection, SelectionFacts
from ..storage.output import staged_directory
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
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CorruptFileError(f"the adapter cannot be read: {error}", file=folder / _WEIGHTS) from error
    model: nn.Module = meta_model(checkpoint, "saved")
    rules = LoadingRules(model)
    parts: dict[str, tuple[Chosen, Tensor]] = {}
    for parameter, (count, axes) in config.layouts().items():
        stem = _START + parameter.removesuffix(".weight")
        index, rows = tensors.get(f"{stem}.neft_index"), tensors.get(f"{stem}.neft_rows")
        if index is None or rows is None or len(index) != count or len(rows) != count:
            raise CorruptFileError(
                "the adapter does not have the neurons of its config", file=folder, tensor=parameter
            )
        left = count
        for name, place in _places_in(model, rules, checkpoint, parameter, axes):
            live = place.index_of(np.arange(place.file.count))
            _, file, at = np.intersect1d(live, index.numpy(), assume_unique=True, return_indices=True)
            order = np.argsort(file)
            if len(order):
                chosen = Chosen(checkpoint.tensors[name], place.file, file[order])
                parts[name] = chosen, rows[torch.from_numpy(at[order])]
                left -= len(order)
        if left:
            raise MismatchError(
                "the base's files do not have these neurons",
                file=checkpoint.name,
                tensor=parameter,
                hint="name the base that the adapter was trained on",
            )
    selection = Selection({name: parts[name][0] for name in sorted(parts)}, _facts(config))
    manifest = Manifest.of(Provenance.of(checkpoint), selection.facts)
    with NewPatch(selection, manifest).written(out, force=force) as writer:
        for name, (chosen, rows) in parts.items():
            for start, stop in block_ranges(len(chosen.index), chosen.layout.width):
                old = gather(checkpoint, chosen.info, chosen.layout, chosen.index[start:stop])
                new = to_bytes(rows[start:stop], chosen.info.dtype)
                writer.add_digests(name, *writer.write_rows(name, start, old, new))
    return writer.patch


def _places_in(
    model: nn.Module, rules: LoadingRules, base: Checkpoint, parameter: str, axes: tuple[int, ...]
) -> Iterator[tuple[str, LivePlace]]:
    """The tensors of the files that are in a weight, with the axes along which its neurons lie in them."""
    for name, info in base.tensors.items():
        try:
            if rules.find(name)[0] != parameter:
                continue
        except MismatchError:  # the model does not have it: a buffer, a head of another class
            continue
        for count in (1, 2):
            for own in itertools.combinations(range(len(info.shape)), count):
                with contextlib.suppress(MismatchError):
                    (place,) = live_places(model, {name: Layout.of(info.shape, own)})[name]
                    if place.parameter == parameter and place.layout.axes == axes:
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


def _facts(config: NeftConfig) -> SelectionFacts:
    budget = {key: value for key in ("neurons", "params") if (value := getattr(config, key)) is not None}
    return SelectionFacts({"anatomy": config.anatomy, "policy": config.policy, "budget": budget})


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
