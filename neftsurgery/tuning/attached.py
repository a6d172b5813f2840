"""Neurons attached to a live model: trained, or with a patch's values. Detaching undoes everything."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance
from ..errors import MismatchError, UsageError, boundary
from ..live.weights import copy_into, to_bytes
from ..neurons.vectors import gather
from ..patch.patch import Manifest, Patch
from ..patch.patch_file import digests
from ..patch.write import NewPatch
from ..selection.selection import RowBlock, Selection
from ..storage.output_checks import refuse_output
from ..tensors.arrays import RawBytes
from ..text import commas, plural
from .attached_neurons import AttachedNeurons, by_tensor
from .base_checkpoint import BaseOption, base_provenance, find_base, finite_bytes
from .checked_patches import CheckedPatches
from .forwards import keep_gradients
from .install import install, remove, update_extra_repr
from .optimizer_hooks import Training
from .processes import refuse_wrapped
from .reselection import carry_over, check_states
from .state_dicts import patch_saving
from .weight_plans import ModeOption, SkipOption, WeightPlan, plan_weights


class Attached:
    """Neurons attached to a live model, until `detach`. Made by `attach`; a context manager.

    ``model``, ``mode`` and ``trainable`` are those of `attach`. ``skipped`` tells which tensors its ``skip``
    has left out, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        what: Selection | Patch,
        base: Checkpoint | None,
        mode: ModeOption,
        trainable: bool,
        skip: SkipOption = None,
    ) -> None:
        self.model = model
        self.mode = mode
        self.trainable = trainable
        self.skipped: dict[str, str] = {}
        self._base = base
        self._what = what
        self._skip: SkipOption = skip
        self._plans: list[WeightPlan] = []
        self._requires_grad: list[tuple[nn.Parameter, bool]] = []  # before the model was frozen
        self._attached = False
        self._training = Training(model)
        self._checked = CheckedPatches()

    def __repr__(self) -> str:
        model = type(self.model).__name__
        if not self._attached:
            return f"Attached({model}, detached)"
        owners = {id(neurons.module) for neurons in self._neurons}
        modes = sorted({neurons.mode for neurons in self._neurons})
        parts = (
            model,
            f"{plural(self.selection.neurons, 'neuron')} in {plural(len(owners), 'module')}",
            f"{commas(self.selection.parameters)} {'trainable' if self.trainable else 'patched'} parameters",
            f"mode={'+'.join(modes)}",
            f"base={'live weights' if self._base is None else self._base.name}",
        )
        return f"Attached({', '.join(parts)})"

    @property
    def selection(self) -> Selection:
        """Which neurons; without those that were skipped."""
        chosen = self._what if isinstance(self._what, Selection) else self._what.selection
        left = {name: tensor for name, tensor in chosen.tensors.items() if name not in self.skipped}
        return Selection(left, chosen.facts) if self.skipped else chosen

    @property
    def base(self) -> Provenance:
        """What a patch records of its base: name, repository and fingerprint, as far as they are known."""
        try:
            return base_provenance(self._base, self.model)
        finally:
            self._close_base()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable values, float32 ``[k, width]`` per weight: give these to an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable values, by their names in ``model.named_parameters()``."""
        self._require_attached()
        ours = {id(neurons.rows) for neurons in self._training.neurons}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in ours:
                yield name, parameter

    @boundary
    def patch(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        reversible: bool = False,
        facts: Mapping[str, object] | None = None,
        force: bool = False,
    ) -> Patch:
        """The neurons as they are now, as a patch on the base.

        Args:
            path: Where to write it. None: to a temporary file, until it is saved.
            reversible: Keep the replaced values in it.
            facts: More entries of its manifest, such as ``training``; JSON.
            force: Replace ``path`` if it exists.

        Raises:
            UsageError: If ``path`` exists, the neurons are detached, or they are not trained.
            MachineError: If it cannot be written, or the base's files have changed.
        """
        self._require_attached()
        if not self.trainable:
            raise UsageError("these neurons are not trained: their values are those of the attached patch")
        self._training.check_patch()
        if path is not None:
            inputs = [] if self._base is None else [self._base.source.path]
            refuse_output(path, inputs=inputs, force=force, kind="file")
        new = by_tensor(self._neurons)
        old = {} if self._base is not None else by_tensor(self._neurons, saved=True)
        selection = Selection({name: chosen for name, (chosen, _) in new.items()}, self.selection.facts)
        origin = base_provenance(self._base, self.model)
        manifest = Manifest.of(origin, self.selection.facts.for_patch(captured=False), facts)

        def rows(block: RowBlock) -> tuple[RawBytes, RawBytes, RawBytes]:
            (chosen, values), part = new[block.name], slice(block.start, block.stop)
            if self._base is not None:
                before = gather(self._base, chosen.info, chosen.layout, chosen.index[part])
            else:
                before = to_bytes(old[block.name][1][part], chosen.info.dtype)
            return finite_bytes(chosen, values[part]), before, digests(before)

        with NewPatch(selection, manifest, reversible).written(path, force=force) as writer:
            writer.write_blocks(rows)
            if self._base is not None:
                self._base.check_unchanged()
        self._close_base()
        return writer.patch

    @boundary
    def switch(self, patch: Patch | str | os.PathLike[str]) -> None:
        """Attach another patch (or its file, or its Hub id) instead.

        A `Patch` is read and checked once. While it lives, its values and the base's vectors stay in memory,
        on the model's device; a switch to it copies (`CheckedPatches`). A path or overlay is read each time.
        Errors are those of `attach`; then the earlier patch stays attached.
        """
        self._require_attached()
        if self.trainable:
            raise UsageError("trainable neurons cannot be switched", hint="detach, then attach the patch")
        self._replace(patch if isinstance(patch, Patch) else Patch.load(patch))

    @boundary
    def select(self, selection: Selection) -> None:
        """Train other neurons from now on. Those that stay keep their values and their optimizer's state.

        New ones start from the base, with a state of zeros. Those that leave go back to the base; take a
        `patch` first to keep their values. An optimizer that has made no step yet is to be made after this.
        Errors are those of `attach`, or tell of a state that cannot be divided; nothing is changed.
        """
        self._require_attached()
        if not self.trainable:
            raise UsageError("neurons of a patch are not trained", hint="switch() to another patch")
        refuse_wrapped(self.model, True)
        check_states({neurons: neurons.rows for neurons in self._neurons}, [*self._training.optimizers])
        self._replace(selection)

    def _replace(self, what: Selection | Patch) -> None:
        """Attach ``what`` instead. If that fails, nothing is changed."""
        self._checked.forget_changed()
        earlier, plans, skipped, optimizers = self._what, self._plans, self.skipped, self._training.optimizers
        old = {neurons: neurons.rows for neurons in self._training.neurons}
        plans = [replace(plan, values=old.get(plan.neurons, plan.values)) for plan in plans]
        self._remove()
        try:
            self._attach(what)
            order = {id(parameter): n for n, parameter in enumerate(self.model.parameters())}
            new = sorted(self._training.neurons, key=lambda each: order[id(each.rows)])  # a new optimizer's
            carry_over(old, new, optimizers)
        except BaseException:
            self._remove()
            self._install(earlier, plans, skipped)
            raise
        finally:
            self._training.optimizers.update(optimizers)
        self.refresh()

    @contextmanager
    def disabled(self, *, values: bool = False) -> Iterator[None]:
        """Have the model compute with the base's neurons in this context, to the bit, and then as before.

        So one model is also its own reference. The neurons have no gradient meanwhile, but the weights may.
        With ``values``, in mode ``scatter``, the weights keep their values.
        """
        self._require_attached()
        changed = [neurons for neurons in self._neurons if not neurons.disabled]
        try:
            for neurons in changed:
                neurons.disable(keep=values)
            yield
        finally:
            for neurons in changed:
                neurons.enable()

    def refresh(self) -> None:
        """Write the values into the weights, for what reads ``model.parameters()`` itself."""
        self._require_attached()
        for neurons in self._neurons:
            neurons.refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """The trainable values: ``NAME`` float32 ``[k, width]``, and ``NAME:index`` int64 ``[k]``.

        If the model is sharded, every process must call this. The same holds for `patch`.
        """
        self._require_attached()
        if not self.trainable:
            return {}
        state = {}
        for name, (chosen, rows) in by_tensor(self._training.neurons).items():
            state[name], state[f"{name}:index"] = rows, torch.from_numpy(chosen.index)
        return state

    @boundary
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load an earlier `state_dict` of the same selection; a `MismatchError` if it is of another."""
        own = self.state_dict()
        for name in sorted(own.keys() | state.keys()):
            mine, theirs = own.get(name), state.get(name)
            both = mine is not None and theirs is not None and mine.shape == theirs.shape
            if both and (not name.endswith(":index") or torch.equal(own[name], state[name].cpu())):
                continue
            raise MismatchError(
                "the state belongs to another selection, of other neurons",
                tensor=name.removesuffix(":index"),
                hint="attach the selection that the state was saved with",
            )
        for neurons in self._training.neurons:
            parts = [state[p.name][p.first : p.first + len(p.index)] for p in neurons.parts]
            copy_into(neurons.rows, torch.cat(parts))
        self.refresh()

    def detach(self) -> None:
        """Undo `attach`: weights, ``requires_grad`` flags and forward passes are as before, to the bit."""
        self._require_attached()
        self._remove()
        self._unfreeze()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._attached:
            self.detach()

    @property
    def _neurons(self) -> Iterator[AttachedNeurons]:
        return (plan.neurons for plan in self._plans)

    def _attach(self, what: Selection | Patch) -> None:
        """Plan and install ``what``. If that fails, nothing is attached."""
        try:
            planned = self._checked.find(self.model, what) or plan_weights(
                self.model, what, self._base, self.mode, self.trainable, self._skip
            )
        finally:
            self._close_base()
        self._checked.keep(what, planned)
        self._install(what, *planned)

    def _install(self, what: Selection | Patch, plans: list[WeightPlan], skipped: dict[str, str]) -> None:
        self._what, self.skipped = what, skipped
        try:
            if self.trainable and not self._requires_grad:
                self._freeze()
            for plan in plans:
                self._plans.append(plan)
                install(plan.neurons, plan.values, plan.layers, plan.uses)
                self._checked.written(plan.neurons)
                if plan.neurons.trainable:
                    self._training.add(plan.neurons)
            self._show()
        except BaseException:  # out of memory, or interrupted
            self._remove()
            if not self._attached:
                self._unfreeze()
            raise
        self._attached = True

    def _remove(self) -> None:
        for plan in reversed(self._plans):
            remove(plan.neurons, plan.layers, plan.uses)
            self._checked.written(plan.neurons)
        self._plans, self._training = [], Training(self.model)
        self._show()

    def _show(self) -> None:
        update_extra_repr(self.model)
        patch_saving(self.model)

    def _unfreeze(self) -> None:
        for parameter, flag in self._requires_grad:
            parameter.requires_grad_(flag)
        self._requires_grad, self._attached, self._checked = [], False, CheckedPatches()

    def _freeze(self) -> None:
        keep_gradients(self.model)
        for parameter in self.model.parameters():
            self._requires_grad.append((parameter, parameter.requires_grad))
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer made earlier would step on a gradient left here

    def _close_base(self) -> None:
        """Close the base's files. They are opened again when they are read."""
        if self._base is not None:
            self._base.close()

    def _require_attached(self) -> None:
        if not self._attached:
            raise UsageError("the neurons are detached", hint="attach again")


