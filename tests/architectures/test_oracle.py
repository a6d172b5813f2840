"""The table against running models: the axis that the anatomy names indexes the output of the module.

The sample holds some forty types of all kinds; `make architectures` reads the files of every type.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from neftsurgery.neurons.anatomy import read_anatomy
from neftsurgery.tensors.header import TensorInfo
from tests.architectures.tiny_models import classes_of, config_of
from tests.architectures.watch import inputs_of, output_axes

TEXT = """llama qwen3 gemma2 gpt2 gpt_neox gpt_neo phi mpt opt falcon_mamba bert deberta-v2 distilbert albert
modernbert mixtral olmoe granitemoe deepseek_v3 t5 bart pegasus_x openai-gpt ctrl fnet biogpt xglm"""
IMAGES = "vit dinov2 deit convnext resnet regnet mobilenet_v2 segformer poolformer pvt levit focalnet"
SOUND = "wav2vec2 hubert"


def _model(model_type: str) -> torch.nn.Module:
    config = config_of(model_type, 16, 2)
    torch.manual_seed(0)
    model = classes_of(model_type)[0](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("model_type", [*TEXT.split(), *IMAGES.split(), *SOUND.split()])
def test_neuron_axes_index_the_output_of_the_running_module(model_type: str) -> None:
    transformers.logging.set_verbosity_error()
    model = _model(model_type)
    infos = {name: TensorInfo(name, "F32", tuple(value.shape)) for name, value in model.state_dict().items()}
    axes = {
        tensor.info.name: tensor.axes for tensor in read_anatomy("rows", infos, model.config.to_dict()).scored
    }
    watched: dict[str, dict[int, bool]] = {}
    for name, axis, told in output_axes(model, inputs_of(model)):
        watched.setdefault(name, {})[axis] = told
    wrong = {
        name: (axes[name], told)
        for name, told in watched.items()
        if name in axes and len(axes[name]) == 1 and told.get(axes[name][0]) is False
    }
    assert not wrong
    seen = [name for name in watched if name in axes]
    assert len(seen) > 2
    # The other way round: what is left out, and indexes an output, is an embedding, head or router.
    reasons = {
        entry.info.name: entry.reason for entry in read_anatomy("rows", infos, model.config.to_dict()).listed
    }
    left = {
        reasons[name] for name, told in watched.items() if name in reasons and told.get(0) and len(told) == 2
    }
    assert left <= {"embedding", "output head", "router", "one element wide"}
