"""Patches that were attached before: switching to them again is copying."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn

from ..live.weights import equal_vectors, read_vectors
from ..patch.patch import Patch
from ..selection.selection import Selection
from .attached_neurons import AttachedNeurons
from .weight_plans import Planned, check_overlap


class CheckedPatches:
    """How to attach patches again; each while its `Patch` lives. Holds its values and the base's vectors.

    If torch's version counter tells that a weight was changed meanwhile, its patches are forgotten. Writes to
    ``.data`` are not counted, so some vectors are compared, others each time.
    """

    def __init__(self) -> None:
        self._planned: WeakKeyDictionary[Patch, Planned] = WeakKeyDictionary()
        self._states: dict[tuple[nn.Module, str], object] = {}  # of weights, after they were written here

    def keep(self, what: Selection | Patch, planned: Planned) -> None:
        """Keep the plans of a patch whose values are written into the weights."""
        each = (plan.neurons for plan in planned[0])
        if isinstance(what, Patch) and all(n.mode == "scatter" and not n.trainable for n in each):
            self._planned[what] = planned

    def written(self, neurons: AttachedNeurons) -> None:
        """Note that the weight was written here."""
        self._states[neurons.module, neurons.attribute] = neurons.weight_state

    def forget_changed(self) -> None:
        """Forget patches of weights that were written elsewhere."""
        for patch, (plans, _) in [*self._planned.items()]:
            each = (plan.neurons for plan in plans)
            if any(self._states.get((n.module, n.attribute)) != n.weight_state for n in each):
                del self._planned[patch]

    def find(self, model: nn.Module, what: Selection | Patch) -> Planned | None:
        """The plans of a patch, with values on the device, if the weights hold what they held; else None."""
        plans, skipped = self._planned.get(what, ((), {})) if isinstance(what, Patch) else ((), {})
        modules, again = set(model.modules()) if plans else (), []
        for plan in plans:
            neurons, saved = plan.neurons, plan.neurons.saved
            assert saved is not None  # they are written over
            assert plan.values is not None  # it is a patch
            step = 1 + len(saved) // 8
            some = slice(neurons.weight._version % step, None, step)
            found = read_vectors(neurons.weight.detach(), neurons.layout, neurons.index[some])
            if neurons.module not in modules or not equal_vectors(found, saved[some]).all():
                return None
            check_overlap(neurons)
            again.append(replace(plan, values=plan.values.to(saved)))
        return (again, skipped) if again else None
