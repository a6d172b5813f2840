"""What happens around an optimizer's step: values are put into their weights; detached ones are refused.

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
from .neurons import Neurons

__all__ = ["watch"]

_MARK = "_neurons"  # on the parameter: whose values it holds


def watch(neurons: Neurons) -> None:
    """Have the optimizers' steps mind these trainable neurons, now and after they are detached."""
    setattr(neurons.rows, _MARK, neurons)
    _hook()


@cache
def _hook() -> None:
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def _marked(optimizer: Optimizer) -> Iterator[tuple[torch.Tensor, Neurons]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (neurons := getattr(parameter, _MARK, None)) is not None:
                yield parameter, neurons


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for parameter, neurons in _marked(optimizer):
        if not neurons.active:
            raise UsageError(
                "an optimizer steps on neurons that were detached",
                tensor=neurons.name,
                hint="attach again, and make a new optimizer of attached.parameters()",
            )
        if parameter.dtype != neurons.rows_dtype:
            raise UsageError(
                "the values of the chosen neurons were cast, so small steps would be lost",
                tensor=neurons.name,
                expected=neurons.rows_dtype,
                found=parameter.dtype,
                hint="cast the model before attaching to it, not after",
            )


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for _, neurons in _marked(optimizer):
        # Not by its version: an optimizer that writes to `parameter.data` leaves that as it is.
        neurons.refresh(force=True)
