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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError
from ..neurons.anatomy import read_anatomy
from ..patch.patch import Patch, PatchTensor
from ..tensors.arrays import Int64Array
from ..tensors.floats import FLOATS
from ..tensors.header import TensorInfo
from ..text import some

__all__ = [
    "STEPS",
    "LivePlaces",
    "LoraModule",
    "LoraPlace",
    "LoraPlaces",
    "adapter_config",
    "lora_modules",
    "next_step",
    "places_in_files",
    "refusals",
    "task_of",
]

#: The values that vLLM takes for ``max_lora_rank``.
STEPS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class LoraPlace:
    """Where a weight of the live model has neurons of a tensor of the files, and how PEFT adapts it.

    A *linear* weight is ``[out, in]``, or transposed ``[in, out]``, as ``Conv1D`` stores it. An *embedding*
    counts as transposed; a *convolution* is ``[out, in, ...]``. A *parameter* is targeted itself, not its
    module; it may be a stack of experts, ``[E, out, in]``, or transposed ``[E, in, out]``.
    """

    path: str  # of the module
    shape: tuple[int, ...]  # of the live weight
    axes: tuple[int, ...]  # its neuron axes
    index: Int64Array  # the numbers in it of the neurons that the patch replaces; -1: in another weight
    form: Literal["linear", "embedding", "convolution", "parameter"] = "linear"
    transposed: bool = False
    parameter: str = "weight"
    order: int = 0  # among the parameters of the module


LoraPlaces: TypeAlias = "Mapping[str, Sequence[LoraPlace] | str]"
"""By the names of tensors in the files: the weights that have their neurons, or why there is no LoRA form."""


class LivePlaces(Protocol):
    """What a live model tells."""

    def places(self, patch: Patch) -> LoraPlaces:
        """Where each tensor of ``patch`` is, or why it has no LoRA form."""

    def check(self, config: Mapping[str, Any], entries: Sequence[TensorInfo]) -> None:
        """Raise a `MismatchError` unless PEFT puts all of this adapter into the model, and lacks nothing."""


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One weight of the live model and what a patch replaces in it.

    Experts share the factors: slot s of expert e is row ``e * rank + s`` of ``A``, column ``s * E + e`` of
    ``B``.
    """

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
    def experts(self) -> int:
        """How many matrices the weight has."""
        return self.place.shape[0] if self._stacked else 1

    @property
    def _stacked(self) -> bool:
        return self.place.form == "parameter" and len(self.place.shape) == 3

    @property
    def _matrix(self) -> tuple[int, ...]:
        """The outputs, the inputs, and of a convolution its kernel."""
        shape = self.place.shape[1:] if self._stacked else self.place.shape
        return shape[::-1] if self.place.transposed else shape

    @property
    def outputs(self) -> int:
        """Features that come out."""
        return self._matrix[0]

    @property
    def inputs(self) -> int:
        """Features that go in, for each element of the kernel."""
        return prod(self._matrix[1:])

    @property
    def rows(self) -> bool:
        """Whether a neuron is an output (a row of ``[out, in]``), not an input."""
        return (self.place.axes[-1] == self._stacked) is not self.place.transposed

    @property
    def count(self) -> int:
        """The rank it needs: its replaced neurons, or those of the expert with the most."""
        return int(np.bincount(self._experts_and_units[0]).max())

    @property
    def _experts_and_units(self) -> tuple[Int64Array, Int64Array]:
        index = np.concatenate([part.index[part.index >= 0] for part in self.parts.values()])
        experts, units = np.divmod(index, self.outputs if self.rows else self.inputs)
        return experts, units

    def slots(self) -> tuple[Int64Array, Int64Array, Int64Array]:
        """The row of ``A``, the column of ``B``, and the output or input of each neuron, part after part."""
        experts, units = self._experts_and_units
        order, number = np.argsort(experts, kind="stable"), np.arange(len(experts))
        number[order] -= np.searchsorted(experts[order], experts[order])
        return experts * self.rank + number, number * self.experts + experts, units

    def entries(self, dtype: str) -> tuple[TensorInfo, TensorInfo]:
        """The factors, ``[rank * E, in]`` and ``[out, rank * E]``; of a convolution with its kernel."""
        rank, (outputs, *rest) = self.rank * self.experts, self._matrix
        stem = f"base_model.model.{self.place.path}{'.base_layer' * self.wrappers}.lora"
        name = f"{stem}_embedding_{{}}" if self.place.form == "embedding" else f"{stem}_{{}}.weight"
        ones = [1] * (len(rest) - 1)
        return (
            TensorInfo(name.format("A"), dtype, (rank, *rest)),
            TensorInfo(name.format("B"), dtype, (outputs, rank, *ones)),
        )


def next_step(rank: int) -> int | None:
    """The smallest of `STEPS` that is no smaller; None beyond the last."""
    return next((step for step in STEPS if step >= rank), None)


def adapter_config(modules: Sequence[LoraModule], base: str | None, task: str | None) -> dict[str, object]:
    """What PEFT reads from ``adapter_config.json``; what is not named here has PEFT's default."""
    named = sorted(module.target for module in modules if module.place.form == "parameter")
    rank = max(module.rank for module in modules)
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(module.target for module in modules if module.place.form != "parameter"),
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
    return config | ({"target_parameters": named} if named else {})


