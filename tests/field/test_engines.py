"""Two processes that train chosen neurons by each engine and trainer, against plain torch in one process.

docs/training.md has a table of these cases. accelerate shards only on GPUs: `engine_script` has it take the
processes' gloo for their backend. The rest is what people run.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from engine_script import ADAM, RUNS, SIZE, STEPS, examples, picks_of, recipe_in
from recipes_support import tokenizer
from safetensors.torch import load_file
from torch import Tensor
from tuning_support import llama, put, select, vectors

import neftsurgery as ns
from neftsurgery.live.weights import from_bytes

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("engine_script.py")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (
    "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0", "--use_fsdp",
    "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer", "--fsdp_cpu_ram_efficient_loading", "false",
    "--fsdp_state_dict_type", "FULL_STATE_DICT",
)  # fmt: skip
#: What the model is wrapped in, and what its parameters are.
KINDS = {
    "ddp": "DistributedDataParallel Tensor",
    "fsdp2": r"FSDP\w+ DTensor",
    "launch fsdp2": r"FSDP\w+ DTensor",
    "lightning": "DistributedDataParallel Tensor",
    "dcp": r"FSDP\w+ DTensor",
    "zero1": "DeepSpeedEngine Tensor",
    "zero2": "DeepSpeedEngine Tensor",
}

Values = dict[str, Tensor]


@functools.cache
def oracle(run: str) -> tuple[Values, list[float]]:
    """The neurons and losses of plain torch, whose other neurons are put back after each step."""
    model, base, picks = llama(), llama(), picks_of(run)
    trained = {name: model.get_parameter(name) for name in picks}
    optimizer, losses = torch.optim.AdamW(trained.values(), **ADAM), []
    for step in range(STEPS):
        rows = examples()[SIZE * step : SIZE * (step + 1)]
        optimizer.zero_grad()
        loss = model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss
        loss.backward()
        losses.append(loss.item())
        for name, weight in trained.items():
            assert weight.grad is not None
            gradient = vectors(weight.grad.clone(), *picks[name])
            put(weight.grad.zero_(), *picks[name], gradient)
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        for name, weight in trained.items():
            now = vectors(weight.detach().clone(), *picks[name])
            weight.data.copy_(base.get_parameter(name))
            put(weight, *picks[name], now)
    return {name: vectors(weight.detach(), *picks[name]) for name, weight in trained.items()}, losses


def launch(launcher: tuple[str, ...], *arguments: str, limit: int = 550) -> subprocess.CompletedProcess[str]:
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "tuning"), str(TESTS / "field")]
    return subprocess.run(
        [sys.executable, "-m", *launcher, *arguments],
        capture_output=True, text=True, timeout=limit, check=False,
        env={
            **os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            "LOCAL_SIZE": "2", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths),
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an engine's runs, all of them made by one pair of processes."""

    @functools.cache
    def run(engine: str) -> Path:
        root = tmp_path_factory.mktemp("engine")
        for name in RUNS[engine]:
            (root / name).mkdir()
            select(llama(), picks_of(name)).save(root / name / "selection.safetensors")
        launcher = ACCELERATE if engine.startswith("launch") else TORCHRUN
        done = launch(launcher, str(SCRIPT), engine, ",".join(RUNS[engine]), str(root))
        (root / "stderr").write_text(done.stderr)
        return root

    return run


def values(folder: Path, how: str, names: Iterable[str]) -> Values:
    if (folder / f"{how} adapter").exists():
        rows = load_file(folder / f"{how} adapter" / "adapter_model.safetensors")
        return {name: rows[f"base_model.model.{name.removesuffix('weight')}neft_rows"] for name in names}
    found = []
    for rank in range(2):
        with ns.Patch.load(folder / f"{how} {rank}") as patch:
            assert sorted(patch.tensors) == sorted(names)
            found.append({name: from_bytes(patch.values(name), "F32") for name in names})
    for name in names:
        assert torch.equal(found[0][name], found[1][name])
    return found[0]


@pytest.mark.parametrize(("engine", "run"), [(engine, run) for engine in KINDS for run in RUNS[engine]])
def test_two_processes_are_one(engine: str, run: str, trained: Callable[[str], Path]) -> None:
    """The patch, or the adapter, is that of plain torch within rounding; a resumed run is the whole one."""
    folder = trained(engine) / run
    assert (folder / "resumed.txt").exists(), (folder.parent / "stderr").read_text()[-6000:]
    kind, *losses = (folder / "whole.txt").read_text().splitlines()
    assert re.fullmatch(KINDS[engine], kind)
    expected, told = oracle(run)
    assert [float(loss) for loss in losses[-STEPS:]] == pytest.approx(told, abs=1e-5)
    whole, resumed = values(folder, "whole", expected), values(folder, "resumed", expected)
    for name in expected:
        torch.testing.assert_close(whole[name], expected[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(resumed[name], whole[name])


def values_of(patch: Path) -> Values:
    with ns.Patch.load(patch) as opened:
        return {name: from_bytes(opened.values(name), "F32") for name in opened.tensors}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_a_recipe(tmp_path: Path, engine: str) -> None:
    """Two processes make the patch of one from the same recipe, within rounding; they stop and resume."""
    llama(vocab_size=260, max_position_embeddings=64).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"{n} plus {n}: ", "completion": f"{2 * n}{'!' * (n % 5)}"} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = launch(TORCHRUN, str(SCRIPT), engine, "recipe", str(tmp_path))
    assert done.returncode == 0, done.stderr[-6000:]
    recipe = recipe_in(tmp_path)
    ns.train(recipe | {"out": str(tmp_path / "alone"), "train": recipe["train"] | {"device": "cpu"}})
    whole, resumed, alone = (
        values_of(tmp_path / how / "neuron_patch.safetensors") for how in ("whole", "resumed", "alone")
    )
    assert whole.keys() == resumed.keys() == alone.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(whole[name], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(resumed[name], whole[name])
