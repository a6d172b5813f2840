"""The experiment: the text, the base that all arms start from, the probes, and the runs. Needs torch."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import neftsurgery as ns
from benchmarks.harness import memory
from benchmarks.selection import models, quality
from benchmarks.selection.arms import ARMS, Arm
from benchmarks.selection.choices import choose, describe
from benchmarks.selection.examples import Codec, Example, collate
from benchmarks.selection.options import RATE, TASKS, Options
from benchmarks.selection.tasks import Task, task
from benchmarks.selection.text import read
from benchmarks.selection.tuning import TrainingResult, batches_of, make_trainable, rank_of, train
from neftsurgery import Selection
from neftsurgery.checkpoint.provenance import fingerprint
from neftsurgery.training.gradient_probe import STEPS

FACTS = "pretraining.json"


class Experiment:
    """Makes runs. What a run needs (base, probe) is made on first use."""

    def __init__(self, options: Options) -> None:
        torch.set_num_threads(options.threads)
        self._options, self._sizes = options, options.sizes
        self.text = read(options.text, self._sizes.text)
        self._folder = options.folder(self.text.digest)
        self._folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def codec(self) -> Codec:
        """The tokenizer. The same text always gives the same one."""
        return Codec.train(self.text, self._sizes.shape.vocabulary)

    @cached_property
    def task(self) -> Task:
        """The task of fine-tuning."""
        return task(self._options.task, self._options.text, self.text, self.codec, self._sizes)

    @property
    def setting(self) -> dict[str, Any]:
        """What must be equal for runs to be comparable, as JSON values."""
        return self._options.describe(self.text.digest) | self.task.setting

    @property
    def base(self) -> Path:
        """The base's checkpoint."""
        return self._folder / "base"

    def pretrain_base(self, log: Callable[[str], None]) -> None:
        """Pre-trains the base."""
        schedule = self._sizes.pretrain
        model = models.initialize(self._sizes.shape, self.codec.vocabulary, 0, self._options.device)
        model.requires_grad_(True)

        def report(step: int, loss: float) -> None:
            if step % max(1, schedule.steps // 20) == 0:
                log(f"    pre-training, step {step} of {schedule.steps}: loss {loss:.3f}")

        began, batches = time.perf_counter(), self._pretraining_batches(schedule.batch)
        train(model, list(model.parameters()), batches, schedule, self._sizes.pretrain_rate, log=report)
        seconds = time.perf_counter() - began
        facts = {"parameters": models.parameters_of(model), "seconds": round(seconds, 1), "date": _today()}
        self._save(model, self.base, facts)

    def base_facts(self) -> dict[str, Any]:
        """The facts stored about the base."""
        facts = json.loads((self.base / FACTS).read_text())
        with closing(ns.Checkpoint.open(self.base)) as checkpoint:
            return dict(facts) | {"fingerprint": fingerprint(checkpoint)}

    def _pretraining_batches(self, size: int) -> Iterator[list[Example]]:
        """Batches of all pre-training tasks, in turns."""
        codec, pairs = self.codec, self.text.pretrain
        both = ([Example(e.ids, 1) for e in make(pairs)] for make in (codec.backward, codec.forward))
        pieces = codec.pieces(self.text.articles, self._sizes.piece)
        parts = (*both, codec.english(pairs), codec.chinese(pairs), pieces)
        streams = [batches_of(part, size, seed) for seed, part in enumerate(parts)]
        turns = [number for number, share in enumerate(self._sizes.mixture) for _ in range(share)]
        # Spread the tasks out. 7 and the number of turns have no common factor.
        turns = [turns[(7 * place) % len(turns)] for place in range(len(turns))]
        while True:
            for turn in turns:
                yield next(streams[turn])

    def tokens(self) -> list[int]:
        """How many tokens of each test example are predicted."""
        return [len(example.ids) - example.start for example in self.task.test]

    def probe(self, seed: int, exponent: int) -> Path:
        """The checkpoint of a full fine-tune with this seed and rate."""
        folder = self._probe(seed, exponent)
        if not folder.is_dir():
            model, _, _ = self._fine_tune(ARMS["full"], seed, exponent, None)
            self._save(model, folder)
        return folder

    def tune(self, arm: Arm, seed: int, exponent: int, probe: Path | None) -> dict[str, Any]:
        """A run of the search for the learning rate: only the dev loss counts."""
        _, trained, _ = self._fine_tune(arm, seed, exponent, probe)
        return {"rate": RATE * 2**exponent, "loss": round(trained.loss, 5), "best": trained.best}

    def run(self, arm: Arm, seed: int, exponent: int, probe: Path | None) -> dict[str, Any]:
        """A run whose figures count, with everything that is measured."""
        model, trained, facts = self._fine_tune(arm, seed, exponent, probe)
        if arm.kind == "full":
            self._save(model, self._probe(seed, exponent))
        dev = {str(step): round(loss, 4) for step, loss in trained.dev.items()}
        return {
            "rate": RATE * 2**exponent, "loss": round(trained.loss, 5), "best": trained.best, "dev": dev,
            "seconds": round(trained.seconds, 2), "step": round(trained.step, 5),
            **facts, **self._evaluate(model),
        }  # fmt: skip

    def evaluate_base(self) -> dict[str, Any]:
        """Measures the base without fine-tuning."""
        model = models.load(self.base, self._options.device)
        loss = models.mean_loss(model, self.task.dev)
        return {"loss": round(loss, 5), "trainable": 0, **self._evaluate(model)}

    def _evaluate(self, model: Any) -> dict[str, Any]:
        began = time.perf_counter()
        found = quality.measure(model, self.task.test, self.codec, self.text, self._sizes)
        more = self.task.more(model)
        found["sentences"] |= more.pop("sentences", {})
        found |= more
        return found | {"examined": round(time.perf_counter() - began, 1), "date": _today()}

    def _fine_tune(
        self, arm: Arm, seed: int, exponent: int, probe: Path | None
    ) -> tuple[Any, TrainingResult, dict[str, Any]]:
        device, schedule = self._options.device, self._sizes.tune
        model = models.load(self.base, device)
        began = time.perf_counter()
        selection = self._select(arm, seed, probe, model) if arm.kind == "neurons" else None
        choosing = time.perf_counter() - began
        facts: dict[str, Any] = {"choosing": round(choosing, 2)}
        if selection is not None:
            facts["selection"] = describe(selection)
        if arm.kind == "lora":
            facts["rank"] = rank_of(arm, model)
        meter = memory.PeakMemory(device)
        parameters = make_trainable(arm, model, selection, seed)
        trained = train(
            model,
            parameters,
            batches_of(self.task.train, schedule.batch, seed),
            schedule,
            RATE * 2**exponent,
            lambda: models.mean_loss(model, self.task.dev),
        )
        facts |= {"trainable": sum(p.numel() for p in parameters), "peak": meter.peak()}
        return model, trained, facts

    def _select(self, arm: Arm, seed: int, probe: Path | None, model: Any) -> Selection:
        batches = islice(batches_of(self.task.train, self._sizes.tune.batch, seed), STEPS)
        return choose(arm, self.base, probe, model, (collate(batch, model.device) for batch in batches), seed)

    def _probe(self, seed: int, exponent: int) -> Path:
        task = self._options.task
        return self._folder / f"probe{f'-{task}' * (task != TASKS[0])}-{seed}-{exponent}"

    def _save(self, model: Any, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint whole or not at all."""
        fresh = folder.with_name(f"{folder.name}.{os.getpid()}.new")
        model.save_pretrained(fresh)
        if facts is not None:
            (fresh / FACTS).write_text(json.dumps(facts))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(fresh, folder)


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
