"""Hooks around an optimizer's step: write new values into their weights; refuse detached neurons.

One pair of hooks serves the whole process, whatever the optimizer and however it is wrapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..errors import UsageError
from .attached_neurons import AttachedNeurons

__all__ = ["register_optimizer_hooks"]

_KEY = "_neurons"  # the attribute of a parameter that says whose values it holds


def register_optimizer_hooks(neurons: AttachedNeurons) -> None:
    """Have the hooks run for these trainable neurons, also after they are detached."""
    setattr(neurons.rows, _KEY, neurons)
    _register_once()


@cache
def _register_once() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _attached(optimizer: Optimizer) -> Iterator[tuple[torch.Tensor, AttachedNeurons]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (neurons := getattr(parameter, _KEY, None)) is not None:
                yield parameter, neurons


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for parameter, neurons in _attached(optimizer):
        if not neurons.active:
            raise UsageError(
                "the optimizer trains neurons that were detached",
                tensor=neurons.name,
                hint="attach again, and make a new optimizer of attached.parameters()",
            )
        if parameter.dtype != neurons.rows_dtype:
            raise UsageError(
                "the values of the trainable neurons were cast, so small steps would be lost",
                tensor=neurons.name,
                expected=neurons.rows_dtype,
                found=parameter.dtype,
                hint="cast the model before attaching to it, not after",
            )


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for _, neurons in _attached(optimizer):
        # Forced, because an optimizer that writes to `parameter.data` does not change its version.
        neurons.refresh(force=True)
