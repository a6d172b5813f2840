"""The LoRA form of a patch: differences as one factor, one-hot vectors as the other, scale 1.

A module with k replaced rows ``d_j`` at outputs ``i_j`` has the low-rank update ``B @ A`` with rows
``A[j] = d_j`` and columns ``B[i_j, j] = 1``; replaced columns have it the other way round. Nothing is
approximated: each element of the update is one difference. (LoRA: Hu et al., "LoRA: Low-Rank
Adaptation of Large Language Models", ICLR 2022.)

The names and the config are PEFT's, in the profile that every reader of LoRA understands: one rank for
all modules, padded with zeros, alpha equal to it, no patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..tensors.header import TensorInfo

__all__ = ["STEPS", "LoraModule", "adapter_config", "next_step"]

#: The values that vLLM takes for ``max_lora_rank``.
STEPS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)


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
