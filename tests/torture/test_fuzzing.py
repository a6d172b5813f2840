"""Hostile files: every reader of untrusted files gets mutated inputs, in a process that watches itself.

A reader accepts a file or refuses it with an error of this package; the safetensors package agrees where it
is the authority. A reader opens nothing outside its folder, runs nothing, and uses bounded memory and time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torture.trials import TIMES, Trials, times

REPOSITORY = Path(__file__).parents[2]
#: In a longer run a thousand times as many inputs as trials of other faults.
INPUTS = times(2500, 1000)
SECONDS = float(os.environ.get("NEFT_FUZZ_SECONDS", "36000"))  # at most, of each reader
TARGETS = (
    "safetensors header", "shard index", "lossless patch", "coded block", "patch", "selection", "scores",
    "adapter config", "adapter weights", "config.json", "journal", "recipe",
)  # fmt: skip


def fuzz(crashers: Path, *words: str) -> list[dict[str, Any]]:
    options = ["--inputs", str(INPUTS), "--seconds", str(SECONDS), "--crashers", str(crashers), *words]
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture.fuzz", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300 + 12 * SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by RLIMIT_AS, as Linux has it")
def test_no_file_does_harm(trials: Trials, tmp_path: Path) -> None:
    crashers = Path(os.environ.get("NEFT_CRASHERS", tmp_path))
    if TIMES:  # each reader in a process of its own; recipes as well, which take transformers to read
        with ThreadPoolExecutor(1 + (os.cpu_count() or 1)) as pool:
            done = pool.map(lambda name: fuzz(crashers, "--recipes", "--only", name), TARGETS)
            results = [result for part in done for result in part]
        assert [result["target"] for result in results] == list(TARGETS)
    else:
        results = fuzz(crashers)
    broken = []
    for result in results:
        entry = trials.entry("hostile file", result["target"])
        entry.tried += result["inputs"]
        entry.losses += len(result["broken"])
        entry.notes |= {key: result[key] for key in ("taken", "refused")}
        assert result["taken"], f"no {result['target']} was taken: the trial means little"
        broken += result["broken"]
    assert not broken, f"see {crashers}: {json.dumps(broken[:5], indent=1)}"
