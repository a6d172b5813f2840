"""What happens around every optimizer's step: checks before it, and the new values written after it."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..errors import UsageError
from ..live.weights import can_represent, is_shard
from ..text import some
from .attached_neurons import AttachedNeurons, refuse_pickling
from .base_checkpoint import float_dtype
from .processes import check_same_neurons, refuse_engines

log = logging.getLogger(__name__)

_trainings: WeakSet[Training] = WeakSet()
_KEY = "_neurons"  # the attribute of a parameter that says whose values it holds


class _Mark:
    """What a parameter knows of the neurons whose values it holds. It keeps nothing alive."""

    def __init__(self, neurons: AttachedNeurons) -> None:
        self.name, self.neurons = neurons.name, weakref.ref(neurons)

    def __reduce_ex__(self, protocol: object) -> Any:
        refuse_pickling()


class Training:
    """The neurons of a model that are trained together."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.neurons: list[AttachedNeurons] = []
        self.optimizers: WeakSet[Optimizer] = WeakSet()  # whose steps were seen
        self._reported = False  # whether neurons that something has frozen were named
        self._compared = False  # whether other processes were asked for theirs

    def add(self, neurons: AttachedNeurons) -> None:
        """Have new values written after a step, and checked before one, by any optimizer."""
        neurons.training = self
        setattr(neurons.rows, _KEY, _Mark(neurons))
        self.neurons.append(neurons)
        _trainings.add(self)
        _register_once()

    def check(self, for_patch: bool = False) -> None:
        """Raise a `UsageError` unless the model computes with the neurons, and trains them alike.

        Values in the dtype of the base are enough ``for_patch``: DeepSpeed keeps wider ones to itself.
        """
        sharded = any(is_shard(neurons.rows) or is_shard(neurons.weight) for neurons in self.neurons)
        model = self._model()
        modules = set() if model is None else set(model.modules())
        if model is not None and not self._compared and not for_patch:
            self._compared = True
            check_same_neurons(model, self.neurons)
        for neurons in self.neurons:
            if neurons.module not in modules:
                raise UsageError(
                    "the module was replaced while neurons were attached to it",
                    tensor=neurons.name,
                    hint="attach after replacing modules",
                )
            weight, rows = neurons.weight.dtype, neurons.rows.dtype
            exact = for_patch and all(can_represent(rows, float_dtype(part.chosen)) for part in neurons.parts)
            if weight != neurons.weight_dtype or (rows != neurons.rows_dtype and not exact):
                raise UsageError(
                    "the model was cast while neurons were attached to it, so small steps are lost",
                    tensor=neurons.name,
                    expected=f"{neurons.weight_dtype} with values of {neurons.rows_dtype}",
                    found=f"{weight} with values of {rows}",
                    hint="cast the model before attaching to it, not after",
                )
            if sharded and neurons.kind is None:
                what = "the model reads this weight itself, and FSDP gives it one without neurons"
                raise UsageError(what, tensor=neurons.name, hint="leave it out of the selection")
            if sharded and not is_shard(neurons.rows):
                raise UsageError(
                    "the gradient of these neurons is not reduced: other weights of the model are sharded",
                    tensor=neurons.name,
                    hint="call fully_shard on the whole model too, after attach",
                )

    def check_patch(self) -> None:
        """Refuse a patch of values that the model does not compute with; name what else was trained."""
        self.check(for_patch=True)
        model = self._model()
        assert model is not None  # it was checked
        ours = {id(neurons.rows) for neurons in self.neurons}
        groups = [group["params"] for optimizer in self.optimizers for group in optimizer.param_groups]
        trained = {id(parameter) for group in groups for parameter in group} - ours
        trained |= {id(parameter) for parameter in model.parameters() if parameter.requires_grad} - ours
        others = [name for name, parameter in model.named_parameters() if id(parameter) in trained]
        if others:
            log.warning("not in the patch, though trained or not frozen: %s", some(others))

    def report_frozen(self, computed: AttachedNeurons) -> None:
        """Name the neurons that something has frozen since, at the first pass that trains a model so."""
        refuse_engines([(computed.name, computed.rows)])
        if not self._reported and not computed.rows.requires_grad:
            self._reported = True
            log.warning(
                "the chosen neurons of %s do not train: requires_grad was turned off, as PEFT does it",
                some([neurons.name for neurons in self.neurons if not neurons.rows.requires_grad]),
            )


@cache
def _register_once() -> None:  # one pair of hooks serves the whole process
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _attached(optimizer: Optimizer) -> Iterator[tuple[Tensor, AttachedNeurons]]:
    """The parameters that hold values of neurons, and these; an error if they are not those of the model."""
    live = () if torch.compiler.is_compiling() else [n for t in _trainings for n in t.neurons if n.active]
    shards = {id(neurons.rows): _Mark(neurons) for neurons in live if is_shard(neurons.rows)}  # FSDP2's own
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            mark: _Mark | None = shards.get(id(parameter)) or getattr(parameter, _KEY, None)
            if mark is None:
                continue
            neurons = mark.neurons()
            if neurons is None or not neurons.active or parameter is not neurons.rows:
                raise UsageError(
                    "the optimizer trains neurons that were detached, or values that were replaced",
                    tensor=mark.name,
                    hint="make a new optimizer of attached.parameters(), of what is attached now",
                )
            yield parameter, neurons


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    attached = [*_attached(optimizer)]
    if torch.compiler.is_compiling():
        return
    _report_untrained(attached)
    trainings = (neurons.training for _, neurons in attached)
    for training in filter(None, dict.fromkeys(trainings)):  # in the same order in all processes
        training.check()
        training.optimizers.add(optimizer)


def _report_untrained(attached: Sequence[tuple[Tensor, AttachedNeurons]]) -> None:
    """Name the weights that the first backward passes gave no gradient, at the first step after them."""
    first = [(parameter.grad is not None, neurons) for parameter, neurons in attached if not neurons.reported]
    used = {_kind(neurons) for reached, neurons in first if reached}
    if not used:  # nothing is trained yet, or gradients are kept elsewhere
        return
    for _, neurons in first:
        neurons.reported = True
    # That no token visited an expert is no fault; that none visited any expert of its kind would be.
    unused = [
        neurons.name
        for reached, neurons in first
        if not reached and not ("expert" in neurons.name and _kind(neurons) in used)
    ]
    if unused:
        log.warning(
            "no gradient reached the chosen neurons of %s in the first backward pass: if the model does not "
            "compute with these weights, they will not train; leave them out of the selection",
            some(unused),
        )


def _kind(neurons: AttachedNeurons) -> str:
    return re.sub(r"\d+", "*", neurons.name)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # A compiled graph writes no weights, and computes with the values themselves (`LayerNeurons.now`).
    if not torch.compiler.is_compiling():
        for _, neurons in _attached(optimizer):
            neurons.refresh()
