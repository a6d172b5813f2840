"""Where the tensors of files lie in live models: what is read from there is what the files have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.core_model_loading import (
    ConversionOps,
    Transpose,
    WeightConverter,
)
from tuning_support import llama

import neftsurgery as ns
from neftsurgery.live.loading import without_progress_bars
from neftsurgery.live.loading_rules import live_weights
from neftsurgery.live.placement import FileTensors, LivePlace, live_places
from neftsurgery.live.weights import read_vectors
from neftsurgery.neurons.layout import Layout
from tests.architectures.placed import check_files, filled
from tests.architectures.tiny_models import classes_of, config_of

EXPERTS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def model_of(model_type: str, **values: Any) -> Any:
    """A model of two layers, or of the first class that can be built of its config."""
    config = config_of(model_type, 64, 2)
    for key, value in (FEW | values).items():
        if hasattr(config, key):
            setattr(config, key, value)
    for cls in classes_of(model_type):
        try:
            with torch.device("meta"):
                return filled(cls(config))
        except ValueError:
            continue
    raise AssertionError(model_type)


def mixtral(experts: int = 3, **values: Any) -> Any:
    sizes = {"vocab_size": 50, "num_key_value_heads": 2, "num_local_experts": experts}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**{**EXPERTS, **sizes, **values}))


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    with without_progress_bars():
        model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def whole(tensors: dict[str, Tensor], *axes: int) -> dict[str, Layout]:
    return {name: Layout(tuple(value.shape), axes) for name, value in tensors.items()}


# How many tensors of the files the loader converts, at least.
FEW = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "vocab_size": 50,
    "pad_token_id": 0,
}
TYPES: dict[str, tuple[int, dict[str, Any]]] = {
    "mixtral": (24, {}),
    "qwen3_moe": (24, {}),
    "qwen2_moe": (24, {}),
    "deepseek_v3": (12, {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
    "glm4_moe": (12, {"first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "gpt_oss": (0, {}),
    "llama4_text": (0, {}),
    "olmoe": (24, {}),
    "minimax": (24, {}),
    "granitemoe": (0, {}),
    "jetmoe": (0, {}),
    "phimoe": (24, {}),
    "nomic_bert": (2, {}),  # Chunk
    "molmo2_text": (6, {"additional_vocab_size": 8}),  # Split, Concatenate
    "inkling2_text": (2, {}),  # Interleave
    "gradium_phonon_tts": (2, {}),  # Chunk, PermuteForRope
    "glm5_next_text": (6, {}),  # Concatenate
    "vit": (0, {}),  # renamed
}


@pytest.mark.parametrize("model_type", TYPES)
def test_each_tensor_of_the_files_is_found_in_the_model(model_type: str, tmp_path: Path) -> None:
    """In the model that wrote the files, and in the model that was loaded from them: the loader is right."""
    converted, values = TYPES[model_type]
    model = model_of(model_type, **values)
    with without_progress_bars():
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype="auto")
    for one in (model, loaded):
        told = check_files(one, tmp_path)
        assert told["wrong"] == told["refused"] == {}
        assert "together" not in told
        assert told["converted"] >= converted
        assert told["neurons"] >= min(converted, 2)
    names = whole(load_file(tmp_path / "model.safetensors"))
    here, there = live_places(model, names), live_places(loaded, names)
    assert {name: spelled(here[name]) for name in here} == {name: spelled(there[name]) for name in there}


def spelled(places: tuple[LivePlace, ...]) -> list[Any]:
    return [
        (
            one.parameter,
            one.region and (one.region.start, [step.tolist() for step in one.region.steps]),
        )
        for one in places
    ]


def test_one_expert_alone(tmp_path: Path) -> None:
    """Some neurons of one expert: its place among all of them comes from the model."""
    model = mixtral(5)
    files = saved(model, tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    (place,) = live_places(model, whole({name: files[name]}, 0))[name]
    assert place.parameter == "model.layers.1.mlp.experts.gate_up_proj"
    assert place.layout == Layout((5, 48, 16), (0, 1))
    chosen = np.array([7, 0, 23])
    live = place.index_of(chosen)
    assert live.tolist() == [3 * 48 + 24 + 7, 3 * 48 + 24, 3 * 48 + 24 + 23]  # w1 lies before w3
    found = read_vectors(model.get_parameter(place.parameter).detach(), place.layout, torch.from_numpy(live))
    assert torch.equal(found, files[name][chosen])


@pytest.mark.parametrize("head", [True, False])
def test_files_without_the_prefix_of_the_model(tmp_path: Path, head: bool) -> None:
    """Files of the base class in a model with a head, and the other way round; never loaded."""
    model = mixtral(12)
    files = saved(model.model if head else model, tmp_path)
    live = copy.deepcopy(model) if head else copy.deepcopy(model.model)
    experts = {name: value for name, value in files.items() if ".experts." in name}
    some = dict([*experts.items()][::5])
    for chosen in (experts, some):
        for name, (place,) in live_places(live, whole(chosen, 0)).items():
            assert torch.equal(place.read(live.get_parameter(place.parameter)), files[name])


def test_a_model_on_the_meta_device(tmp_path: Path) -> None:
    model = mixtral()
    files = saved(model, tmp_path)
    with torch.device("meta"):
        meta = mixtral()
    for name, (place,) in live_places(meta, whole(files, 0)).items():
        (there,) = live_places(model, whole({name: files[name]}, 0))[name]
        assert spelled((place,)) == spelled((there,))


def test_experts_that_lie_transposed_in_the_files(tmp_path: Path) -> None:
    """The loader looks at shapes; a square weight stays as it is."""
    converters = [WeightConverter("experts.w", "experts.w", operations=[Transpose(1, 2, check_dims=True)])]
    for file_shape, transposed in (((3, 4, 6), True), ((3, 6, 4), False), ((3, 4, 4), False)):
        shape = file_shape if not transposed else (3, 6, 4)
        values = torch.arange(float(np.prod(file_shape))).view(file_shape)
        live = values.mT.contiguous() if transposed else values
        (place,) = live_places(
            with_weights({"experts.w": shape}, converters), {"experts.w": Layout(file_shape, (0, 2))}
        )["experts.w"]
        assert torch.equal(place.read(live), values)
        assert place.layout.axes == ((0, 1) if transposed else (0, 2))


def with_weights(shapes: dict[str, tuple[int, ...]], conversions: list[Any]) -> Any:
    """A model of transformers with these weights, as if it had been loaded with these conversions."""

    class Model(tf.PreTrainedModel):
        config_class = tf.LlamaConfig

        def __init__(self) -> None:
            super().__init__(tf.LlamaConfig(**EXPERTS))
            for name, shape in shapes.items():
                *path, last = name.split(".")
                module: nn.Module = self
                for step in path:
                    if step not in dict(module.named_children()):
                        module.add_module(step, nn.Module())
                    module = module.get_submodule(step)
                module.register_parameter(last, nn.Parameter(torch.rand(shape)))

    model = Model()
    model._weight_conversions = conversions
    return model


class Custom(ConversionOps):
    """An operation that a later transformers might have."""

    def __init__(self, work: Callable[[Tensor], Tensor]) -> None:
        self.work = work

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **others: Any) -> Any:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: self.work(tensors[0])}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def placed(
    work: Callable[[Tensor], Tensor], live: tuple[int, ...], axes: tuple[int, ...] = (0,)
) -> LivePlace:
    model = with_weights({"a.new": live}, [WeightConverter("a.old", "a.new", operations=[Custom(work)])])
    (place,) = live_places(model, {"a.old": Layout((4, 6), axes)})["a.old"]
    return place


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], str]] = {
    "dequantized": (lambda t: t * 0.5, (4, 6), "leaves some out"),
    "changed in place": (lambda t: t.add_(1), (4, 6), "values in place"),
    "padding removed": (lambda t: t[:3].contiguous(), (3, 6), "leaves some out"),
    "padded": (lambda t: torch.nn.functional.pad(t, (0, 2)), (4, 8), "leaves some out"),
    "repeated": (lambda t: torch.cat([t, t]), (8, 6), "several places"),
    "other rows": (lambda t: t.reshape(6, 4), (6, 4), "but parts of some"),
    "mixed": (lambda t: t.reshape(3, 8).mT.contiguous(), (8, 3), "mixes its axes"),
    "columns in another order": (lambda t: t.view(4, 2, 3).mT.reshape(4, 6), (4, 6), "another order"),
    "a longer neuron": (lambda t: t.reshape(2, 12), (2, 12), "but parts of some"),
    "another shape": (lambda t: t.mT.contiguous(), (4, 6), r"would have shape \[6, 4\], not \[4, 6\]"),
    "an error": (lambda t: t.tolist(), (4, 6), "Error"),
}


@pytest.mark.parametrize(("work", "live", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_told_is_refused(
    work: Callable[[Tensor], Tensor], live: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ns.MismatchError, match=message) as caught:
        placed(work, live)
    assert str(caught.value).startswith("tensor a.old: ")
    assert "loaded as a.new by Custom" in str(caught.value)


def test_operations_that_nobody_has_named() -> None:
    values = torch.arange(24.0).view(4, 6)
    work: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
        "reversed halves": (lambda t: torch.cat([t[2:], t[:2]]), (4, 6)),
        "more axes": (lambda t: t.view(4, 1, 2, 3), (4, 1, 2, 3)),
        "columns first": (lambda t: t.mT.contiguous(), (6, 4)),
    }
    for name, (each, shape) in work.items():
        place = placed(each, shape)
        live = each(values).clone()
        assert torch.equal(place.read(live), values), name
        index = torch.from_numpy(place.index_of(np.array([2, 1])))
        assert torch.equal(read_vectors(live, place.layout, index), values[[2, 1]]), name
        place.write(live, values + 100)
        assert torch.equal(live, each(values + 100)), name


def test_neurons_that_are_cut_into_several_weights() -> None:
    """The whole tensor can be read and written; only its rows have no place."""
    from transformers.core_model_loading import Chunk

    converter = WeightConverter("a.old", ["a.left", "a.right"], operations=[Chunk(dim=1)])
    model = with_weights({"a.left": (4, 3), "a.right": (4, 3)}, [converter])
    places = live_places(model, {"a.old": Layout((4, 6), ())})["a.old"]
    values, read = torch.rand(4, 6), torch.zeros(4, 6)
    for place in places:
        place.write(model.get_parameter(place.parameter), values[place.part])
        read[place.part] = place.read(model.get_parameter(place.parameter))
    assert torch.equal(read, values)
    assert torch.equal(torch.cat([model.a.left, model.a.right], 1), values)
    with pytest.raises(ns.MismatchError, match="cuts its neurons into several weights"):
        live_places(model, {"a.old": Layout((4, 6), (0,))})
    left, right = live_places(model, {"a.old": Layout((4, 6), (1,))})["a.old"]
    assert left.index_of(np.arange(6)).tolist() == [0, 1, 2, -1, -1, -1]
    assert right.index_of(np.arange(6)).tolist() == [-1, -1, -1, 0, 1, 2]


def test_tensors_of_unequal_sizes_are_placed_if_all_are_given() -> None:
    """What the loader would write has equal sizes; the files' own are taken where they are known."""
    from transformers.core_model_loading import Concatenate

    converter = WeightConverter(["a.q", "a.k"], "a.qk", operations=[Concatenate(dim=0)])
    model = with_weights({"a.qk": (6, 3)}, [converter])
    both = {"a.q": Layout((4, 3), (0,)), "a.k": Layout((2, 3), (0,))}
    found = live_places(model, both)
    assert found["a.k"][0].index_of(np.arange(2)).tolist() == [4, 5]
    with pytest.raises(ns.MismatchError, match=r"a\.qk would have shape \[7, 3\], not \[6, 3\]"):
        live_places(model, {"a.q": both["a.q"]})


