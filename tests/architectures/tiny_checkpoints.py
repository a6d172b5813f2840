"""A small model of one type on disk: a base, a tuned copy with every weight moved, and what both are live."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .runnable import Runnable, outputs

__all__ = ["TinyCheckpoints", "Unusable", "far", "in_dtype", "rounded", "tensors_in", "write_like"]


_UNSTABLE = 1e-2  # as where lengths of sounds are rounded


class Unusable(Exception):
    """The model cannot be run, or loaded twice alike: nothing can be compared."""


@dataclass
class TinyCheckpoints:
    """The folders of one model type."""

    found: Runnable
    folder: Path

    def __post_init__(self) -> None:
        logging.getLogger("transformers").setLevel(logging.CRITICAL)
        self.base, self.tuned = self.folder / "base", self.folder / "tuned"
        self.found.model.save_pretrained(self.base)
        self._sums = _sums(self.found.model)
        self.found.model = self.found.model.to("meta")  # from here on, what the files hold
        tuned = {name: _moved(name, value) for name, value in tensors_in(self.base).items()}
        write_like(self.base, self.tuned, tuned)

    @cached_property
    def plain(self) -> Any:
        """The base as transformers loads it. Do not change it."""
        try:
            model = self.load(self.base)
        except Exception as error:
            told = f"{type(error).__name__}: {error}".strip().splitlines()[0][:120]
            raise Unusable(f"transformers does not load what it saved: {told}") from error
        others = [name for name, value in _sums(model).items() if self._sums.get(name, value) != value]
        if others:
            raise Unusable(f"transformers does not load what it saved: {others[0]} has other values")
        return model

    def load(self, folder: Path) -> Any:
        """The model of a folder, in evaluation mode."""
        return type(self.found.model).from_pretrained(folder).eval()

    def copy(self) -> Any:
        """A base to change."""
        return copy.deepcopy(self.plain)

    @cached_property
    def why(self) -> str:
        """Why no outputs can be compared; empty if they can."""
        if self.found.inputs is None:
            return f"no inputs: {self.found.why}"
        if far(self.base_outputs, self.outputs_of(self.load(self.base))):
            return "transformers loads another model each time"
        if far(self.base_outputs, self.outputs_of(rounded(self.copy())), _UNSTABLE):
            return "a rounding of its weights moves its outputs"
        return ""

    @property
    def runs(self) -> bool:
        """Whether outputs can be compared."""
        return not self.why

    @cached_property
    def base_outputs(self) -> list[torch.Tensor]:
        """What the base gives for the inputs."""
        return self.outputs_of(self.plain)

    def outputs_of(self, model: Any, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """What a model gives for the same inputs. If a dtype is named, it is of that one thereafter."""
        inputs = self.found.inputs
        assert inputs is not None
        if dtype is not None:
            model, inputs = model.to(dtype), in_dtype(inputs, dtype)
        with torch.no_grad():
            return outputs(model, inputs)


def rounded(model: Any) -> Any:
    """The model with its weights a rounding apart: norms of few elements are moved far by that."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                bits = torch.randint(-1, 2, weight.shape, generator=draw)
                weight.mul_(1 + bits * torch.finfo(weight.dtype).eps)
    return model


def _sums(model: Any) -> dict[str, float]:
    return {name: float(value.detach().double().sum()) for name, value in model.named_parameters()}


def in_dtype(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of a forward pass, those in floating point as ``dtype``."""
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def far(first: list[torch.Tensor], second: list[torch.Tensor], tolerance: float = 5e-5) -> float:
    """The largest difference relative to the largest value of its tensor; 0 if within the tolerance."""
    if [one.shape for one in first] != [one.shape for one in second]:
        return float("inf")
    worst = 0.0
    for one, other in zip(first, second, strict=True):
        size = float(one.abs().nan_to_num(0, 0, 0).max()) + 1e-12
        apart = float((one.double() - other.double()).abs().nan_to_num(0).max()) / size
        worst = max(worst, apart)
    return worst if worst > tolerance else 0.0


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def write_like(base: Path, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A copy of ``base`` with other values."""
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata(), list(file.keys())
        save_file({name: tensors[name].contiguous() for name in names}, folder / path.name, metadata)


def _moved(name: str, value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    draw = torch.Generator().manual_seed(len(name) + value.numel())
    step = 0.01 + 0.02 * torch.rand(value.shape, generator=draw)  # never zero
    sign = torch.randint(0, 2, value.shape, generator=draw) * 2 - 1
    return value + (step * sign).to(value.dtype)
