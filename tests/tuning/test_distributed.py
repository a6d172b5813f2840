"""Two processes that each see half of every batch give the values that one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_script import ADAM, STEPS
from tuning_support import FAMILIES, batch, llama, rows_of, select

import neftsurgery as ns
from neftsurgery.live.weights import from_bytes

# torchrun, and `accelerate launch`, whose other way to two processes on CPUs needs MPI.
LAUNCHERS = (
    ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
)
SCRIPT = Path(__file__).with_name("distributed_script.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("ddp", "scatter"),
        ("ddp", "overlay"),
        ("zero", "scatter"),
        ("fsdp", "overlay"),
        ("accelerate", "scatter"),
    ],
)
def test_two_processes(tmp_path: Path, kind: str, mode: str) -> None:
    model, picks = llama(), FAMILIES["llama"][1]
    attached = ns.attach(model, select(model, picks))
    optimizer = torch.optim.AdamW(attached.parameters(), **ADAM)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**batch(step, size=4)).loss.backward()
        optimizer.step()
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[kind == "accelerate"], str(SCRIPT), kind, mode, str(tmp_path)],
        capture_output=True, text=True, timeout=500, check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        with ns.Patch.load(tmp_path / f"patch {rank}") as patch:
            for name in picks:
                theirs = from_bytes(patch.values(name), "F32")
                torch.testing.assert_close(theirs, rows_of(attached, name).detach(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The cases of `process_script` that each of two processes passed."""
    rendezvous = f"file://{tmp_path_factory.mktemp('processes') / 'rendezvous'}"
    command = [sys.executable, str(SCRIPT.with_name("process_script.py")), rendezvous]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        return [process.communicate(timeout=100)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_experts_that_one_process_does_not_visit(passed: list[list[str]]) -> None:
    """Neither waits for the other; both have the mean of their gradients."""
    assert all("experts" in cases for cases in passed)


def test_processes_that_attach_other_neurons(passed: list[list[str]]) -> None:
    """Under DDP and FSDP2: each says so, with the tensor's name, before the first step."""
    assert all("other_neurons" in cases for cases in passed)


def test_a_process_that_ends(passed: list[list[str]]) -> None:
    """The other has an error, of gloo, rather than waiting."""
    assert all("a_process_that_ends" in cases for cases in passed)
