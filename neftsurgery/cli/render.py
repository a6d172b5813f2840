"""How scores and what they are made of are printed for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint.checkpoint import Side
from ..reporting.layer_map import BLOCKS, LayerMap, layer_map_lines
from ..scoring.scores import Scores
from ..surgery.pairing import Pair
from ..surgery.summary import Movement, Summary
from ..text import commas, percent, plural, size
from .console import Console, can_print

__all__ = ["say_captured", "say_map", "say_pair", "say_summary"]

_SHOWN = 5
_BAR = 24
_MAPPED = "3%"


def _checkpoint_cells(checkpoint: Side) -> list[str]:
    """The cells of a row: name, bytes, files, dtypes, model type."""
    dtypes = Counter(info.dtype for info in checkpoint.tensors.values())
    config = checkpoint.config or {}
    return [
        checkpoint.name,
        size(checkpoint.nbytes),
        plural(len(checkpoint.shards), "file"),
        "+".join(dtype for dtype, _ in dtypes.most_common(3)),
        str(config.get("model_type") or "no config"),
    ]


def say_pair(console: Console, plan: Pair) -> None:
    """Say what two checkpoints have in common, what is scored of it and what is not."""
    rows = [["base", *_checkpoint_cells(plan.base)], ["tuned", *_checkpoint_cells(plan.tuned)]]
    console.say_table(rows, right=[2])
    scored = plan.anatomy.scored
    neurons = sum(t.layout.count if t.part is None else t.part.count for t in scored)
    text = f"{plural(len(plan.jobs), 'tensor')} in common; {len(scored):,} hold {plural(neurons, 'neuron')}"
    if plan.anatomy.unit_count:
        text += f" in {plural(plan.anatomy.unit_count, 'unit')}"
    console.say(f"{text} (anatomy {plan.anatomy.name})")
    reasons = Counter(_plain(entry.reason) for entry in plan.anatomy.listed)
    if reasons:
        console.say("not scored: " + ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()))
    for what, names in (("only in base", plan.only_base), ("only in tuned", plan.only_tuned)):
        if names:
            console.say(f"{what}: {_some(names)}")
    if plan.differing:
        shown = [f"{name} ({a} and {b})" for name, (a, b) in plan.differing.items()]
        console.say(f"of another shape or dtype: {_some(shown)}")
    console.warn(plan.anatomy.warnings)


def _plain(reason: str) -> str:
    """A reason without the tensor that it names, so that equal reasons are counted together."""
    return reason.partition(":")[0]


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(name[:120] for name in names[:_SHOWN]) + (
        f" and {commas(more)} more" if more > 0 else ""
    )


def say_summary(console: Console, summary: Summary, score: str) -> None:
    """Say what the scores show: relation, layers and kinds, top neurons, what budgets capture."""
    console.say()
    if summary.nonfinite:
        console.say(f"{plural(summary.nonfinite, 'neuron')} hold a NaN or Inf, and are never chosen by score")
    if summary.identical:
        console.say("The two are identical in every scored neuron.")
        return
    same = summary.neurons - summary.changed_neurons
    console.say(_relation(summary))
    if same:
        console.say(
            f"{plural(same, 'neuron')} of {commas(summary.neurons)} are bit-identical "
            f"({percent(same / summary.neurons)})."
        )
    _say_movements(console, "layers that moved most", summary.layers)
    _say_movements(console, "kinds of weight that moved most", summary.kinds)
    if summary.top:
        console.say(f"\nmost sensitive neurons ({score})")
        rows = [[f"{n.score:.4g}", f"{n.tensor[:120]} [{n.index}]"] for n in summary.top[:_SHOWN]]
        console.say_table(rows, right=[0])
    if summary.captured:
        console.say("\nshare of the whole change that the most sensitive neurons hold")
        rows = [[f"top {budget}", percent(share)] for budget, share in summary.captured.items()]
        console.say_table(rows, right=[0, 1])
    console.say()


def _relation(summary: Summary) -> str:
    text = f"cosine {summary.cosine:.6f} over all scored weights, relative change {summary.relative:.3g}"
    if summary.related:
        return f"The two are related: {text}."
    return (
        f"The two do NOT look related: {text}. Independent models have a cosine near 0;\n"
        "is this the base that the other was tuned from?"
    )


def _say_movements(console: Console, title: str, movements: Sequence[Movement]) -> None:
    if not movements:
        return
    most = max(movement.relative for movement in movements)
    console.say(f"\n{title} (relative change, share of the change)")
    rows = [
        [
            movement.name[:80],
            f"{movement.relative:.3g}",
            percent(movement.share),
            "#" * round(_BAR * movement.relative / most) if 0 < most < float("inf") else "",
        ]
        for movement in movements
    ]
    console.say_table(rows, right=[1, 2], shown=_SHOWN)


def say_map(console: Console, scores: Scores) -> None:
    """Draw a small map of where the most sensitive neurons are, on a terminal."""
    if not console.is_terminal:
        return
    found = LayerMap.of_scores(scores, scores.select(neurons=_MAPPED))
    console.say(f"where the most sensitive {_MAPPED} are")
    for line in layer_map_lines(found, blocks=can_print(BLOCKS)):
        console.say(f"  {line}")
    console.say()


def say_captured(console: Console, facts: Mapping[str, Any], *, whole: bool | None) -> None:
    """Say what share of the change a selection holds, and whether base plus patch is the tuned model."""
    captured = facts.get("captured")
    if captured is not None:
        console.say(
            f"it captures {percent(captured)} of the whole change"
            + (
                f" ({percent(facts['captured_scored'])} of that of the scored tensors)"
                if "captured_scored" in facts
                else ""
            )
        )
    if whole:
        console.say("base plus patch is the tuned model, bit for bit")
    elif whole is None:
        console.say("base plus patch is the tuned model only if nothing else was changed")
    else:
        console.say("base plus patch is NOT the tuned model: it has only these neurons of it")
