"""``neftsurgery extract``."""

from __future__ import annotations

from typing import Any

import click

from ...errors import UsageError
from ...patch.write import patch_bytes
from ...scoring.scores import Scores
from ...selection.selection import Selection
from ...storage.output_checks import refuse_output
from ...surgery.extract import cut, is_whole_change, plan_extraction
from ...text import amount, percent, plural, size
from ..console import Console
from ..options import (
    budget_options,
    common_options,
    dry_run_option,
    force_option,
    output_option,
    scope_options,
    score_option,
    seed_option,
    take_budget,
    take_scope,
)
from ..render import say_captured

__all__ = ["command"]


@click.command("extract")
@click.argument("base")
@click.argument("tuned")
@output_option("PATCH", required=True, text="Write the patch to this file.")
@budget_options
@click.option("--scores", metavar="SCORES", help="Choose by these scores instead of scoring again.")
@click.option("--selection", metavar="SELECTION", help="Cut out these neurons.")
@click.option(
    "--reversible", is_flag=True, help="Keep the replaced values too: revert needs no base; twice the size."
)
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
    out: str,
    scores: str | None,
    selection: str | None,
    reversible: bool,
    score: str,
    seed: int,
    force: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Score, choose, and cut the chosen neurons of TUNED out as a patch on BASE.

    \b
    Example:
      neftsurgery extract base/ tuned/ -o neuron_patch.safetensors --neurons 3%
      neftsurgery extract base/ tuned/ -o neuron_patch.safetensors --changed --include '*' --with-bias
    """
    budget = take_budget(options)
    scope = take_scope(options)
    if scores is not None and selection is not None:
        raise UsageError("--scores and --selection do not go together")
    if scores is not None or selection is not None:
        _refuse_scoring_options("--scores" if scores is not None else "--selection")
    inputs = [path for path in (scores, selection, budget.get("like")) if path is not None]
    refuse_output(out, inputs=inputs, force=force, kind="file")
    if "like" in budget:
        budget["like"] = Selection.load(budget["like"])
    if selection is None:
        budget["seed"] = seed
    plan = plan_extraction(
        base,
        tuned,
        None if selection is None else Selection.load(selection),
        scores=None if scores is None else Scores.load(scores),
        scope=scope,
        score=score,
        budget=budget,
        out=out,
        force=force,
        limits=console.limits,
        progress=console.progress,
    )
    for warning in plan.warnings:
        console.note(f"warning: {warning}")
    chosen = plan.selection
    nbytes = patch_bytes(chosen, reversible)
    if not dry_run:
        patch = cut(
            plan,
            reversible=reversible,
            out=out,
            force=force,
            limits=console.limits,
            progress=console.progress,
        )
        nbytes = patch.nbytes
    total = plan.base.parameters
    console.say(
        f"{'would cut' if dry_run else 'cut'} {plural(chosen.neurons, 'neuron')} "
        f"of {plural(len(chosen.tensors), 'tensor')} out: {amount(chosen.parameters)} parameters, "
        f"{percent(chosen.parameters / total) if total else '0%'} of the model"
    )
    facts = chosen.facts if plan.captured_known else {}
    whole = is_whole_change(plan)
    say_captured(console, facts, whole=whole)
    share = percent(nbytes / plan.base.nbytes) if plan.base.nbytes else "0%"
    console.say(f"{'would write' if dry_run else 'wrote'} {out} ({size(nbytes)}, {share} of the base)")
    console.answer(
        {
            "base": base,
            "tuned": tuned,
            "neurons": plan.scores.neurons if plan.scores is not None else chosen.neurons,
            "selected": chosen.neurons,
            "selected_parameters": chosen.parameters,
            "parameters": total,
            "tensors": {name: len(part.index) for name, part in chosen.tensors.items()},
            "captured": facts.get("captured"),
            "captured_scored": facts.get("captured_scored"),
            "whole_change": whole,
            "reversible": reversible,
            "bytes": nbytes,
            "out": None if dry_run else out,
            "dry_run": dry_run,
            "warnings": list(plan.warnings),
        },
        plan.timing,
    )


def _refuse_scoring_options(given: str) -> None:
    """What is chosen already, or by scores that are there already, is not scored: say so, do not ignore."""
    context = click.get_current_context()
    for name in ("score", "anatomy", "axis", "include", "exclude", "only"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(
                f"--{name} does not go with {given}", hint="it is for scoring, which was done before"
            )
