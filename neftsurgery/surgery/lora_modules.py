"""The LoRA form of a patch, and which of its weights have one.

One factor is differences, the other one-hot vectors, the scale is 1: a module with k replaced rows ``d_j``
at outputs ``i_j`` has the low-rank update ``B @ A`` with rows ``A[j] = d_j`` and columns ``B[i_j, j] = 1``;
replaced columns have it the other way round. Nothing is approximated: each element of the update is one
difference. (LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.)

The names and the config are PEFT's, by default in the profile that every reader of LoRA understands: one rank
for all modules, padded with zeros, alpha equal to it, no patterns.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError
from ..neurons.anatomy import read_anatomy
from ..neurons.layout import Layout
from ..neurons.submodels import split_part
from ..patch.patch import Patch
from ..tensors.arrays import Int64Array
from ..tensors.floats import FLOATS
from ..tensors.header import TensorInfo
from ..text import some

#: The values that vLLM takes for ``max_lora_rank``.
STEPS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LoraForm: TypeAlias = Literal["linear", "embedding", "convolution", "parameter"]
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class LoraPlace:
    """Where a weight of the live model has neurons of a tensor of the files, and how PEFT adapts it."""

    path: str  # of the module
    form: LoraForm
    experts: int  # the weight is as many matrices
    outputs: int
    inputs: tuple[int, ...]  # of a convolution with its kernel
    rows: bool  # whether a neuron is an output, not an input
    index: Int64Array  # the numbers in it of the neurons that the patch replaces; -1: in another weight
    transposed: bool = False
    parameter: str = "weight"
    order: int = 0  # among the parameters of the module

    @classmethod
    def of(
        cls,
        path: str,
        layout: Layout,
        index: Int64Array,
        form: LoraForm = "linear",
        *,
        transposed: bool = False,
        parameter: str = "weight",
        order: int = 0,
    ) -> LoraPlace | str:
        """The place in a weight of this layout, or why there is none.

        The weight is ``[out, in]``, of a convolution ``[out, in, ...]``; or transposed ``[in, out]``, as of
        ``Conv1D`` and embeddings. A parameter, which is targeted itself, may be a stack of such matrices.
        """
        stacked = form == "parameter" and len(layout.shape) == 3
        matrix, axes = layout.shape[stacked:], layout.axes
        known = [(*(0,) * stacked, axis) for axis in (stacked, stacked + 1)]
        is_kernel = len(matrix) > 2
        if axes not in known[: 2 - is_kernel] or is_kernel != (form == "convolution") or len(matrix) < 2:
            return f"not a matrix of rows or columns, but {list(layout.shape)} along {list(axes)}"
        outputs, *inputs = matrix[::-1] if transposed else matrix
        experts, rows = layout.shape[0] if stacked else 1, (axes == known[0]) is not transposed
        return cls(path, form, experts, outputs, (*inputs,), rows, index, transposed, parameter, order)


LoraPlaces: TypeAlias = "Mapping[str, Sequence[LoraPlace] | str]"
"""By the names of tensors in the files: the weights that have their neurons, or why there is no LoRA form."""


class LivePlaces(Protocol):
    """What a live model tells of a patch."""

    @property
    def places(self) -> LoraPlaces:
        """Where each tensor of the patch is, or why it has no LoRA form."""

    def others(self, targets: Collection[str]) -> list[str]:
        """The modules that PEFT takes for one of ``targets``, as their names end in its name."""

    def check(self, config: Mapping[str, Any], entries: Sequence[TensorInfo]) -> None:
        """Raise a `MismatchError` unless PEFT puts all of this adapter into the model, and lacks nothing."""


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One weight of the live model and what a patch replaces in it."""

    parts: Mapping[str, LoraPlace]  # by the names of the tensors in the files
    place: LoraPlace  # of the first of them
    rank: int = 0
    wrappers: int = 0  # of other parameters of the module, which PEFT puts around this one's

    @property
    def tensor(self) -> str:
        """The name in the files, the first of several."""
        return next(iter(self.parts))

    @property
    def target(self) -> str:
        """What PEFT calls it: the module's name in the live model, or the parameter's."""
        place = self.place
        return f"{place.path}.{place.parameter}" if place.form == "parameter" else place.path

    @property
    def count(self) -> int:
        """The rank it needs: its replaced neurons, or those of the expert with the most."""
        return int(np.bincount(self._experts_and_units[0]).max())

    @property
    def _experts_and_units(self) -> tuple[Int64Array, Int64Array]:
        index = np.concatenate([part.index[part.index >= 0] for part in self.parts.values()])
        experts, units = np.divmod(index, self.place.outputs if self.place.rows else prod(self.place.inputs))
        return experts, units

    def slots(self) -> tuple[Int64Array, Int64Array, Int64Array]:
        """The row of ``A``, the column of ``B``, and the output or input of each neuron, part by part."""
        experts, units = self._experts_and_units
        order, number = np.argsort(experts, kind="stable"), np.empty_like(experts)
        number[order] = np.arange(len(experts)) - np.searchsorted(experts[order], experts[order])
        return experts * self.rank + number, number * self.place.experts + experts, units

    def entries(self, dtype: str) -> tuple[TensorInfo, TensorInfo]:
        """The factors, ``[rank * E, in]`` and ``[out, rank * E]``; of a convolution with its kernel."""
        place, rank = self.place, self.rank * self.place.experts
        stem = f"base_model.model.{place.path}{'.base_layer' * self.wrappers}.lora"
        name = f"{stem}_embedding_{{}}" if place.form == "embedding" else f"{stem}_{{}}.weight"
        ones = [1] * (len(place.inputs) - 1)
        return (
            TensorInfo(name.format("A"), dtype, (rank, *place.inputs)),
            TensorInfo(name.format("B"), dtype, (place.outputs, rank, *ones)),
        )


