"""What a live class tells of weights that the table does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.cli.main import cli
from neftsurgery.live.class_axes import class_axes
from neftsurgery.sources.resolve import resolve


class NewestConfig(PreTrainedConfig):
    """A type that no table knows."""

    model_type = "neft-newest"


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.output_size, self.input_size = 3, 6, 8
        self.weight = nn.Parameter(torch.randn(3, 6, 8))


class _NewestModel(PreTrainedModel):
    config_class = NewestConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.words = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"kernel": Conv1D(6, 8), "linear": nn.Linear(8, 4)}) for _ in "ab"
        )
        self.up = nn.ConvTranspose2d(3, 5, 2)
        self.down = nn.Conv2d(3, 5, 2)
        self.grouped = nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.experts = _Experts()
        self.table = nn.Parameter(torch.randn(7, 7))
        self.post_init()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    AutoConfig.register("neft-newest", NewestConfig, exist_ok=True)
    AutoModel.register(NewestConfig, _NewestModel, exist_ok=True)
    path = tmp_path_factory.mktemp("newest")
    _NewestModel(NewestConfig()).save_pretrained(path)
    return path


def test_layers_tell_the_axes_and_others_tell_nothing(folder: Path) -> None:
    kinds = [
        "words.weight", "layers.*.kernel.weight", "layers.*.linear.weight", "up.weight", "down.weight",
        "grouped.weight", "experts.weight", "table", "absent",
    ]  # fmt: skip
    assert class_axes(Checkpoint.read(resolve(folder)), kinds) == {
        "words.weight": (),
        "layers.*.kernel.weight": (1,),
        "layers.*.linear.weight": (0,),
        "up.weight": (1,),
        "down.weight": (0,),
        "experts.weight": (0, 1),
    }


def test_each_of_the_tensors_that_the_loader_merges_is_told(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=30, num_key_value_heads=1, num_local_experts=3, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    kinds = [f"model.layers.*.block_sparse_moe.experts.*.w{number}.weight" for number in (1, 2, 3)]
    assert class_axes(Checkpoint.read(resolve(tmp_path)), kinds) == dict.fromkeys(kinds, (0,))


def test_inspect_says_what_to_give(folder: Path) -> None:
    """Only what is read otherwise; the options read the checkpoint as the class says."""
    done = CliRunner().invoke(cli, ["inspect", str(folder), "--anatomy", "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)["class_axes"]
    assert told == {
        "words.weight": [],
        "layers.*.kernel.weight": [1],
        "up.weight": [1],
        "down.weight": [0],
        "experts.weight": [0, 1],
    }
    said = next(line for line in done.stderr.splitlines() if "class tell" in line)
    given = said.partition("tell: ")[2].replace("'", "").split()
    options = [one for pair in zip(given[::2], given[1::2], strict=True) for one in pair]
    again = CliRunner().invoke(cli, ["inspect", str(folder), *options, "--json"], catch_exceptions=False)
    axes = {one["name"]: one.get("neuron_axes") for one in json.loads(again.stdout)["tensors"]}
    assert axes["layers.1.kernel.weight"] == [1]
    assert axes["up.weight"] == [1]
    assert axes["experts.weight"] == [0, 1]


def test_a_type_that_transformers_does_not_know_either(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "neft-unheard-of"}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    done = CliRunner().invoke(cli, ["inspect", str(tmp_path), "--anatomy"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "neft-unheard-of" in done.stderr
