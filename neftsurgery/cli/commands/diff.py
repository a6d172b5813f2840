"""``neftsurgery diff``."""

from __future__ import annotations

from typing import Any

import click

from ...checkpoint.adapter import open_pair
from ...progress import Timing
from ...storage.output_checks import refuse_output
from ...surgery.diff import score_pair
from ...surgery.pairing import Pair, pair
from ...surgery.summary import summarize
from ...text import size
from ..console import Console
from ..options import (
    common_options,
    dry_run_option,
    force_option,
    output_option,
    scope_options,
    score_option,
    seed_option,
    take_scope,
)
from ..render import say_map, say_pair, say_summary

__all__ = ["command"]


@click.command("diff")
@click.argument("base")
@click.argument("tuned")
@output_option("SCORES", text="Write the scores to this file.")
@score_option
@scope_options
@seed_option
@force_option
@dry_run_option
@common_options
def command(
    console: Console,
    base: str,
    tuned: str,
    out: str | None,
    score: str,
    seed: int,
    force: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Score every neuron of TUNED, a checkpoint or the folder of a PEFT LoRA adapter, against BASE.

    Both are streamed, neither is loaded. Tells which layers and kinds of weight moved most, the most
    sensitive neurons, and what share of the whole change the top neurons hold.

    \b
    Example:
      neftsurgery diff base/ tuned/ -o scores.safetensors
      neftsurgery diff base/ adapter/ -o scores.safetensors
      neftsurgery diff meta-llama/Llama-3.2-1B my-fine-tune/ --anatomy ffn
    """
    first, second = open_pair(base, tuned)
    if out is not None:
        refuse_output(out, inputs=[first.source.path, second.source.path], force=force, kind="file")
    plan = pair(first, second, take_scope(options))
    say_pair(console, plan)
    if dry_run:
        console.say(f"would read {size(plan.nbytes)}" + (f" and write {out}" if out else ""))
        console.answer({"dry_run": True, **_facts(plan), "bytes_to_read": plan.nbytes})
        return
    timing = Timing()
    with score_pair(
        plan,
        score,
        seed=seed,
        out=out,
        force=force,
        limits=console.limits,
        progress=console.progress,
        timing=timing,
    ) as scores:
        summary = summarize(scores)
        say_summary(console, summary, score)
        if summary.top and not summary.identical:
            say_map(console, scores)
        if out is not None:
            console.say(f"wrote {out} ({size(scores.nbytes)})")
        console.answer(
            {
                "score": score,
                **_facts(plan),
                "neurons": scores.neurons,
                "units": scores.units,
                "selected": 0,
                "out": out,
                **summary.describe(),
            },
            timing,
        )


def _facts(plan: Pair) -> dict[str, Any]:
    return {
        "base": plan.base.name,
        "tuned": plan.tuned.name,
        "anatomy": plan.anatomy.name,
        "scored_tensors": len(plan.anatomy.scored),
        "common_tensors": len(plan.jobs),
        "neurons": sum(t.layout.count if t.part is None else t.part.count for t in plan.anatomy.scored),
        "units": plan.anatomy.unit_count,
        "selected": 0,
        "warnings": list(plan.anatomy.warnings),
        **plan.describe(),
    }