@boundary
def attach(
    model: nn.Module,
    what: Selection | Patch | str | os.PathLike[str],
    *,
    base: BaseOption = None,
    mode: ModeOption = "auto",
    trainable: bool | None = None,
    skip: SkipOption = None,
) -> Attached:
    """Make the chosen neurons of a live model trainable and freeze the rest; or put a patch's values in.

    Args:
        model: A torch model, before it is wrapped (DDP, FSDP) or compiled. Its modules, names and state dict
            stay.
        what: A selection: its neurons become trainable, starting from the values that the model holds. A
            patch, its file or its Hub id (``org/name``, ``org/name@revision``): the neurons take its values,
            and are trained only if ``trainable``.
        base: The checkpoint that the model was loaded from: a file, a folder, or a Hub id. It gives the patch
            its dtypes and hashes. None: the checkpoint that the model names, if that is on this machine, else
            the live weights. False: the live weights.
        mode: ``scatter``: the values are written into the weight; costs hardly more than a frozen model.
            ``overlay``: the weight is never written; for quantized, sharded and shared weights. ``auto``:
            scatter where possible.
        trainable: None: a selection is, a patch is not.
        skip: By ``"unattachable"``, leave out tensors that cannot be attached to this model, with a warning
            that names them, instead of refusing them all. `Attached.skipped` tells why.

    Raises:
        MismatchError: If the selection or patch does not fit the model or its base, or the model's dtype
            cannot hold the checkpoint's values exactly. Nothing is changed.
        UsageError: If the model, or neurons that are already attached, do not allow it. Nothing is changed.
    """
    if isinstance(what, (str, os.PathLike)):
        what = Patch.load(what)
    if not isinstance(what, (Selection, Patch)):
        raise UsageError("attach takes a Selection or a Patch", found=type(what).__name__)
    train = isinstance(what, Selection) if trainable is None else trainable
    if isinstance(what, Selection) and not train:
        raise UsageError("a selection has no values", hint="attach a patch, or train the selection")
    refuse_wrapped(model, train)
    attached = Attached(model, what, find_base(model, base, what.tensors), mode, train, skip)
    attached._attach(what)
    return attached
