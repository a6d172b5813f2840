"""attach: a frozen model whose chosen neurons are trained, or replaced by a patch; detach undoes it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, UsageError, boundary
from ..patch.patch import Patch
from ..patch.write import written_patch
from ..selection.selection import Selection
from ..storage.output_checks import refuse_output
from ..version import __version__
from .base import BaseOption, base_facts, base_files, file_rows, selection_facts
from .neurons import Neurons
from .plan import ModeOption, Placement, plan
from .steps import watch
from .vectors import assign, blocks_of, to_bytes, whole
from .wiring import settle, unsettle, unwire, wire

__all__ = ["Attached", "attach"]


@boundary
def attach(
    model: nn.Module,
    what: Selection | Patch | str | os.PathLike[str],
    *,
    base: BaseOption = None,
    mode: ModeOption = "auto",
    trainable: bool | None = None,
) -> Attached:
    """Make the chosen neurons of a live model trainable, and freeze the rest; or put a patch in force.

    Parameters
    ----------
    model:
        A torch model, before it is wrapped (DDP, FSDP) or compiled. Its modules, names and state dict stay.
    what:
        A selection: its neurons become trainable, starting from what the model holds. A patch, its file or
        its Hub id (``org/name``, ``org/name@revision``): its values are put in; they are trained on only if
        ``trainable``.
    base:
        The checkpoint that the model was loaded from: a file, a folder, or a Hub id. It gives the
        patch its types and hashes. None: where the model says it came from, if that is on this
        machine, else the live weights. False: the live weights.
    mode:
        ``scatter``: the weight holds the current values; costs hardly more than a frozen model.
        ``overlay``: the weight is never written; for quantized and sharded weights, and those that
        others share. ``auto``: scatter where it can be.
    trainable:
        None: a selection is, a patch is not.

    Raises
    ------
    MismatchError
        If the selection or patch does not fit the model or its base, or the live type cannot hold
        the checkpoint's values exactly. Nothing is changed.
    UsageError
        If a layer's type, or what is attached already, does not allow it. Nothing is changed.
    """
    _refuse_wrapped(model)
    if isinstance(what, (str, os.PathLike)):
        what = Patch.load(what)
    train = isinstance(what, Selection) if trainable is None else trainable
    if isinstance(what, Selection) and not train:
        raise UsageError("a selection has no values to put in", hint="attach a patch, or train the selection")
    attached = Attached(model, what, base_files(model, base), mode, train)
    attached._install(attached._plan(what))
    return attached


def _refuse_wrapped(model: nn.Module) -> None:
    inner = next((name for name in ("_orig_mod", "module") if name in model._modules), None)
    if inner == "_orig_mod" or isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise UsageError(
            f"the model is wrapped in {type(model).__name__}",
            hint=f"attach to the model itself (model.{inner}), before it is wrapped",
        )


class Attached:
    """Chosen neurons of a live model, in force until `detach`. Made by `attach`; a context manager.

    Attributes
    ----------
    model:
        The model.
    mode:
        As it was asked for.
    trainable:
        Whether the neurons are trained.
    """

    def __init__(
        self,
        model: nn.Module,
        what: Selection | Patch,
        files: Checkpoint | None,
        mode: ModeOption,
        trainable: bool,
    ) -> None:
        self.model = model
        self.mode = mode
        self.trainable = trainable
        self._what = what
        self._files = files
        self._placements: list[Placement] = []
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._live = False

    @property
    def selection(self) -> Selection:
        """Which neurons."""
        return self._what if isinstance(self._what, Selection) else self._what.selection

    @property
    def base(self) -> dict[str, Any]:
        """What a patch says of its base: name, repository and fingerprint, as far as they are known."""
        try:
            return base_facts(self._files, self.model)
        finally:
            self._rest()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable values, float32 ``[k, width]`` per weight: what to give an optimizer."""
        for _, parameter in self.named_parameters():
            yield parameter

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable values, by their names in ``model.named_parameters()``."""
        self._require_live()
        ours = {id(neurons.rows) for neurons in self._neurons if neurons.trainable}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in ours:
                yield name, parameter

    @boundary
    def patch(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        reversible: bool = False,
        facts: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> Patch:
        """The neurons as they are now, as a patch on the base.

        Parameters
        ----------
        path:
            Where to write it. None: it lives in a temporary file until saved.
        reversible:
            Keep the replaced values in it.
        facts:
            More to say in its manifest, such as ``training``; JSON.
        force:
            Replace ``path`` if it exists.

        Raises
        ------
        UsageError
            If ``path`` exists, after `detach`, or for neurons that are not trained.
        MachineError
            If it cannot be written, or the base's files were changed since.
        """
        self._require_live()
        if not self.trainable:
            raise UsageError("these neurons are not trained: they are those of the patch that is attached")
        if path is not None:
            inputs = [] if self._files is None else [self._files.source.path]
            refuse_output(path, inputs=inputs, force=force, kind="file")
        tensors = {p.neurons.name: p.neurons.chosen for p in self._placements}
        selection = Selection(dict(sorted(tensors.items())), self.selection.facts)
        document = {
            "base": base_facts(self._files, self.model),
            "selection": selection_facts(self.selection.facts),
            "created_by": f"neftsurgery {__version__}",
            **(facts or {}),
        }
        with written_patch(selection, document, path, reversible=reversible, force=force) as written:
            for name in selection.tensors:
                for start, old, new in self._blocks(name):
                    written.writer.add_digests(name, *written.writer.write_rows(name, start, old, new))
            if self._files is not None:
                self._files.check_unchanged()
        self._rest()
        return written.result()

    def _blocks(self, name: str) -> Iterator[tuple[int, Any, Any]]:
        """Raw vectors before and after, block by block."""
        (neurons,) = (n for n in self._neurons if n.name == name)
        chosen, rows, base = neurons.chosen, whole(neurons.rows.detach()), neurons.saved
        for start, stop in blocks_of(len(chosen.index), chosen.layout.width):
            part = type(chosen)(chosen.info, chosen.layout, chosen.index[start:stop])
            if self._files is not None:
                old = file_rows(self._files, part)
            else:
                assert base is not None  # without files the live weight has told
                old = to_bytes(base[start:stop], chosen.info.dtype)
            yield start, old, to_bytes(rows[start:stop], chosen.info.dtype)

    @boundary
    def switch(self, patch: Patch | str | os.PathLike[str]) -> None:
        """Put another patch in force instead, or its file or Hub id; costs what copying its vectors costs.

        Raises
        ------
        UsageError
            After `detach`, or where the neurons are trained.
        MismatchError, CorruptFileError
            If the patch does not fit; the earlier one stays in force.
        """
        self._require_live()
        if self.trainable:
            raise UsageError("neurons in training cannot be switched", hint="detach, then attach the patch")
        if not isinstance(patch, Patch):
            patch = Patch.load(patch)
        earlier = self._placements
        self._remove()
        try:
            self._install(self._plan(patch))
        except BaseException:
            self._install(earlier)
            raise
        self._what = patch

    def refresh(self) -> None:
        """Bring the weights up to date with values that were changed behind torch's back.

        Steps of optimizers, `load_state_dict` and changes in place are noticed by themselves. Call
        this after writing to ``parameter.data``, or in place while the model runs compiled.
        """
        self._require_live()
        for neurons in self._neurons:
            neurons.refresh(force=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The values in training: ``NAME`` float32 ``[k, width]``, and ``NAME:index`` int64 ``[k]``.

        Where the model is sharded, every process must ask; that goes for `patch` as well.
        """
        self._require_live()
        state = {}
        for neurons in self._neurons:
            if neurons.trainable:
                state[neurons.name] = whole(neurons.rows.detach())
                state[f"{neurons.name}:index"] = torch.from_numpy(neurons.chosen.index)
        return state

    @boundary
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the values of an earlier `state_dict` of the same selection.

        Raises
        ------
        MismatchError
            If it is of another selection; nothing is changed.
        """
        own = self.state_dict()
        for name in sorted(own.keys() | state.keys()):
            mine, theirs = own.get(name), state.get(name)
            if mine is None or theirs is None or mine.shape != theirs.shape:
                raise MismatchError(
                    "the state is of another selection",
                    tensor=name,
                    expected="no such entry" if mine is None else list(mine.shape),
                    found="no such entry" if theirs is None else list(theirs.shape),
                )
            if name.endswith(":index") and not torch.equal(mine, theirs.cpu()):
                raise MismatchError("the state is of other neurons", tensor=name.removesuffix(":index"))
        for neurons in self._neurons:
            if neurons.trainable:
                assign(neurons.rows, state[neurons.name])
        self.refresh()

    def detach(self) -> None:
        """Take everything out: weights, flags and forward passes are as before, to the bit.

        Raises
        ------
        UsageError
            If it is detached already.
        """
        self._require_live()
        self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self.detach()

    @property
    def _neurons(self) -> Iterator[Neurons]:
        return (placement.neurons for placement in self._placements)

    def _plan(self, what: Selection | Patch) -> list[Placement]:
        try:
            return plan(self.model, what, files=self._files, mode=self.mode, trainable=self.trainable)
        finally:
            self._rest()

    def _install(self, placements: list[Placement]) -> None:
        self._placements = []
        try:
            if self.trainable:
                self._freeze()
            for placement in placements:
                settle(placement.neurons, placement.values)
                self._placements.append(placement)
                for module, operation in placement.uses:
                    wire(module, placement.neurons, operation)
                if self.trainable:
                    watch(placement.neurons)
        except BaseException:  # out of memory, or interrupted
            self._remove()
            raise
        self._live = True

    def _remove(self) -> None:
        for placement in reversed(self._placements):
            for module, _ in placement.uses:
                unwire(module, placement.neurons)
            unsettle(placement.neurons)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._placements, self._flags, self._live = [], [], False

    def _freeze(self) -> None:
        for parameter in self.model.parameters():
            self._flags.append((parameter, parameter.requires_grad))
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer made before would step on what is left there

    def _rest(self) -> None:
        """Close the base's files, which open again when they are read."""
        if self._files is not None:
            self._files.close()

    def _require_live(self) -> None:
        if not self._live:
            raise UsageError("the neurons are detached", hint="attach again")
