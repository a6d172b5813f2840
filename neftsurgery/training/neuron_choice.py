"""The neurons of a run, as far as they can be chosen before the model is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance, require_same_files
from ..errors import UsageError
from ..neurons.anatomy import Anatomy
from ..neurons.layout import Layout
from ..options import PrefixOptions, Scope, declared
from ..progress import Progress
from ..scoring.scores import Scores
from ..selection.budget import Budget
from ..selection.selection import Selection
from ..storage.threads import Limits
from ..surgery.diff import DiffPlan
from ..surgery.extract import ExtractPlan, plan_extract
from ..surgery.pairing import pair
from ..text import natural_key
from .recipe import PROBES, Recipe, Select


@dataclass(frozen=True)
class NeuronChoice:
    """The chosen neurons, or what a probe of the live model has to score."""

    selection: Selection | None = None  # None: a probe will choose the neurons
    anatomy: Anatomy | None = None  # what the probe has to score; None if there is a selection
    scores: Scores | None = None  # those that the selection was made by, if they were computed now
    warnings: tuple[str, ...] = ()

    @property
    def layouts(self) -> dict[str, Layout]:
        """The tensors that are, or may be, trained."""
        if self.selection is not None:
            return {name: chosen.layout for name, chosen in self.selection.tensors.items()}
        assert self.anatomy is not None  # there is one of the two
        return {tensor.info.name: tensor.layout for tensor in self.anatomy.scored}

    def parameters(self, base: Checkpoint, select: Select) -> int | None:
        """The number of parameters to train; an estimate without a selection, None for a threshold."""
        if self.selection is not None:
            return self.selection.parameters
        assert self.anatomy is not None  # there is one of the two
        scored = self.anatomy.scored
        if select.like is not None:
            like = Selection.load(select.like).counts
            return sum(like.get(t.info.name, 0) * t.layout.width for t in scored)
        whole = sum(tensor.neurons * tensor.layout.width for tensor in scored)
        budget = Budget.of(**select.budget)
        each, total = whole / max(1, self.anatomy.unit_count or self.anatomy.neurons), whole
        if (amount := budget.neurons) is None:
            amount, each, total = budget.params, 1.0, base.parameters
        if amount is None:
            return None
        return round((amount.count or 0) * each + float(amount.percent or 0) / 100 * total)


def budget_of(select: Select) -> dict[str, Any]:
    """The arguments of `Scores.select`."""
    budget = select.budget
    return budget | {"like": Selection.load(budget["like"])} if "like" in budget else budget


def choose_from_files(recipe: Recipe, base: Checkpoint, limits: Limits, progress: Progress) -> NeuronChoice:
    """Choose the neurons if files suffice for that; a selection or scores must fit the base."""
    by, path, select = recipe.probe.by, recipe.probe.path, recipe.select
    if by in PROBES:
        anatomy = pair(base, base, select.scope).anatomy
        budget = Budget.of(**budget_of(select))  # an unreadable selection is found here, not after the probe
        more = budget.warnings(anatomy.unit_count or anatomy.neurons)
        return NeuronChoice(anatomy=anatomy, warnings=(*anatomy.warnings, *more))
    path = recipe.model if by == "weights" else path
    assert path is not None  # check_recipe has made sure
    if by in ("tuned", "weights"):
        score = {"score": select.score or "cosine", "rank": select.rank}
        options = budget_of(select) | asdict(select.scope) | score
        options |= {name: getattr(recipe.probe, name) for name in declared(PrefixOptions)}
        plan = plan_extract(recipe.model, path, limits=limits, progress=progress, **options)
        assert isinstance(plan, ExtractPlan)  # which is not lossless
        return NeuronChoice(plan.selection, scores=plan.scores, warnings=tuple(plan.warnings))
    if by == "scores":
        with Scores.load(path) as scores:
            require_same_files("the scores are of another base", Provenance.of(base), scores.base, file=path)
            budget = Budget.of(**budget_of(select))
            selection, neurons = scores.choose(budget), scores.units or scores.neurons
        warnings = tuple(budget.warnings(neurons))
    else:
        selection, warnings = Selection.load(path), ()
    selection.require_fit(base)
    return NeuronChoice(selection, warnings=warnings)


def within_backward(recipe: Recipe, base: Checkpoint) -> Recipe:
    """The recipe, with the layers excluded that its budget of backward FLOPs does not reach.

    The backward pass ends at the lowest layer that is trained. It multiplies by every weight above as the
    forward pass does, so its FLOPs are in proportion to their elements, the output head's included.
    GreenTrainer (Huang et al., ICLR 2024) budgets them, too.
    """
    share, layers = recipe.schedule.backward, dict[str, int]()
    if share == 1:
        return recipe
    anatomy = pair(base, base, Scope(axis=recipe.select.axis)).anatomy
    for tensor in anatomy.scored:
        layers[tensor.layer] = layers.get(tensor.layer, 0) + tensor.info.elements
    tables = [one.info.elements for one in anatomy.listed if one.reason in ("embedding", "output head")]
    left = share * (sum(layers.values()) + max(tables, default=0)) - max(tables, default=0)
    left -= layers.pop("", 0)
    order = sorted(layers, key=natural_key, reverse=True)
    reached = sum(cost <= left for cost in accumulate(layers[layer] for layer in order))
    if not reached:
        what = "schedule.backward does not reach a layer: the output head alone takes more"
        raise UsageError(what, found=share)
    below = [f"{layer}.*" for layer in order[reached:]]
    excluded = list(dict.fromkeys([*recipe.select.exclude, *below]))
    return replace(recipe, select=replace(recipe.select, exclude=excluded))


def random_control(recipe: Recipe, base: Checkpoint, selection: Selection) -> Selection:
    """As many random neurons of the same anatomy: as many in each tensor, or units of as many parameters."""
    scope, facts = recipe.select.scope, selection.facts
    if recipe.probe.by in ("scores", "selection"):  # the recipe does not say
        axis = {name: list(chosen.layout.axes) for name, chosen in selection.own.items()}
        scope = Scope(facts.anatomy or "rows", axis=axis, include=list(axis))
    biased = bool(facts.companion_biases)
    with DiffPlan(pair(base, base, scope), "random", alone=True).run() as scores:
        budget: dict[str, Any] = {"params": selection.parameters} if scores.units else {"like": selection}
        return scores.select(policy="random", seed=recipe.select.seed + 1, with_bias=biased, **budget)
