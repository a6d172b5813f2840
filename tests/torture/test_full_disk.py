"""A small disk that is really full: exit 5, nothing half-written, nothing left on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import snapshot
from torture.runner import Runner
from torture.trials import Trials, times

import neftsurgery as ns

pytestmark = pytest.mark.slow
SIZE = 24 << 20
#: Bytes that a lossless patch changes in place.
ALIKE = 1 << 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 24 MB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "work",
    [
        "apply", "revert", "extract", "merge", "export", "apply --in-place",
        "extract --lossless", "apply (lossless)", "revert (lossless)", "apply --in-place (lossless)",
    ],
)  # fmt: skip
def test_a_disk_with_too_little_room(
    runner: Runner, trials: Trials, sides: tuple[Path, Path], tmp_path: Path, disk: Path, work: str
) -> None:
    """With any amount of free space, the output is written whole or not at all."""
    base, tuned = sides
    rows, out, filler = tmp_path / "rows", disk / "out", disk / "filler"
    common = {"per": "tensor", "score": "random", "reversible": True}
    ns.extract(*sides, neurons="6%", out=rows, **common).close()
    with ns.Patch.load(rows) as patch:
        patch.selection.save(tmp_path / "selection")
    ns.apply(base, rows, out=tmp_path / "patched")
    ns.extract(*sides, lossless=True, reversible=True, out=tmp_path / "whole").close()
    file = sorted(shutil.copytree(base, tmp_path / "alike").glob("*.safetensors"))[0]
    content = file.read_bytes()
    file.write_bytes(content[:-ALIKE] + bytes(ALIKE))
    ns.extract(base, tmp_path / "alike", lossless=True, out=tmp_path / "part").close()
    words = {
        "apply": ("apply", base, rows, "-o", out),
        "revert": ("revert", tmp_path / "patched", rows, "-o", out),
        "extract": ("extract", base, tuned, "--selection", tmp_path / "selection", "-o", out),
        "merge": ("merge", rows, "-o", out),
        "export": ("export", rows, "--to", "lora", "-o", out),
        "apply --in-place": ("apply", out, rows, "--in-place"),
        "extract --lossless": ("extract", base, tuned, "--lossless", "--reversible", "-o", out),
        "apply (lossless)": ("apply", base, tmp_path / "whole", "-o", out),
        "revert (lossless)": ("revert", tuned, tmp_path / "whole", "-o", out),
        "apply --in-place (lossless)": ("apply", out, tmp_path / "part", "--in-place"),
    }[work]

    def prepare(free: int) -> None:
        for path in (out, filler):
            subprocess.run(["rm", "-rf", str(path)], check=True)
        if "--in-place" in work:
            ns.revert(tmp_path / "patched", rows, out=out)
        status = os.statvfs(disk)
        size = max(0, status.f_bavail * status.f_frsize - free)
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, size))

    prepare(SIZE)
    assert runner.command(*words).status == 0
    expected, before = snapshot(out), snapshot(base)
    needed = sum(path.stat().st_size for path in [out, *out.rglob("*")] if path.is_file())
    needed = {"apply --in-place": rows.stat().st_size, "apply --in-place (lossless)": ALIKE}.get(work, needed)
    runs = times(3, 0.2)
    full = 0
    for run in range(runs):
        prepare(int(1.1 * needed * run / runs) // 4096 * 4096)
        with trials.trial("disk full (a small tmpfs)", work):
            outcome = runner.command(*words)
            assert outcome.status in (0, 5), outcome.err
            assert "Traceback" not in outcome.err
            if outcome.status == 0:
                assert snapshot(out) == expected
            elif "--in-place" in work:
                assert snapshot(out) == before, "the model is not as it was"
            else:
                assert not out.exists()
                assert "space" in outcome.err
                full += 1
            assert [path.name for path in disk.rglob("*") if ".neft-" in path.name] == []
    assert full or "--in-place" in work, "the disk was never full"
