"""The demo with training: fine-tune and diff a tiny model, train the chosen neurons, apply the patch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..demo.tiny_model import (
    NEW,
    OLD,
    Languages,
    Losses,
    TrainingSettings,
    count_parameters,
    load_model,
    logits_of,
    losses_of,
    new_model,
    single_thread,
    train_parameters,
)
from ..selection.selection import Selection
from ..text import commas, percent, size
from ..tuning.attached import attach
from .commands.demo import SHARE, TRAINING_LINES, DemoSession
from .console import Console

_PRETRAINING = TrainingSettings(OLD, steps=200, learning_rate=3e-3, seed=1)
# The same examples, steps and learning rate for every model that learns the new task.
_FINE_TUNING = TrainingSettings(NEW, steps=150, learning_rate=2e-3, seed=2)


@dataclass(frozen=True)
class TrainedModel:
    """A row of the final table."""

    name: str
    losses: Losses  # the losses on both tasks
    trained: int  # the number of trained parameters
    nbytes: int  # the size of the files to keep
    seconds: float  # the training time


class TrainingDemo(DemoSession):
    """The demo with training; ``trained`` are the models, in order."""

    def __init__(self, console: Console, folder: Path, seed: int) -> None:
        super().__init__(console, folder)
        self._seed = seed
        self._languages = Languages(seed=seed)
        self.trained: list[TrainedModel] = []

    @single_thread()
    def run(self) -> dict[str, bool]:
        """Run the demo; returns whether each check passed."""
        diff, select, control, apply, verify, revert, report = TRAINING_LINES
        base, tuned, patched = (self.folder / name for name in ("base", "tuned", "patched"))
        model = new_model(self._languages, self._seed)
        number = commas(count_parameters(model.parameters()))
        self.heading(f"A Llama with {number} parameters learns to translate A to B, B to C and C to A")
        self._train_all("base", model, _PRETRAINING, base)

        self.heading("A full fine-tune on the new task: A to C")
        self._train_all("full fine-tune", load_model(base), _FINE_TUNING, tuned)

        self.heading("Which neurons did that turn?")
        self.run_command(diff)
        self.run_command(select)

        self.heading("NeFT: train only these neurons, from the base")
        model = self._train_selection(f"NeFT, {SHARE} of the neurons", base, "selection", "neuron_patch")
        live = logits_of(model, self._languages)

        self.heading("The control: as many random neurons")
        self.run_command(control)
        self._train_selection(f"{SHARE} of the neurons at random", base, "control", "control_patch")

        self.heading("Apply the patch to the files of the base, load them, and revert it")
        self.run_command(apply)
        self.run_command(verify)
        loaded = logits_of(load_model(patched), self._languages)
        equal = self.check(
            "the model loaded from patched/ gives the trained model's logits, bit for bit",
            np.array_equal(loaded, live),
        )
        self.run_command(revert)
        same = self.check_restored()
        self._summary()
        self.draw_report(report)
        return {"patched_files_give_the_trained_logits": equal, "restored_bit_for_bit": same}

    def _train_all(self, name: str, model: Any, settings: TrainingSettings, folder: Path) -> None:
        """Train all parameters of ``model`` and write it to ``folder``."""

        def save() -> int:
            model.save_pretrained(folder)
            return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

        self._train(name, model, model.parameters(), settings, save)

    def _train_selection(self, name: str, base: Path, selection: str, patch: str) -> Any:
        """Train a selection from the base and write its patch; returns the trained model."""
        for line in (
            f'attached = ns.attach(model, ns.Selection.load("{selection}.safetensors"))',
            "optimizer = torch.optim.AdamW(attached.parameters(), ...)  # and train as usual",
            f'attached.patch("{patch}.safetensors")',
        ):
            self.console.say(f">>> {line}")
        model = load_model(base)
        attached = attach(model, Selection.load(self.folder / f"{selection}.safetensors"))
        file = self.folder / f"{patch}.safetensors"
        self._train(name, model, attached.parameters(), _FINE_TUNING, lambda: attached.patch(file).nbytes)
        return model

    def _train(
        self,
        name: str,
        model: Any,
        parameters: Iterable[Any],
        settings: TrainingSettings,
        save: Callable[[], int],
    ) -> None:
        """Train ``parameters`` of ``model``, and add a row to the table; ``save`` returns bytes."""
        trained, settings = list(parameters), replace(settings, seed=10 * self._seed + settings.seed)
        with self.console.progress(name, settings.steps, unit="step") as advance:
            seconds = train_parameters(model, trained, self._languages, settings, advance)
        losses, number = losses_of(model, self._languages), count_parameters(trained)
        self.trained.append(TrainedModel(name, losses, number, save(), seconds))
        self.console.say(
            f"  {commas(number)} parameters trained for {seconds:.1f} s; "
            f"loss on the old task {losses.old:.4f}, on the new one {losses.new:.4f}"
        )

    def _summary(self) -> None:
        base, *_ = self.trained
        self.heading("Results: loss on unseen sentences, in nats per word")
        head = ["", "old task", "new task", "parameters trained", "to keep", "seconds"]
        rows = [
            [
                row.name,
                f"{row.losses.old:.4f}",
                f"{row.losses.new:.4f}",
                f"{commas(row.trained)} ({percent(row.trained / base.trained)})",
                size(row.nbytes),
                f"{row.seconds:.1f}",
            ]
            for row in self.trained
        ]
        self.console.say_table([head, *rows], right=range(1, len(head)))
        self.console.say(
            "  One seed of a tiny model does not show how to choose neurons: "
            "with other seeds the random ones learn as well."
        )