def ranks(modules: Sequence[LoraModule]) -> str:
    """Their rank in words, or the lowest and the highest."""
    low, *_, high = sorted([modules[0].rank, *(module.rank for module in modules)])
    return f"rank {high}" if low == high else f"ranks {low} to {high}"


def next_step(rank: int) -> int | None:
    """The smallest of `STEPS` that is no smaller; None beyond the last."""
    return next((step for step in STEPS if step >= rank), None)


def adapter_config(
    modules: Sequence[LoraModule], base: str | None, task: str | None, live: LivePlaces | None = None
) -> dict[str, object]:
    """What PEFT reads from ``adapter_config.json``; what is not named here has PEFT's default."""
    named = sorted(module.target for module in modules if module.place.form == "parameter")
    targets = sorted(module.target for module in modules if module.place.form != "parameter")
    others = [] if live is None else live.others(targets)
    rank = max(module.rank for module in modules)
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "fan_in_fan_out": any(m.place.transposed for m in modules if m.place.form == "linear"),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "rank_pattern": (patterns := _patterns(modules, rank)),
        "alpha_pattern": patterns,
        "modules_to_save": None,
    }
    rest = {"target_parameters": named, "exclude_modules": others}
    return config | {key: names for key, names in rest.items() if names}


def _patterns(modules: Iterable[LoraModule], usual: int) -> dict[str, int]:
    """The ranks that are not the ``usual`` one, by expressions that match whole names, one per rank."""
    others: dict[int, list[str]] = {}
    for module in modules:
        others.setdefault(module.rank, []).append(re.escape(module.target))
    return {f"^({'|'.join(names)})": rank for rank, names in sorted(others.items()) if rank != usual}


