"""The training suite, very small: what each contestant trains, and the structure of results and page."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page.training import requirements
from benchmarks.training.options import ALL_CONTESTANTS as CONTESTANTS
from benchmarks.training.options import MIXTURE_CONTESTANTS, QUICK, Options, add_arguments

ROOT = Path(__file__).resolve().parents[2]
JOB: dict[str, Any] = {
    "device": "cpu", "shape": "tiny", "layers": 2, "batch": 2, "length": 8, "checkpointing": False,
}  # fmt: skip
OURS = [name for name, (role, words) in CONTESTANTS.items() if "PEFT" not in words]
PEFT = [name for name in CONTESTANTS if name not in OURS]


def prepared(name: str, dtype: str, **more: Any) -> tuple[Any, Any]:
    """The contestant, after a backward pass."""
    from benchmarks.training import contestants, models

    job = JOB | {"dtype": dtype} | more
    if name in MIXTURE_CONTESTANTS:
        job |= {"shape": "moe-tiny"}
    method = contestants.prepare(name, models.build(job))
    ids = models.batch(job)
    method.model(input_ids=ids, labels=ids).loss.backward()
    method.before_step()
    return method, ids


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in OURS if not name.endswith("floor")])
def test_all_trained_parameters_get_a_gradient(name, dtype):
    method, _ = prepared(name, dtype)
    assert method.parameters
    assert all(parameter.grad is not None for parameter in method.parameters)


@pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")
@pytest.mark.filterwarnings("ignore")  # PEFT calls deprecated functions of transformers
@pytest.mark.parametrize("name", PEFT)
def test_rivals_train(name):
    method, _ = prepared(name, "fp32")
    assert method.trainable > 0
    assert any(parameter.grad is not None for parameter in method.parameters)


def test_the_mask_keeps_the_rows_that_neft_trains():
    import torch

    neft, _ = prepared("neft-3", "fp32")
    masked, _ = prepared("masked-3", "fp32")
    assert masked.trainable == neft.trainable < sum(p.numel() for p in masked.parameters)
    left = sum(int(p.grad.any(1).sum()) * p.shape[1] for p in masked.parameters)
    assert left == neft.trainable
    ours = torch.cat([p.grad.flatten() for p in neft.parameters]).abs().sum()
    theirs = torch.cat([p.grad.flatten() for p in masked.parameters]).abs().sum()
    torch.testing.assert_close(ours, theirs)


def test_units_have_as_many_parameters_as_rows():
    from benchmarks.training import contestants, models

    model = models.build(JOB | {"dtype": "fp32", "shape": "small"})
    rows = sum(len(n) * model.get_parameter(w).shape[1] for w, n in contestants.rows(model, 0.03).items())
    assert contestants.prepare("units-3", model).trainable == pytest.approx(rows, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_floors_backward_pass_ends_where_nefts_does(checkpointing):
    """It ends at the outputs of the first layer's projections; with checkpointing, at their inputs."""
    seen: dict[str, list[tuple[bool, bool]]] = {}
    for name in ("floor", "neft-3"):
        from benchmarks.training import contestants, models

        job = JOB | {"dtype": "fp32", "checkpointing": checkpointing}
        method = contestants.prepare(name, models.build(job))
        needs: list[tuple[bool, bool]] = []

        def watch(module, inputs, output, needs=needs):
            needs.append((inputs[0].requires_grad, output.requires_grad))

        for module in models.linears(method.model).values():
            module.register_forward_hook(watch)
        ids = models.batch(job)
        method.model(input_ids=ids, labels=ids).loss.backward()
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


def test_requirements_are_judged_by_ratios_within_turns():
    def entry(name: str, peak: int, *seconds: float) -> dict[str, Any]:
        return {"id": name, "peak": peak, "runs": [{"seconds": s} for s in seconds]}

    entries = [
        entry("floor", 80, 1.0, 10.0),
        entry("neft-3", 100, 1.08, 10.8),
        entry("lora-3", 110, 1.2, 12.0),
        entry("peft-3", 100, 1.26, 12.6),
    ]
    judged = {
        device: list(requirements({"device": device, "contestants": entries})) for device in ("cpu", "cuda")
    }
    assert [requirement.met for requirement in judged["cpu"]] == [True, True, None, False, False, True, None]
    assert [requirement.met for requirement in judged["cuda"]] == [
        True,
        False,
        None,
        False,
        False,
        True,
        None,
    ]
    assert judged["cpu"][1].measured == "of its time: 1.08"
    mixture = [entry("experts_floor", 80, 1.0, 10.0), entry("experts-3", 100, 1.1, 11.0)]
    mixture += [entry("experts_peft-3", 100, 1.3, 13.0), entry("experts_lora-3", 100, 1.0, 10.0)]
    in_place, adapter = requirements({"device": "cpu", "experts": True, "contestants": mixture})
    assert in_place.met
    assert in_place.measured == "of its time: 1.10"
    assert not adapter.met
    assert adapter.measured == "of its time: 1.30"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks need Linux")
def test_workers_take_turns_and_the_page_shows_them(tmp_path):
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
def test_a_run_without_a_working_contestant_is_an_error_and_stores_nothing(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    words = ["training", "--quick", "--device", "cuda", "--only", "neft-3", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "benchmarks", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "every contestant failed" in done.stderr
    assert not (tmp_path / "out").exists()
