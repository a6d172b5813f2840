"""Chosen neurons on a CUDA device: gradients, bits and files are those that plain torch has there.

Each test also runs on the processor, so that none is first run on the machine that has a GPU.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from attach_support import ModelOnDisk
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from tuning_support import FAMILIES, batch, llama, put, rows_of, saved, select, vectors

import neftsurgery as ns
from neftsurgery.peft import NeftConfig

pytestmark = pytest.mark.filterwarnings("default")  # other versions of torch and drivers warn of other things
MODES = ("scatter", "overlay")
PICKS = FAMILIES["llama"][1]
NEXT = {
    "model.layers.0.mlp.up_proj.weight": ([0], [5, 6]),
    "model.layers.0.mlp.gate_proj.weight": ([0], [2]),
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def on(device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch(seed, size=4, length=16).items()}


def state(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors, in the processor's memory."""
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in model.state_dict().items()
        if "_neurons_" not in name
    }


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_as_exact(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """``found`` is as near to the exact values, in float64, as plain torch's of the same dtype are."""
    size = exact.norm()
    assert size > 0
    bound = 2 * (plain.double() - exact).norm() + 1e-6 * size
    assert bound < 0.5 * size  # gradients of other rows would be off by more than their size
    assert (found.double() - exact).norm() <= bound


def run(model: Any, device: torch.device, autocast: bool = False) -> Tensor:
    """The logits of a step, after its backward pass."""
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        out = model(**on(device))
    out.loss.backward()
    return out.logits.detach()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*DTYPES, "autocast and checkpointing"])
def test_gradients_are_those_of_plain_autograd(device: torch.device, kind: str, mode: Any) -> None:
    model = llama(**SIZES).to(device, DTYPES.get(kind, torch.float32)).train()
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    attached = ns.attach(model, select(model, PICKS), base=False, mode=mode)
    if kind not in DTYPES:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    logits = [run(one, device, kind not in DTYPES) for one in (model, plain)]
    assert_as_exact(*logits, run(exact, device))
    for name, (axes, index) in PICKS.items():
        rows = rows_of(attached, name)
        assert rows.device.type == device.type
        assert rows.dtype == torch.float32
        theirs = (vectors(one.get_parameter(name).grad, axes, index) for one in (plain, exact))
        assert_as_exact(rows.grad, *theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_steps_are_those_of_plain_torch_with_the_rest_restored(
    device: torch.device, mode: Any, options: Any
) -> None:
    model = llama(**SIZES).to(device)
    twin, before = copy.deepcopy(model), state(model)
    attached = ns.attach(model, select(model, PICKS), base=False, mode=mode)
    ours = torch.optim.AdamW(attached.parameters(), lr=1e-2, **options)
    theirs = torch.optim.AdamW([twin.get_parameter(name) for name in PICKS], lr=1e-2)
    for step in range(3):
        for one, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            one(**on(device, step)).loss.backward()
            optimizer.step()
        for name, (axes, index) in PICKS.items():
            weight = twin.get_parameter(name)
            trained = vectors(weight.detach(), axes, index).clone()
            weight.data.copy_(before[name])
            put(weight, axes, index, trained)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**on(device)).logits, twin(**on(device)).logits, rtol=1e-3, atol=1e-3
        )
    for name, (axes, index) in PICKS.items():
        expected = vectors(twin.get_parameter(name).detach(), axes, index)
        torch.testing.assert_close(rows_of(attached, name).detach(), expected, rtol=1e-3, atol=1e-4)


def test_a_switch_in_place_is_exact_and_so_is_the_way_back(device: torch.device, tmp_path: Path) -> None:
    disk = ModelOnDisk(tmp_path, torch.bfloat16)
    patches = {name: disk.patch(name, picks) for name, picks in (("one", PICKS), ("two", NEXT))}
    model = disk.model.to(device)
    before = state(model)
    attached = None
    for name in ("one", "two", "one"):
        if attached is None:
            attached = ns.attach(model, patches[name])
        else:
            attached.switch(patches[name])
        assert {value.device.type for value in model.state_dict().values()} == {device.type}
        ns.apply(disk.folder, patches[name], out=tmp_path / "patched", force=True)
        files = load_file(tmp_path / "patched" / "model.safetensors")
        assert_same_bits({key: state(model)[key] for key in files}, files)
        assert any(not torch.equal(before[key], files[key]) for key in files)
    with attached.disabled():
        assert_same_bits(state(model), before)
    attached.detach()
    assert_same_bits(state(model), before)


def test_an_overlay_computes_the_same_and_writes_nothing(device: torch.device, tmp_path: Path) -> None:
    disk = ModelOnDisk(tmp_path, torch.bfloat16)
    patch, model = disk.patch("one", PICKS), disk.model.to(device)
    before = state(model)
    with torch.no_grad():
        with ns.attach(model, patch, mode="scatter"):
            written = model(**on(device)).logits
        plain = model(**on(device)).logits
        with ns.attach(model, patch, mode="overlay"):
            overlaid = model(**on(device)).logits
            assert_same_bits(state(model), before)
    put_in = copy.deepcopy(model)
    ns.apply_live(put_in, patch)
    exact = put_in.double()(**on(device)).logits.detach()
    assert_as_exact(overlaid, written, exact)
    with pytest.raises(AssertionError):
        assert_as_exact(plain, written, exact)


