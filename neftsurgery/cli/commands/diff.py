"""``neftsurgery diff``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.dequantized import stored_side
from ...neurons.submodels import stated_type
from ...options import CompareOptions, SpreadOptions
from ...reporting.layer_map import BLOCKS, LayerMap, layer_map_lines
from ...scoring.scores import Scores
from ...surgery.diff import plan_diff
from ...surgery.pairing import Pair
from ...surgery.summary import Movement, Summary, summarize
from ...text import commas, percent, plural, size, some
from ..console import Console, can_print
from ..options import options_of, output_option, writing_options

_SHOWN = 5
_BAR = 24
_MAPPED = "3%"


@click.command("diff")
@click.argument("base")
@click.argument("tuned", required=False)
@output_option("SCORES", text="Write the scores to this file.")
@click.option(
    "--no-sums",
    "sums",
    flag_value=False,
    default=True,
    help="Leave out the sums that scores derive from: the file is an eighth as large, and tells no shares of "
    "the change.",
)
@options_of(CompareOptions, SpreadOptions)
@writing_options
def command(
    console: Console, base: str, tuned: str | None, out: str | None, score: str, dry_run: bool, **options: Any
) -> None:
    """Score every neuron of TUNED against BASE.

    TUNED is a checkpoint, or the folder of a PEFT LoRA adapter. Both are streamed, neither is loaded. Tells
    which layers and kinds of weight moved most, the most sensitive neurons, and what share of the whole
    change the top neurons hold. A score of BASE alone, such as magnitude, needs no TUNED.

    \b
    Example:
      neftsurgery diff base/ tuned/ -o scores.safetensors
      neftsurgery diff base/ adapter/ -o scores.safetensors
      neftsurgery diff base/ --score magnitude -o scores.safetensors
      neftsurgery diff meta-llama/Llama-3.2-1B my-fine-tune/ --anatomy ffn
    """
    plan = plan_diff(base, tuned, out=out, score=score, **options)
    _say_pair(console, plan.pair)
    facts = plan.describe()
    if dry_run:
        console.say(f"would read {size(plan.pair.nbytes)}" + (f" and write {out}" if out else ""))
        console.answer(facts, dry_run=True)
        return
    with plan.run(**console.running) as scores:
        summary = summarize(scores)
        if tuned is None:
            _say_top(console, summary, score)
        else:
            _say_summary(console, summary, score)
        if summary.most_sensitive and (tuned is None or not summary.identical):
            _say_map(console, scores)
        if out is not None:
            console.say(f"wrote {out} ({size(scores.nbytes)})")
        console.answer({**facts, **summary.describe()}, scores.timing, dry_run=False)


def _checkpoint_cells(checkpoint: Checkpoint) -> list[str]:
    """The cells of a row: name, bytes, files, dtypes, model type."""
    checkpoint = stored_side(checkpoint)
    dtypes = Counter(info.dtype for info in checkpoint.tensors.values())
    return [
        checkpoint.name,
        size(checkpoint.nbytes),
        plural(len(checkpoint.shards), "file"),
        "+".join(dtype for dtype, _ in dtypes.most_common(3)),
        stated_type(checkpoint.config) or "no config",
    ]


def _say_pair(console: Console, plan: Pair) -> None:
    """Say what two checkpoints have in common, what is scored of it and what is not."""
    rows = [["base", *_checkpoint_cells(plan.base)], ["tuned", *_checkpoint_cells(plan.tuned)]]
    console.say_table(rows, right=[2])
    neurons = plural(plan.anatomy.neurons, "neuron")
    text = f"{plural(len(plan.jobs), 'tensor')} in common; {len(plan.anatomy.scored):,} hold {neurons}"
    if plan.anatomy.unit_count:
        text += f" in {plural(plan.anatomy.unit_count, 'unit')}"
    console.say(f"{text} (anatomy {plan.anatomy.name})")
    # Some reasons name a tensor after a colon: without it, equal ones are counted together.
    reasons = Counter(entry.reason.partition(":")[0] for entry in plan.anatomy.listed)
    if reasons:
        console.say("not scored: " + ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()))
    joined = plan.joined
    for what, names in (("only in base", joined.only_base), ("only in tuned", joined.only_tuned)):
        if names:
            console.say(f"{what}: {some(names)}")
    if joined.copies:
        console.say(f"tied: {some([f'{copy} is {name}' for copy, name in joined.copies.items()])}")
    if plan.differing:
        shown = [f"{name} ({a} and {b})" for name, (a, b) in plan.differing.items()]
        console.say(f"of another shape or dtype: {some(shown)}")
    if plan.not_compared:
        console.say(f"not compared: {some(plan.not_compared)}")
    console.warn(plan.warnings)


def _say_summary(console: Console, summary: Summary, score: str) -> None:
    """Say what the scores show: relation, layers and kinds, top neurons, what budgets capture."""
    console.say()
    if summary.nonfinite:
        console.say(f"{plural(summary.nonfinite, 'neuron')} hold a NaN or Inf, and are never chosen by score")
    if not summary.neurons:
        console.say("No neuron was scored.")
    elif summary.identical and not summary.unscored_changed:
        console.say("The two are identical in every scored neuron, and in all else that was compared.")
        return
    if summary.unscored_changed:
        console.say(f"not scored, and different: {some(summary.unscored_changed)}")
    if summary.identical:
        if summary.neurons:
            console.say("In the scored neurons nothing differs.")
        return
    if summary.changed_neurons is None:
        console.say("Without sums, only the order of the neurons is known.")
    else:
        console.say(*_relation(summary))
    if same := summary.neurons - (summary.changed_neurons or summary.neurons):
        console.say(
            f"{plural(same, 'neuron')} of {commas(summary.neurons)} are bit-identical "
            f"({percent(same / summary.neurons)})."
        )
    _say_movements(console, "layers that moved most", summary.layers)
    _say_movements(console, "kinds of weight that moved most", summary.kinds)
    _say_top(console, summary, score)
    if summary.captured_by_budget:
        console.say("", "share of the whole change that the most sensitive neurons hold")
        rows = [[f"top {budget}", percent(share)] for budget, share in summary.captured_by_budget.items()]
        console.say_table(rows, right=[0, 1])
    console.say()


def _say_top(console: Console, summary: Summary, score: str) -> None:
    if summary.most_sensitive:
        console.say("", f"most sensitive neurons ({score})")
        rows = [[f"{n.score:.4g}", f"{n.tensor[:120]} [{n.index}]"] for n in summary.most_sensitive[:_SHOWN]]
        console.say_table(rows, right=[0])


def _relation(summary: Summary) -> list[str]:
    moved = f"relative change {summary.relative_change:.3g}"
    text = f"cosine {summary.cosine:.6f} over all scored weights, {moved}"
    if summary.related:
        return [f"The two are related: {text}."]
    return [
        f"The two do NOT look related: {text}. Independent models have a cosine near 0;",
        "is this the base that the other was tuned from?",
    ]


def _say_movements(console: Console, title: str, movements: Sequence[Movement]) -> None:
    if not movements:
        return
    most = max(movement.relative_change for movement in movements)
    console.say("", f"{title} (relative change, share of the change)")
    rows = [
        [
            movement.name[:80],
            f"{movement.relative_change:.3g}",
            percent(movement.share_of_change),
            "#" * round(_BAR * movement.relative_change / most) if 0 < most < float("inf") else "",
        ]
        for movement in movements
    ]
    console.say_table(rows, right=[1, 2], shown=_SHOWN)


def _say_map(console: Console, scores: Scores) -> None:
    """Draw a small map of where the most sensitive neurons are, on a terminal."""
    if console.as_json or console.quiet or not sys.stdout.isatty():
        return
    found = LayerMap.of_scores(scores, scores.select(neurons=_MAPPED))
    console.say(f"where the most sensitive {_MAPPED} are")
    for line in layer_map_lines(found, blocks=can_print(BLOCKS)):
        console.say(f"  {line}")
    console.say()
