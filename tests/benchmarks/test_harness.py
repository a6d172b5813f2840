"""The tools of the benchmarks: a measured process, the machine, memory, checkpoints, limits, rivals."""

from __future__ import annotations

import json
import platform
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import neftsurgery as ns
from benchmarks.files.fixtures import CheckpointPair, DiskSpaceError, Fixtures
from benchmarks.harness import machine, memory, page_cache
from benchmarks.harness.process import CommandError, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks need Linux")


def test_a_run_has_its_cost_and_the_last_printed_object():
    found = run(["sh", "-c", """echo library; echo '{"seconds": 1.5, "neurons": 3}'"""])
    assert (found.seconds, found.printed["neurons"]) == (1.5, 3)
    assert found.wall > 0
    assert found.peak > 0
    assert run(["sh", "-c", "echo no object"]).seconds is None


def test_a_command_that_fails_says_why_without_paths_of_this_machine():
    with pytest.raises(CommandError) as caught:
        run(["sh", "-c", "echo first >&2; echo cannot read /some/where/file >&2; exit 3"])
    assert (caught.value.code, caught.value.reason) == (3, "cannot read file")
    assert CommandError(["x"], 4, "").reason == "exit code 4"


def test_the_machine_is_described_but_not_identified(tmp_path):
    found = machine.describe(tmp_path, ["pytest", "no-such-package"])
    assert found["packages"] == {"pytest": pytest.__version__}
    assert found["cores"] >= 1
    assert found["memory_gb"] > 0
    assert platform.node() not in json.dumps(found)


def test_the_peak_of_memory_can_be_reset():
    block = bytearray(b"x") * 50_000_000
    assert memory.peak() >= memory.resident() > len(block)
    high = memory.peak()
    del block
    memory.reset_peak()
    assert memory.peak() <= high - 40_000_000


def test_pairs_are_kept_until_the_disk_is_full(tmp_path, monkeypatch):
    fixtures = Fixtures(tmp_path)
    (tmp_path / "pair-1000000").mkdir()
    first = fixtures.pair(10**6)  # there is one already
    assert not list(first.folder.iterdir())
    out = fixtures.output("out")
    out.mkdir()
    (out / "file").write_text("x")
    assert not fixtures.output("out").exists()
    free = [10**6, 10**12]  # too little until a pair is removed
    monkeypatch.setattr(page_cache, "free_space", lambda folder: free.pop(0))
    second = fixtures.pair(2 * 10**6)
    assert second.base.is_dir()
    assert not first.folder.exists()
    monkeypatch.setattr(page_cache, "free_space", lambda folder: 10**6)
    with pytest.raises(DiskSpaceError, match=r"needs 6 MB of disk; 1 MB are free"):
        fixtures.pair(3 * 10**6)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> CheckpointPair:
    return Fixtures(tmp_path_factory.mktemp("pairs")).pair(10**6)


def test_the_limits_read_and_write_every_byte(pair, tmp_path):
    command = [sys.executable, "-m", "benchmarks.limits.reads", str(pair.base), str(pair.tuned)]
    whole = run([*command, "--threads", "2", "--buffer", "4096"]).printed
    files = [file for side in (pair.base, pair.tuned) for file in side.glob("*.safetensors")]
    assert whole["bytes_read"] == sum(file.stat().st_size for file in files)
    head = run([*command, "--threads", "1", "--buffer", "4096", "--head", "8192"]).printed
    assert head["bytes_read"] == 2 * 8192
    out = tmp_path / "out"
    run([sys.executable, "-m", "benchmarks.limits.writes", str(out), "--size", "5000001"])
    assert out.stat().st_size == 5_000_001


def main_of(module: str, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [module, *map(str, words)])
    import_module(f"benchmarks.rivals.{module}").main()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rivals_do_the_same_work_as_the_commands(pair, tmp_path, monkeypatch, capsys):
    """Those that need mergekit run in `make bench` only: the tests do not install it."""
    patch, ours, theirs = (tmp_path / name for name in ("patch", "ours", "theirs"))
    ns.extract(pair.base, pair.tuned, neurons="3%", out=patch).close()
    ns.apply(pair.base, patch, out=ours)
    main_of("transformers_save", monkeypatch, pair.base, patch, theirs)
    saved = weights(theirs)
    for name, tensor in weights(ours).items():
        assert (tensor == saved[name]).all(), name
    main_of("torch_cosine", monkeypatch, pair.base, pair.tuned)
    main_of("transformers_cosine", monkeypatch, pair.base, pair.tuned)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    counts = [line["neurons"] for line in lines if "neurons" in line]
    assert counts[0] == counts[1] > ns.diff(pair.base, pair.tuned).neurons  # they score the embeddings too


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
