"""Patterns of an adapter's config: the oracles are PEFT's own matching and `re`; hostile ones end."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

import neftsurgery as ns
from neftsurgery.checkpoint.adapter_patterns import first_matches, ranks_and_alphas

FILE = Path("adapter_config.json")
PATHS = [
    f"{root}{layers}.{layer}.{kind}"
    for root in ("", "model.", "model.decoder.")
    for layers in ("layers", "h")
    for layer in (0, 1, 11)
    for kind in ("attn.q_proj", "attn.q", "mlp.experts.1.w2", "mlp.q_proj")
] + ["lm_head", "q_proj"]

PIECES = [
    "q_proj",
    "q",
    "q.proj",
    "w2",
    "attn.q_proj",
    "layers.1.mlp.q_proj",
    "experts.1.w2",
    "proj",
    "lm_head",
]
EXPRESSIONS = [
    r".*q_proj",
    r".*\.1\..*",
    r"^model.*",
    r"(attn|mlp)\.q.*",
    r".*layers\.\d+\.(?!mlp).*",
    r"h\.[01]\..*",
]
pattern = st.sampled_from(PIECES + EXPRESSIONS + PATHS)
table = st.dictionaries(pattern, st.integers(1, 9), max_size=4)
modules = st.lists(st.sampled_from(PIECES + PATHS), max_size=5) | st.sampled_from(EXPRESSIONS)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Settings that LoraConfig takes."""
    found = {
        "r": draw(st.integers(1, 9)),
        "lora_alpha": draw(st.integers(1, 9)),
        "rank_pattern": draw(table),
        "alpha_pattern": draw(table),
        "target_modules": draw(modules),
        "exclude_modules": draw(st.none() | modules),
    }
    if isinstance(found["target_modules"], list) and draw(st.booleans()):
        found["layers_to_transform"] = draw(st.integers(0, 2) | st.lists(st.sampled_from([0, 1, 11])))
        names = st.sampled_from(["layers", "h", "experts"])
        found["layers_pattern"] = draw(st.none() | names | st.lists(names, max_size=2))
    return found


@given(configs())
@settings(max_examples=60)
def test_modules_ranks_and_alphas_are_those_of_peft(config: dict[str, Any]) -> None:
    theirs = LoraConfig(**config)
    expected = {}
    for path in PATHS:
        targeted = check_target_module_exists(theirs, path)
        if targeted and not isinstance(targeted, _ExcludedModule):
            rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern, path), theirs.r)
            alpha = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern, path), theirs.lora_alpha)
            expected[path] = (rank, alpha)
    assert ranks_and_alphas(config, PATHS, FILE) == expected


def test_the_first_pattern_that_matches_is_named() -> None:
    questions = [("match", ["q", "mo", "m"]), ("fullmatch", ["lm_.*", r".*\d\..*"]), ("match", [])]
    expected = [
        [next((i for i, one in enumerate(several) if getattr(re, how)(one, path)), -1) for path in PATHS]
        for how, several in questions
    ]
    assert first_matches(questions, PATHS, FILE) == expected


def test_a_pattern_that_would_run_for_ever_is_refused() -> None:
    with pytest.raises(ns.MismatchError, match=r"more than 2 s to match(?s:.*)merge_and_unload"):
        first_matches([("match", [r"(a+)+$"])], ["a" * 60 + "b"], FILE, seconds=2)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_the_matching_process_ends_when_its_parent_is_killed() -> None:
    script = (
        "from pathlib import Path; from neftsurgery.checkpoint.adapter_patterns import first_matches;"
        "first_matches([('match', ['(a+)+$'])], ['a' * 60 + 'b'], Path('c.json'), seconds=8)"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        while not (found := children.read_text().split()):
            assert parent.poll() is None
        process = Path(f"/proc/{found[0]}")
        while int((process / "stat").read_text().split()[13]) < 10:  # a tenth of a second of matching
            assert parent.poll() is None
        parent.kill()
    while process.exists() and (process / "cmdline").read_bytes():  # empty of a dead one that nobody awaits
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("patterns", "paths"),
    [
        ([f"layers.{i}" for i in range(100_000)], ["q"]),
        (["q"] * 5_000, ["q"] * 5_000),
        (["q" * 2_000_000], ["q"]),
    ],
    ids=["patterns", "matches", "text"],
)
def test_too_many_patterns_are_refused(patterns: list[str], paths: list[str]) -> None:
    with pytest.raises(ns.MismatchError, match="too many patterns"):
        first_matches([("match", patterns)], paths, FILE)


def test_too_many_parents_of_layers_are_refused() -> None:
    config = {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["h"] * 100_000}
    with pytest.raises(ns.MismatchError, match="too many names"):
        ranks_and_alphas(config, PATHS, FILE)


@pytest.mark.parametrize("broken", ["(", "a{3", "[", "(?P<a>b)(?P<a>c)", "*", "\ud800("])
def test_a_broken_pattern_is_refused(broken: str) -> None:
    if broken == "a{3":  # which Python takes literally
        assert first_matches([("match", [broken])], ["a{3"], FILE) == [[0]]
        return
    with pytest.raises(ns.MismatchError, match="not a regular expression"):
        first_matches([("match", [broken])], ["q"], FILE)


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": ["q"]},
        {"target_modules": {"q": 1}},
        {"target_modules": ["q", 1]},
        {"exclude_modules": 3},
        {"layers_to_transform": "1"},
        {"layers_to_transform": ["1"]},
        {"layers_pattern": 1},
    ],
    ids=str,
)
def test_a_setting_of_another_type_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ns.CorruptFileError, match=next(iter(config))):
        ranks_and_alphas({"target_modules": ["q"]} | config, PATHS, FILE)