def _patterns(modules: Iterable[LoraModule], usual: int) -> dict[str, int]:
    """The ranks that are not the ``usual`` one, by regular expressions that match whole names.

    PEFT tries one after the other for each module: modules of one rank share one.
    """
    others: dict[int, list[str]] = {}
    for module in modules:
        others.setdefault(module.rank, []).append(re.escape(module.target))
    return {f"^({'|'.join(names)})": rank for rank, names in sorted(others.items()) if rank != usual}


def lora_modules(patch: Patch, places: LoraPlaces) -> list[LoraModule]:
    """The weights that the patch changes, of rank 0; a `MismatchError` if a tensor has no LoRA form."""
    if refused := refusals(patch, places):
        raise MismatchError(
            "some of the patch has no LoRA form",
            file=patch.place,
            expected="rows or columns of linear weights",
            found=some([f"{name} ({why})" for name, why in refused.items()], _SHOWN),
            hint="leave it out when neurons are chosen ([[exclude]], no [[with_bias]]), "
            "or write the patched checkpoint: `neftsurgery apply BASE PATCH -o OUT`",
        )
    weights: dict[tuple[str, str], dict[str, LoraPlace]] = {}
    for name, found in places.items():
        for place in found:
            if isinstance(place, LoraPlace) and (place.index >= 0).any():
                weights.setdefault((place.path, place.parameter), {})[name] = place
    if not weights:
        raise MismatchError("the patch replaces no neuron", file=patch.place)
    modules = [LoraModule(parts, next(iter(parts.values()))) for parts in weights.values()]
    return [replace(module, wrappers=_wrappers(module.place, modules)) for module in modules]


def refusals(patch: Patch, places: LoraPlaces) -> dict[str, str]:
    """The tensors of the patch without a LoRA form, and why."""
    refused, first = dict[str, str](), dict[tuple[str, str], tuple[str, LoraPlace]]()
    for name, tensor in patch.tensors.items():
        for place in [found] if isinstance(found := places[name], str) else found:
            if isinstance(place, str):
                refused[name] = place
            elif why := _refusal(tensor, place):
                refused[name] = why
            else:
                other, its = first.setdefault((place.path, place.parameter), (name, place))
                if its.axes != place.axes:
                    refused[name] = f"other axes than {other}, which is a part of the same weight"
    return refused


def _wrappers(place: LoraPlace, modules: Iterable[LoraModule]) -> int:
    others = [m.place for m in modules if m.place.path == place.path]
    return sum(other.order > place.order for other in others)


def _refusal(tensor: PatchTensor, place: LoraPlace) -> str | None:
    """Why a tensor has no LoRA form at this place; None if it has one."""
    if tensor.info.dtype not in FLOATS:
        return f"{tensor.info.dtype} elements"
    axes, ndim = place.axes, len(place.shape)
    allowed = {"convolution": [(0,)], "parameter": [(0, 1), (0, 2)] if ndim == 3 else [(0,), (1,)]}
    if axes not in allowed.get(place.form, [(0,), (1,)] if ndim == 2 else []):
        return f"not a matrix of rows or columns, but {list(place.shape)} along {list(axes)}"
    return None


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
        axes, reason = kinds[name]
        layout = tensor.layout
        if told and tensor.info.type.kind == "float" and len(layout.shape) == 2:
            axes = layout.axes
        path, turned = prefix + name.removesuffix(".weight"), axes == (1,)
        place = LoraPlace(path, layout.shape, layout.axes, patch.index(name), transposed=turned)
        places[name] = _unknown(name, layout.shape, reason) or [place]
    warnings = []
    if config is None and not told:
        warnings.append(
            "there is no config.json that says how the weights are stored; all are taken as [out, in]: "
            "name a base with its config if the model has Conv1D layers, as GPT-2 does"
        )
    return places, warnings


def _unknown(name: str, shape: tuple[int, ...], reason: str) -> str:
    """Why files alone do not give a tensor a LoRA form; empty if they do."""
    if reason and reason != "output head":
        return reason
    if len(shape) > 2:
        return "stacked experts" if "expert" in name else "convolution"
    return "" if name.endswith(".weight") or len(shape) < 2 else "not the weight of a module"


def task_of(base: Checkpoint | None) -> str | None:
    """PEFT's task type. Other than this one, they make PEFT replace the head by one of its own."""
    config: Any = (base.config if base is not None else None) or {}
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None
