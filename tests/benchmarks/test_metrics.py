"""Medians with their range, ratios within rounds, and the requirements judged by them."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.sizes import format_size, parse_size
from benchmarks.page.metrics import Spread, limit, ratio, spread, wall, work
from benchmarks.page.requirements import requirements


def entry(name: str, *walls: float, role: str = "ours", seconds: float | None = None) -> dict[str, Any]:
    runs = [
        {"wall": w, "cpu": w, "peak": 10**8, "handed": 0, "dirtied": 0, "seconds": seconds} for w in walls
    ]
    return {"name": name, "role": role, "skipped": None, "runs": runs}


def test_a_spread_shows_its_range_and_one_figure_has_none():
    assert f"{Spread.of([3.0, 1.0, 2.0]):.1f}" == "2.0 (1.0 to 3.0)"
    assert f"{Spread.of([2.0]):.1f}" == "2.0"
    assert Spread.of([]) is None


def test_ratios_are_taken_within_rounds():
    slow_drift = ratio(entry("a", 1.0, 10.0), entry("b", 2.0, 20.0), wall)
    assert slow_drift == Spread(0.5, 0.5, 0.5)


def test_a_rival_with_fewer_rounds_is_compared_in_those():
    assert ratio(entry("a", 4.0), entry("b", 2.0, 100.0), wall) == Spread(2.0, 2.0, 2.0)


def test_work_is_the_whole_process_if_it_reports_no_seconds():
    assert spread(entry("cp", 3.0), work) == Spread(3.0, 3.0, 3.0)
    assert spread(entry("diff", 3.0, seconds=1.0), work) == Spread(1.0, 1.0, 1.0)


def test_the_limit_is_the_fastest_of_each_round():
    limits = [entry("a", 1.0, 4.0, role="limit"), entry("b", 2.0, 3.0, role="limit")]
    found = limit({"contestants": [entry("ours", 0.1, 0.1), *limits]})
    assert [work(run) for run in found["runs"]] == [1.0, 3.0]
    assert limit({"contestants": [entry("ours", 0.1)]}) is None


def test_requirements_are_judged_by_the_median_and_say_if_nothing_was_measured():
    copied = {"contestants": [entry("neftsurgery apply, 3%", 1.0, 1.2, 9.0), entry("cp -r", 1.0, 1.0, 1.0)]}
    judged = {
        requirement.statement: requirement for requirement in requirements({"apply": {"groups": [copied]}})
    }
    apply = judged.pop("apply takes at most 1.1 of the time of cp and sync")
    assert apply.met is False
    assert "1.20 (1.00 to 9.00)" in apply.measured
    assert {(requirement.measured, requirement.met) for requirement in judged.values()} == {
        ("not measured", None)
    }


def test_sizes_are_parsed_and_formatted():
    sizes = {"2.4GB": 2_400_000_000, "512KiB": 524_288, "300 MB": 300_000_000, "4096": 4096}
    assert {text: parse_size(text) for text in sizes} == sizes
    assert format_size(2_400_000_000) == "2.4 GB"
