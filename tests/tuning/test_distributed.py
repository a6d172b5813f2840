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

SCRIPT = Path(__file__).with_name("distributed_script.py")
# Each launcher is started once, for all of its engines. If one of its processes fails, it ends the other.
TORCHRUN = ("torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", "2")
# Its other way to two processes on CPUs needs MPI.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
TRAINING = {
    TORCHRUN: ("ddp scatter", "ddp overlay", "zero scatter", "fsdp overlay"),
    ACCELERATE: ("accelerate scatter",),
}
# In the first step of "experts" one process visits none with rows. Neither waits for the other.
# Those of `mismatch_script` have errors on purpose; the last one ends both processes.
OTHERS = {TORCHRUN: ("experts", "other neurons", "lost process"), ACCELERATE: ()}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    model, picks = llama(), FAMILIES["llama"][1]
    attached = ns.attach(model, select(model, picks))
    optimizer = torch.optim.AdamW(attached.parameters(), **ADAM)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**batch(step, size=4)).loss.backward()
        optimizer.step()
    cases = (*TRAINING[launcher], *OTHERS[launcher])
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(SCRIPT), str(tmp_path), *cases],
        capture_output=True, text=True, timeout=1800, check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {f"{case}: right" for case in cases} <= set(done.stdout.splitlines())
    for case in TRAINING[launcher]:
        for rank in range(2):
            with ns.Patch.load(tmp_path / case / f"patch {rank}") as patch:
                for name in picks:
                    theirs, ours = from_bytes(patch.values(name), "F32"), rows_of(attached, name).detach()
                    torch.testing.assert_close(
                        theirs, ours, rtol=1e-5, atol=1e-6, msg=lambda text, case=case: f"{case}: {text}"
                    )
