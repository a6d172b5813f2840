"""Some model types through every verb, with weights; `make architectures` does all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.architectures.experts import train_experts
from tests.architectures.trial_page import put_trials, wrong
from tests.architectures.trials import try_type

QUICK = "llama gpt2 mixtral vit xlnet"
REST = """t5 bart deberta-v2 gemma3 lfm2 llama4 resnet rwkv speecht5 granitemoe minimax gpt_oss afmoe
falcon_mamba"""
CHECKED = ("diff", "extract", "changed", "attach", "lora")


@pytest.mark.parametrize(
    "model_type", [*QUICK.split(), *(pytest.param(one, marks=pytest.mark.slow) for one in REST.split())]
)
def test_every_verb_is_right_or_refuses_by_name(model_type: str) -> None:
    columns = try_type(model_type)["columns"]
    for name in CHECKED:
        assert columns[name]["verdict"] in ("right", "part"), (name, columns[name])
    if model_type in QUICK.split():
        assert columns["units"]["verdict"] in ("right", "not run"), columns["units"]
    assert columns["diff"]["counts"]["watched"] > 2
    assert columns["attach"]["counts"]["reached"] > 2


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "granitemoe"])
def test_experts_train_end_to_end(model_type: str) -> None:
    run = train_experts(model_type)
    assert run.right, run


def test_the_page_counts_verdicts_and_names_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = ("<!-- made by `make architectures`: trials -->", "<!-- end of trials -->")
    page.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    column = {"verdict": "right", "why": "", "left": {}, "counts": {}}
    columns = dict.fromkeys(("diff", "units", "extract", "changed", "attach", "lora"), column)
    part = {**column, "verdict": "part", "left": {"it is a router": [3, "gate.weight"]}}
    bad = {**column, "verdict": "wrong", "why": "a.weight: gradient absent"}
    stored = {
        "one": {"class": "One", "not run": "", "columns": columns},
        "two": {"class": "Two", "not run": "", "columns": {**columns, "diff": part, "attach": bad}},
        "three": {"failed": "ImportError: timm"},
    }
    put_trials(page, json.loads(json.dumps(stored)))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| right | 1 | 2 | 2 | 2 | 1 | 2 |" in text
    assert "| wrong | 0 | 0 | 0 | 0 | 1 | 0 |" in text
    assert wrong(stored) == ["two, attach: a.weight: gradient absent"]
    assert "- two, attach: a.weight: gradient absent" in text
    assert "- diff: it is a router (3 in 1 types: `two`)" in text
    assert "| `two` | Two | ✓ -3 | ✓ | ✓ | ✓ | **wrong** | ✓ |" in text
    assert "- ImportError: timm (1): `three`" in text
