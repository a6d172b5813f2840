"""The axolotl plugin, with stand-ins for the two classes of axolotl that it uses."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from recipes_support import RECIPES
from tuning_support import batch, llama

from neftsurgery.peft import NeftConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


@dataclasses.dataclass(frozen=True)
class AdapterCapabilities:
    """As axolotl 0.19 has it."""

    name: str
    lora_like: bool = False
    relora: bool = False


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    base: Any = ModuleType("axolotl.integrations.base")
    base.AdapterCapabilities, base.BasePlugin = AdapterCapabilities, object
    for name, module in (
        ("axolotl", base),
        ("axolotl.integrations", base),
        ("axolotl.integrations.base", base),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return runpy.run_path(str(RECIPES / "trainers" / "axolotl_neft.py"), run_name="axolotl_neft")[
        "NeftPlugin"
    ]()


def config(**given: Any) -> Any:
    return SimpleNamespace(**{"adapter": "neft", "neft": {"neurons": "10%"}, "lora_model_dir": None} | given)


def test_it_names_its_adapter_and_its_arguments(plugin: Any) -> None:
    assert plugin.get_adapter_capabilities() == [AdapterCapabilities("neft")]
    assert plugin.get_input_args() == "axolotl_neft.NeftArgs"
    assert plugin.load_adapter(llama(), config(adapter="lora")) is None


def test_it_makes_an_adapter_and_continues_one(plugin: Any, tmp_path: Path) -> None:
    model, made = plugin.load_adapter(llama(), config())
    assert isinstance(model, PeftModel)
    assert isinstance(made, NeftConfig)
    rows = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for one in rows:
            one.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    for inference in (False, True):
        again, _ = plugin.load_adapter(
            llama(), config(neft=None, lora_model_dir=str(tmp_path / "adapter")), inference=inference
        )
        trained = [parameter for parameter in again.parameters() if parameter.requires_grad]
        assert len(trained) == (0 if inference else len(rows))
        with torch.no_grad():
            assert torch.equal(again(**batch()).logits, model(**batch()).logits)
            assert not torch.equal(again(**batch()).logits, llama()(**batch()).logits)


def test_it_gives_the_config_alone_to_preference_training(plugin: Any) -> None:
    model, made = plugin.load_adapter(llama(), config(), config_only=True)
    assert model is None
    assert (made.neurons, made.task_type) == ("10%", "CAUSAL_LM")
