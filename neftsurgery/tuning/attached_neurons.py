"""The neurons attached to one weight of a live model: which ones, their values, and optimizers' steps."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..errors import UsageError
from ..live.weights import is_plain, read_vectors, write_vectors
from ..neurons.layout import Layout
from ..selection.selection import Chosen
from ..text import some

log = logging.getLogger(__name__)

Mode: TypeAlias = Literal["scatter", "overlay"]
NeuronKind: TypeAlias = Literal["outputs", "inputs", "bias"]


@dataclass(frozen=True, eq=False)
class AttachedPart:
    """The chosen neurons of one tensor of the files that lie in a live weight, and where they lie in it."""

    chosen: Chosen  # in the files
    index: NDArray[np.int64]  # their numbers in the live weight, ``[k]``
    first: int = 0  # the position of the first among all chosen neurons of the tensor
    start: int = 0  # the position of the first among all neurons attached to the weight

    @property
    def name(self) -> str:
        """The tensor's name in the files."""
        return self.chosen.info.name

    @property
    def positions(self) -> slice:
        """Where its vectors lie among those of the weight."""
        return slice(self.start, self.start + len(self.index))


@dataclass(eq=False, repr=False)
class AttachedNeurons:
    """The chosen neurons of one weight of a live model, and their values.

    The weight may hold several tensors of the files: each is a part, with consecutive neurons.

    In mode ``scatter`` the values are written into the weight; in mode ``overlay`` it is never written.
    Trainable values are a parameter of the module, named ``weight_neurons`` or ``bias_neurons``.
    """

    parts: tuple[AttachedPart, ...]
    layout: Layout  # of the live weight
    module: nn.Module  # the owner of the weight; a tied weight has one
    attribute: str  # of the weight in the module, such as ``weight`` or ``bias``
    kind: NeuronKind | None  # what the neurons are to their layer; None if no forward pass is replaced
    mode: Mode
    trainable: bool

    def __post_init__(self) -> None:
        self.name = self.parts[0].name  # in the checkpoint; the first of several
        self.active = False  # whether they are installed
        self.reported = False  # whether it was seen if the first backward pass reached them
        self.parameter_name = f"{self.attribute}_neurons"
        self.rows_dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        index = np.concatenate([part.index for part in self.parts])
        self.index = torch.from_numpy(index).to(self.weight.device)  # int64 ``[k]``, in the live weight
        # int64: for each neuron of an embedding its position in ``rows``, or k if it is not chosen.
        self.inverse_index: Tensor | None = None
        # The vectors that the weight held before, ``[k, width]`` in its dtype; None if the weight is
        # quantized, or nothing needs them.
        self.saved: Tensor | None = None
        self.by_expert: Any = None  # the rows by expert (`ExpertRows`), once one expert of a stack is read
        self._values: Tensor | None = None  # of an overlay that is not trainable
        self._written: Tensor | None = None  # the very weight that the values were written to
        self._versions = (-1, -1)  # of the rows and the weight, when they were last equal

    def __repr__(self) -> str:
        how = ("trainable" if self.trainable else "patched", self.mode)
        return f"{self.parameter_name}={len(self.index)} of {self.layout.count} ({', '.join(how)})"

    @property
    def weight(self) -> Tensor:
        """The live weight."""
        # Looked up each time: wrappers such as FSDP replace the module's tensor, and an overlay that kept
        # a reference to the whole weight would keep it in memory.
        weight: Any = self.module._parameters[self.attribute]  # the attribute is a `NeuronWeight`
        # So is the parameter, if the model's weights were tied meanwhile.
        return getattr(weight, "parameter", weight)  # type: ignore[no-any-return]

    @property
    def rows(self) -> Tensor:
        """The values, ``[k, width]``: a parameter if they are trainable."""
        if self.trainable:
            values: Tensor = getattr(self.module, self.parameter_name)
            return values
        assert self._values is not None  # only asked for while they are installed
        return self._values

    def make_inverse_index(self) -> None:
        """Set `inverse_index`."""
        count, device = len(self.index), self.index.device
        self.inverse_index = torch.full((self.layout.count,), count, device=device)
        self.inverse_index[self.index] = torch.arange(count, device=device)

    def install(self, values: Tensor | None) -> None:
        """Install ``values``, ``[k, width]``; None: the vectors that the weight holds."""
        weight = self.weight
        if is_plain(weight) and (self.trainable or self.mode == "scatter"):
            self.saved = read_vectors(weight.detach(), self.layout, self.index)
        start = self.saved if values is None else values.to(weight.device)
        assert start is not None  # a quantized weight always comes with values
        if self.trainable:
            rows = nn.Parameter(start.to(self.rows_dtype, copy=True))
            self.module.register_parameter(self.parameter_name, rows)
        elif self.mode == "overlay":
            self._values = start
        if self.mode == "scatter":
            self._written = weight
            if values is not None:
                self._write(start)
        self.active = True
        self._record_versions()

    def remove(self) -> None:
        """Undo `install`, complete or not: the weight's bits are what they were before."""
        if self._written is not None:
            assert self.saved is not None  # scatter mode reads it before it writes
            self._write(self.saved)
        if self.trainable:
            self.module._parameters.pop(self.parameter_name, None)
        self.saved = self._values = self._written = self.by_expert = None
        self.active = False

    def refresh(self, force: bool = False) -> None:
        """Write the values into the weight if either has changed in place; ``force``: in any case."""
        weight = self.weight
        if self.index.device != weight.device:
            self._move(weight.device)
        if self._written is None or not self.trainable:
            return
        if weight is not self._written:
            raise UsageError(
                "the weight was replaced while neurons were attached to it",
                tensor=self.name,
                hint='detach before replacing it, or attach with mode="overlay", which sharded weights need',
            )
        if force or self._versions != (self.rows._version, weight._version):
            self._write(self.rows.detach())
            self._record_versions()

    def _move(self, device: torch.device) -> None:
        """Follow the weight to another device."""
        self.index, self.by_expert = self.index.to(device), None
        for name in ("inverse_index", "saved", "_values"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(device))

    def _record_versions(self) -> None:
        if self._written is not None and self.trainable:
            self._versions = (self.rows._version, self._written._version)

    def _write(self, rows: Tensor) -> None:
        with torch.no_grad():
            write_vectors(self.weight, self.layout, self.index, rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachedNeurons:
        twin = object.__new__(AttachedNeurons)
        memo[id(self)] = twin
        shared = {
            "name", "parts", "layout", "attribute", "kind", "mode", "trainable", "parameter_name", "reported",
            "active",
        }  # fmt: skip
        for key, value in (self.__dict__ | {"by_expert": None}).items():
            twin.__dict__[key] = value if key in shared else copy.deepcopy(value, memo)
        if self.trainable:
            twin._versions = (-1, -1)  # version counters of copies start at zero
        return twin

    def __reduce_ex__(self, protocol: object) -> Any:
        refuse_pickling()


def refuse_pickling() -> NoReturn:
    """Raise a `UsageError`: a pickle would contain this package's objects, and the whole frozen base."""
    raise UsageError(
        "a model with attached neurons cannot be pickled",
        hint="save attached.patch() and detach, or save model.state_dict()",
    )


_KEY = "_neurons"  # the attribute of a parameter that says whose values it holds


def register_optimizer_hooks(neurons: AttachedNeurons) -> None:
    """Have new values written after a step, and detached neurons refused before one, by any optimizer."""
    setattr(neurons.rows, _KEY, neurons)
    _register_once()


@cache
def _register_once() -> None:  # one pair of hooks serves the whole process
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _attached(optimizer: Optimizer) -> Iterator[tuple[torch.Tensor, AttachedNeurons]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (neurons := getattr(parameter, _KEY, None)) is not None:
                yield parameter, neurons


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        _report_untrained([*_attached(optimizer)])
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
    if torch.compiler.is_compiling():
        return
    for _, neurons in _attached(optimizer):
        # Forced, because an optimizer that writes to `parameter.data` does not change its version.
        neurons.refresh(force=True)
