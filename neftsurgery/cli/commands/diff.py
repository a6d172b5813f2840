"""``neftsurgery diff``."""

from __future__ import annotations

from typing import Any

import click

from ...options import Scope, ScopeOptions, ScoreOptions, SeedOptions
from ...surgery.diff import plan_diff
from ...surgery.summary import summarize
from ...text import size
from ..console import Console
from ..options import common_options, dry_run_option, force_option, options_of, output_option, take
from ..render import say_map, say_pair, say_summary

__all__ = ["command"]


@click.command("diff")
@click.argument("base")
@click.argument("tuned")
@output_option("SCORES", text="Write the scores to this file.")
@options_of(ScoreOptions, ScopeOptions, SeedOptions)
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
    """Score every neuron of TUNED against BASE.

    TUNED is a checkpoint, or the folder of a PEFT LoRA adapter. Both are streamed, neither is loaded. Tells
    which layers and kinds of weight moved most, the most sensitive neurons, and what share of the whole
    change the top neurons hold.

    \b
    Example:
      neftsurgery diff base/ tuned/ -o scores.safetensors
      neftsurgery diff base/ adapter/ -o scores.safetensors
      neftsurgery diff meta-llama/Llama-3.2-1B my-fine-tune/ --anatomy ffn
    """
    plan = plan_diff(
        base, tuned, scope=Scope(**take(options, ScopeOptions)), score=score, seed=seed, out=out, force=force
    )
    say_pair(console, plan.pair)
    facts = plan.describe()
    if dry_run:
        console.say(f"would read {size(plan.pair.nbytes)}" + (f" and write {out}" if out else ""))
        console.answer(facts, dry_run=True)
        return
    with plan.run(limits=console.limits, progress=console.progress) as scores:
        summary = summarize(scores)
        say_summary(console, summary, score)
        if summary.top and not summary.identical:
            say_map(console, scores)
        if out is not None:
            console.say(f"wrote {out} ({size(scores.nbytes)})")
        console.answer({**facts, **summary.describe()}, scores.timing, dry_run=False)