def lora_modules(patch: Patch, places: LoraPlaces) -> list[LoraModule]:
    """The weights that the patch changes, of rank 0; a `MismatchError` if a tensor has no LoRA form."""
    weights: dict[tuple[str, str], dict[str, LoraPlace]] = {}
    refused = dict[str, str]()
    for name, found in places.items():
        kind = patch.tensors[name].info.dtype
        if isinstance(found, str) or kind not in FLOATS:
            refused[name] = found if isinstance(found, str) else f"{kind} elements"
            continue
        for place in found:
            parts = weights.setdefault((place.path, place.parameter), {})
            parts |= {name: place} if (place.index >= 0).any() else {}
            if parts and {part.rows for part in parts.values()} != {place.rows}:
                refused[name] = f"along another axis than {next(iter(parts))}, a part of the same weight"
    if refused:
        raise MismatchError(
            "some of the patch has no LoRA form",
            file=patch.place,
            tensor=next(iter(refused)),
            expected="rows or columns of linear weights",
            found=some([f"{name} ({why})" for name, why in refused.items()], _SHOWN),
            hint="leave it out when neurons are chosen ([[exclude]], no [[with_bias]]), "
            "or write the patched checkpoint: `neftsurgery apply BASE PATCH -o OUT`",
        )
    modules = [LoraModule(parts, next(iter(parts.values()))) for parts in weights.values() if parts]
    if not modules:
        raise MismatchError("the patch replaces no neuron", file=patch.place)
    of_module: dict[str, list[int]] = {}
    for module in modules:
        of_module.setdefault(module.place.path, []).append(module.place.order)
    return [
        replace(module, wrappers=sum(order > module.place.order for order in of_module[module.place.path]))
        for module in modules
    ]


def adapted_part(patch: Patch, base: Checkpoint | None) -> Checkpoint | None:
    """The base, or the part of it that the patch changes; a `MismatchError` if it changes several."""
    parts = sorted({split_part(name)[0] for name in patch.tensors})
    if len(parts) > 1:
        raise MismatchError(
            "the patch changes several models of the checkpoint, and an adapter is for one",
            file=patch.place,
            found=", ".join(part or "the folder itself" for part in parts),
            hint=f"extract a patch of one of them, with [[only='{parts[-1]}*']] for example",
        )
    return base if base is None or parts in ([], [""]) else Checkpoint.open(base.root / parts[0])


def places_in_files(patch: Patch, base: Checkpoint | None, prefix: str) -> tuple[LoraPlaces, list[str]]:
    """The places if the live model has the names of the files, and warnings."""
    tensors = {name: tensor.info for name, tensor in patch.tensors.items()}
    config = None if base is None else base.config
    anatomy = read_anatomy("rows", tensors if base is None else base.tensors, config)
    # In a patch of rows a neuron is an output, so its axis tells how the weight is stored.
    told = config is None and patch.facts.anatomy == "rows"
    # Per tensor, the axes of its outputs, and why it holds no neurons (empty if it does).
    kinds: dict[str, tuple[tuple[int, ...], str]] = {t.info.name: (t.axes, "") for t in anatomy.scored}
    kinds |= {entry.info.name: ((0,), entry.reason) for entry in anatomy.listed}
    places: dict[str, Sequence[LoraPlace] | str] = {}
    for name, tensor in patch.tensors.items():
        (axes, reason), layout = kinds[name], tensor.layout
        if told and tensor.info.type.kind == "float" and len(layout.shape) == 2:
            axes = layout.axes
        path, index = prefix + split_part(name)[1].removesuffix(".weight"), patch.index(name)
        place = LoraPlace.of(path, layout, index, transposed=axes == (1,))
        why = _unknown(tensor.info, reason) or place
        places[name] = why if isinstance(why, str) else [why]
    warnings = []
    if config is None and not told:
        warnings.append(
            "there is no config.json that says how the weights are stored; all are taken as [out, in]: "
            "name a base with its config if the model has Conv1D layers, as GPT-2 does"
        )
    return places, warnings


def _unknown(info: TensorInfo, reason: str) -> str:
    """Why files alone do not give a tensor a LoRA form; empty if they do."""
    if reason and reason != "output head":
        return reason
    if "/" in info.name:
        return "in a folder of several models, of which PEFT adapts one"
    if len(info.shape) > 2:
        return "stacked experts" if "expert" in info.name else "convolution"
    if len(info.shape) == 2 and not info.name.endswith(".weight"):
        return "not the weight of a module"
    return ""


def task_of(base: Checkpoint | None) -> str | None:
    """PEFT's task type. Other than this one, they make PEFT replace the head by one of its own."""
    config: Any = (base.config if base is not None else None) or {}
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None
