"""The sections of a report: one for each scores file and each patch, and one for their overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import text
from ..checkpoint.provenance import Provenance
from ..patch.lossless import LosslessPatch, form_shares
from ..progress import Progress
from ..selection.budget import Budget
from .budget_sweep import BudgetSweep
from .control_comparison import ControlComparison
from .figure import ReportFigure
from .inputs import LosslessInput, PatchInput, ReportInput, ScoresInput, read_candidates
from .layer_map import LayerMap, draw_layer_map, layer_map_figure
from .score_distribution import ScoreDistribution, quantization_figures, top_neurons_figure
from .selection_overlap import SelectionOverlap
from .training_record import loss_figure, training_facts

_PARTIAL = " The rest of the fine-tune is not in them."


@dataclass(frozen=True, slots=True)
class ReportSection:
    """A section of the page."""

    id: str  # the anchor on the page; unique in a report
    title: str
    lead: str  # one sentence on what the section is about
    facts: tuple[tuple[str, str], ...]  # formatted names and values, which the page shows as tiles
    figures: Sequence[ReportFigure]
    # What the JSON holds in addition to the numbers of the figures.
    data: Mapping[str, Any] = field(default_factory=dict)
    verdict: Sequence[str] = ()  # what to take home, in a sentence each: it comes first


def sections_of(inputs: Sequence[ReportInput], progress: Progress) -> tuple[ReportSection, ...]:
    """Compute the sections: one for each input, and one for the overlap of several."""
    sections = []
    for number, entry in enumerate(inputs, 1):
        suffix = f"-{number}" if len(inputs) > 1 else ""
        title = f"{number}. {text.label(entry.name)}" if suffix else text.label(entry.name)
        if isinstance(entry, ScoresInput):
            sections.append(_scores_section(entry, title, suffix, progress))
        elif isinstance(entry, PatchInput):
            sections.append(_patch_section(entry, title, suffix))
        else:
            sections.append(_lossless_section(entry, title, suffix))
    choices = [entry for entry in inputs if not isinstance(entry, LosslessInput)]
    if len(choices) > 1:
        sections.append(_overlap_section(choices))
    return tuple(sections)


def _scores_section(entry: ScoresInput, title: str, suffix: str, progress: Progress) -> ReportSection:
    scores, selection, budget = entry.scores, entry.selection, entry.budget
    one_cut = budget.policy == "sensitive" and budget.per == "model" and budget.max_per_tensor is None
    one_cut &= not budget.changed and budget.like is None and budget.params is None
    candidates = read_candidates(scores, selection)
    sweep, controls = BudgetSweep(scores, budget, progress), ControlComparison(candidates)
    figures = [
        layer_map_figure(entry.map, suffix=suffix, word=entry.word),
        ScoreDistribution(candidates, one_cut=one_cut).figure(suffix),
        sweep.captured_figure(suffix),
        sweep.kinds_figure(suffix),
        top_neurons_figure(candidates, suffix),
        controls.overlap_figure(suffix),
        controls.correlation_figure(suffix),
    ]
    figures += quantization_figures(scores, suffix)
    captured = selection.facts.captured
    facts = [
        ("score", scores.score),
        ("anatomy", text.label(scores.anatomy)),
        ("neurons scored", text.commas(scores.neurons)),
        *([("units", text.commas(scores.units))] if scores.by_unit else []),
        ("budget", _budget_text(budget)),
        ("neurons chosen", text.commas(selection.neurons)),
        ("share of the parameters", text.percent(selection.parameters / scores.parameters)),
        *([("share of the change", text.percent(captured))] if captured is not None else []),
    ]
    data = {
        "kind": "scores",
        "name": entry.name,
        "score": scores.score,
        "anatomy": scores.anatomy,
        "neurons": scores.neurons,
        "units": scores.units,
        "parameters": scores.parameters,
        "budget": budget.describe(),
        "selected": selection.neurons,
        "selected_parameters": selection.parameters,
        "captured": captured,
        "captured_scored": selection.facts.captured_scored,
        "verdict": controls.verdict,
        **{key: one.to_json() for key, one in (("base", scores.base), ("tuned", scores.tuned)) if one},
    }
    base, tuned = _quoted(scores.base, "its base"), _quoted(scores.tuned, "a fine-tune")
    lead = f"Scores of {tuned} compared with {base}."
    verdict = [controls.verdict]
    if captured is not None:
        verdict.append(
            f"The chosen neurons hold {text.percent(captured)} of the change: of the squared differences of "
            f"all weights that both checkpoints have, summed.{_PARTIAL if captured < 1 else ''}"
        )
    return ReportSection(f"scores{suffix}", title, lead, tuple(facts), figures, data, verdict)


def _patch_section(entry: PatchInput, title: str, suffix: str) -> ReportSection:
    patch = entry.patch
    captured = patch.facts.captured
    figures = [layer_map_figure(entry.map, suffix=suffix, word=entry.word, of_patch=True)]
    if loss := loss_figure(patch.training, suffix):
        figures.append(loss)
    how = [key for key in ("score", "anatomy", "policy") if key in patch.facts]
    facts = [
        ("neurons replaced", text.commas(patch.neurons)),
        ("tensors", text.commas(len(patch.tensors))),
        ("parameters", text.commas(patch.parameters)),
        ("size", text.size(patch.nbytes)),
        ("reversible", "yes" if patch.reversible else "no"),
        *((key, text.label(str(patch.facts[key]))) for key in how),
        *([("share of the change", text.percent(captured))] if captured is not None else []),
        *training_facts(patch.training),
    ]
    data = {
        "kind": "patch",
        "name": entry.name,
        "neurons": patch.neurons,
        "parameters": patch.parameters,
        "tensors": len(patch.tensors),
        "bytes": patch.nbytes,
        "reversible": patch.reversible,
        "base": dict(patch.base),
        "selection": {key: value for key, value in patch.facts.items() if key != "followers"},
        "training": patch.manifest.get("training"),
    }
    base = _quoted(patch.base, "a checkpoint")
    lead = f"A patch of {base}. It holds only the weights that it changes, and no scores."
    verdict = ["This patch is a whole fine-tune: no other weight was trained."] if patch.training else []
    if captured is not None and not patch.training:
        verdict = [
            f"Its neurons hold {text.percent(captured)} of the change.{_PARTIAL if captured < 1 else ''}"
        ]
    return ReportSection(f"patch{suffix}", title, lead, tuple(facts), figures, data, verdict)


def _lossless_section(entry: LosslessInput, title: str, suffix: str) -> ReportSection:
    patch, delta = entry.patch, entry.patch.forward
    facts = (
        ("size", text.size(patch.nbytes)),
        ("tuned weights", text.size(delta.nbytes)),
        ("other files", text.commas(len(delta.side))),
        ("files not carried", text.some(patch.not_carried) or "none"),
        ("reversible", "yes" if patch.reversible else "no"),
    )
    data = {
        "kind": "lossless",
        "name": entry.name,
        "bytes": patch.nbytes,
        "tuned_bytes": delta.nbytes,
        "base": dict(patch.base),
        "tuned": dict(patch.tuned),
        "forms": patch.forms(),
    }
    base, tuned = _quoted(patch.base, "Its base"), _quoted(patch.tuned, "the fine-tune")
    verdict, figures = [f"{base} with this patch is {tuned}, to the bit."], lossless_figures(patch, suffix)
    return ReportSection(f"lossless{suffix}", title, "A lossless patch.", facts, figures, data, verdict)


def lossless_figures(patch: LosslessPatch, suffix: str) -> tuple[ReportFigure, ...]:
    """A map of what changed, a map of what it takes, and a table by kind of weight."""
    weights = patch.weights()
    kinds = (
        (kind, one.tensors, one.elements, one.changed, one.tuned_bytes, one.code, form_shares(one.forms))
        for kind, one in patch.kinds().items()
    )
    changed = {name: (one.changed, one.elements) for name, one in weights.items()}
    stored = {name: (one.code, one.tuned_bytes) for name, one in weights.items()}
    return (
        _map_figure("changed", suffix, changed, "of all elements changed"),
        _map_figure("stored", suffix, stored, "of the tuned bytes are stored"),
        ReportFigure.of("forms", suffix, kinds),
    )


def _map_figure(name: str, suffix: str, counts: Mapping[str, tuple[int, int]], verdict: str) -> ReportFigure:
    found = LayerMap.of_counts(counts)
    draw = (lambda fig: draw_layer_map(fig, found)) if counts else None
    share = text.percent(found.neurons / max(1, found.total))
    return ReportFigure.of(name, suffix, found.rows(), draw, f"{share} {verdict}.")


def _overlap_section(inputs: Sequence[ScoresInput | PatchInput]) -> ReportSection:
    choices = [(entry if isinstance(entry, ScoresInput) else entry.patch).selection for entry in inputs]
    overlap = SelectionOverlap([entry.name for entry in inputs], choices)
    figures = [overlap.figure(), *([overlap.layers_figure()] if len(overlap.layers) > 1 else [])]
    return ReportSection(
        "together",
        "Overlap of the chosen neurons",
        "The neurons that several of them choose or replace.",
        (),
        figures,
        {"kind": "overlap", "unfit": list(overlap.unfit)},
    )


def _budget_text(budget: Budget) -> str:
    given = {key.replace("_", " "): value for key, value in budget.describe().items()}
    if given.pop("like", None) is not None:
        given["like"] = "another selection"
    options = (key if value is True else f"{key} {value}" for key, value in given.items())
    return text.label(", ".join(options), 80)


def _quoted(origin: Provenance, unknown: str) -> str:
    """The name of a checkpoint as a file records it; ``unknown`` if it records none."""
    return f"“{text.label(origin.label)}”" if origin.label else unknown
