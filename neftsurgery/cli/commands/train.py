"""``neftsurgery train``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ...errors import UsageError
from ...text import amount, percent, plural, size
from ..console import Console
from ..options import common_options, dry_run_option, force_option

if TYPE_CHECKING:
    from ...training.plan import TrainingPlan
    from ...training.run import Outcome

__all__ = ["command"]


@click.command("train")
@click.argument("recipe", metavar="RECIPE.yaml")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Instead of what the recipe says: train.steps=100.",
)
@click.option("-o", "--out", metavar="DIR", help="The folder to make; short for --set out=DIR.")
@click.option(
    "--resume", is_flag=True, help="Only go on with an unfinished run; without it, one is gone on with too."
)
@click.option("--restart", is_flag=True, help="Throw an unfinished run away, and begin anew.")
@force_option
@dry_run_option
@common_options
def command(
    console: Console,
    recipe: str,
    overrides: tuple[str, ...],
    out: str | None,
    resume: bool,
    restart: bool,
    force: bool,
    dry_run: bool,
) -> int:
    """Find the neurons that matter, train them and nothing else, and cut the patch.

    A recipe says what to train on what. OUT gets the patch, its selection and scores, and the loss
    curve, when all is done. A run that was stopped goes on from its last save when the same command is
    given again; Ctrl-C saves first.

    \b
    Example:
      neftsurgery train recipes/quickstart.yaml
      neftsurgery train recipe.yaml --set select.neurons=1% --set train.learning_rate=1e-4 -o run/
    """
    if resume and restart:
        raise UsageError("--resume and --restart do not go together")
    plan_training, read_recipe, train = _load()
    plan = plan_training(
        read_recipe(recipe, [*overrides, *([f"out={out}"] if out is not None else [])]),
        force=force,
        restart=restart,
        limits=console.limits,
        progress=console.progress,
    )
    if resume and plan.resumes is None:
        raise UsageError("there is no unfinished run to go on with", file=plan.out)
    _say_plan(console, plan)
    if dry_run:
        console.answer({"dry_run": True, "out": None, **plan.describe()})
        return 0
    with _asked_to_stop(console) as stop:
        outcome = train(
            plan,
            force=force,
            restart=restart,
            limits=console.limits,
            progress=partial(console.progress, unit="step"),
            say=console.note,
            stop=stop,
        )
        code = 0 if outcome.finished else 128 + stop.signal
    _say_outcome(console, plan, outcome)
    console.answer({"dry_run": False, **_facts(plan, outcome)})
    return code


def _load() -> tuple[Any, Any, Any]:
    """The training side, which needs more than the core."""
    try:
        from ...training.plan import plan_training
        from ...training.reading import read_recipe
        from ...training.run import train
    except ImportError as error:
        raise UsageError(
            f"training needs what is not installed: {error.name}", hint="pip install 'neftsurgery[train]'"
        ) from error
    return plan_training, read_recipe, train


class _Stop:
    """Whether a signal has asked to stop, and which; until somebody watches, signals stop at once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.watched = False
        self.signal = 0

    def __call__(self) -> bool:
        self.watched = True
        if self.signal:
            self._console.note("stopping, and saving first; again to stop at once")
        return self.signal != 0


@contextmanager
def _asked_to_stop(console: Console) -> Iterator[_Stop]:
    """The first Ctrl-C asks to save and stop; a second one stops at once."""
    stop = _Stop(console)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.signal or not stop.watched:
            before[number](number, frame)
        stop.signal = number

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_plan(console: Console, plan: TrainingPlan) -> None:
    for warning in plan.warnings:
        console.note(f"warning: {warning}")
    facts = plan.describe()
    dev = f", {plural(facts['dev_examples'], 'dev example')}" if plan.dev else ", no dev examples"
    say, params = console.say, facts["trainable_parameters"]
    say(f"{facts['model']}: {amount(facts['parameters'])} parameters")
    say(f"{plural(facts['examples'], 'example')} ({amount(facts['tokens_learned'])} tokens to learn){dev}")
    if params is None:
        say(f"to train: as many neurons as score above the threshold (by {facts['probe']})")
    else:
        about = "about " if facts["estimated"] else ""
        count = "" if facts["selected"] is None else f"{plural(facts['selected'], 'neuron')}, "
        share = percent(params / max(1, facts["parameters"]))
        say(f"to train: {count}{about}{amount(params)} parameters, {share} of the model")
        states = (size(facts["optimizer_bytes"]), size(facts["optimizer_bytes_of_full"]))
        say(f"optimizer state: {about}{states[0]}, of a full fine-tune {states[1]}")
    resumes = plan.resumes
    going = "" if resumes is None else f", going on from step {resumes}"
    say(f"{plural(plan.steps, 'step')}, saved every {plan.save_every}{going}; then {plan.out}")


def _say_outcome(console: Console, plan: TrainingPlan, outcome: Outcome) -> None:
    if not outcome.finished:
        console.note(
            f"neftsurgery: interrupted at step {outcome.step} of {outcome.steps}, and saved: "
            "give the same command again to go on"
        )
        return
    first = next((point["dev_loss"] for point in outcome.curve if "dev_loss" in point), None)
    if outcome.dev_loss is not None and first is not None:
        console.say(
            f"dev loss {first:.4f} -> {outcome.dev_loss:.4f}, at step {outcome.best_step}: the patch kept"
        )
    elif outcome.train_loss is not None:
        console.say(f"train loss {outcome.train_loss:.4f} at the end")
    if not outcome.picture:
        console.note("no picture of the loss curve: that needs matplotlib")
    console.say(f"wrote {plan.out} (neuron_patch.safetensors: {size(outcome.nbytes)})")
    console.say(
        f"try it: neftsurgery apply {plan.recipe.model} {plan.out}/neuron_patch.safetensors -o patched"
    )


def _facts(plan: TrainingPlan, outcome: Outcome) -> dict[str, Any]:
    chosen = outcome.selection
    return {
        **plan.describe(),
        "estimated": False,
        "selected": chosen.neurons,
        "trainable_parameters": chosen.parameters,
        "finished": outcome.finished,
        "step": outcome.step,
        "resumed_from": outcome.resumed_from,
        "train_loss": outcome.train_loss,
        "dev_loss": outcome.dev_loss,
        "best_step": outcome.best_step,
        "out": str(plan.out) if outcome.finished else None,
        "bytes": outcome.nbytes,
    }
