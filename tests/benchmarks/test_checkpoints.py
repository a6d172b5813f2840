"""The libraries accept the checkpoints that benchmarks write."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

import neftsurgery as ns
from benchmarks.checkpoints.shapes import BF16, deep_llama, llama, many_experts
from benchmarks.checkpoints.write import write_pair


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            names = opened.keys()
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    return found


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shards", [1, 5])
def test_safetensors_finds_every_tensor(tmp_path, shards, sparse):
    model = llama(5e6)
    write_pair(tmp_path, model, shards, sparse)
    for side in (tmp_path / "base", tmp_path / "tuned"):
        assert shapes_of(side) == model.tensors
        assert len(list(side.glob("*.safetensors"))) == shards


def test_transformers_loads_a_checkpoint_without_missing_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_pair(tmp_path, llama(5e6))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.config.model_type == "llama"


def test_transformers_accepts_the_config_of_a_mixture_of_experts(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(many_experts(600).config))
    assert transformers.AutoConfig.from_pretrained(tmp_path).num_experts > 1


def test_every_neuron_is_tuned(tmp_path):
    write_pair(tmp_path, llama(5e6), shards=2)
    scores = ns.diff(tmp_path / "base", tmp_path / "tuned")
    assert scores.select(threshold=0.0).neurons == scores.neurons > 1000


@pytest.mark.parametrize("nbytes", [500e6, 2.4e9, 8e9, 100e9])
def test_a_model_has_about_the_bytes_asked_for(nbytes):
    model = llama(nbytes)
    assert model.nbytes == pytest.approx(nbytes, rel=0.1)
    assert model.nbytes == sum(BF16 * math.prod(shape) for shape in model.tensors.values())


def test_models_with_many_tensors():
    assert len(deep_llama(0.5e9, 500).tensors) >= 500
    assert 64_000 <= len(many_experts(64_000).tensors) < 64_200
