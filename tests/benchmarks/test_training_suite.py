"""The suite for training, very small: what each contestant trains, and the structure of results and page."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page.training import claims
from benchmarks.training.options import CONTESTANTS, QUICK, Options, add_arguments

ROOT = Path(__file__).resolve().parents[2]
JOB: dict[str, Any] = {
    "device": "cpu", "shape": "tiny", "layers": 2, "batch": 2, "length": 8, "checkpointing": False,
}  # fmt: skip
OURS = [name for name, (role, words) in CONTESTANTS.items() if "PEFT" not in words]
PEFT = [name for name in CONTESTANTS if name not in OURS]


def prepared(name: str, dtype: str, **more: Any) -> tuple[Any, Any]:
    """The contestant, after a backward pass."""
    from benchmarks.training import models, ways

    job = JOB | {"dtype": dtype} | more
    way = ways.prepare(name, models.build(job))
    ids = models.batch(job)
    way.model(input_ids=ids, labels=ids).loss.backward()
    way.before_step()
    return way, ids


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in OURS if name != "floor"])
def test_all_that_is_trained_gets_a_gradient(name, dtype):
    way, _ = prepared(name, dtype)
    assert way.parameters
    assert all(parameter.grad is not None for parameter in way.parameters)


@pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")
@pytest.mark.filterwarnings("ignore")  # PEFT calls what transformers has renamed, and more
@pytest.mark.parametrize("name", PEFT)
def test_rivals_train(name):
    way, _ = prepared(name, "fp32")
    assert way.trainable > 0
    assert any(parameter.grad is not None for parameter in way.parameters)


def test_the_mask_leaves_the_rows_that_neft_trains():
    import torch

    neft, _ = prepared("neft-3", "fp32")
    masked, _ = prepared("masked-3", "fp32")
    assert masked.trainable == neft.trainable < sum(p.numel() for p in masked.parameters)
    left = sum(int(p.grad.any(1).sum()) * p.shape[1] for p in masked.parameters)
    assert left == neft.trainable
    ours = torch.cat([p.grad.flatten() for p in neft.parameters]).abs().sum()
    theirs = torch.cat([p.grad.flatten() for p in masked.parameters]).abs().sum()
    torch.testing.assert_close(ours, theirs)


def test_units_are_as_many_parameters_as_rows():
    from benchmarks.training import models, ways

    model = models.build(JOB | {"dtype": "fp32", "shape": "small"})
    rows = sum(len(n) * model.get_parameter(w).shape[1] for w, n in ways.rows(model, 0.03).items())
    assert ways.prepare("units-3", model).trainable == pytest.approx(rows, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_floor_end_where_those_of_neft_do(checkpointing):
    """At the outputs of the first layer's projections; with checkpointing, at the inputs, for all alike."""
    seen: dict[str, list[tuple[bool, bool]]] = {}
    for name in ("floor", "neft-3"):
        from benchmarks.training import models, ways

        job = JOB | {"dtype": "fp32", "checkpointing": checkpointing}
        way = ways.prepare(name, models.build(job))
        needs: list[tuple[bool, bool]] = []

        def watch(module, inputs, output, needs=needs):
            needs.append((inputs[0].requires_grad, output.requires_grad))

        for module in models.linears(way.model).values():
            module.register_forward_hook(watch)
        ids = models.batch(job)
        way.model(input_ids=ids, labels=ids).loss.backward()
        seen[name] = needs
        assert needs[:3] == [(checkpointing, True)] * 3
    assert seen["floor"] == seen["neft-3"]


def options(*words: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return Options.of(parser.parse_args(words))


def test_the_command_measures_the_same_again():
    words = ("--device", "cuda", "--layers", "4", "--shape", "llama-7b", "--dtype", "bf16", "--checkpointing")
    asked = options(*words, "--only", "neft-3,floor")
    assert options(*asked.command().split()[4:]) == asked
    assert asked.only == ("floor", "neft-3")


def test_claims_are_judged_by_ratios_within_turns():
    def entry(name: str, peak: int, *seconds: float) -> dict[str, Any]:
        return {"id": name, "peak": peak, "runs": [{"seconds": s} for s in seconds]}

    entries = [
        entry("floor", 80, 1.0, 10.0),
        entry("neft-3", 100, 1.08, 10.8),
        entry("lora-3", 110, 1.2, 12.0),
    ]
    judged = {device: list(claims({"device": device, "contestants": entries})) for device in ("cpu", "cuda")}
    assert [claim.met for claim in judged["cpu"]] == [True, True, None, True, None]
    assert [claim.met for claim in judged["cuda"]] == [True, False, None, True, None]
    assert judged["cpu"][1].found == "of its time: 1.08"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks ask Linux for what they tell")
def test_workers_take_turns_and_the_page_tells_them(tmp_path):
    out = tmp_path / "docs" / "benchmarks"
    only = ["floor", "neft-3"] + ["lora-3"] * (find_spec("peft") is not None)
    words = ["training", "--quick", "--dtype", "bf16", "--only", ",".join(only), "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    (part,) = json.loads((out / "training.json").read_text()).values()
    assert [entry["id"] for entry in part["contestants"]] == only
    for entry in part["contestants"]:
        assert entry["skipped"] is None, entry
        assert len(entry["runs"]) == QUICK["rounds"]
        assert all(run["seconds"] > 0 for run in entry["runs"])
        assert entry["peak"] > 0
        assert (entry["trainable"] > 0) is (entry["optimizer_bytes"] > 0) is (entry["id"] != "floor")
    page = (out.parent / "benchmarks-training.md").read_text()
    assert f"`{part['command']}`" in page
    assert all(CONTESTANTS[name][1] in page for name in only)
    assert str(tmp_path) not in page


@pytest.mark.slow
def test_a_run_in_which_nothing_works_says_so_and_stores_nothing(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = ["training", "--quick", "--device", "cuda", "--only", "neft-3", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "benchmarks", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "every contestant failed" in done.stderr
    assert not (tmp_path / "out").exists()