@pytest.mark.parametrize("mode", MODES)
def test_a_patch_of_the_device_is_the_file_that_extract_makes(
    device: torch.device, tmp_path: Path, mode: Any
) -> None:
    model = saved(llama(**SIZES).bfloat16(), tmp_path / "base").to(device)
    attached = ns.attach(model, select(model, PICKS), mode=mode)
    optimizer = torch.optim.AdamW(attached.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        model(**on(device, step)).loss.backward()
        optimizer.step()
    patch = attached.patch(tmp_path / "patch.safetensors", reversible=True)
    ns.apply(tmp_path / "base", patch, out=tmp_path / "tuned")
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    for name, (axes, index) in PICKS.items():
        written = rows_of(attached, name).detach().cpu().bfloat16()
        assert torch.equal(vectors(tuned[name], axes, index), written)
    again = ns.extract(
        tmp_path / "base", tmp_path / "tuned", attached.selection, reversible=True, out=tmp_path / "again"
    )
    again.save(tmp_path / "again.safetensors")
    assert_same_bits(load_file(tmp_path / "patch.safetensors"), load_file(tmp_path / "again.safetensors"))


def test_neurons_follow_a_model_to_the_device(device: torch.device, tmp_path: Path) -> None:
    disk = ModelOnDisk(tmp_path)
    patch, model = disk.patch("one", PICKS), disk.model
    before = state(model)
    attached = ns.attach(model, select(model, PICKS), mode="overlay")
    model.to(device)
    model(**on(device)).loss.backward()
    assert all(one.grad is not None and one.device.type == device.type for one in attached.parameters())
    attached.detach()
    put_in = ns.attach(model, patch)
    expected = state(model)
    model.cpu()
    assert_same_bits(state(model), expected)
    put_in.detach()
    assert_same_bits(state(model), before)


def test_a_patch_goes_into_a_model_on_the_device(device: torch.device, tmp_path: Path) -> None:
    disk = ModelOnDisk(tmp_path, torch.bfloat16)
    patch, model = disk.patch("one", PICKS), disk.model.to(device)
    ns.apply_live(model, patch)
    ns.apply(disk.folder, patch, out=tmp_path / "patched")
    files = load_file(tmp_path / "patched" / "model.safetensors")
    assert_same_bits({key: state(model)[key] for key in files}, files)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_an_adapter_is_saved_and_loaded(device: torch.device, tmp_path: Path, dtype: torch.dtype) -> None:
    bare = llama(**SIZES).to(device, dtype)
    before = state(bare)
    model = get_peft_model(copy.deepcopy(bare), NeftConfig(neurons="10%", anatomy="units"))
    rows = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {one.dtype for one in rows} == {torch.float32}
    optimizer = torch.optim.AdamW(rows, lr=1e-2, fused=True)
    for step in range(2):
        optimizer.zero_grad()
        model(**on(device, step)).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "adapter").eval()
    with torch.no_grad():
        tuned = model(**on(device)).logits
        assert torch.equal(loaded(**on(device)).logits, tuned)
        with model.disable_adapter():
            assert torch.equal(model(**on(device)).logits, bare(**on(device)).logits)
        whole = copy.deepcopy(model).double()(**on(device)).logits
        model.merge_adapter()
        assert_as_exact(tuned, model(**on(device)).logits, whole)
        model.unmerge_adapter()
    assert_same_bits(state(model.unload()), before)


def test_gradients_of_stacked_experts(device: torch.device) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "grouped_mm"}
    model: Any = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**sizes, **heads, **experts, initializer_range=0.3, decoder_sparse_step=1)
    )
    model = model.to(device, torch.bfloat16)
    name = "model.layers.0.mlp.experts.down_proj"
    picks = {name: ([0, 1], [0, 3, 70, 255])}
    plain = copy.deepcopy(model)
    attached = ns.attach(model, select(model, picks), base=False)
    for one in (model, plain):
        run(one, device)
    # The router may send a token elsewhere in float64, so the plain gradient is the oracle here.
    expected = vectors(plain.get_parameter(name).grad, *picks[name]).float()
    assert expected.norm() > 0
    assert (rows_of(attached, name).grad - expected).norm() < 0.01 * expected.norm()


@pytest.mark.cuda
@pytest.mark.slow
def test_a_compiled_step(cuda: torch.device) -> None:
    """Forward, backward and optimizer, all compiled: the values are those of the plain step."""
    torch._dynamo.reset()
    found, picks = [], dict(list(PICKS.items())[:2])
    for compiled in (False, True):
        model = llama(**SIZES, num_hidden_layers=1).to(cuda)
        attached = ns.attach(model, select(model, picks), base=False, mode="overlay")
        optimizer = torch.optim.AdamW(attached.parameters(), lr=1e-2)
        forward = torch.compile(model) if compiled else model
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        for number in range(3):
            optimizer.zero_grad()
            forward(**on(cuda, number)).loss.backward()
            step()
        found.append([rows.detach().clone() for rows in attached.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
def test_a_base_in_4_bits(cuda: torch.device, tmp_path: Path) -> None:
    """As with QLoRA: the rows start from the original files, are trained, and the patch fits those files."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    saved(llama(**SIZES).bfloat16(), tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base",
        dtype=torch.bfloat16,
        device_map={"": cuda},
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
    )
    name = "model.layers.0.mlp.up_proj.weight"
    original = llama(**SIZES).bfloat16()
    attached = ns.attach(model, select(original, {name: PICKS[name]}), base=tmp_path / "base")
    first = rows_of(attached, name).detach().cpu().clone()
    assert torch.equal(first, vectors(original.get_parameter(name).detach(), *PICKS[name]).float())
    optimizer = torch.optim.AdamW(attached.parameters(), lr=1e-2)
    model(**on(cuda)).loss.backward()
    assert rows_of(attached, name).grad.abs().max() > 0
    optimizer.step()
    patch = attached.patch(tmp_path / "patch.safetensors")
    ns.apply(tmp_path / "base", patch, out=tmp_path / "tuned")
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    assert torch.equal(vectors(tuned[name], *PICKS[name]), rows_of(attached, name).detach().cpu().bfloat16())