def test_names_that_are_the_same_weight() -> None:
    model = mixtral()
    name = "layers.0.block_sparse_moe.experts.1.w2.weight"
    layouts = dict.fromkeys([name, f"model.{name}"], Layout((16, 24), (0,)))
    with pytest.raises(ns.MismatchError, match="loaded together with"):
        live_places(model, layouts)
    merged = {"model.layers.0.mlp.experts.down_proj": Layout((3, 16, 24), (0, 1))}
    with pytest.raises(ns.MismatchError, match="are the same weight"):
        live_places(model, {name: Layout((16, 24), (0,)), **merged})
    with pytest.raises(ns.MismatchError, match="are the same weight"):
        live_places(llama(), dict.fromkeys(["model.norm.weight", "norm.weight"], Layout((16,), ())))


def test_a_tensor_that_the_model_lacks() -> None:
    name = "model.layers.0.block_sparse_moe.experts.7.w1.weight"
    with pytest.raises(ns.MismatchError, match="loaded together with"):
        live_places(mixtral(), {name: Layout((24, 16), (0,))})
    with pytest.raises(ns.MismatchError, match="no such weight"):
        live_places(
            mixtral(), {"model.layers.9.block_sparse_moe.experts.0.w1.weight": Layout((24, 16), (0,))}
        )


