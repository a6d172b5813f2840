"""The chosen neurons of one live weight: where they are, and what they hold."""

from __future__ import annotations

import copy
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..selection.selection import Chosen
from .vectors import gather, is_plain, scatter

__all__ = ["Mode", "Neurons", "Side", "refuse_pickling"]

Mode: TypeAlias = Literal["scatter", "overlay"]
Side: TypeAlias = Literal["outputs", "inputs", "bias"]


class Neurons:
    """The chosen neurons of one live weight, and their values.

    Attributes
    ----------
    name:
        The checkpoint's name of the tensor.
    chosen:
        Which neurons, and of what tensor.
    module, attribute:
        Who has the weight, under what name: ``weight`` or ``bias``. A tied weight has one owner.
    side:
        What they are to their module; None if that does not matter, since no forward pass is changed.
    mode:
        ``scatter``: the weight holds the values. ``overlay``: it is never written.
    trainable:
        Whether the values are a parameter of ``module``, ``weight_neurons`` or ``bias_neurons``, float32.
    index:
        int64 ``[k]``, on the weight's device.
    slots:
        Of each neuron of the weight its position in ``rows``, int64; k where it is not chosen.
    saved:
        What the weight held before, ``[k, width]`` in its type; None if that was codes, or is not needed.
    rows_dtype:
        The type of trainable values: float32, or the weight's if that is wider.
    """

    def __init__(
        self,
        chosen: Chosen,
        module: nn.Module,
        attribute: str,
        side: Side | None,
        mode: Mode,
        trainable: bool,
    ) -> None:
        self.name = chosen.info.name
        self.chosen = chosen
        self.module = module
        self.attribute = attribute
        self.side = side
        self.mode = mode
        self.trainable = trainable
        self.active = False
        self.parameter_name = f"{attribute}_neurons"
        self.rows_dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        self.index = torch.from_numpy(chosen.index).to(self.weight.device)
        self.saved: Tensor | None = None
        self._values: Tensor | None = None
        self.slots: Tensor | None = None
        self._held: Tensor | None = None  # the very weight that the values were written to
        self._seen = (-1, -1)

    @property
    def weight(self) -> Tensor:
        """The live weight."""
        # Asked of the module each time: wrappers such as FSDP put other tensors there, and an overlay
        # that held on to the whole weight would keep it in memory.
        weight: Tensor = getattr(self.module, self.attribute)
        return weight

    @property
    def rows(self) -> Tensor:
        """The values, ``[k, width]``: a parameter if they are trainable."""
        if self.trainable:
            values: Tensor = getattr(self.module, self.parameter_name)
            return values
        assert self._values is not None  # asked only while it is in force
        return self._values

    def make_slots(self) -> None:
        """Have `slots`, which lookups need."""
        count, device = len(self.index), self.index.device
        self.slots = torch.full((self.chosen.layout.count,), count, device=device)
        self.slots[self.index] = torch.arange(count, device=device)

    def install(self, values: Tensor | None) -> None:
        """Put ``values`` (None: what the weight holds) in force."""
        weight = self.weight
        if is_plain(weight) and (self.trainable or self.mode == "scatter"):
            self.saved = gather(weight.detach(), self.chosen.layout, self.index)
        start = self.saved if values is None else values.to(weight.device)
        assert start is not None  # where the weight is codes, there are values
        if self.trainable:
            rows = nn.Parameter(start.to(self.rows_dtype, copy=True))
            self.module.register_parameter(self.parameter_name, rows)
        elif self.mode == "overlay":
            self._values = start
        if self.mode == "scatter":
            self._held = weight
            if values is not None:
                self._write(start)
        self.active = True
        self._note()

    def remove(self) -> None:
        """Take the values out: the weight holds to the bit what it held before."""
        if self._held is not None:
            assert self.saved is not None  # both are set for a scatter
            self._write(self.saved)
        if self.trainable:
            del self.module._parameters[self.parameter_name]
        self.saved = self._values = self._held = None
        self.active = False

    def refresh(self, force: bool = False) -> None:
        """Bring the weight up to date with values that an optimizer, or anybody, has changed in place.

        Costs some comparisons when nothing has changed. An overlay has nothing to bring.
        """
        weight = self.weight
        if self.index.device != weight.device:
            self._follow(weight.device)
        if self._held is None or not self.trainable:
            return
        if weight is not self._held:
            raise UsageError(
                "the weight was replaced by another one while its neurons were in it",
                tensor=self.name,
                hint='detach first, or attach with mode="overlay", which weights that are sharded need',
            )
        if force or self._seen != (self.rows._version, weight._version):
            self._write(self.rows.detach())
            self._note()

    def _follow(self, device: torch.device) -> None:
        """Go where the model went."""
        self.index = self.index.to(device)
        for name in ("slots", "saved", "_values"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(device))

    def _note(self) -> None:
        if self._held is not None and self.trainable:
            self._seen = (self.rows._version, self._held._version)

    def _write(self, rows: Tensor) -> None:
        with torch.no_grad():
            scatter(self.weight, self.chosen.layout, self.index, rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> Neurons:
        twin = object.__new__(Neurons)
        memo[id(self)] = twin
        shared = {"name", "chosen", "attribute", "side", "mode", "trainable", "parameter_name", "active"}
        for key, value in self.__dict__.items():
            twin.__dict__[key] = value if key in shared else copy.deepcopy(value, memo)
        if self.trainable:
            twin._seen = (-1, -1)  # version counters start anew
        return twin

    def __reduce_ex__(self, protocol: object) -> Any:
        refuse_pickling()


def refuse_pickling() -> NoReturn:
    """Raise: a pickled model would carry this package's objects, and a frozen base to no purpose."""
    raise UsageError(
        "a model with attached neurons cannot be pickled",
        hint="save attached.patch() and detach, or save model.state_dict()",
    )
