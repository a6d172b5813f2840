"""One run: choose, train, measure. Needs torch."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import neftsurgery as ns
from benchmarks.harness.memory import PeakMemory
from benchmarks.selection.arms import GRADIENT_SCORES, Arm
from benchmarks.selection.pretrained.arms import ANATOMIES, CHANGE_SCORES, WEIGHT_SCORES, chosen
from benchmarks.selection.pretrained.options import HEAD_RATE, RATE, PretrainedOptions
from benchmarks.selection.pretrained.subjects import SUBJECTS, Cell
from benchmarks.selection.tuning import CLIP, rate_factor
from neftsurgery import Scores, Selection
from neftsurgery.options import Scope
from neftsurgery.surgery.pairing import pair
from neftsurgery.training.gradient_probe import gradient_scores

UNUSED = ("pooler.*",)  # weights of the encoder that a mean of hidden states does not use


@dataclass(frozen=True)
class Spot:
    """Where a run is: a task, how many examples, and the seed that draws them."""

    task: str
    examples: int
    seed: int


class PretrainedExperiment:
    """Makes runs on one model."""

    def __init__(self, options: PretrainedOptions) -> None:
        torch.set_num_threads(options.threads)
        self._options, self._setting = options, options.setting
        self._work = options.work / f"pretrained-{options.model}{'-quick' * options.quick}"
        self._work.mkdir(parents=True, exist_ok=True)
        self.subject = SUBJECTS[options.model](
            self._setting, options.text, self._work, options.device, options.precision
        )

    def parameters(self) -> int:
        """Of the base, without a head."""
        with closing(ns.Checkpoint.open(self.subject.folder)) as base:
            return base.parameters

    def start(self, spot: Spot) -> dict[str, Any]:
        """What is measured before training."""
        cell = self._cell(spot)
        model = self.subject.model(cell)
        test = self.subject.measure(model, cell.test)
        return {"dev": self.subject.measure(model, cell.dev), "test": test, **self.subject.extra(model)}

    def run(self, arm: Arm, spot: Spot, exponent: int, *, probe: int | None, counts: bool) -> dict[str, Any]:
        """A run; ``probe`` is the exponent of the full fine-tune whose change is a score.

        Without ``counts`` it is one of a search: only the dev loss is measured.
        """
        cell = self._cell(spot)
        torch.manual_seed(spot.seed)
        model = self.subject.model(cell)
        began = time.perf_counter()
        facts: dict[str, Any] = {}
        selection = None
        if arm.kind == "neurons":
            selection = self._select(arm, spot, cell, model, probe)
            facts = {"choosing": round(time.perf_counter() - began, 2), "neurons": selection.neurons}
            facts |= self._overlap(arm, spot, selection)
        meter = PeakMemory(self._options.device)
        trained = _Trained(arm, model, selection, self, spot.seed)
        dev, times = self._train(model, trained.parameters, cell, spot, RATE * 2**exponent)
        best = min(dev, key=lambda step: dev[step]["loss"])
        facts |= {"rate": RATE * 2**exponent, "dev": dev, "best": best, "loss": dev[best]["loss"]}
        facts |= {"trainable": sum(p.numel() for p in trained.parameters), "peak": meter.peak()}
        if counts:
            facts |= {"step": round(median(times), 4), "seconds": round(sum(times), 1)}
            facts |= {"bytes": trained.nbytes(), "test": self.subject.measure(model, cell.test)}
            facts |= self.subject.extra(model)
        if arm.kind == "full" and arm.percent is None:
            self._keep_change(spot, exponent, model)
        return facts

    @lru_cache(maxsize=8)  # noqa: B019  # there is one experiment
    def _cell(self, spot: Spot) -> Cell:
        return self.subject.cell(spot.task, spot.examples, spot.seed)

    def _train(
        self, model: Any, parameters: Sequence[nn.Parameter], cell: Cell, spot: Spot, rate: float
    ) -> tuple[dict[int, dict[str, float]], list[float]]:
        """Train; the state with the lowest dev loss stays."""
        setting, subject = self._setting, self.subject
        head = subject.head(model)
        for parameter in head:
            parameter.requires_grad_(True)
        groups = [{"params": list(parameters), "lr": rate}, {"params": head, "lr": HEAD_RATE}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        every = [*parameters, *head]
        dev: dict[int, dict[str, float]] = {0: subject.measure(model, cell.dev)}
        kept, times = [p.detach().clone() for p in every], []
        clock = time.process_time if self._options.device == "cpu" else time.perf_counter
        for step, batch in enumerate(islice(subject.batches(cell, spot.seed), setting.steps), 1):
            began = clock()
            factor = rate_factor(step, setting.steps)
            for group, highest in zip(optimizer.param_groups, (rate, HEAD_RATE), strict=True):
                group["lr"] = highest * factor
            model.eval()  # without dropout, in every arm
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(every, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            times.append(clock() - began)
            if step in setting.looks:
                dev[step] = subject.measure(model, cell.dev)
                if dev[step]["loss"] == min(one["loss"] for one in dev.values()):
                    kept = [p.detach().clone() for p in every]
        with torch.no_grad():
            for parameter, value in zip(every, kept, strict=True):
                parameter.copy_(value)
        return dev, times

    def _select(self, arm: Arm, spot: Spot, cell: Cell, model: Any, probe: int | None) -> Selection:
        with self._scores(arm, spot, cell, model, probe) as scores:
            return scores.select(params=f"{arm.percent}%", policy=arm.policy, seed=spot.seed)

    def _scores(self, arm: Arm, spot: Spot, cell: Cell, model: Any, probe: int | None) -> Scores:
        folder = self.subject.folder
        if arm.score in GRADIENT_SCORES:
            with closing(ns.Checkpoint.open(folder)) as base:
                anatomy = pair(base, base, Scope(arm.anatomy, exclude=UNUSED)).anatomy
                batches = islice(self.subject.batches(cell, spot.seed), self._setting.probe_batches)
                scores = gradient_scores(model, base, anatomy, batches, score=arm.score)
            assert scores is not None  # nothing stops it
            return scores
        if arm.score in CHANGE_SCORES:
            assert probe is not None  # the suite runs the full fine-tune first
            file = self._change(spot, probe, arm)
            if not file.exists():
                self.run(Arm("full", "full", "rival", ""), spot, probe, probe=None, counts=False)
            return Scores.load(file)
        return ns.diff(folder, anatomy=arm.anatomy, score=arm.score, seed=spot.seed, exclude=UNUSED)

    def _change(self, spot: Spot, exponent: int, arm: Arm) -> Path:
        where = f"{spot.task}-{spot.examples}-{spot.seed}-{exponent}"
        return self._work / f"scores-{where}-{arm.anatomy}-{arm.score}.safetensors"

    def _keep_change(self, spot: Spot, exponent: int, model: Any) -> None:
        """Keep the scores of a full fine-tune, and not the fine-tune."""
        with tempfile.TemporaryDirectory(dir=self._work) as folder:
            model.save_pretrained(folder)
            for anatomy in ANATOMIES:
                for score in CHANGE_SCORES:
                    file = self._change(spot, exponent, chosen(anatomy, score))
                    asked = {"anatomy": anatomy, "score": score, "exclude": UNUSED}
                    ns.diff(self.subject.folder, folder, out=file, force=True, **asked).close()

    def _overlap(self, arm: Arm, spot: Spot, selection: Selection) -> dict[str, Any]:
        """The share of the neurons that seed 1 chose as well, from other examples."""
        if arm.score in WEIGHT_SCORES or spot.seed < 1:
            return {}
        name = f"selection-{spot.task}-{spot.examples}-{arm.name}.safetensors"
        if spot.seed == 1:
            selection.save(self._work / name, force=True)
            return {}
        if not (self._work / name).exists():
            return {}
        first = Selection.load(self._work / name).tensors
        common = sum(
            len(set(first[key].index.tolist()) & set(one.index.tolist()))
            for key, one in selection.tensors.items()
            if key in first
        )
        return {"overlap": round(common / selection.neurons, 4)}


class _Trained:
    """The trainable parameters of an arm, and the size of the file that keeps them."""

    def __init__(
        self, arm: Arm, model: Any, selection: Selection | None, experiment: PretrainedExperiment, seed: int
    ) -> None:
        self._attached: Any = None
        self._adapted: Any = None
        subject = experiment.subject
        if arm.kind == "neurons":
            assert selection is not None
            self._attached = ns.attach(model, selection, base=subject.folder)
            self.parameters = list(self._attached.parameters())
            return
        head = {id(p) for p in subject.head(model)}
        if arm.kind in ("lora", "shira"):
            self._adapted = _adapted(arm, model, subject.linear, experiment.parameters(), seed)
        for name, parameter in model.named_parameters():
            if arm.kind in ("full", "bitfit"):
                parameter.requires_grad_(arm.kind == "full" or name.endswith("bias"))
        self.parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in head]

    def nbytes(self) -> int:
        """Bytes of the patch or adapter, without the head."""
        if self._attached is not None:
            with self._attached.patch() as patch:
                return int(patch.nbytes)
        if self._adapted is not None:
            from peft import get_peft_model_state_dict

            state = get_peft_model_state_dict(self._adapted)
            return sum(tensor.nbytes for tensor in state.values())
        return sum(p.nbytes for p in self.parameters)


def _adapted(arm: Arm, model: Any, linear: Sequence[str], parameters: int, seed: int) -> Any:
    """The model with a PEFT method, at the rank nearest to the arm's share of the parameters."""
    from peft import LoraConfig, ShiraConfig, get_peft_model

    assert arm.percent is not None
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in linear
    }
    each = sum(module.in_features + module.out_features for module in found.values())
    rank = max(1, round(float(arm.percent) / 100 * parameters / each))
    if arm.kind == "lora":
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[*found])
    else:
        config = ShiraConfig(r=rank, mask_type="random", random_seed=seed, target_modules=[*found])
    with warnings.catch_warnings(action="ignore"):  # of torch and transformers, about PEFT
        return get_peft_model(model, config)
