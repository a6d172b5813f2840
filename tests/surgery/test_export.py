"""Patches as LoRA adapters: PEFT is the oracle, on models of transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_support import tiny
from safetensors import safe_open
from safetensors.numpy import load_file
from support import Result, raw_file, raw_read, snapshot, write_file, write_folder

import neftsurgery as ns
from neftsurgery.storage.threads import DEFAULT_MEMORY, Limits
from neftsurgery.surgery.export import plan_export
from neftsurgery.surgery.lora_modules import LoraModule, LoraPlace

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ARCHITECTURES = ["llama", "gpt2", "bert", "opt"]


def load(path: Path, name: str) -> torch.nn.Module:
    return type(tiny(name)).from_pretrained(path).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Base and tuned checkpoints of an architecture, made once; small steps, and such as change signs."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> tuple[Path, Path]:
        base, tuned = root / name / "base", root / name / "tuned"
        if not base.exists():
            model = tiny(name)
            model.save_pretrained(base)
            with torch.no_grad():
                for n, parameter in enumerate(model.parameters()):
                    step = 2 * torch.rand_like(parameter) - 1
                    parameter *= 1 + (2 * step if n % 3 else 1e-3 * step)
            model.save_pretrained(tuned)
        return base, tuned

    return make


def cut(sides: tuple[Path, Path], out: Path, **options: object) -> ns.Patch:
    usual = {"neurons": "20%", "policy": "random", "reversible": True}
    return ns.extract(*sides, out=out, **(usual | options))


def merged(base: Path, adapter: Path, name: str) -> dict[str, np.ndarray]:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(base, name), adapter)
    return {key: value.numpy() for key, value in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("anatomy", ["rows", "ffn", "units"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_merges_an_export_to_what_apply_gives(
    models: Callable[[str], tuple[Path, Path]], tmp_path: Path, name: str, anatomy: str
) -> None:
    """Within one float32 ulp of the difference, and exactly but for the elements that are counted."""
    base, tuned = models(name)
    patch = cut((base, tuned), tmp_path / "p", anatomy=anatomy, reversible=anatomy == "ffn")
    done = ns.export_lora(patch, tmp_path / "adapter", base=base)
    assert {module.place.rows for module in done.modules} == ({True} if anatomy == "rows" else {True, False})
    ns.apply(base, patch, out=tmp_path / "applied")
    old, new = (load_file(path / "model.safetensors") for path in (base, tmp_path / "applied"))
    found = merged(base, tmp_path / "adapter", name)
    inexact = 0
    for key, value in new.items():
        gap = np.abs(found[key].astype(np.float64) - value)
        assert (gap <= np.spacing(np.abs(value - old[key]))).all(), key
        inexact += np.count_nonzero(found[key] != value)
    assert inexact == done.inexact
    assert done.elements == patch.parameters
    assert 0 < inexact < 0.6 * done.elements  # the large steps do not all round back


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attached_logits_are_those_of_the_patched_model(
    models: Callable[[str], tuple[Path, Path]], tmp_path: Path, name: str
) -> None:
    from peft import PeftModel

    base, tuned = models(name)
    patch = cut((base, tuned), tmp_path / "p", anatomy="ffn")
    ns.export_lora(patch, tmp_path / "adapter", base=base)
    ns.apply(base, patch, out=tmp_path / "applied")
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        expected = load(tmp_path / "applied", name)(input_ids=ids).logits
        attached = PeftModel.from_pretrained(load(base, name), tmp_path / "adapter").eval()
        found = attached(input_ids=ids).logits
        plain = load(base, name)(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-3 * (plain - expected).abs().max()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def two(models: Callable[[str], tuple[Path, Path]], tmp_path: Path, name: str) -> tuple[Path, list[ns.Patch]]:
    """Two patches on the same neurons, as `attach` would train them twice: the second one's are scaled."""
    base, tuned = models(name)
    first = cut((base, tuned), tmp_path / "p", anatomy="ffn")
    other = tmp_path / "other"
    shutil.copytree(tuned, other)
    arrays = load_file(other / "model.safetensors")
    write_file(
        other / "model.safetensors",
        {k: (1.5 * v).astype(v.dtype) for k, v in arrays.items()},
        {"format": "pt"},
    )
    return base, [first, ns.extract(base, other, first.selection, out=tmp_path / "q", reversible=True)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exports_hot_swap(models: Callable[[str], tuple[Path, Path]], tmp_path: Path, name: str) -> None:
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter

    base, patches = two(models, tmp_path, name)
    for number, patch in enumerate(patches):
        ns.export_lora(patch, tmp_path / f"a{number}", base=base)
        ns.apply(base, patch, out=tmp_path / f"applied{number}")
    model = PeftModel.from_pretrained(load(base, name), tmp_path / "a0").eval()
    ids = torch.arange(12).reshape(1, 12)
    for number in (0, 1, 0):
        hotswap_adapter(model, tmp_path / f"a{number}", adapter_name="default")
        with torch.no_grad():
            expected = load(tmp_path / f"applied{number}", name)(input_ids=ids).logits
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exports_add_up_by_concatenation(
    models: Callable[[str], tuple[Path, Path]], tmp_path: Path, name: str
) -> None:
    """PEFT's exact way to add adapters is our `sum`."""
    from peft import PeftModel

    base, patches = two(models, tmp_path, name)
    for number, patch in enumerate(patches):
        ns.export_lora(patch, tmp_path / f"a{number}", base=base)
    model = PeftModel.from_pretrained(load(base, name), tmp_path / "a0", adapter_name="a0")
    model.load_adapter(tmp_path / "a1", adapter_name="a1")
    model.add_weighted_adapter(["a0", "a1"], [1.0, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    found = {k: v.numpy() for k, v in model.merge_and_unload().state_dict().items()}
    total = ns.merge(patches, on_overlap="sum", weights=[1, 0.5], out=tmp_path / "sum")
    ns.apply(base, total, out=tmp_path / "applied")
    for key, value in load_file(tmp_path / "applied" / "model.safetensors").items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


def test_the_portable_profile(models: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    base, tuned = models("gpt2")
    patch = cut((base, tuned), tmp_path / "p", neurons=60, anatomy="ffn")
    done = ns.export_lora(patch, tmp_path / "adapter", base=base)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    largest = max(tensor.count for tensor in patch.tensors.values())
    assert config["r"] == config["lora_alpha"] == done.rank >= largest
    assert done.rank in (16, 32)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["fan_in_fan_out"]
    assert config["task_type"] == "CAUSAL_LM"
    assert config["bias"] == "none"
    assert str(tmp_path) not in json.dumps(config)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "numpy") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        assert {file.get_slice(key).get_dtype() for key in shapes} == {"F32"}
    assert {n[0 if "lora_A" in key else 1] for key, n in shapes.items()} == {done.rank}
    assert len(shapes) == 2 * len(patch.tensors)
    from peft import PeftConfig

    assert PeftConfig.from_pretrained(tmp_path / "adapter").target_modules == set(config["target_modules"])


def test_a_reversible_patch_needs_no_base_and_any_memory_gives_the_same(
    models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = models("llama")
    patch = cut((base, tuned), tmp_path / "p", anatomy="ffn")
    ns.export_lora(patch, tmp_path / "with", base=base)
    ns.export_lora(patch, tmp_path / "without")
    plan_export(patch, tmp_path / "small", base=base).run(limits=Limits(3, DEFAULT_MEMORY, block=100))
    weights = {
        name: (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("with", "without", "small")
    }
    assert len(set(weights.values())) == 1


def test_without_a_config_a_patch_of_rows_still_tells_how_its_weights_are_stored(
    models: Callable[[str], tuple[Path, Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = models("gpt2")
    patch = cut((base, tuned), tmp_path / "p")
    ns.export_lora(patch, tmp_path / "with", base=base)
    ns.export_lora(patch, tmp_path / "without")
    assert "stored" not in caplog.text
    weights = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("with", "without")]
    assert weights[0] == weights[1]
    other = cut((base, tuned), tmp_path / "q", anatomy="ffn")
    ns.export_lora(other, tmp_path / "assumed")
    assert "how the weights are stored" in caplog.text
    assert "Conv1D" in caplog.text


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_short_types_are_counted_in_their_own_rounding(tmp_path: Path, kind: str) -> None:
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[kind]
    rng = torch.Generator().manual_seed(0)
    sides, tensors = [], []
    for name in ("base", "tuned"):
        weight = torch.randn(12, 20, generator=rng).to(dtype)
        tensors.append(weight)
        sides.append(
            raw_file(tmp_path / name, {"l.weight": (kind, weight.view(torch.int16).numpy().view("u2"))})
        )
    patch = ns.extract(*sides, changed=True, reversible=True, out=tmp_path / "p")
    done = ns.export_lora(patch, tmp_path / "adapter")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (torch.from_numpy(factors[f"base_model.model.l.lora_{x}.weight"]) for x in "AB")
    weight = tensors[0].clone()
    weight += b @ a  # as PEFT merges
    assert done.inexact == int((weight != tensors[1]).sum())


def refusal(patch: ns.Patch, tmp_path: Path, **options: object) -> ns.NeftError:
    before = snapshot(tmp_path)
    with pytest.raises(ns.NeftError) as caught:
        ns.export_lora(patch, tmp_path / "adapter", **options)
    assert snapshot(tmp_path) == before
    return caught.value


def test_what_has_no_lora_form_is_refused_by_name(
    models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = models("gpt2")
    for options, name, why in (
        ({"with_bias": True}, r"\.bias", "bias"),
        ({"include": ["*wte*"], "only": ["*wte*"], "anatomy": "rows"}, "wte.weight", "embedding"),
        ({"include": ["*ln_1.weight"], "changed": True, "neurons": None}, "ln_1.weight", "norm"),
    ):
        given = {key: value for key, value in ({"neurons": "50%"} | options).items() if value is not None}
        patch = ns.extract(base, tuned, out=tmp_path / "p", force=True, reversible=True, **given)
        error = refusal(patch, tmp_path, base=base)
        assert isinstance(error, ns.MismatchError)
        assert re.search(rf"{name} \({why}\b", str(error))
        assert "neftsurgery apply" in str(error)


def test_experts_and_convolutions_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"conv.weight": (4, 3, 3, 3), "mlp.experts.up_proj": (2, 4, 6), "odd": (4, 5)}
    shapes["unet/linear.weight"] = (4, 5)
    for name, shape in shapes.items():
        sides = [
            write_file(tmp_path / side, {name: rng.standard_normal(shape).astype(np.float32)})
            for side in ("base", "tuned")
        ]
        axis = {"conv.weight": 0, "mlp.experts.up_proj": (0, 1)}
        patch = ns.extract(
            *sides,
            neurons=3,
            axis={name: axis[name]} if name in axis else {},
            reversible=True,
            out=tmp_path / "p",
            force=True,
        )
        assert name in str(refusal(patch, tmp_path))


def test_ranks(tmp_path: Path, neft: Callable[..., Result], caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    base, tuned = (
        write_file(tmp_path / side, {"l.weight": rng.standard_normal((600, 4)).astype(np.float32)})
        for side in ("base", "tuned")
    )
    few = ns.extract(base, tuned, neurons=9, reversible=True, out=tmp_path / "few")
    many = ns.extract(base, tuned, changed=True, reversible=True, out=tmp_path / "many")
    assert ns.export_lora(few, tmp_path / "a").rank == 16
    assert ns.export_lora(few, tmp_path / "b", rank=256).rank == 256
    assert "vLLM" not in caplog.text
    assert ns.export_lora(few, tmp_path / "c", rank=10).rank == 10
    assert "1, 8, 16, 32, 64, 128, 256, 320, 512" in caplog.text
    assert "--max-lora-rank 16" in caplog.text
    small = refusal(few, tmp_path, rank=8)
    assert isinstance(small, ns.UsageError)
    assert (small.found, "at least 9" in str(small)) == (8, True)
    large = refusal(many, tmp_path)
    assert isinstance(large, ns.MismatchError)
    assert "neftsurgery apply" in str(large)
    assert ns.export_lora(many, tmp_path / "d", rank=600).inexact > 0
    done = neft("export", tmp_path / "few", "--to", "lora", "-o", "cli", "--json")
    assert done.code == 0
    assert (done.json["rank"], done.json["rank_needed"]) == (16, 9)
    assert done.json["bytes"] == (tmp_path / "cli" / "adapter_model.safetensors").stat().st_size
    assert neft("export", tmp_path / "few", "--to", "lora", "-o", "cli").code == 2
    said = neft("export", tmp_path / "few", "--to", "lora", "-o", "dry", "--dry-run")
    assert "would write dry" in said.out
    assert "times the patch's" in said.out
    assert not (tmp_path / "dry").exists()


def test_a_wrong_or_missing_base_is_refused(
    models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = models("llama")
    patch = cut((base, tuned), tmp_path / "p", reversible=False)
    assert isinstance(refusal(patch, tmp_path), ns.UsageError)
    assert isinstance(refusal(patch, tmp_path, base=tuned), ns.MismatchError)


def test_a_difference_that_a_product_would_spread_is_refused(tmp_path: Path) -> None:
    old, new = np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)
    new[1, 2] = np.inf
    base, tuned = (write_file(tmp_path / n, {"l.weight": a}) for n, a in (("base", old), ("tuned", new)))
    patch = ns.extract(base, tuned, changed=True, reversible=True, out=tmp_path / "p")
    assert "infinite" in str(refusal(patch, tmp_path))


def test_a_prefix_reaches_the_modules_of_the_live_model(
    models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = models("gpt2")
    sides = []
    for name, path in (("b", base), ("t", tuned)):
        arrays = load_file(path / "model.safetensors")
        config = json.loads((base / "config.json").read_text())
        sides.append(
            write_folder(
                tmp_path / name, {k.removeprefix("transformer."): v for k, v in arrays.items()}, 1, config
            )
        )
    patch = cut((sides[0], sides[1]), tmp_path / "p")
    whole = cut((base, tuned), tmp_path / "q")
    ns.export_lora(patch, tmp_path / "a", base=sides[0], prefix="transformer.")
    ns.export_lora(whole, tmp_path / "b2", base=base)
    assert (
        raw_read(tmp_path / "a" / "adapter_model.safetensors").keys()
        == raw_read(tmp_path / "b2" / "adapter_model.safetensors").keys()
    )


def test_an_adapter_is_for_one_part_of_a_checkpoint_and_has_its_names(
    models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    parts = ("text_encoder", "text_encoder_2")
    for side, model in zip((base, tmp_path / "tuned"), models("llama"), strict=True):
        for part in parts:
            shutil.copytree(model, side / part)
        index = {part: ["transformers", "LlamaForCausalLM"] for part in parts}
        (side / "model_index.json").write_text(json.dumps(index))
    patch = cut((base, tmp_path / "tuned"), tmp_path / "p", only=["text_encoder_2/*"])
    ns.export_lora(patch, tmp_path / "adapter", base=base)
    ns.apply(base, patch, out=out)
    wanted = load_file(out / "text_encoder_2" / "model.safetensors")
    found = merged(base / "text_encoder_2", tmp_path / "adapter", "llama")
    changed = {name.partition("/")[2] for name in patch.tensors}
    assert changed <= wanted.keys()
    for name in changed:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-7)
    both = cut((base, tmp_path / "tuned"), tmp_path / "q")
    with pytest.raises(ns.MismatchError, match="changes several models") as error:
        ns.export_lora(both, tmp_path / "none", base=base)
    assert "found text_encoder/, text_encoder_2/" in str(error.value)


def test_every_neuron_has_a_slot_of_its_own_in_any_order_of_experts() -> None:
    """Two tensors of the files each fill half of the outputs of three experts, neither in their order."""
    first, second = (np.array(index) for index in ([2 * 8 + 1, 0, 8 + 3], [2 * 8 + 5, 8 + 7, 8 + 6]))
    parts = {
        name: LoraPlace("experts", "parameter", 3, 8, (5,), True, index)
        for name, index in {"a": first, "b": second}.items()
    }
    module = LoraModule(parts, parts["a"], rank=3)
    rows, columns, units = (each.tolist() for each in module.slots())
    experts = [2, 0, 1, 2, 1, 1]
    assert module.count == 3
    assert units == [1, 0, 3, 5, 7, 6]
    assert [row // 3 for row in rows] == experts
    assert [column % 3 for column in columns] == experts
    assert [row % 3 for row in rows] == [column // 3 for column in columns] == [0, 0, 0, 1, 1, 2]
