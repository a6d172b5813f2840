"""The round with training: a small model is pre-trained, fine-tuned, diffed, NeFT-trained and patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...demo.languages import NEW, OLD, Languages
from ...demo.pupil import (
    Lesson,
    Losses,
    alone,
    answers,
    born,
    count,
    learn,
    learn_neurons,
    load,
    losses,
)
from ...text import amount, percent, size
from ..console import table
from .lines import APPLY, CONTROL, DIFF, REPORT, REVERT, SELECT, SHARE, VERIFY
from .stage import Stage, can_draw, digests

__all__ = ["show"]

_SCHOOL = Lesson(OLD, steps=200, learning_rate=3e-3, seed=1)
# The same sentences, steps and learning rate for all that learn the new task.
_COURSE = Lesson(NEW, steps=150, learning_rate=2e-3, seed=2)


@dataclass(frozen=True)
class Row:
    """A line of the table: losses, parameters trained, bytes to keep, seconds of training."""

    name: str
    losses: Losses
    trained: int
    nbytes: int
    seconds: float


def show(stage: Stage, seed: int) -> tuple[dict[str, bool], list[Row]]:
    """Do all steps; returns which claims held, and the table."""
    with alone():
        return _Round(stage, seed).run()


class _Round:
    def __init__(self, stage: Stage, seed: int) -> None:
        self._stage = stage
        self._seed = seed
        self._languages = Languages(seed=seed)
        self._rows: list[Row] = []

    def run(self) -> tuple[dict[str, bool], list[Row]]:
        stage = self._stage
        base, tuned, patched = (stage.place / name for name in ("base", "tuned", "patched"))
        self._pretrain(base)
        self._fine_tune(base, tuned)

        stage.title("Which neurons did that turn?")
        stage.type(DIFF)
        stage.type(SELECT)

        stage.title("NeFT: back to the base, and train these neurons only")
        model = self._train_selection(f"NeFT, {SHARE} of the neurons", base, "selection", "neuron_patch")
        live = answers(model, self._languages)

        stage.title("The control: as many neurons, drawn at random")
        stage.type(CONTROL)
        self._train_selection(f"{SHARE} of the neurons at random", base, "control", "control_patch")

        stage.title("Put the patch into the base's files, load them, and take it out again")
        stage.type(APPLY)
        stage.type(VERIFY)
        fresh = answers(load(patched), self._languages)
        equal = stage.claim(
            "the model loaded from patched/ gives the trained model's logits, bit for bit",
            np.array_equal(fresh, live),
        )
        stage.type(REVERT)
        same = stage.claim(
            "every file of restored/ equals the one of base/, bit for bit",
            digests(base) == digests(stage.place / "restored") != digests(patched),
        )
        self._summary()
        if can_draw():
            stage.title("See it")
            stage.type(REPORT)
        return {"patched_files_give_the_trained_logits": equal, "restored_bit_for_bit": same}, self._rows

    def _pretrain(self, base: Path) -> None:
        languages = self._languages
        model = born(languages, self._seed)
        parameters = list(model.parameters())
        self._stage.title(
            f"A Llama of {amount(count(parameters))} parameters learns to translate A to B, B to C and C to A"
        )
        with self._progress("pre-training", _SCHOOL) as done:
            seconds = learn(model, parameters, languages, self._lesson(_SCHOOL), done)
        model.save_pretrained(base)
        self._add("base", model, count(parameters), _bytes(base), seconds)

    def _fine_tune(self, base: Path, tuned: Path) -> None:
        self._stage.title("A full fine-tune on what is new: A to C")
        model = load(base)
        parameters = list(model.parameters())
        with self._progress("full fine-tune", _COURSE) as done:
            seconds = learn(model, parameters, self._languages, self._lesson(_COURSE), done)
        model.save_pretrained(tuned)
        self._add("full fine-tune", model, count(parameters), _bytes(tuned), seconds)

    def _train_selection(self, name: str, base: Path, selection: str, patch: str) -> Any:
        """Train a selection from the base; its patch is cut, and the model returned with it in force."""
        say, place = self._stage.console.say, self._stage.place
        for line in (
            f'attached = ns.attach(model, ns.Selection.load("{selection}.safetensors"))',
            "optimizer = torch.optim.AdamW(attached.parameters(), ...)  # and train as ever",
            f'attached.patch("{patch}.safetensors")',
        ):
            say(f">>> {line}")
        file = place / f"{patch}.safetensors"
        with self._progress(name, _COURSE) as done:
            model, trained, seconds = learn_neurons(
                base,
                place / f"{selection}.safetensors",
                file,
                self._languages,
                self._lesson(_COURSE),
                done,
            )
        self._add(name, model, trained, file.stat().st_size, seconds)
        return model

    def _lesson(self, lesson: Lesson) -> Lesson:
        return replace(lesson, seed=10 * self._seed + lesson.seed)

    @contextmanager
    def _progress(self, what: str, lesson: Lesson) -> Iterator[Callable[[int], None]]:
        with self._stage.console.progress(what, lesson.steps, unit="step") as done:
            yield done

    def _add(self, name: str, model: Any, trained: int, nbytes: int, seconds: float) -> None:
        row = Row(name, losses(model, self._languages), trained, nbytes, seconds)
        self._rows.append(row)
        self._stage.console.say(
            f"  {amount(trained)} parameters trained for {seconds:.1f} s; "
            f"loss on the old task {row.losses.old:.4f}, on the new one {row.losses.new:.4f}"
        )

    def _summary(self) -> None:
        stage, (base, *_) = self._stage, self._rows
        stage.title("What each of them knows: loss in nats a word, of sentences that none has seen")
        head = ["", "old task", "new task", "parameters trained", "to keep", "seconds"]
        rows = [
            [
                row.name,
                f"{row.losses.old:.4f}",
                f"{row.losses.new:.4f}",
                f"{amount(row.trained)} ({percent(row.trained / base.trained)})",
                size(row.nbytes),
                f"{row.seconds:.1f}",
            ]
            for row in self._rows
        ]
        for line in table([head, *rows], right=range(1, len(head))):
            stage.console.say(line)
        stage.console.say(
            "  One seed of a toy is no evidence of how to choose neurons: "
            "on other seeds those at random learn as well."
        )


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
