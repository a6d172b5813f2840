"""The sections of a report: what is told of each scores file and patch, and of several together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import text
from ..selection.budget import Budget
from .agreement import Agreement
from .distribution import Distribution
from .figure import Figure
from .growth import PERCENTS, Growth
from .map_figure import map_figure
from .overlap import Overlaps
from .sensitive import sensitive_figure
from .subjects import Patched, Scored, Subject
from .training import loss_figure, training_facts

__all__ = ["Section", "sections_of", "steps"]

Step = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page.

    Attributes
    ----------
    id:
        Its place on the page; unique in a report.
    title:
        Its heading.
    lead:
        What it is about, in a sentence.
    facts:
        Names and values, shown as tiles; ready to be shown.
    figures:
        Its figures.
    data:
        What the JSON says of it beside the figures' numbers.
    """

    id: str
    title: str
    lead: str
    facts: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...]
    data: Mapping[str, Any] = field(default_factory=dict)


def steps(subjects: Sequence[Subject]) -> int:
    """How often `sections_of` tells of progress."""
    return sum(len(PERCENTS) for subject in subjects if isinstance(subject, Scored))


def sections_of(subjects: Sequence[Subject], step: Step = int) -> tuple[Section, ...]:
    """Compute everything; ``step`` is told of each budget that was chosen for."""
    sections = []
    for number, subject in enumerate(subjects, 1):
        end = f"-{number}" if len(subjects) > 1 else ""
        title = f"{number}. {text.label(subject.name)}" if end else text.label(subject.name)
        make = _scored if isinstance(subject, Scored) else _patched
        sections.append(make(subject, title, end, step))
    if len(subjects) > 1:
        sections.append(_together(subjects))
    return tuple(sections)


def _scored(subject: Subject, title: str, end: str, step: Step) -> Section:
    assert isinstance(subject, Scored)  # chosen for it
    scores, selection, items = subject.scores, subject.selection, subject.items
    budget = subject.budget
    one_cut = budget.policy == "sensitive" and budget.per == "model" and budget.max_per_tensor is None
    one_cut &= not budget.changed and budget.like is None and budget.params is None
    growth = Growth.of(scores, budget, step)
    agreement = Agreement.of(items, scores.score)
    figures = [
        map_figure(subject.map, id=f"map{end}", word=subject.word),
        Distribution.of(items, scores.score, one_cut=one_cut).figure(f"distribution{end}"),
        growth.captured_figure(f"growth{end}"),
        growth.kinds_figure(f"growth-by-kind{end}"),
        sensitive_figure(items, scores.score, id=f"sensitive{end}"),
        agreement.overlap_figure(f"agreement{end}"),
        agreement.correlation_figure(f"correlation{end}"),
    ]
    captured = selection.facts.get("captured")
    facts = [
        ("score", scores.score),
        ("anatomy", text.label(scores.anatomy)),
        ("neurons scored", text.amount(scores.neurons)),
        *([("units", text.amount(scores.units))] if scores.by_unit else []),
        ("budget", _told(budget)),
        ("neurons chosen", text.amount(selection.neurons)),
        ("of the parameters", text.percent(selection.parameters / scores.parameters)),
        *([("of the change", text.percent(captured))] if captured is not None else []),
    ]
    data = {
        "kind": "scores",
        "name": subject.name,
        "score": scores.score,
        "anatomy": scores.anatomy,
        "neurons": scores.neurons,
        "units": scores.units,
        "parameters": scores.parameters,
        "budget": budget.describe(),
        "selected": selection.neurons,
        "selected_parameters": selection.parameters,
        "captured": captured,
        "captured_scored": selection.facts.get("captured_scored"),
        "verdict": agreement.verdict,
        **_origin(scores.facts),
    }
    sides = _side(scores.facts, "tuned", "a fine-tune"), _side(scores.facts, "base", "its base")
    lead = f"Scores of {sides[0]} beside {sides[1]}."
    return Section(f"scores{end}", title, lead, tuple(facts), tuple(figures), data)


def _patched(subject: Subject, title: str, end: str, step: Step) -> Section:
    assert isinstance(subject, Patched)  # chosen for it
    patch = subject.patch
    captured = patch.facts.get("captured")
    figures = [map_figure(subject.map, id=f"map{end}", word=subject.word, of_patch=True)]
    if loss := loss_figure(patch.manifest, id=f"loss{end}"):
        figures.append(loss)
    facts = [
        ("neurons replaced", text.amount(patch.neurons)),
        ("tensors", text.amount(len(patch.tensors))),
        ("parameters", text.amount(patch.parameters)),
        ("size", text.size(patch.nbytes)),
        ("reversible", "yes" if patch.reversible else "no"),
        *(
            (key, text.label(str(patch.facts[key])))
            for key in ("score", "anatomy", "policy")
            if key in patch.facts
        ),
        *([("of the change", text.percent(captured))] if isinstance(captured, float) else []),
        *training_facts(patch.manifest),
    ]
    data = {
        "kind": "patch",
        "name": subject.name,
        "neurons": patch.neurons,
        "parameters": patch.parameters,
        "tensors": len(patch.tensors),
        "bytes": patch.nbytes,
        "reversible": patch.reversible,
        "base": dict(patch.base),
        "selection": {key: value for key, value in patch.facts.items() if key != "followers"},
        "training": patch.manifest.get("training"),
    }
    lead = (
        f"A patch of {_side(patch.manifest, 'base', 'a checkpoint')}. It knows of the weights that it "
        "touches, and has no scores."
    )
    return Section(f"patch{end}", title, lead, tuple(facts), tuple(figures), data)


def _together(subjects: Sequence[Subject]) -> Section:
    found = Overlaps.of([subject.name for subject in subjects], [subject.selection for subject in subjects])
    figures = [found.figure()]
    if len(found.layers) > 1:
        figures.append(found.layers_figure())
    return Section(
        "together",
        "All of them together",
        "Which neurons several of them choose or replace.",
        (),
        tuple(figures),
        {"kind": "overlap", "unfit": list(found.unfit)},
    )


def _told(budget: Budget) -> str:
    told = [
        f"{key.replace('_', ' ')} {value}" if value is not True else key.replace("_", " ")
        for key, value in budget.describe().items()
        if key != "like"
    ]
    return text.label(", ".join(told + ["like another selection"] * (budget.like is not None)), 80)


def _origin(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {side: facts[side] for side in ("base", "tuned") if isinstance(facts.get(side), dict)}


def _side(facts: Mapping[str, Any], side: str, unknown: str) -> str:
    """What a file calls its base or tuned checkpoint."""
    found = facts.get(side)
    names = [found.get(key) for key in ("repo", "name")] if isinstance(found, dict) else []
    return next((f"“{text.label(name)}”" for name in names if isinstance(name, str) and name), unknown)
