"""The files suite run as a user runs it, very small: the structure of results and page, but no figures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.files.options import PARTS
from benchmarks.harness import page_cache, results
from benchmarks.harness.side_by_side import Contestant, run_side_by_side
from benchmarks.page.files import render
from benchmarks.page.lossless import render_lossless
from benchmarks.page.quantized import render_quantized
from benchmarks.page.training import render_training

ROOT = Path(__file__).resolve().parents[2]
RUN = {"wall", "cpu", "peak", "handed", "dirtied", "seconds", "printed"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks need Linux")


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_parts_are_measured_and_shown_on_the_page(tmp_path):
    out, work, only = (
        tmp_path / "docs" / "benchmarks",
        tmp_path / "work",
        ["warm", "cold", "sizes", "inplace"],
    )
    assert set(only) < set(PARTS)
    words = ("--quick", "--no-rivals", "--size", "6MB", "--sizes", "6MB", "--in-place-size", "6MB")
    done = bench("files", *words, "--only", ",".join(only), "--work", work, "--out", out)
    assert not done.returncode, done.stderr
    assert not list(work.iterdir())
    parts = json.loads((out / "files.json").read_text())
    assert list(parts) == only
    for name, part in parts.items():
        assert "skipped" not in part, name
        assert part["command"].startswith(f"python -m benchmarks files --only {name} ")
        for entry in [entry for group in part["groups"] for entry in group["contestants"]]:
            assert entry["skipped"] is None, entry
            assert all(set(run) == RUN and run["wall"] > 0 and run["peak"] > 0 for run in entry["runs"])
    check_page(out, parts)


def check_page(out: Path, parts: dict[str, dict[str, object]]) -> None:
    page = (out.parent / "benchmarks.md").read_text()
    assert "## Requirements\n\n| requirement | measured | met |" in page
    for part in parts.values():
        assert f"## {part['title']}\n\n`{part['command']}`" in page
    assert str(out.parent) not in page
    if find_spec("matplotlib"):
        for chart in ("diff-throughput.svg", "memory.svg"):
            assert f"(benchmarks/{chart})" in page
            assert (out / chart).read_text().startswith("<?xml")


def test_an_unknown_part_is_an_error():
    done = bench("files", "--only", "warm,nonsense")
    assert done.returncode == 2
    assert "no such part: nonsense" in done.stderr


def test_measuring_a_part_again_keeps_the_others(tmp_path):
    file = tmp_path / "new" / "files.json"
    runs = [{"wall": 1.0}, {"wall": 2.0}]
    for part, walls in (("warm", runs), ("cold", runs), ("warm", runs[:1])):
        results.store(file, part, {"groups": [{"contestants": [{"runs": walls}]}]})
    stored = results.load(file)
    assert stored["cold"]["groups"][0]["contestants"][0]["runs"] == runs
    assert stored["warm"]["groups"][0]["contestants"][0]["runs"] == runs[:1]


def test_a_contestant_that_cannot_run_is_skipped_with_the_reason():
    absent = Contestant("absent", "rival", ["true"], needs=("no_such_package",))
    broken = Contestant("broken", "rival", ["sh", "-c", "echo no luck with /some/where/file >&2; exit 3"])
    fine = Contestant("fine", "limit", ["true"])
    entries = {entry["name"]: entry for entry in run_side_by_side([absent, broken, fine], rounds=2)}
    assert entries["absent"]["skipped"] == "not installed: no_such_package"
    assert entries["broken"]["skipped"] == "failed: no luck with file"
    assert len(entries["fine"]["runs"]) == 2


def test_the_page_cache_is_filled_and_emptied(tmp_path):
    (tmp_path / "file").write_bytes(bytes(3_000_000))
    page_cache.warm(tmp_path)
    assert page_cache.resident_share(tmp_path) == 1
    try:
        page_cache.drop(tmp_path)
    except page_cache.PageCacheError:
        pytest.skip("this file system keeps its pages")
    assert page_cache.resident_share(tmp_path) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_pages_in_docs_match_their_results(tmp_path):
    shutil.copytree(ROOT / "docs" / "benchmarks", tmp_path / "benchmarks")
    render(tmp_path / "benchmarks")
    render_training(tmp_path / "benchmarks")
    render_lossless(tmp_path / "benchmarks")
    render_quantized(tmp_path / "benchmarks")
    for page in ("", "-training", "-lossless", "-quantized"):
        page = f"benchmarks{page}.md"
        assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text(), page
