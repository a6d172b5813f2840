"""Adapters as patches and patches as adapters: the same neurons with the same values."""

from __future__ import annotations

import os
from collections import defaultdict
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
from ..live.weights import to_bytes
from ..neurons.layout import Layout
from ..neurons.vectors import gather
from ..patch.patch import Manifest, Patch
from ..patch.patch_file import digests
from ..patch.write import NewPatch
from ..selection.selection import Chosen, RowBlock, Selection
from ..storage.output import staged_directory
from ..tensors.arrays import Int64Array, RawBytes
from ..tuning.base_checkpoint import checked_values
from ..tuning.forwards import forward_of
from .base_vectors import base_digest, file_vectors, neurons_in_files, require_base
from .choosing import neurons_of
from .config import NeftConfig
from .model import require_supported

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
    places = neurons_in_files(checkpoint, config, {name: index for name, (index, *_) in stored.items()})
    if missing := next((name for name in stored if name not in places), None):
        raise MismatchError("the base's files lack these neurons", file=checkpoint.name, tensor=missing)
    for name, vectors in file_vectors(checkpoint, places).items():
        require_base(folder.name, name, stored[name][2], vectors)
    parts = defaultdict[str, list[tuple[Layout, Int64Array, Tensor]]](list)
    for parameter, several in places.items():
        for name, layout, index, positions in several:
            parts[name].append((layout, index, stored[parameter][1][positions]))
    chosen, values = dict[str, Chosen](), dict[str, Tensor]()
    for name, ((layout, *_), *_) in sorted(parts.items()):  # a tensor may lie in several weights
        index = np.concatenate([one for _, one, _ in parts[name]])
        order = np.argsort(index)
        chosen[name] = Chosen(checkpoint.tensors[name], layout, index[order])
        values[name] = torch.cat([rows for *_, rows in parts[name]])[torch.from_numpy(order)]
    budget = {key: one for key in ("neurons", "params") if (one := getattr(config, key)) is not None}
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


def _stored_neurons(folder: Path, config: NeftConfig) -> dict[str, tuple[Int64Array, Tensor, Tensor]]:
    """The numbers, the vectors and the base's digest of the neurons of each weight of an adapter."""
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CorruptFileError(f"the adapter cannot be read: {error}", file=folder / _WEIGHTS) from error
    stored: dict[str, tuple[Int64Array, Tensor, Tensor]] = {}
    for parameter, (count, _) in config.layouts().items():
        stems = [_stem(parameter, wrapped) for wrapped in (True, False)]
        stem = next((one for one in stems if f"{one}.neft_rows" in tensors), stems[0])
        numbers, vectors = tensors.get(f"{stem}.neft_index"), tensors.get(f"{stem}.neft_rows")
        if numbers is None or vectors is None or len(numbers) != count or len(vectors) != count:
            raise CorruptFileError(
                "the adapter does not have the neurons of its config", file=folder, tensor=parameter
            )
        digest = tensors.get(f"{stem}.neft_digest", torch.zeros(16, dtype=torch.uint8))
        stored[parameter] = numbers.numpy(), vectors, digest
    return stored


def _stem(parameter: str, wrapped: bool) -> str:
    """How the names of its tensors start: of a layer that is ``wrapped``, or of a `NeftModule`."""
    owner, _, attribute = parameter.rpartition(".")
    return f"{_START}{owner}" if wrapped else f"{_START}{owner}.adapted.{attribute}"


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
    checkpoint = Checkpoint.open(base)
    for chosen in patch.selection.tensors.values():
        checked_values(patch, chosen, 0, None, checkpoint)
    model: nn.Module = meta_model(checkpoint, "saved")
    found = neurons_of(model, patch)
    owners = {name: name.rpartition(".")[0] for name in found}
    require_supported(model, {name: one.layout.axes for name, one in found.items()})
    config = NeftConfig(
        base_model_name_or_path=checkpoint.source.repo or checkpoint.name,
        anatomy=patch.facts.anatomy or "rows",
        target_modules=sorted({*owners.values()}),
        counts={name: [len(one.index), *one.layout.axes] for name, one in sorted(found.items())},
        inference_mode=True,
    )
    tensors = {}
    places = neurons_in_files(checkpoint, config, {name: one.index for name, one in found.items()})
    before = file_vectors(checkpoint, places)
    for name, one in found.items():
        assert one.values is not None  # a patch has them
        stem = _stem(name, wrapped=forward_of(model.get_submodule(owners[name])) is not None)
        wide = torch.float64 if one.values.dtype == torch.float64 else torch.float32
        tensors[f"{stem}.neft_index"] = torch.from_numpy(one.index)
        tensors[f"{stem}.neft_rows"] = one.values.to(wide)
        tensors[f"{stem}.neft_digest"] = base_digest(before[name])
    with staged_directory(adapter, force=force) as folder:
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(folder)
