"""`neftsurgery train` from recipe to patch, on a tiny Llama and tokenizer made here: nothing is fetched.

These are also the tests of the live parts of a run: `run`, `probe`, `trainer` and `base_model` of
`neftsurgery.training`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes_support import RECIPES, make
from safetensors.torch import load_file
from support import snapshot
from transformers import AutoModelForCausalLM

import neftsurgery as ns
from neftsurgery.cli.commands.train import _stop_on_signals
from neftsurgery.cli.console import Console
from neftsurgery.demo.tiny_model import single_thread
from neftsurgery.storage.threads import Limits

ROWS = [
    {"prompt": f"shout {w}:", "completion": f" {w.upper()}"} for w in ("bird", "fish", "lion", "frog", "toad")
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of the recipes, hardly trained."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    make(folder, 5)
    return folder


def write_recipe(tiny: Path, folder: Path) -> Path:
    """A recipe with its base and examples in ``folder``."""
    shutil.copytree(tiny, folder / "base")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    content = (
        "model: base\nout: run\ndata: {train: data.jsonl, eval_share: 0.2}\n"
        "probe: {steps: 2}\nselect: {neurons: 5%}\n"
        "train: {steps: 6, batch_size: 4, learning_rate: 1e-2, save_every: 2}\n"
    )
    (folder / "recipe.yaml").write_text(content)
    return folder / "recipe.yaml"


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    return write_recipe(tiny, tmp_path)


def test_from_recipe_to_patched_checkpoint(neft: Any, recipe: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path / "base")
    result = neft("train", recipe, "--json")
    facts = result.json
    reports = re.findall(
        r"^(probe, batch|step) (\d) of \d: loss \d+\.\d{4}, .*\d tokens/s$", result.err, re.M
    )
    assert reports == [*(("probe, batch", n) for n in "12"), *(("step", n) for n in "123456")]
    assert facts["finished"]
    assert facts["step"] == facts["steps"] == 6
    out = tmp_path / "run"
    assert {path.name for path in out.iterdir()} >= {
        "neuron_patch.safetensors", "selection.safetensors", "scores.safetensors", "losses.jsonl",
        "recipe.yaml",
    }  # fmt: skip
    assert not (tmp_path / "run.unfinished").exists()
    assert snapshot(tmp_path / "base") == before
    points = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    dev = {point["step"]: point["dev_loss"] for point in points if "dev_loss" in point}
    assert sorted(dev) == [0, 2, 4, 6]
    assert facts["dev_loss"] == min(dev.values()) < dev[0]
    with ns.Patch.load(out / "neuron_patch.safetensors") as patch:
        training = patch.manifest["training"]
        assert training["dev_loss"] == facts["dev_loss"]
        assert training["data"] == "data.jsonl"
        assert training["probe"] == "gradients"
        assert set(training) == {
            "data", "examples", "examples_digest", "probe", "steps", "batch_size", "accumulate",
            "learning_rate", "scheduler", "warmup", "weight_decay", "clip", "dtype",
            "gradient_checkpointing", "method", "mode", "seed", "more", "train_loss", "base_dev_loss",
            "dev_loss", "best_step", "curve", "seconds", "torch", "transformers",
        }  # fmt: skip
        losses = ("step", "train_loss", "dev_loss")
        curve = [{key: point[key] for key in losses if key in point} for point in points]
        assert training["curve"] == [point for point in curve if len(point) > 1]
        assert patch.facts["score"] == "gradient"
        assert str(tmp_path) not in json.dumps(dict(patch.manifest))
        assert patch.selection.neurons == facts["selected"]
    assert neft("apply", "base", "run/neuron_patch.safetensors", "-o", "patched").code == 0
    ids = torch.arange(3, 20)[None]
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto").eval()
    base = live(input_ids=ids).logits
    with ns.Patch.load(out / "neuron_patch.safetensors") as patch:
        ns.attach(live, patch)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", dtype="auto").eval()
        assert torch.equal(loaded(input_ids=ids).logits, live(input_ids=ids).logits)
    assert not torch.equal(loaded(input_ids=ids).logits, base)
    # The written recipe makes the same patch again.
    again = neft("train", "run/recipe.yaml", "-o", "again", "--json").json
    assert again["dev_loss"] == facts["dev_loss"]
    one, other = (load_file(tmp_path / name / "neuron_patch.safetensors") for name in ("run", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_dry_run_describes_the_run_and_writes_nothing(neft: Any, recipe: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    facts = neft("train", recipe, "--dry-run", "--json").json
    assert snapshot(tmp_path) == before
    assert facts["dry_run"]
    assert facts["estimated"]
    assert (facts["steps"], facts["examples"], facts["dev_examples"]) == (6, 16, 4)
    assert facts["optimizer_bytes"] == 8 * facts["trainable_parameters"]
    real = neft("train", recipe, "--json").json
    assert (
        abs(real["trainable_parameters"] - facts["trainable_parameters"]) < 0.5 * real["trainable_parameters"]
    )
    said = neft("train", recipe, "--dry-run", "-o", "other")
    assert "6 steps, saved every 2" in said.out


@pytest.mark.parametrize("by", ["fisher", "finetune", "tuned", "scores", "selection", "random"])
def test_every_way_to_choose(neft: Any, recipe: Path, tmp_path: Path, by: str) -> None:
    options = {
        "fisher": ["probe.by=fisher", "probe.steps=2"],
        "finetune": ["probe.by=finetune", "probe.steps=2", "probe.learning_rate=1e-3"],
    }
    has_file = by not in options
    if has_file:
        tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
        with torch.no_grad():
            tuned.model.layers[0].mlp.up_proj.weight[[3, 7]] += 0.5
        tuned.save_pretrained(tmp_path / "tuned")
        ns.diff(tmp_path / "base", tmp_path / "tuned", out=tmp_path / "scores")
        ns.Scores.load(tmp_path / "scores").select(neurons=2).save(tmp_path / "selection")
        options = {
            "tuned": ["probe.by=tuned", "probe.path=tuned", "select.neurons=2"],
            "scores": ["probe.by=scores", "probe.path=scores", "select.neurons=2"],
            "selection": ["probe.by=selection", "probe.path=selection", "select.neurons="],
            "random": ["probe.by=scores", "probe.path=scores", "select.neurons=2", "select.policy=random"],
        }
    words = [word for option in [*options[by], "probe.steps=" if has_file else "train.seed=1"]
             for word in ("--set", option)]  # fmt: skip
    result = neft("train", recipe, *words, "--json")
    assert result.code == 0, result.err
    with ns.Patch.load(tmp_path / "run" / "neuron_patch.safetensors") as patch:
        chosen = {name: patch.index(name).tolist() for name in patch.tensors}
        assert patch.facts["score"] == ("fisher" if by == "fisher" else "cosine")
    if by in ("tuned", "scores", "selection"):
        kinds = ("up", "gate", "down") if by == "tuned" else ("up",)  # whole units, where a recipe chooses
        assert chosen == {f"model.layers.0.mlp.{kind}_proj.weight": [3, 7] for kind in kinds}
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith("model")]


def run_process(recipe: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "neftsurgery", "train", str(recipe), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def saves(out: Path) -> set[str]:
    """The complete saves of an unfinished run."""
    folder = out.with_name(out.name + ".unfinished") / "saves"
    return {path.parent.name for path in folder.glob("checkpoint-*/neuron_save.json")}


def wait_for_a_save(out: Path, process: subprocess.Popen[str], seen: set[str]) -> None:
    """Until there is one besides those ``seen``."""
    for _ in range(12_000):
        if saves(out) - seen:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no save in ten minutes")


LONG = ("--set", "train.steps=80", "--set", "train.save_every=5")


@pytest.mark.slow
@single_thread()  # as in the processes: sums depend on it
def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_patch(
    neft: Any, recipe: Path, tiny: Path, tmp_path: Path
) -> None:
    """By every signal in turn; each run resumes what the last one left."""
    (tmp_path / "whole").mkdir()
    undisturbed = neft("train", write_recipe(tiny, tmp_path / "whole"), *LONG)
    assert undisturbed.code == 0, undisturbed.err
    out, whole = tmp_path / "run", tmp_path / "whole" / "run"
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        seen = saves(out)
        process = run_process(recipe, *LONG, *(["--resume"] if seen else []))
        wait_for_a_save(out, process, seen)
        process.send_signal(number)
        _, errors = process.communicate(timeout=600)
        assert not out.exists()
        if number == signal.SIGKILL:
            assert process.returncode == -9
        else:
            assert process.returncode == 128 + number, errors
            assert "run the same command again" in errors
    other = neft("train", recipe, *LONG, "--set", "train.seed=5")
    assert (other.code, "train.seed differ" in other.err) == (2, True)
    resumed = neft("train", recipe, *LONG, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert 0 < resumed.json["resumed_from"] < 80
    one, two = (load_file(folder / "neuron_patch.safetensors") for folder in (out, whole))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    curves = [(folder / "losses.jsonl").read_text().splitlines() for folder in (out, whole)]
    devs = [[p for line in curve if "dev_loss" in (p := json.loads(line))] for curve in curves]
    assert [p["dev_loss"] for p in devs[0]] == [p["dev_loss"] for p in devs[1]]


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["--set", "train.learningrate=1"], 2, "did you mean train.learning_rate"),
        (["--set", "model=nowhere"], 2, "no such file or folder"),
        (["--set", "data.train=no.jsonl"], 2, "no such file of examples"),
        (["--set", "data.train=bad.jsonl"], 4, "bad.jsonl: line 2: not valid JSON"),
        (["--set", "train.more={optm: sgd}"], 2, "optim"),
        (["--set", "train.more={max_steps: 3}"], 2, "train.more.max_steps is set by the recipe"),
        (["--set", "probe.by=selection", "--set", "probe.path=data.jsonl", "--set", "select.neurons=",
          "--set", "probe.steps="], 4, "data.jsonl"),
        (["-o", "base"], 2, "is the input"),
        (["-o", "full"], 2, "exists already"),
        (["-o", "base/run"], 2, "inside the input"),
        (["--resume"], 2, "there is no unfinished run to resume"),
        (["--resume", "--restart"], 2, "do not go together"),
        (["--set", "model=base/model.safetensors"], 2, "config.json"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_training(
    neft: Any, recipe: Path, tmp_path: Path, words: list[str], code: int, why: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROWS[0]) + "\n{\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = snapshot(tmp_path)
    result = neft("train", recipe, *words)
    assert result.code == code, result.err
    assert why in result.err
    assert "Traceback" not in result.err
    assert snapshot(tmp_path) == before


def test_unusable_selections(neft: Any, recipe: Path, tmp_path: Path) -> None:
    scores = ns.diff(
        tmp_path / "base", tmp_path / "base", axis={"lm_head.weight": 0}, include=["lm_head.weight"]
    )
    selection = scores.select(neurons=3, policy="random")
    words = [
        "--set",
        "probe.by=selection",
        "--set",
        "probe.path=s",
        "--set",
        "select.neurons=",
        "--set",
        "probe.steps=",
    ]
    ns.Selection({}, {}).save(tmp_path / "s")
    result = neft("train", recipe, *words)
    assert (result.code, "no neuron is chosen" in result.err) == (3, True)
    name, chosen = next(iter(selection.tensors.items()))
    wrong = type(chosen)(
        type(chosen.info)("model.other", chosen.info.dtype, chosen.info.shape), chosen.layout, chosen.index
    )
    ns.Selection({"model.other": wrong}, {}).save(tmp_path / "s", force=True)
    result = neft("train", recipe, *words, "--json")
    assert result.code == 3
    assert result.json["tensor"] == "model.other"
    assert name != "model.other"


def test_force_replaces_what_is_there(neft: Any, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").touch()
    assert neft("train", recipe).code == 2
    assert neft("train", recipe, "--force").code == 0
    assert not (tmp_path / "run" / "old").exists()
    assert (tmp_path / "run" / "neuron_patch.safetensors").exists()


def test_a_loss_that_is_not_a_number(neft: Any, recipe: Path, tmp_path: Path) -> None:
    result = neft("train", recipe, "--set", "train.learning_rate=1e30", "--set", "data.eval_share=0")
    assert result.code == 3, result.err
    assert "the loss is not a number" in result.err
    assert not (tmp_path / "run").exists()
    assert neft("train", recipe).code == 0  # a run without a save does not block the next one


def test_a_signal_is_answered_while_torch_is_at_work(capfd: pytest.CaptureFixture[str]) -> None:
    """While the main thread is in a call that no signal ends. The second signal stops at once."""
    console = Console(as_json=False, quiet=False, limits=Limits.of())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    said = []

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            said.append(capfd.readouterr().err)
            if said[-1]:
                break
            time.sleep(0.01)
        ended.append(False)

    try:
        with _stop_on_signals(console) as stop:
            ended: list[bool] = []
            assert not stop()
            thread = threading.Thread(target=interrupt)
            thread.start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1_500_000)
            ended.append(True)
            thread.join()
            assert (said[-1].partition(":")[0], ended) == ("interrupted", [False, True])
            assert stop()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_the_quickstart(neft: Any, tmp_path: Path) -> None:
    """As a newcomer runs it, in a copy of recipes/."""
    shutil.copytree(RECIPES, tmp_path / "recipes", ignore=shutil.ignore_patterns("tiny-model", "quickstart"))
    make(tmp_path / "recipes" / "tiny-model", 300)
    result = neft("train", "recipes/quickstart.yaml", "--json")
    assert result.code == 0, result.err
    out = tmp_path / "recipes" / "quickstart"
    losses = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    first = next(point["dev_loss"] for point in losses if "dev_loss" in point)
    assert result.json["dev_loss"] < 0.2 * first
    assert np.frombuffer((out / "losses.png").read_bytes()[:8], np.uint8)[1:4].tobytes() == b"PNG"
