"""The neurons attached to one weight of a live model: which ones, and their values."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import UsageError
from ..live.weights import full_tensor, is_plain, read_vectors, write_vectors
from ..neurons.layout import Layout
from ..selection.selection import Chosen

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
    Trainable values are a parameter of the module, such as ``weight_neurons_1f0c9ab2``. The digits are a
    checksum of the neurons' numbers, so that a state of other neurons has other names: no loader takes it.
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
        self.disabled = False  # whether the model computes with the base's vectors instead
        self.reported = False  # whether it was seen if the first backward pass reached them
        self.training: Any = None  # what is checked before an optimizer's step (`Training`)
        self.weight_dtype = self.weight.dtype
        self.rows_dtype = torch.float64 if self.weight_dtype == torch.float64 else torch.float32
        index = np.concatenate([part.index for part in self.parts])
        self.parameter_name = f"{self.attribute}_neurons_{zlib.crc32(index.tobytes()):08x}"
        self.index = torch.from_numpy(index).to(self.weight.device)  # int64 ``[k]``, in the live weight
        # int64: for each neuron of an embedding its position in ``rows``, or k if it is not chosen.
        self.inverse_index: Tensor | None = None
        # The vectors that the weight held before, ``[k, width]`` in its dtype; None if the weight is
        # quantized, or nothing needs them.
        self.saved: Tensor | None = None
        self.by_expert: Any = None  # the rows by expert (`ExpertRows`), once one expert of a stack is read
        self._values: Tensor | None = None  # that are not trainable: an overlay's, or while disabled
        self._written: Tensor | None = None  # the very weight that the values were written to
        self._source: Tensor | None = None  # the very rows that were last written
        self._versions = (-1, -1)  # of the rows and the weight, when they were last equal
        self._disabled_at: int | None = None  # the weight's version when they were disabled

    def __repr__(self) -> str:
        how = ("trainable" if self.trainable else "patched", self.mode)
        return f"{self.attribute}_neurons={len(self.index)} of {self.layout.count} ({', '.join(how)})"

    @property
    def weight(self) -> Tensor:
        """The live weight."""
        # Looked up each time: wrappers such as FSDP replace the module's tensor, and an overlay that kept
        # a reference to the whole weight would keep it in memory.
        weight: Any = self.module._parameters[self.attribute]  # the attribute is a `NeuronWeight`
        # So is the parameter, if the model's weights were tied meanwhile.
        return getattr(weight, "parameter", weight)  # type: ignore[no-any-return]

    @property
    def weight_state(self) -> object:
        """What changes with the live weight, as far as torch tells of changes."""
        weight = self.module._parameters.get(self.attribute)
        if weight is None or weight.is_inference():
            return object()
        return id(weight), weight._version, weight.dtype, weight.device

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
        start = self.saved if values is None else values.to(weight.device)
        assert start is not None  # a quantized weight always comes with values
        if self.trainable:
            rows = start  # of an earlier installation: an optimizer may have it
            if not isinstance(rows, nn.Parameter):
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
        if self.saved is not None and is_plain(self.weight):
            same = self._written is None and torch.equal(self._vectors(), self.saved)
            if not same:  # an overlay has not written it, but a state may have been loaded into it
                self._write(self.saved)
        if self.trainable:
            self.module._parameters.pop(self.parameter_name, None)
        self._values = self._written = self._source = self.by_expert = None
        self.active = self.disabled = False

    def refresh(self) -> None:
        """Write the values into the weight, in every forward pass: not every optimizer tells of changes."""
        weight = self.weight
        if self.index.device != weight.device:
            self._move(weight.device)
        if self.training is not None and self.module.training and torch.is_grad_enabled():
            self.training.report_frozen(self)
        if self._written is None or not self.trainable or self.disabled:
            return
        if weight is not self._written:
            raise UsageError(
                "the weight was replaced while neurons were attached to it",
                tensor=self.name,
                hint='detach before replacing it, or attach with mode="overlay", which sharded weights need',
            )
        rows = self.rows
        if rows is self._source and self._versions == (rows._version, weight._version):
            # As far as torch knows, nothing has changed. So nor does this count as a change: graphs that
            # hold the weight can still be differentiated, as those of a plain model could.
            weight = weight.data
        self._write(rows.detach(), weight)
        self._record_versions()

    def disable(self, keep: bool = False) -> None:
        """Have no forward pass compute with the values, and put the base's vectors into the weight."""
        self.disabled = True
        if self._written is not None and not keep:
            assert self.saved is not None
            self._values = None if self.trainable else self._vectors()
            self._disabled_at = self._written._version
            self._write(self.saved)

    def enable(self) -> None:
        """Undo `disable`, complete or not."""
        weight, self.disabled = self._written, False
        if weight is None or self._disabled_at is None:
            return
        if weight._version == self._disabled_at + 1:
            # It will be what it was, so graphs that hold it can be differentiated as before.
            torch._C._autograd._unsafe_set_version_counter((weight,), (self._disabled_at,))
        self._disabled_at = None
        if self.trainable:
            self.refresh()
        elif self._values is not None:
            self._write(self._values, weight.data)
            self._values = None

    def _move(self, device: torch.device) -> None:
        """Follow the weight to another device."""
        self.index, self.by_expert = self.index.to(device), None
        for name in ("inverse_index", "saved", "_values"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(device))

    def _record_versions(self) -> None:
        if self._written is not None and self.trainable:
            self._source, self._versions = self.rows, (self.rows._version, self._written._version)

    def _vectors(self) -> Tensor:
        return read_vectors(self.weight.detach(), self.layout, self.index)

    def _write(self, rows: Tensor, weight: Tensor | None = None) -> None:
        with torch.no_grad():
            write_vectors(self.weight if weight is None else weight, self.layout, self.index, rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachedNeurons:
        twin = object.__new__(AttachedNeurons)
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__, by_expert=None, training=None)
        for key in ("module", "index", "inverse_index", "saved", "_values", "_written", "_source"):
            twin.__dict__[key] = copy.deepcopy(self.__dict__[key], memo)
        if self.trainable:
            twin._versions = (-1, -1)  # version counters of copies start at zero
        return twin

    def __reduce_ex__(self, protocol: object) -> Any:
        refuse_pickling()


def by_tensor(attached: Iterable[AttachedNeurons], saved: bool = False) -> dict[str, tuple[Chosen, Tensor]]:
    """The neurons of each tensor of the files, and their values, or those ``saved``; sorted by name."""
    found: dict[str, list[tuple[Chosen, Tensor]]] = {}
    for neurons in attached:
        whole = neurons.saved if saved else full_tensor(neurons.rows.detach())
        assert whole is not None  # vectors of a weight that is not quantized are saved
        for part in neurons.parts:  # those of one tensor follow each other
            found.setdefault(part.name, []).append((part.chosen, whole[part.positions]))
    joined = {}
    for name, parts in sorted(found.items()):
        index = np.concatenate([chosen.index for chosen, _ in parts])
        rows = torch.cat([rows for _, rows in parts]) if len(parts) > 1 else parts[0][1]
        joined[name] = replace(parts[0][0], index=index), rows
    return joined


def refuse_pickling() -> NoReturn:
    """Raise a `UsageError`: a pickle would contain this package's objects, and the whole frozen base."""
    raise UsageError(
        "a model with attached neurons cannot be pickled",
        hint="save attached.patch() and detach, or save model.state_dict()",
    )
