"""The selection suite, tiny: what each arm trains, which state is kept, and a run that is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import neftsurgery as ns
from benchmarks.__main__ import main
from benchmarks.harness import json_lines
from benchmarks.harness.process import QUIET
from benchmarks.selection import models, tuning
from benchmarks.selection.arms import ARMS
from benchmarks.selection.choices import choose
from benchmarks.selection.examples import (
    CHINESE,
    END,
    Codec,
    Example,
    batches_by_length,
    collate,
    shuffled_batches,
)
from benchmarks.selection.options import SCALES, Schedule, Shape
from benchmarks.selection.tasks import task
from benchmarks.selection.text import ARTICLES, Sizes, Text, TextError
from benchmarks.selection.text import PAIRS as PAIRS_FILE
from neftsurgery.demo.tiny_model import single_thread

ROOT = Path(__file__).resolve().parents[2]
PAIRS = tuple(
    (f"word{n} is {'here' if n % 2 else 'there'}.", f"词{n}在{'这' if n % 2 else '那'}里。")
    for n in range(40)
)
TEXT = Text(PAIRS, PAIRS[:20], PAIRS[20:30], PAIRS[30:], (), ())
SHAPE = Shape(32, 48, 2, 4, 400)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.train(TEXT, SHAPE.vocabulary)


@pytest.fixture(scope="module")
def examples(codec: Codec) -> list[Example]:
    return codec.forward(PAIRS)


@pytest.fixture
def model(codec: Codec) -> Any:
    return models.initialize(SHAPE, codec.vocabulary, 0, "cpu")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, codec: Codec) -> tuple[Path, Path]:
    """The base, and a probe that differs from it everywhere."""
    folder = tmp_path_factory.mktemp("selection")
    base = models.initialize(SHAPE, codec.vocabulary, 0, "cpu")
    base.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    base.save_pretrained(folder / "probe")
    return folder / "base", folder / "probe"


def test_sentences_decode_to_themselves_and_only_the_answer_is_predicted(codec):
    for english, chinese in PAIRS[:5]:
        example = codec.translation(english, chinese, CHINESE)
        assert codec.decode(example.ids[1 : example.start - 1]) == english
        assert codec.decode((*example.ids[example.start :], 7, 8)) == chinese
        assert example.ids[-1] == END
        labels = collate([example])["labels"][0].tolist()
        assert labels == [-100] * example.start + list(example.ids[example.start :])


def test_an_epoch_has_every_example_once_in_batches_of_similar_length(examples):
    batches = shuffled_batches(examples, 8, random.Random(0))
    seen = [example for batch in islice(batches, 5) for example in batch]
    assert sorted(seen, key=lambda e: e.ids) == sorted(examples, key=lambda e: e.ids)
    assert sorted(place for places, _ in batches_by_length(examples, 7) for place in places) == list(
        range(40)
    )


def test_losses_and_translations_agree_with_the_model_run_one_by_one(codec, model, examples):
    found = models.evaluate(model, examples)
    for example, (loss, count) in zip(examples[:6], found, strict=False):
        batch = collate([example])
        assert loss / count == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    answers = models.translate(model, codec, PAIRS[:6], CHINESE, 5)
    for (english, _), answer in zip(PAIRS[:6], answers, strict=True):
        ids = list(codec.prompt(english, CHINESE))
        for _ in range(5):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == codec.decode(ids[-5:])


ON_ROWS = [a.name for a in ARMS.values() if a.kind == "neurons" and a.percent in ("3", "9")]


@pytest.mark.parametrize("name", [name for name in ON_ROWS if name.endswith("-9")])
def test_every_arm_trains_its_share_of_the_parameters_and_nothing_else(name, model, checkpoints, examples):
    arm = ARMS[name]
    whole, batches = models.parameters_of(model), [collate(examples[:8])]
    selection = choose(arm, *checkpoints, model, batches, 3)
    parameters = tuning.make_trainable(arm, model, selection, 3)
    share = sum(p.numel() for p in parameters) / whole
    largest = 5 * 32 if arm.anatomy != "units" else 4 * 32 * 32  # one neuron or unit may be missing
    assert 0.09 - largest / whole <= share <= 0.09
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tuning.train(model, parameters, iter([examples[:8]] * 3), Schedule(3, 8), 1e-2)
    for key, value in model.state_dict().items():
        if "_neurons_" in key:  # the trained values, beside the weights
            continue
        moved = (value != before[key]).nonzero()
        if key in selection.tensors:
            axis = selection.tensors[key].layout.axes[0]
            assert set(moved[:, axis].tolist()) <= set(selection.tensors[key].index.tolist())
        else:
            assert not len(moved)


def test_controls_differ_in_what_they_should(checkpoints, model):
    base, probe = checkpoints
    chosen = {
        name: choose(ARMS[f"{name}-9"], base, probe, model, [], 1)
        for name in ("neft", "random", "random-like", "least-like", "reversed", "norm")
    }
    assert chosen["random-like"].counts == chosen["least-like"].counts == chosen["neft"].counts
    assert chosen["random"].counts != chosen["neft"].counts

    def picked(name: str) -> set[tuple[str, int]]:
        return {(tensor, int(n)) for tensor, part in chosen[name].tensors.items() for n in part.index}

    assert not picked("neft") & picked("least-like")
    assert not picked("neft") & picked("reversed")
    assert 0 < len(picked("neft") & picked("random-like")) < len(picked("neft"))
    weights = ns.Checkpoint.open(base)
    norms = {
        key: np.linalg.norm(models.load(base, "cpu").state_dict()[key].numpy(), axis=1)
        for key in chosen["norm"].tensors
    }
    weights.close()
    inside = max(norms[key][part.index].max() for key, part in chosen["norm"].tensors.items())
    outside = min(np.delete(norms[key], part.index).min() for key, part in chosen["norm"].tensors.items())
    assert inside <= outside * (1 + 1e-6)


@pytest.mark.filterwarnings("ignore")  # PEFT calls what transformers has renamed
def test_adapters_have_the_nearest_rank_and_full_is_all(model):
    whole = models.parameters_of(model)
    each = 2 * (4 * 64 + 3 * 80)
    assert tuning.rank_of(ARMS["lora-30"], model) == round(0.3 * whole / each) > 1
    assert sum(p.numel() for p in tuning.make_trainable(ARMS["full"], model, None, 0)) == whole
    adapters = tuning.make_trainable(ARMS["lora-30"], model, None, 0)
    assert sum(p.numel() for p in adapters) == round(0.3 * whole / each) * each


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["full", "lora-9", "neft-9"])
def test_the_best_state_is_kept_and_training_without_progress_stops(name, model, checkpoints, examples):
    arm = ARMS[name]
    selection = choose(arm, *checkpoints, model, [], 0) if arm.kind == "neurons" else None
    parameters = tuning.make_trainable(arm, model, selection, 0)
    held = examples[30:]
    told: list[float] = []

    def evaluate() -> float:
        told.append(models.mean_loss(model, held) if len(told) < 3 else 99.0)
        return told[-1]

    schedule = Schedule(100, 8, evaluate_every=2, patience=3)
    trained = tuning.train(
        model, parameters, tuning.batches_of(examples[:30], 8, 0), schedule, 3e-3, evaluate
    )
    assert trained.best == 4
    assert list(trained.dev) == [0, 2, 4, 6, 8, 10]
    assert trained.loss == told[2] < told[0]
    assert models.mean_loss(model, held) == pytest.approx(told[2], rel=1e-6)


def test_the_rate_warms_up_and_falls_to_zero():
    shares = [tuning.rate_factor(step, 100) for step in range(1, 101)]
    assert shares[0] == pytest.approx(0.2)
    assert max(shares) == 1.0 == shares[4] == shares[5]
    assert shares[-1] == pytest.approx(0.01 / 0.95)
    assert all(a >= b for a, b in pairwise(shares[5:]))


def test_plays_are_split_into_whole_pieces(tmp_path, codec):
    speeches = [f"nurse {n}: " + " ".join(f"word{(n + m) % 40} is here" for m in range(6)) for n in range(60)]
    (tmp_path / "tinyshakespeare.txt").write_text("\n\n".join(speeches))
    sizes = replace(SCALES["quick"], text=Sizes(20, 6, 5, 0, 0), piece=12)
    found = task("plays", tmp_path, TEXT, codec, sizes)
    assert [len(part) for part in (found.train, found.dev, found.test)] == [20, 6, 5]
    assert all(len(example.ids) == 12 for example in found.train)
    assert not set(found.test) & (set(found.train) | set(found.dev))
    assert found.setting == task("plays", tmp_path, TEXT, codec, sizes).setting
    assert task("translation", tmp_path, TEXT, codec, sizes).setting == {}
    with pytest.raises(TextError, match="are too few"):
        task("plays", tmp_path, TEXT, codec, replace(sizes, text=Sizes(9999, 6, 5, 0, 0)))


def command(out: Path, text: Path, *words: str) -> list[str]:
    places = ["--text", str(text), "--work", str(out / "work"), "--out", str(out / "results")]
    return ["selection", "--quick", "--threads", "1", "--seeds", "2", *places, *words]


def part_of(text: Path, folder: Path) -> Path:
    """A folder with every eighth line of the text: each process reads and tokenizes all of it."""
    for name in (PAIRS_FILE, *ARTICLES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines = (text / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[::8]))
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@single_thread()  # as in the processes: sums depend on it
def test_a_killed_run_resumes_and_ends_with_the_same_lines(tmp_path, shared_data, monkeypatch):
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)

    def finish(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
        main()

    text, only = part_of(shared_data / "text", tmp_path / "text"), ("--only", "base,full,neft-3")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(*command(whole, text, *only))
    file = killed / "results" / "selection-quick.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *command(killed, text, *only)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and sum(line["kind"] == "run" for line in json_lines.load(file)) < 2:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = file.read_bytes()
    assert 2 <= sum(line["kind"] == "run" for line in json_lines.load(file)) < 5
    finish(*command(killed, text, *only, "--workers", "2"))
    assert file.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    results = [json_lines.load(folder / "results" / "selection-quick.jsonl") for folder in (whole, killed)]
    ours, again = ([same(line) for line in found if line["kind"] in ("run", "tuning")] for found in results)
    assert sorted(map(repr, ours)) == sorted(map(repr, again))  # two workers finish in any order
    assert [line["arm"] for line in ours if line["kind"] == "run"] == ["base"] + [
        arm for arm in ("full", "neft-3") for _ in range(2)
    ]
    page = (whole / "results.md").read_text()
    assert all(ARMS[name].label in page for name in only[1].split(","))
    assert str(tmp_path) not in page + json.dumps(results[0])
    finish(*command(whole, text, *only))  # everything is done already
    assert len(json_lines.load(whole / "results" / "selection-quick.jsonl")) == len(results[0])


def same(line: dict[str, Any]) -> dict[str, Any]:
    """The parts of a line that do not depend on timing."""
    return {
        key: value
        for key, value in line.items()
        if key not in ("seconds", "step", "peak", "choosing", "examined")
    }
