"""A training that is killed or stopped again and again ends in the patch of an uninterrupted one."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from recipes_support import make
from support import snapshot
from torture.runner import running
from torture.trials import TIMES, Trials, times

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TIMES, reason="it takes minutes (NEFT_TORTURE=1); tests/cli/test_train.py tries once"
    ),
]

ROWS = [
    {"prompt": f"shout {w}:", "completion": f" {w.upper()}"} for w in ("bird", "fish", "lion", "frog", "toad")
]
RECIPE = (
    "model: base\nout: run\ndata: {train: data.jsonl, eval_share: 0.2}\n"
    "probe: {steps: 2}\nselect: {neurons: 5%}\n"
    "train: {steps: 12, batch_size: 4, learning_rate: 1e-2, save_every: 2}\n"
)


def result(out: Path) -> dict[str, object]:
    """What must not depend on interruptions: the patch's weights, the selection, the dev losses."""
    import torch
    from safetensors.torch import load_file

    losses = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    patch = load_file(out / "neuron_patch.safetensors")
    return {
        "patch": {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in patch.items()},
        "selection": (out / "selection.safetensors").read_bytes(),
        "dev": [(point["step"], point["dev_loss"]) for point in losses if "dev_loss" in point],
    }


def test_a_training_stopped_at_any_moment_goes_on_to_the_same_bits(trials: Trials, tmp_path: Path) -> None:
    make(tmp_path / "base", 5)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    before = snapshot(tmp_path / "base")
    whole = tmp_path / "whole"
    with running("--torch") as runner:

        def train(out: Path, **options: object) -> object:
            return runner.command("train", tmp_path / "recipe.yaml", "-o", out, **options)

        runner.calibrate(lambda **options: train(whole, **options))
        expected, took = result(whole), runner.high
        for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
            done, out = 0, tmp_path / f"run-{number.name}"
            for _ in range(times(2, 0.05)):
                delay = runner.random.uniform(0.05, 0.9) * took
                with trials.trial(number.name, "train"):
                    outcome = train(out, after=delay, signal=number)
                    assert outcome.status in (0, -number, 128 + number), outcome.err
                    assert "Traceback" not in outcome.err
                    if outcome.status == 0:
                        assert result(out) == expected, "it came to other numbers"
                        shutil.rmtree(out)
                        done += 1
                    assert not out.exists(), "half a result"
            with trials.trial(number.name, "train"):
                outcome = train(out)
                assert outcome.status == 0, outcome.err
                assert result(out) == expected, "it came to other numbers"
                assert not out.with_name(out.name + ".unfinished").exists(), "the unfinished run is left"
    assert snapshot(tmp_path / "base") == before
    assert [path.name for path in tmp_path.rglob("*") if ".neft-" in path.name] == []
