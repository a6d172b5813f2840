"""Two processes that each see half of every batch arrive where one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_script import ADAM, STEPS
from tuning_support import FAMILIES, batch, llama, rows_of, select

import neftsurgery as ns
from neftsurgery.tuning.vectors import from_bytes

SCRIPT = Path(__file__).with_name("distributed_script.py")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mode"), [("ddp", "scatter"), ("ddp", "overlay"), ("fsdp", "overlay")])
def test_two_processes(tmp_path: Path, kind: str, mode: str) -> None:
    model, picks = llama(), FAMILIES["llama"][1]
    attached = ns.attach(model, select(model, picks))
    optimizer = torch.optim.AdamW(attached.parameters(), **ADAM)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**batch(step, size=4)).loss.backward()
        optimizer.step()
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), kind, mode, str(tmp_path), str(rank)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    for rank in range(2):
        with ns.Patch.load(tmp_path / f"patch {rank}") as patch:
            for name in picks:
                theirs = from_bytes(patch.values(name), "F32")
                torch.testing.assert_close(theirs, rows_of(attached, name).detach(), rtol=1e-5, atol=1e-6)
