"""The selection suite on published models, with a tiny encoder in their place; and its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import json_lines
from benchmarks.page.pretrained import (
    BEGIN,
    END,
    PretrainedStudy,
    claims,
    comparisons,
    holm,
    pair_row,
    quality_row,
    render_pretrained,
)
from benchmarks.selection.arms import Arm
from benchmarks.selection.pretrained import schedules, subjects, suite
from benchmarks.selection.pretrained.arms import ARMS, CANDIDATES, FIXED, SWEPT
from benchmarks.selection.pretrained.experiment import PretrainedExperiment, Spot
from benchmarks.selection.pretrained.options import SCHEDULES, SETTINGS, PretrainedOptions

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"good{n}" for n in range(8))]
WORDS += [f"bad{n}" for n in range(8)]


class TinyEncoder(subjects.Encoder):
    def _checkpoint(self, work: Path) -> Path:
        folder = work / "tiny"
        if not folder.exists():
            torch.manual_seed(0)
            BertModel(
                BertConfig(
                    vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                    intermediate_size=64, max_position_embeddings=32,
                ),
                add_pooling_layer=False,
            ).save_pretrained(folder)  # fmt: skip
            (folder / "vocab.txt").write_text("\n".join(WORDS))
            BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
        return folder


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainedOptions:
    monkeypatch.setitem(subjects.SUBJECTS, "minilm", TinyEncoder)
    rng = np.random.default_rng(0)
    (tmp_path / "classification").mkdir()
    for part, task in [(p, t) for p in ("train", "dev", "test") for t in SETTINGS["minilm"].tasks]:
        labels = rng.integers(0, 2, 12)
        texts = [" ".join(rng.choice(WORDS[5 + 8 * label : 13 + 8 * label], 6)) for label in labels]
        rows = [{"text": t, "label": int(label)} for t, label in zip(texts, labels, strict=True)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "classification" / f"{task}.{part}.jsonl").write_text(lines)
    return PretrainedOptions(
        "minilm", tmp_path, tmp_path / "work", tmp_path / "out", ("trec", "cr"), (), (), 2, "cpu", 1,
        float("inf"), True,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch, about PEFT's SHiRA
def test_every_kind_of_arm_trains_what_it_says(options: PretrainedOptions) -> None:
    experiment = PretrainedExperiment(options)
    spot = Spot("trec", 8, 1)
    found = {
        name: experiment.run(ARMS[name], spot, 0, probe=0, counts=True)
        for name in ("full", "lora", "shira", "bitfit", "rows-cosine", "rows-fisher", "rows-lowrank")
    }
    assert found["full"]["trainable"] == experiment.parameters()
    each = sum(2 * 32 for _ in range(4)) + 2 * (32 + 64)  # in and out features of a layer
    assert found["lora"]["trainable"] == found["shira"]["trainable"] == 2 * each
    for name in ("rows-cosine", "rows-fisher", "rows-lowrank"):
        assert 0 < found[name]["trainable"] <= 0.03 * experiment.parameters()
    for name, one in found.items():
        assert set(one["dev"]) == {0, 1, 2}, name
        assert one["loss"] == min(look["loss"] for look in one["dev"].values())
        assert 0 <= one["test"]["accuracy"] <= 1
        assert one["bytes"] > 4 * one["trainable"] or name in ("full", "bitfit", "lora")


def test_the_head_starts_where_a_regression_on_frozen_features_ends(options: PretrainedOptions) -> None:
    experiment = PretrainedExperiment(options)
    cell = experiment.subject.cell("trec", 8, 1)
    model = experiment.subject.model(cell)
    assert isinstance(experiment.subject, subjects.Encoder)
    batch = experiment.subject.collate(cell.train)
    loss = model(**batch).loss + 1e-2 / 2 * model.classifier.weight.square().sum()
    slopes = torch.autograd.grad(loss, list(model.classifier.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-3


def test_batches_hold_texts_of_like_length_and_each_example_once(options: PretrainedOptions) -> None:
    subject = PretrainedExperiment(options).subject
    cell = subjects.Cell("trec", [subjects.PretrainedExample((4,) * n) for n in range(1, 33)], (), ())
    masks = [one["attention_mask"] for one in islice(subject.batches(cell, 3), 16)]
    for epoch in (masks[:8], masks[8:]):
        assert sorted(n for mask in epoch for n in mask.sum(1).tolist()) == list(range(1, 33))
    assert masks[0].tolist() != masks[8].tolist()
    assert sum(mask.numel() for mask in masks) < 1.35 * sum(int(mask.sum()) for mask in masks)


def test_products_in_bfloat16_leave_weights_and_optimizers_in_float32(options: PretrainedOptions) -> None:
    narrow = replace(options, precision="bfloat16")
    assert narrow.describe() != options.describe()
    experiments = [PretrainedExperiment(options), PretrainedExperiment(narrow)]
    losses = [
        each.run(ARMS["rows-lowrank"], Spot("trec", 8, 1), 0, probe=None, counts=False)["loss"]
        for each in experiments
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    subject = experiments[1].subject
    assert subject.model(subject.cell("trec", 8, 1)).dtype == torch.float32


BEST_RATES = {"trec": -2, "cr": -1, "gsm8k": 1}  # as exponents


class InventedExperiment:
    """Losses that fall towards a task's best rate, and with the seed; some arms are better by their names.

    Before training they are lower than with any rate.
    """

    def __init__(self, options: PretrainedOptions) -> None:
        self.runs: list[tuple[str, str, int, int]] = []

    def parameters(self) -> int:
        return 1000

    def start(self, spot: Spot) -> dict[str, Any]:
        return {"dev": measured(3.0), "test": measured(3.0)}

    def run(self, arm: Arm, spot: Spot, exponent: int, *, probe: int | None, counts: bool) -> dict[str, Any]:
        assert (probe is not None) == (arm.score in ("cosine", "l2") and arm.kind == "neurons")
        self.runs.append((arm.name, spot.task, spot.seed, exponent))
        loss = 1 + abs(exponent - BEST_RATES[spot.task]) + 0.1 * spot.seed - 0.001 * len(arm.name)
        facts = {"loss": loss, "rate": 2.0**exponent, "trainable": 30, "peak": 1, "step": 0.1, "bytes": 1}
        dev = {0: measured(0.5), 1: measured(loss), 2: measured(loss)}
        return facts | {"dev": dev, "best": 2, "test": measured(loss)}


def test_rates_come_first_then_the_best_selectors_and_a_finished_suite_makes_no_run_again(
    options: PretrainedOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.selection.pretrained.experiment.PretrainedExperiment", InventedExperiment)
    suite.measure(options)
    lines = json_lines.load(options.results)
    suite.measure(options)
    assert json_lines.load(options.results) == lines
    runs = [one for one in lines if one["kind"] == "run"]
    screened = [one for one in lines if one["kind"] == "screen"]
    assert {one["arm"] for one in screened} == CANDIDATES.keys()
    best = {name for _, name in sorted((one["loss"], one["arm"]) for one in screened)[:4]}
    assert {one["arm"] for one in runs if one["task"] == "cr"} == {"start", *FIXED} | best
    rates = {(one["task"], one["rung"]) for one in runs if one["arm"] != "start"}
    assert rates == {("trec", -2), ("cr", -1)}
    lora = [one for one in lines if one["kind"] == "tuning" and one["arm"] == "lora"]
    ladders = [("trec", n) for n in (0, 1, -1, -2, -3)] + [("cr", n) for n in (0, 1, -1, -2)]
    assert [(one["task"], one["rung"]) for one in lora] == ladders
    seeds = [(one["seed"], one["task"]) for one in runs if one["arm"] == "full"]
    assert seeds == [(1, "trec"), (1, "cr"), (2, "trec"), (2, "cr")]
    swept = {one["arm"] for one in runs} & SWEPT.keys()
    assert len(swept) == 2
    render_pretrained(options.out)
    page = (tmp_path / "out.md").read_text()
    for arm in FIXED.values():
        assert arm.label in page
    render_pretrained(options.out)
    assert (tmp_path / "out.md").read_text() == page
    assert page.count(BEGIN) == page.count(END) == 1


def test_where_runs_take_long_a_selector_has_the_rate_of_its_control(
    options: PretrainedOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.selection.pretrained.experiment.PretrainedExperiment", InventedExperiment)
    screened = {"kind": "screen", "arm": "units-l2", "loss": 1.0}
    json_lines.append(options.results, screened)
    large = replace(options, model="smollm2", tasks=("gsm8k",))
    suite.measure(large)
    lines = json_lines.load(large.results)
    assert "units-l2" not in {one["arm"] for one in lines if one["kind"] == "tuning"}
    assert [one["rung"] for one in lines if one.get("arm") == "units-l2"] == [1, 1]


class TinyChatModel(subjects.ChatModel):
    def _checkpoint(self, work: Path) -> Path:
        folder = work / "tiny"
        if not folder.exists():
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "intermediate_size": 256, "num_attention_heads": 8, "vocab_size": 32}
            LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)).save_pretrained(folder)
            (folder / "vocab.txt").write_text("\n".join(WORDS))
            BertTokenizerFast(str(folder / "vocab.txt"), eos_token="[SEP]").save_pretrained(folder)
        return folder


def test_schedules_of_a_recipe_beside_the_fixed_choice(
    options: PretrainedOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "ChatModel", TinyChatModel)
    (tmp_path / "gsm8k").mkdir()
    problems = [{"question": f"good{n % 8} bad1 ?", "answer": f"bad{n % 8}"} for n in range(60)]
    text = "".join(json.dumps(problem) + "\n" for problem in problems)
    (tmp_path / "gsm8k" / "train.jsonl").write_text(text)
    chosen = replace(options, model="smollm2", seeds=1)
    schedules.measure_schedules(chosen)
    lines = json_lines.load(chosen.schedule_results)
    schedules.measure_schedules(chosen)
    assert json_lines.load(chosen.schedule_results) == lines
    flops = {one["schedule"]: one["flops"] for one in lines if one["kind"] == "flops"}
    assert flops["backward"] < flops["fixed"]
    runs = {one["schedule"]: one for one in lines if one["kind"] == "run"}
    assert runs.keys() == SCHEDULES.keys()
    assert len({run["before"] for run in runs.values()}) == 1
    assert all(run["loss"] < run["before"] and run["step"] > 0 for run in runs.values())
    render_pretrained(options.out)
    page = (tmp_path / "out.md").read_text()
    assert f"| `backward: 0.5` | {runs['fixed']['before']:.3f} |" in page


def measured(loss: float) -> dict[str, float]:
    return {"loss": loss, "accuracy": 0.5}


def line(arm: str, task: str, seed: int, loss: float) -> dict[str, Any]:
    return {
        "kind": "run", "arm": arm, "task": task, "examples": 8, "seed": seed, "trainable": 30, "loss": loss,
        "dev": {"10": measured(loss)}, "test": measured(loss), "step": 0.1, "peak": 1, "bytes": 1,
    }  # fmt: skip


def test_arms_are_compared_run_by_run(tmp_path: Path) -> None:
    setting = {"kind": "setting", "setting": {"looks": [10]}, "parameters": 1000}
    json_lines.append(tmp_path / "pretrained-minilm.jsonl", setting)
    ours = [1.0, 2.0, 1.5, 2.4]
    for n, (task, seed) in enumerate([("a", 1), ("a", 2), ("b", 1), ("b", 2)]):
        for arm, loss in (("rows-cosine", ours[n]), ("rows-random", ours[n] + 0.5 + 0.01 * n), ("full", 9.0)):
            json_lines.append(tmp_path / "pretrained-minilm.jsonl", line(arm, task, seed, loss))
    (study,) = PretrainedStudy.load(tmp_path / "pretrained-minilm.jsonl")
    found = study.pair("rows-cosine", "rows-random", lambda one: one["test"]["loss"])
    assert found is not None
    assert (found.seeds, round(found.mean, 6)) == (4, -0.515)
    assert [(a.name, b.name) for a, b, *_ in comparisons(study)] == [
        ("rows-cosine", "rows-random"), ("rows-cosine", "full")
    ]  # fmt: skip
    assert "| random rows | -0.515 (" in pair_row(comparisons(study)[0]).replace("**", "")
    assert quality_row(study, "rows-cosine").startswith("| **rows by cosine** | 3.00 | 1.500 ± 0.707 / 50.0")
    shown = list(claims(study))
    assert "holds" in shown[0]  # -7 against the full fine-tune, all steady
    assert "not run yet" in shown[1]


def test_holms_correction() -> None:
    """By hand: sorted, times what is left, never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