def test_names_whose_meaning_depends_on_others() -> None:
    """kimi's files have norm0 and norm1, the model norm1 and norm2: for one alone, too."""
    from transformers.core_model_loading import GroupWeightRename

    renaming = GroupWeightRename(["b.norm0", "b.norm1"], ["b.norm1", "b.norm2"])
    model = with_weights({"b.norm1": (4,), "b.norm2": (5,)}, [renaming])
    found = live_places(model, {"b.norm1": Layout((5,), (0,))})
    assert [place.parameter for place in found["b.norm1"]] == ["b.norm2"]


def test_a_loaded_model_remembers_what_its_files_were(tmp_path: Path) -> None:
    """Files that were written with merged experts have no others."""
    model = mixtral()
    with without_progress_bars():
        model.save_pretrained(tmp_path, save_original_format=False)
        loaded = tf.MixtralForCausalLM.from_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    (place,) = live_places(loaded, whole(files))[name]
    assert (place.parameter, place.region) == (name, None)


def test_experts_are_loaded_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Not of their names: 10 comes after 9. The loader says so, from files that were changed by hand."""
    saved(mixtral(12), tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    for n, name in enumerate(sorted(files)):
        files[name] = torch.full_like(files[name], n + 1)
    save_file(files, tmp_path / "model.safetensors", {"format": "pt"})
    with without_progress_bars():
        loaded = tf.MixtralForCausalLM.from_pretrained(tmp_path)
    for name, (place,) in live_places(loaded, whole(files)).items():
        assert torch.equal(place.read(loaded.get_parameter(place.parameter)), files[name])


def test_a_plain_module() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    (place,) = live_places(model, {"0.weight": Layout((3, 2), (0,))})["0.weight"]
    assert (place.parameter, place.layout) == ("0.weight", Layout((3, 2), (0,)))
    assert place.index_of(np.arange(3)).tolist() == [0, 1, 2]
    with pytest.raises(ns.MismatchError, match="no such weight"):
        live_places(model, {"1.weight": Layout((3, 2), (0,))})


def test_a_buffer_is_read_and_has_no_neurons() -> None:
    model = nn.BatchNorm1d(3)
    (place,) = live_places(model, {"running_mean": Layout((3,), ())})["running_mean"]
    assert place.parameter == "running_mean"
    with pytest.raises(ns.MismatchError, match="a buffer of the model has no neurons"):
        live_places(model, {"running_mean": Layout((3,), (0,))})


def test_the_tensors_of_files_from_the_weights(tmp_path: Path) -> None:
    """Read when they are asked for, from the weights as they are then."""
    model = model_of("nomic_bert")
    files = saved(model, tmp_path)
    tensors = FileTensors(live_weights(model), live_places(model, whole(files)))
    assert {*tensors} == {*files}
    for name, value in files.items():
        assert torch.equal(tensors[name], value)
        tensors.write(name, value + 1)
        assert torch.equal(tensors[name], value + 1)
