"""The LoRA form of a patch, and which of its weights have one.

One factor is differences, the other one-hot vectors, the scale is 1: a module with k replaced rows ``d_j``
at outputs ``i_j`` has the low-rank update ``B @ A`` with rows ``A[j] = d_j`` and columns ``B[i_j, j] = 1``;
replaced columns have it the other way round. Nothing is approximated: each element of the update is one
difference. (LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.)

The names and the config are PEFT's, in the profile that every reader of LoRA understands: one rank for
all modules, padded with zeros, alpha equal to it, no patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError
from ..neurons.anatomy import read_anatomy
from ..patch.patch import Patch, PatchTensor
from ..tensors.floats import FLOATS
from ..tensors.header import TensorInfo
from ..text import some

__all__ = ["LoraModule", "STEPS", "adapter_config", "lora_modules", "next_step", "task_of"]

#: The values that vLLM takes for ``max_lora_rank``.
STEPS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One linear module and what a patch replaces in it."""

    tensor: str  # the weight's name in the files
    path: str  # the module's name in the live model
    inputs: int  # features, whichever way the weight is stored
    outputs: int
    count: int  # replaced neurons
    rows: bool  # whether a neuron is an output (a row of ``[out, in]``), not an input
    transposed: bool  # whether the weight is stored ``[in, out]``, as ``Conv1D`` does

    @property
    def names(self) -> tuple[str, str]:
        """The entries of the factors ``A`` and ``B`` in the adapter."""
        stem = f"base_model.model.{self.path}"
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"

    def entries(self, rank: int) -> tuple[TensorInfo, TensorInfo]:
        """The factors, ``[rank, in]`` and ``[out, rank]``."""
        first, second = self.names
        return TensorInfo(first, "F32", (rank, self.inputs)), TensorInfo(second, "F32", (self.outputs, rank))


def next_step(rank: int) -> int | None:
    """The smallest of `STEPS` that is no smaller; None beyond the last."""
    return next((step for step in STEPS if step >= rank), None)


def adapter_config(
    modules: Sequence[LoraModule], rank: int, base: str | None, task: str | None
) -> dict[str, object]:
    """What PEFT reads from ``adapter_config.json``; what is not named here has PEFT's default."""
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(module.path for module in modules),
        "fan_in_fan_out": any(module.transposed for module in modules),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }


def lora_modules(patch: Patch, base: Checkpoint | None, prefix: str) -> tuple[list[LoraModule], list[str]]:
    """The modules that the patch changes, and warnings; a `MismatchError` if a tensor has no LoRA form."""
    tensors = {name: tensor.info for name, tensor in patch.tensors.items()}
    config = None if base is None else base.config
    anatomy = read_anatomy("rows", tensors if base is None else base.tensors, config)
    # In a patch of rows a neuron is an output, so its axis tells how the weight is stored.
    told = config is None and patch.facts.anatomy == "rows"
    # Per tensor, the axes of its outputs, and why it holds no neurons (empty if it does).
    kinds: dict[str, tuple[tuple[int, ...], str]] = {t.info.name: (t.axes, "") for t in anatomy.scored}
    kinds |= {entry.info.name: ((0,), entry.reason) for entry in anatomy.listed}
    modules, refused = [], list[tuple[str, str]]()
    for name, tensor in patch.tensors.items():
        axes, reason = kinds[name]
        if told and tensor.info.type.kind == "float" and len(tensor.info.shape) == 2:
            axes = tensor.layout.axes
        why = _refusal(tensor, reason)
        if why is not None:
            refused.append((name, why))
        elif tensor.count:
            modules.append(_module(name, tensor, transposed=axes == (1,), prefix=prefix))
    if refused:
        raise _refused(patch, refused)
    if not modules:
        raise MismatchError("the patch replaces no neuron", file=patch.place)
    warnings = []
    if config is None and not told:
        warnings.append(
            "there is no config.json that says how the weights are stored; all are taken as [out, in]: "
            "name a base with its config if the model has Conv1D layers, as GPT-2 does"
        )
    experts = next((module.tensor for module in modules if ".experts." in module.tensor), None)
    if experts is not None:
        warnings.append(
            f"{experts} and others are single experts: transformers may stack them when it loads the model, "
            "and PEFT then finds no module of that name"
        )
    return modules, warnings


def _refusal(tensor: PatchTensor, reason: str) -> str | None:
    """Why a tensor has no LoRA form; None if it has one."""
    name, shape = tensor.info.name, tensor.info.shape
    if reason and reason != "output head":
        return reason
    if "expert" in name and len(shape) > 2:
        return "stacked experts"
    if len(shape) > 2:
        return "convolution"
    if len(shape) < 2 or len(tensor.layout.axes) != 1:
        return f"not a matrix of rows or columns, but {list(shape)} along {list(tensor.layout.axes)}"
    if not name.endswith(".weight"):
        return "not the weight of a module"
    if tensor.info.dtype not in FLOATS:
        return f"{tensor.info.dtype} elements"
    return None


def _refused(patch: Patch, refused: list[tuple[str, str]]) -> MismatchError:
    return MismatchError(
        "some of the patch has no LoRA form",
        file=patch.place,
        expected="rows or columns of linear weights",
        found=some([f"{name} ({why})" for name, why in refused], _SHOWN),
        hint="leave it out when neurons are chosen ([[exclude]], no [[with_bias]]), "
        "or write the patched checkpoint: `neftsurgery apply BASE PATCH -o OUT`",
    )


def _module(name: str, tensor: PatchTensor, *, transposed: bool, prefix: str) -> LoraModule:
    first, second = tensor.info.shape
    outputs, inputs = (second, first) if transposed else (first, second)
    rows = (tensor.layout.axes == (0,)) is not transposed
    path = prefix + name.removesuffix(".weight")
    return LoraModule(name, path, inputs, outputs, tensor.count, rows, transposed)


def task_of(base: Checkpoint | None) -> str | None:
    """PEFT's task type, if the base's config names a class with one."""
    config: Any = (base.config if base is not None else None) or {}
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    endings = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    return next((task for ending, task in endings.items() if name.endswith(ending)), None)
