"""Names under another prefix: which change of them fits, and what is read after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support import LLAMA_CONFIG, llama, write_file, write_folder

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.name_prefixes import Prefixes, fitting_prefixes
from neftsurgery.tensors.header import TensorInfo

BASE = llama(32, 48, 2, 64, seed=0)
TUNED = {name: array + np.float32(0.01) for name, array in BASE.items()}
HEAD = "lm_head.weight"


def under(strip: str, add: str, names: dict[str, np.ndarray] = TUNED) -> dict[str, np.ndarray]:
    """The names as another class or wrapper writes them; the head stays outside of an inner prefix."""
    return {add + name[len(strip) :] if name.startswith(strip) else name: a for name, a in names.items()}


#: How names become others when they are saved; the options that take it back.
SAVED = {
    "torch.compile": (("", "_orig_mod."), {"strip_prefix": "_orig_mod."}),
    "DDP": (("", "module."), {"strip_prefix": "module."}),
    "DDP of compiled": (("", "module._orig_mod."), {"strip_prefix": "module._orig_mod."}),
    "PEFT": (("", "base_model.model."), {"strip_prefix": "base_model.model."}),
    "a vision model": (
        ("model.", "model.language_model."), {"strip_prefix": "model.language_model.", "add_prefix": "model."}
    ),
    "an older vision model": (("model.", "language_model.model."), {"strip_prefix": "language_model."}),
    "Mamba": (("model.", "backbone."), {"strip_prefix": "backbone.", "add_prefix": "model."}),
    "the body": (("model.", ""), {"add_prefix": "model."}),
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "base", BASE, 2, LLAMA_CONFIG)
    return tmp_path


@pytest.mark.parametrize("case", SAVED)
def test_the_refusal_names_the_prefix_and_with_it_all_is_read(here: Path, case: str) -> None:
    (strip, add), options = SAVED[case]
    write_folder(here / "tuned", under(strip, add), 3, LLAMA_CONFIG)
    write_folder(here / "plain", TUNED, 1, LLAMA_CONFIG)
    for verb in (
        lambda: ns.diff("base", "tuned"),
        lambda: ns.diff("base", "tuned", include=["*"]),
        lambda: ns.extract("base", "tuned", changed=True),
    ):
        with pytest.raises(ns.MismatchError, match="under another prefix") as error:
            verb()
        for name, prefix in options.items():
            assert (f"{name}='{prefix}'" in str(error.value)) == bool(prefix)
    given = {name: prefix for name, prefix in options.items() if prefix}
    wanted, found = (ns.diff("base", named, **how) for named, how in (("plain", {}), ("tuned", given)))
    assert found.tensors.keys() == wanted.tensors.keys()
    for name in wanted.tensors:
        np.testing.assert_array_equal(found.values(name), wanted.values(name))
    ns.extract("base", "tuned", changed=True, include=["*"], with_bias=True, out="p", **given).close()
    ns.apply("base", "p", out="made")
    made = {n: a for file in (here / "made").glob("*.safetensors") for n, a in load_file(file).items()}
    for name, array in TUNED.items():
        np.testing.assert_array_equal(made[name], array)


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_a_real_compiled_model_and_a_real_wrapper(here: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(3))

    net = Net()
    saved = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    compiled = {name: tensor.numpy() for name, tensor in torch.compile(net).state_dict().items()}
    assert compiled.keys() == {f"_orig_mod.{name}" for name in saved}
    write_file(here / "a", saved)
    write_file(here / "b", compiled)
    with pytest.raises(ns.MismatchError, match=r"strip_prefix='_orig_mod\.'"):
        ns.diff("a", "b")
    assert ns.diff("a", "b", strip_prefix="_orig_mod").neurons == 12


@pytest.mark.parametrize("prefix", ["model", "model.", "model.."])
def test_a_prefix_may_be_given_without_its_dot(prefix: str) -> None:
    assert Prefixes.of(prefix, prefix) == Prefixes("model.", "model.")
    assert not Prefixes.of()
    for empty in ("", ".", ".."):
        with pytest.raises(ns.UsageError, match="strip_prefix is empty"):
            Prefixes.of(empty)
        with pytest.raises(ns.UsageError, match="add_prefix is empty"):
            Prefixes.of(None, empty)


def test_a_prefix_is_whole_parts_of_names() -> None:
    assert Prefixes.of("mod").changed(["mod.a", "model.b"], (), "t") == {"mod.a": "a", "model.b": "model.b"}


def test_a_prefix_that_no_name_has(here: Path) -> None:
    write_folder(here / "tuned", under("", "module."))
    with pytest.raises(
        ns.UsageError, match=r"no name of a tensor changes by strip_prefix='modul\.'"
    ) as error:
        ns.diff("base", "tuned", strip_prefix="modul.")
    assert error.value.found == "names that begin with module."
    assert error.value.file == "tuned"


def test_two_tensors_that_would_get_one_name(here: Path) -> None:
    write_folder(here / "tuned", TUNED | {"layers.0.mlp.up_proj.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(ns.MismatchError, match="two tensors have one name") as error:
        ns.diff("base", "tuned", strip_prefix="model.")
    assert error.value.tensor == "layers.0.mlp.up_proj.weight"
    assert error.value.found == "layers.0.mlp.up_proj.weight and model.layers.0.mlp.up_proj.weight" or (
        error.value.found == "model.layers.0.mlp.up_proj.weight and layers.0.mlp.up_proj.weight"
    )


def test_a_wrong_change_of_names_is_answered_with_the_right_one(here: Path) -> None:
    write_folder(here / "tuned", under("", "module."))
    with pytest.raises(ns.MismatchError, match=r"strip_prefix='module\.'$"):
        ns.diff("base", "tuned", strip_prefix="module.model.")
    with pytest.raises(ns.MismatchError, match=r"strip_prefix='module\.'$"):
        ns.diff("base", "tuned", add_prefix="model.")


def test_a_change_that_fits_nothing_shows_the_names_that_it_makes(here: Path) -> None:
    write_folder(here / "tuned", TUNED)
    with pytest.raises(ns.MismatchError, match="no tensor of a layer in common") as error:
        ns.diff("base", "tuned", strip_prefix="model.")
    assert str(error.value.expected).startswith("model.layers.0.")
    assert str(error.value.found).startswith("layers.0.")


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_adapter_has_no_names_to_change(here: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(here / "adapter")
    with pytest.raises(ns.UsageError, match=r"strip_prefix='model\.' does not go with an adapter"):
        ns.diff("base", "adapter", strip_prefix="model.")
    assert ns.diff("base", "adapter").neurons


def test_only_the_head_in_common_is_no_comparison(here: Path) -> None:
    other = {name.replace("layers", "h").replace("_proj", "_linear"): a for name, a in TUNED.items()}
    write_folder(here / "tuned", {n: a for n, a in other.items() if n == HEAD or ".h." in n})
    for options in ({}, {"include": ["*"]}):
        with pytest.raises(ns.MismatchError, match="have no tensor of a layer in common") as error:
            ns.diff("base", "tuned", **options)
        assert HEAD in str(error.value.hint)
    write_file(here / "head.safetensors", {HEAD: TUNED[HEAD]})  # one that has nothing but a head is compared
    assert ns.diff("base", "head.safetensors", include=[HEAD]).neurons == 64


def test_the_change_is_recorded_and_the_fingerprint_is_of_the_files(here: Path) -> None:
    write_folder(here / "tuned", under("", "module."), 2)
    scores = ns.diff("base", "tuned", strip_prefix="module", out="s")
    fingerprint = ns.diff("tuned", "tuned").base.fingerprint
    expected = {"name": "tuned", "strip_prefix": "module.", "fingerprint": fingerprint}
    assert scores.tuned.to_json() == expected
    with pytest.raises(ns.MismatchError, match=r"strip_prefix='module\.'"):
        ns.extract("base", "tuned", scores=scores, neurons=3)
    patch = ns.extract("base", "tuned", scores=scores, neurons=3, strip_prefix="module")
    assert patch.facts.captured is not None
    chosen = scores.select(neurons=3)
    assert chosen.facts.tuned == expected
    with pytest.raises(ns.MismatchError, match=r"strip_prefix='module\.'"):
        ns.extract("base", "tuned", chosen)
    assert ns.extract("base", "tuned", chosen, strip_prefix="module").neurons == 3


def test_rows_windows_and_positions_are_read_under_the_new_names(here: Path) -> None:
    write_folder(here / "tuned", under("model.", "model.language_model."), 3)
    stored = Checkpoint.open("tuned")
    new = stored.renamed(Prefixes("model.language_model.", "model."), BASE)
    assert new.tensors.keys() == TUNED.keys()
    for name, info in new.tensors.items():
        assert info.name == name
        out = np.empty((1, TUNED[name].nbytes // len(TUNED[name])), np.uint8)
        new.read_rows(name, np.array([len(TUNED[name]) - 1]), out)
        assert out.tobytes() == TUNED[name][-1:].tobytes()
        old = name if name == HEAD else f"model.language_model.{name.removeprefix('model.')}"
        assert new.position(name) == stored.position(old)
    assert stored.tensors.keys() == under("model.", "model.language_model.").keys()


def test_a_patch_for_names_under_another_prefix_says_so(here: Path) -> None:
    write_folder(here / "tuned", TUNED)
    write_folder(here / "vision", under("model.", "model.language_model.", BASE))
    ns.extract("base", "tuned", neurons="3%", out="p").close()
    with pytest.raises(ns.MismatchError, match="not for this checkpoint") as error:
        ns.apply("vision", "p", out="new")
    assert "strip_prefix='model.' add_prefix='model.language_model.'" in str(error.value)
    patch = ns.extract(
        "vision", "tuned", neurons="3%", strip_prefix="model", add_prefix="model.language_model"
    )
    ns.apply("vision", patch, out="new")


def infos(*names: str, shape: tuple[int, ...] = (4, 4)) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, "F32", shape) for name in names}


def test_what_fits_by_chance_is_not_named() -> None:
    base = infos(*(f"model.layers.{n}.mlp.weight" for n in range(40)))
    assert fitting_prefixes(base, infos("a.b.weight", "x.0.mlp.weight")) is None
    assert fitting_prefixes(base, base) is None
    assert fitting_prefixes(base, infos(*(f"module.{name}" for name in base), shape=(4, 8))) is None
    assert fitting_prefixes(base, infos(*(f"module.{name}" for name in base))) == Prefixes("module.", "")
    assert fitting_prefixes({}, base) is None
    assert fitting_prefixes(base, {}) is None


class Counting(dict[str, TensorInfo]):
    """Tensors that count how often one is looked up."""

    looked_up = 0

    def __getitem__(self, name: str) -> TensorInfo:
        self.looked_up += 1
        return super().__getitem__(name)


def test_names_that_all_end_alike_are_not_compared_with_each_other() -> None:
    base = Counting(infos(*(f"a{n}.weight" for n in range(5000))))
    tuned = infos(*(f"b{n}.weight" for n in range(5000)))
    fitting_prefixes(base, tuned)
    assert 5000 <= base.looked_up <= 50 * 5000
