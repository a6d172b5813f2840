"""Chosen neurons as a method of PEFT: what PEFT does with an adapter, beside plain torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

import neftsurgery as ns
from neftsurgery.errors import NeftError
from neftsurgery.peft.config import NeftConfig
from neftsurgery.peft.layer import AdaptedWeight

# PEFT calls deprecated functions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
IDS = torch.arange(18).view(2, 9)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=64, **more)).double()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=64,
            n_positions=32,
            attn_pdrop=0,
            embd_pdrop=0,
            resid_pdrop=0,
            tie_word_embeddings=False,
        )
    ).double()


def mixtral(implementation: str = "batched_mm") -> Any:
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 64}
    model = MixtralForCausalLM(MixtralConfig(**sizes)).double()
    model.set_experts_implementation(implementation)
    return model


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 6)
        self.image = nn.Conv2d(1, 5, 3, padding=1)
        self.out = nn.Linear(5 * 9 * 6, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.out(self.image(self.table(input_ids).unsqueeze(1)).flatten(1))
        return out


def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=ids, **more)
    found: Tensor = getattr(out, "logits", out)
    return found


def trained(model: Any, steps: int = 2) -> Any:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(input_ids=IDS)
        getattr(out, "logits", out).square().mean().backward()
        optimizer.step()
    return model


def layers(model: nn.Module) -> dict[str, AdaptedWeight]:
    """What holds the adapters of each parameter, by its name."""
    found = {one.name: one for one in model.modules() if isinstance(one, AdaptedWeight)}
    assert found
    return found


CASES = {
    "rows": (llama, {"neurons": "10%"}),
    "norm": (llama, {"neurons": "10%", "policy": "norm"}),
    "units": (llama, {"params": 4000, "policy": "magnitude", "anatomy": "units"}),
    "columns": (llama, {"neurons": 30, "anatomy": "ffn"}),
    "Conv1D": (gpt2, {"neurons": "10%"}),
    "embedding": (gpt2, {"neurons": "20%", "include": ["*wte.weight"], "target_modules": ["wte"]}),
    "experts": (mixtral, {"neurons": "20%"}),
    "columns of experts": (mixtral, {"params": "20%", "anatomy": "units", "target_modules": ["experts"]}),
    "experts one by one": (lambda: mixtral("eager"), {"params": "20%", "anatomy": "ffn"}),
    "a router": (mixtral, {"neurons": 12, "include": ["*mlp.gate.weight"], "target_modules": ["gate"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_plain_torch(case: str) -> None:
    make, options = CASES[case]
    plain = make()
    if case == "embedding":
        plain.lm_head.weight = nn.Parameter(
            plain.lm_head.weight.detach().clone()
        )  # untied, as the adapter sees it
    model = get_peft_model(copy.deepcopy(plain), NeftConfig(**options))
    assert torch.equal(logits(model), logits(plain))
    model(input_ids=IDS).logits.square().mean().backward()
    plain(input_ids=IDS).logits.square().mean().backward()
    for name, layer in layers(model).items():
        gradient, axes = plain.get_parameter(name).grad, layer.layout.axes
        first = gradient.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)
        expected = first[layer.neft_index["default"]].flatten(1)
        rows = layer.neft_rows["default"]
        torch.testing.assert_close(rows.grad, expected.to(rows.dtype), rtol=1e-9, atol=1e-15)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "neft_rows" not in n)


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_computes_the_same(case: str) -> None:
    make, options = CASES[case]
    base = make()
    model = trained(get_peft_model(copy.deepcopy(base), NeftConfig(**options)))
    before = logits(model)
    assert not torch.allclose(before, logits(base))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before)
    model.unmerge_adapter()
    for name, layer in layers(model).items():
        assert torch.equal(layer.held, base.get_parameter(name)), name
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), before)
    assert {type(one) for one in merged.modules()} == {type(one) for one in base.modules()}


def test_convolutions_are_trained_too() -> None:
    torch.manual_seed(0)
    base = Convolutions()
    model = trained(get_peft_model(copy.deepcopy(base), NeftConfig(neurons=2, target_modules=["image"])))
    (layer,) = layers(model).values()
    assert layer.neft_rows["default"].shape == (2, 9)
    changed = (layer.neft_rows["default"] != base.image.weight.flatten(1)[layer.neft_index["default"]]).all(1)
    assert changed.all()
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_loads(case: str, low_memory: bool, tmp_path: Path) -> None:
    make, options = CASES[case]
    model = trained(get_peft_model(make(), NeftConfig(**options)))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert "import neftsurgery.peft" in (tmp_path / "README.md").read_text()
    loaded = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in loaded.parameters())


def test_the_base_is_there_to_the_bit() -> None:
    base = llama()
    model = trained(get_peft_model(copy.deepcopy(base), NeftConfig(neurons="10%")))
    tuned = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), tuned)
    assert torch.equal(logits(model.unload()), logits(base))


def test_several_adapters(tmp_path: Path) -> None:
    base = llama()
    model = get_peft_model(copy.deepcopy(base), NeftConfig(neurons="10%"), adapter_name="one")
    trained(model)
    one = logits(model)
    model.add_adapter("two", NeftConfig(neurons=12, target_modules=["up_proj", "o_proj"], seed=1))
    assert torch.equal(logits(model), one)
    model.set_adapter("two")
    trained(model)
    two = logits(model)
    assert not torch.equal(one, two)
    model.set_adapter("one")
    assert torch.equal(logits(model), one)
    for name in ("one", "two"):
        model.save_pretrained(tmp_path, selected_adapters=[name])
        loaded = PeftModel.from_pretrained(llama(), tmp_path / name)
        torch.testing.assert_close(logits(loaded), {"one": one, "two": two}[name])
    mixed = logits(model.eval(), torch.cat([IDS[:1]] * 3), adapter_names=["two", "__base__", "one"])
    torch.testing.assert_close(mixed, torch.stack([two[0], logits(base)[0], one[0]]))
    model.set_adapter("two")
    model.delete_adapter("one")
    assert torch.equal(logits(model), two)


def test_a_mixed_batch_has_the_head_of_each_adapter() -> None:
    def config(seed: int) -> NeftConfig:
        return NeftConfig(neurons=2, target_modules=["image"], modules_to_save=["out"], seed=seed)

    torch.manual_seed(0)
    base, ids = Convolutions(), torch.cat([IDS[:1]] * 3)
    model = trained(get_peft_model(copy.deepcopy(base), config(0), adapter_name="one"))
    model.add_adapter("two", config(1))
    model.set_adapter("two")
    trained(model, steps=3)
    expected = [logits(base, ids)]
    for name in ("one", "two"):
        model.set_adapter(name)
        expected.append(logits(model, ids))
    mixed = logits(model.eval(), ids, adapter_names=["__base__", "one", "two"])
    torch.testing.assert_close(mixed, torch.stack([each[0] for each in expected]))


def test_a_mixed_batch_is_searched_by_beams() -> None:
    model = get_peft_model(llama().eval(), NeftConfig(neurons="30%"), adapter_name="one")
    model.add_adapter("two", NeftConfig(neurons="30%", seed=1))
    mask = torch.ones(2, 9, dtype=torch.int64)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        with torch.no_grad():
            for layer in layers(model).values():
                if name in layer.neft_rows:
                    layer.neft_rows[name] += torch.randn_like(layer.neft_rows[name])
        alone[name] = model.eval().generate(input_ids=IDS[:1], attention_mask=mask[:1], **how)
    names = ["two", "one"]
    ids = torch.cat([IDS[:1]] * 2)
    mixed = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **how)
    assert torch.equal(mixed, torch.cat([alone[name] for name in names]))
    assert not torch.equal(alone["one"], alone["two"])


@pytest.mark.parametrize("state", ["too few", "training", "merged"])
def test_mixed_batches_that_cannot_be(state: str) -> None:
    model = get_peft_model(llama(), NeftConfig(neurons="10%"), adapter_name="one").eval()
    names = ["one"] if state == "too few" else ["one", "__base__"]
    if state == "training":
        model.train()
    if state == "merged":
        model.merge_adapter()
    with pytest.raises(NeftError, match="a name for each example"):
        model(input_ids=IDS, adapter_names=names)


def test_what_peft_says_of_an_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(llama(), NeftConfig(neurons=9, target_modules=["up_proj"]))
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 288 || all params: ")
    (layer, *_) = layers(model).values()
    assert (layer.in_features, layer.out_features) == (32, 48)


def test_neurons_of_conv1d_are_its_outputs_also_without_a_config() -> None:
    from transformers.pytorch_utils import Conv1D

    model = get_peft_model(nn.Sequential(Conv1D(6, 4)), NeftConfig(neurons=2, target_modules=["0"]))
    (layer,) = layers(model).values()
    assert layer.layout.axes == (1,)


def test_adapters_that_share_neurons_are_not_active_together() -> None:
    model = get_peft_model(llama(), NeftConfig(neurons="10%"), adapter_name="one")
    model.add_adapter("two", NeftConfig(neurons="10%"))
    with pytest.raises(NeftError, match="in common"):
        model.base_model.set_adapter(["one", "two"])


def test_disjoint_adapters_add_up() -> None:
    model = get_peft_model(llama(), NeftConfig(neurons=9, target_modules=["up_proj"]), adapter_name="one")
    model.add_adapter("two", NeftConfig(neurons=9, target_modules=["down_proj"]))
    for name in ("one", "two"):
        model.set_adapter(name)
        trained(model)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["one", "two"])), both)


def test_a_new_head_is_trained_and_saved(tmp_path: Path) -> None:
    def classifier() -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(**SIZES, vocab_size=64, num_labels=3, pad_token_id=0)
        return LlamaForSequenceClassification(config).double()

    config = NeftConfig(task_type="SEQ_CLS", neurons="5%", modules_to_save=["score"])
    model = trained(get_peft_model(classifier(), config))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(classifier(), tmp_path)), logits(model))


def test_a_budget_is_settled_over_the_whole_model() -> None:
    model = get_peft_model(llama(), NeftConfig(neurons=50, policy="norm"))
    base = llama()
    scored = []
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = module.weight.detach()
            scored += [
                (norm, f"{name}.weight", row) for row, norm in enumerate((weight.square().mean(1)).tolist())
            ]
    best = {(name, row) for _, name, row in sorted(scored, reverse=True)[:50]}
    found = {
        (name, row) for name, layer in layers(model).items() for row in layer.neft_index["default"].tolist()
    }
    assert found == best


def test_neurons_of_a_file(tmp_path: Path) -> None:
    model = llama().float()
    model.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "tuned")
    selection = ns.diff(tmp_path / "base", tmp_path / "tuned").select(neurons="10%")
    selection.save(tmp_path / "selection.safetensors")
    patch = ns.extract(tmp_path / "base", tmp_path / "tuned", selection, out=tmp_path / "patch.safetensors")
    ns.apply(tmp_path / "base", patch, out=tmp_path / "patched")

    chosen = get_peft_model(
        copy.deepcopy(model), NeftConfig(selection=str(tmp_path / "selection.safetensors"))
    )
    counts = {name: len(layer.neft_index["default"]) for name, layer in layers(chosen).items()}
    assert counts == selection.counts
    assert torch.equal(logits(chosen), logits(model))
    config = NeftConfig(selection=str(tmp_path / "patch.safetensors"))
    merged = get_peft_model(copy.deepcopy(model), config).merge_and_unload()
    for name, value in LlamaForCausalLM.from_pretrained(tmp_path / "patched").state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name
    chosen.save_pretrained(tmp_path / "adapter")
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({}, "a selection or patch file, or a budget"),
        ({"neurons": "3%", "selection": "s.safetensors"}, "a selection or patch file, or a budget"),
        ({"neurons": "3%", "target_modules": ["no_such"]}, "no neuron"),
        ({"neurons": 0}, "at least 1"),
    ],
)
def test_bad_configs_change_nothing(config: dict[str, Any], problem: str) -> None:
    model = llama()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(NeftError, match=problem):
        get_peft_model(model, NeftConfig(**config))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    trained(get_peft_model(llama(), NeftConfig(neurons="10%"))).save_pretrained(tmp_path)
    with pytest.raises(NeftError, match="no such parameter"):
        PeftModel.from_pretrained(gpt2(), tmp_path)


def test_a_tied_weight_is_refused() -> None:
    model = llama(tie_word_embeddings=True)
    with pytest.raises(NeftError, match=r"tied to lm_head"):
        get_peft_model(
            model, NeftConfig(neurons=3, include=["*embed_tokens.weight"], target_modules=["embed_tokens"])
        )


def test_adapters_of_stacked_experts(tmp_path: Path) -> None:
    """Of other parameters of one module, added in any order, and several at a time."""
    base = mixtral()
    both = NeftConfig(params="20%", target_modules=["experts"], seed=1)
    base.save_pretrained(tmp_path / "base")
    chosen = ns.diff(tmp_path / "base", score="norm", only=["*.w2.weight"]).select(neurons="20%")
    chosen.save(tmp_path / "down.safetensors")
    down = NeftConfig(selection=str(tmp_path / "down.safetensors"))
    model = get_peft_model(copy.deepcopy(base), down, adapter_name="down")
    trained(model)
    one = logits(model)
    model.add_adapter("both", both)
    assert torch.equal(logits(model), one)
    model.set_adapter("both")
    trained(model)
    two = logits(model)
    assert not torch.allclose(one, two)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    for name, expected in (("down", one), ("both", two)):
        model.save_pretrained(tmp_path, selected_adapters=[name])
        loaded = PeftModel.from_pretrained(mixtral(), tmp_path / name)
        assert torch.equal(logits(loaded), expected)
    with pytest.raises(NeftError, match="stacked weights"):
        logits(model.eval(), adapter_names=["down", "both"])
    model.delete_adapter("down")
    assert torch.equal(logits(model), two)
    assert type(model.unload().model.layers[0].mlp.experts) is type(base.model.layers[0].mlp.experts)


def test_experts_are_recomputed_in_the_backward_pass() -> None:
    models = [get_peft_model(mixtral("eager"), NeftConfig(params="20%")) for _ in range(2)]
    models[1].gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for model in models:
        model.train()(input_ids=IDS).logits.square().mean().backward()
        gradients.append({name: one.neft_rows["default"].grad for name, one in layers(model).items()})
    torch.testing.assert_close(gradients[1], gradients[0])


def test_what_reads_a_parameter_from_outside_finds_the_neurons() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)  # reads the weight of its last layer itself
    x = torch.randn(2, 3, 8)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = copy.deepcopy(attention)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out

    model = get_peft_model(Model(), NeftConfig(neurons=3, anatomy="rows", target_modules=["out_proj"]))
    (weight,) = layers(model).values()
    model(x).square().mean().backward()
    attention(x, x, x, need_weights=False)[0].square().mean().backward()
    index, rows = weight.neft_index["default"], weight.neft_rows["default"]
    torch.testing.assert_close(rows.grad, attention.out_proj.weight.grad[index])


def test_a_parameter_of_the_whole_model_is_no_neuron_of_a_module() -> None:
    class Model(Convolutions):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.Parameter(torch.ones(4, 3))

    model = get_peft_model(Model(), NeftConfig(neurons="50%"))
    assert not any("scales" in name for name in layers(model))
    counts = {"scales": [2, 0]}
    with pytest.raises(NeftError, match=r"scales: the model reads it itself"):
        get_peft_model(Model(), NeftConfig(neurons=1, counts=counts))
