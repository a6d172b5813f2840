"""The round of the LoRA sweep: right where PEFT gives what `apply` gives, wrong where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.lora_round import lora_round
from peft_support import tiny
from safetensors.torch import load_file, save_file

import neftsurgery as ns

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def sides(name: str, tmp_path: Path) -> tuple[Path, Path]:
    model = tiny(name)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def test_experts_and_projections_are_right_before_and_after_the_merge(tmp_path: Path) -> None:
    found = lora_round(
        *sides("moe", tmp_path), tmp_path / "w", "20%", {"input_ids": torch.arange(12).reshape(1, 12)}
    )
    assert (found.verdict, found.reason, found.unmerged) == ("right", "", "equal")
    assert found.forms.keys() == {"linear", "embedding", "parameter"}
    assert list(found.refused.values()) == ["weight of a MixtralTopKRouter"]


@pytest.mark.parametrize(
    ("which", "change", "reason"),
    [
        ("lora_B.weight", 0.0, "is off by"),
        ("lora_A.weight", 1.1, "is off by"),
        ("q_proj.lora_A.weight", None, "missing"),
    ],
)
def test_an_adapter_that_does_less_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, change: float | None, reason: str
) -> None:
    export = ns.export_lora

    def worse(patch: Any, out: Path, **options: Any) -> Any:
        done = export(patch, out, **options)
        factors = load_file(out / "adapter_model.safetensors")
        for name in [name for name in factors if name.endswith(which)]:
            value = factors.pop(name)
            factors |= {} if change is None else {name: change * value}
        save_file(factors, out / "adapter_model.safetensors", {"format": "pt"})
        return done

    monkeypatch.setattr(ns, "export_lora", worse)
    found = lora_round(*sides("llama", tmp_path), tmp_path / "w", "20%")
    assert found.verdict == "wrong"
    assert reason in found.reason
