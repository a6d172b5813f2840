"""``neftsurgery train``."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ...errors import UsageError
from ...storage.output_checks import refuse_output
from ...text import commas, percent, plural, size
from ..console import Console
from ..options import output_option, writing_options

if TYPE_CHECKING:
    from ...training.train import TrainResult
    from ...training.train_plan import TrainPlan


@click.command("train")
@click.argument("recipe", metavar="RECIPE.yaml", required=False)
@click.option(
    "--init",
    is_flag=True,
    help="Print a commented recipe, or write it to -o FILE. A task may be named: instructions, maths.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a value of the recipe, as in train.steps=100.",
)
@output_option("DIR", text="The folder to create. Same as --set out=DIR. With --init: the file.")
@click.option(
    "--resume",
    is_flag=True,
    help="Resume an unfinished run. This is also the default; the flag makes a missing run an error.",
)
@click.option("--restart", is_flag=True, help="Discard an unfinished run and start again.")
@writing_options
def command(
    console: Console, recipe: str | None, overrides: tuple[str, ...], dry_run: bool, **options: Any
) -> int:
    """Find the neurons that matter, train only them, and cut the patch.

    The recipe names the model, the data and the settings. When the run has finished, OUT holds the patch, its
    selection and scores, and the loss curve. Ctrl-C saves and stops. The same command then resumes
    from the last save.

    \b
    Example:
      neftsurgery train --init maths -o recipe.yaml
      neftsurgery train recipe.yaml --set select.neurons=1% --set train.learning_rate=1e-4 -o run/
    """
    init, out = options.pop("init"), options.pop("out")
    if init:
        return _init(console, recipe, out, force=options["force"], dry_run=dry_run)
    if recipe is None:
        raise UsageError("there is no recipe", hint="`neftsurgery train --init` prints one to start from")
    from ...training.train import require_training

    require_training()
    from ...training.recipe_reader import parse_overrides
    from ...training.train_plan import plan_train
    from ...training.trainer import is_first_process

    if not is_first_process():
        console = Console(as_json=False, quiet=True, limits=console.limits)
    given = parse_overrides(overrides) | ({} if out is None else {"out": out})
    plan = plan_train(recipe, given, **options, **console.running)
    _say_plan(console, plan)
    if dry_run:
        console.answer({"dry_run": True, "out": None, **plan.describe()})
        return 0
    with _stop_on_signals(console) as stop:
        result = plan.run(
            limits=console.limits,
            progress=partial(console.progress, unit="step"),
            report=console.report,
            note=console.note,
            stop=stop,
        )
        code = 0 if result.finished else 128 + stop.signal
    _say_result(console, plan, result)
    console.answer({"dry_run": False, **plan.describe(), **result.describe()})
    return code


def _init(console: Console, task: str | None, out: str | None, *, force: bool, dry_run: bool) -> int:
    """Print the recipe of a task, or write it."""
    from ...storage.output import staged_file
    from ...training.recipe_text import recipe_text

    text = recipe_text(task)
    if out is not None:
        refuse_output(out, inputs=[], force=force, kind="file")
    if out is not None and not dry_run:
        with staged_file(Path(out), force=force) as file:
            file.write_at(text.encode(), 0)
        console.say(f"wrote {out}", f"next: neftsurgery train {out} --dry-run")
    elif out is None:
        console.say(*text.splitlines())
    console.answer({"recipe": text, "out": out}, dry_run=dry_run)
    return 0


class _Stop:
    """The signal that asked the run to stop, if any. Before the first step, a signal stops the process."""

    def __init__(self) -> None:
        self.watched = False
        self.signal = 0

    def __call__(self) -> bool:
        self.watched = True
        return self.signal != 0


@contextmanager
def _stop_on_signals(console: Console) -> Iterator[_Stop]:
    """Within the context, the first SIGINT or SIGTERM asks the run to save and stop; the second stops it."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.signal or not stop.watched:
            before[number](number, frame)
        stop.signal = number

    def tell() -> None:
        while number := os.read(heard, 1):
            if number[0] in before and stop.watched:
                console.note("interrupted: finishing this step, then saving; interrupt again to stop at once")

    # Python handles a signal between two calls of torch, which may take long; this thread says so at once.
    heard, woken = os.pipe()
    os.set_blocking(woken, False)
    wakeup = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(woken)
        teller.join()
        os.close(heard)


def _say_plan(console: Console, plan: TrainPlan) -> None:
    console.warn(plan.warnings)
    facts = plan.describe()
    dev = f", {plural(facts['dev_examples'], 'dev example')}" if plan.examples.dev else ", no dev examples"
    say, params = console.say, facts["trainable_parameters"]
    say(f"{facts['model']}: {commas(facts['parameters'])} parameters")
    say(f"{plural(facts['examples'], 'example')} ({commas(facts['tokens_learned'])} tokens to learn){dev}")
    about = "about " if facts["estimated"] else ""
    if params is None:
        say(f"to train: the neurons that score above the threshold (probe: {facts['probe']})")
    else:
        count = "" if facts["selected"] is None else f"{plural(facts['selected'], 'neuron')}, "
        share = percent(params / max(1, facts["parameters"]))
        say(f"to train: {count}{about}{commas(params)} parameters, {share} of the model")
    if facts["optimizer_bytes"] is not None:
        states = (size(facts["optimizer_bytes"]), size(facts["optimizer_bytes_of_full"]))
        say(f"optimizer state: {about}{states[0]}; a full fine-tune needs {states[1]}")
    resumes = plan.resumes
    resuming = "" if resumes is None else f", resuming from step {resumes}"
    say(f"{plural(plan.steps, 'step')}, saved every {plan.save_every}{resuming}; then {plan.out}")


def _say_result(console: Console, plan: TrainPlan, result: TrainResult) -> None:
    if not result.finished:
        early = "in the control" if result.selection.neurons else "in the probe"
        where = f"at step {result.step} of {result.steps}" if result.step else early
        console.note(f"neftsurgery: interrupted {where}, and saved: run the same command again to resume")
        return
    if result.dev_loss is not None and result.base_dev_loss is not None:
        console.say(
            f"dev loss: base {result.base_dev_loss:.4f}, best {result.dev_loss:.4f} at step "
            f"{result.best_step}; this patch is kept"
        )
        for name, loss in (*result.dev_losses.items(), ("as many random neurons", result.control_dev_loss)):
            if loss is not None:
                console.say(f"  {name}: {loss:.4f}")
    elif result.train_loss is not None:
        console.say(f"last train loss {result.train_loss:.4f}")
    if not result.plotted:
        console.note("the loss curve is not plotted: matplotlib is not installed")
    console.say(f"wrote {result.out} (neuron_patch.safetensors: {size(result.patch_bytes)})")
    if result.pushed is not None:
        console.say(f"pushed it to {result.pushed}")
    console.say(f"try it: neftsurgery apply {plan.recipe.model} {result.patch} -o patched")
