"""Tied tensors, in every form that files keep them in: transformers' loading is the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from safetensors.torch import save_model
from support import Result, snapshot

import neftsurgery as ns
from neftsurgery.surgery import rewrite
from neftsurgery.surgery.diff import plan_diff
from neftsurgery.surgery.extract import plan_extract
from neftsurgery.surgery.verify import plan_verify

transformers = pytest.importorskip("transformers")
E, H = "model.embed_tokens.weight", "lm_head.weight"
FORMS = ["saved by transformers", "saved by save_model", "both", "both in shards"]
LOSSLESS = {"changed": True, "include": ["*"], "with_bias": True}


def build(seed: int, tied: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if seed else ():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


def save(model: torch.nn.Module, folder: Path, form: str) -> Path:
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    state = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    if form == "saved by save_model":
        save_model(model, str(file), metadata={"format": "pt"})
    elif form == "both":
        save_torch(state, file, {"format": "pt"})
    elif form == "both in shards":
        file.unlink()
        parts = {"a.safetensors": [H], "b.safetensors": [name for name in state if name != H]}
        for name, held in parts.items():
            save_torch({one: state[one] for one in held}, folder / name, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {one: name for name, held in parts.items() for one in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same_as(folder: Path, model: torch.nn.Module) -> None:
    """What transformers loads from a folder is the model, to the bit, with the same weights tied."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (loaded, model)]
    assert tied[0] == tied[1]


@pytest.mark.parametrize("tuned_form", FORMS)
@pytest.mark.parametrize("base_form", FORMS)
def test_a_tied_tensor_is_one_tensor_however_it_is_saved(
    tmp_path: Path, base_form: str, tuned_form: str
) -> None:
    base, tuned = build(0), build(1)
    a, b = save(base, tmp_path / "base", base_form), save(tuned, tmp_path / "tuned", tuned_form)
    scores = ns.diff(a, b)
    assert scores.facts["only_in_base"] == scores.facts["only_in_tuned"] == []
    assert scores.parameters == sum(p.numel() for p in base.parameters())
    plan = plan_extract(a, b, include=["*"], changed=True, with_bias=True)
    assert plan.describe()["whole_change"] is True, plan.describe()
    assert len({E, H} & plan.selection.tensors.keys()) == 1
    patch = plan.run()
    for form in FORMS:  # the base may be saved again in any form
        other = save(base, tmp_path / f"again {form}", form)
        out = tmp_path / f"out {form}"
        ns.apply(other, patch, out=out)
        same_as(out, tuned)
        assert ns.verify(out, patch).state == "patched"
        ns.revert(out, patch, base=a, out=tmp_path / f"back {form}")
        assert snapshot(tmp_path / f"back {form}") == snapshot(other)
        ns.apply(other, patch, in_place=True)
        assert snapshot(other) == snapshot(out)


@pytest.mark.parametrize("base_form", FORMS)
def test_the_base_is_known_in_every_form(tmp_path: Path, base_form: str, neft: Callable[..., Result]) -> None:
    """Saved again in another form, it has another fingerprint of its files, and is the same model."""
    a = save(build(0), tmp_path / "a", base_form)
    b = save(build(1), tmp_path / "b", "both")
    ns.extract(a, b, out=tmp_path / "p", reversible=True, **LOSSLESS).close()
    norm = {"changed": True, "only": ["*norm*"], "include": ["*norm*"], "axis": {"*norm*": 0}}
    ns.extract(a, b, out=tmp_path / "scalars", reversible=True, **norm).close()
    for number, form in enumerate(FORMS):
        save(build(0), tmp_path / f"base{number}", form)
        for patch in ("p", "scalars"):
            steps = [
                ("verify", f"base{number}", patch, "--json"),
                ("apply", f"base{number}", patch, "-o", f"{patch}{number}", "--json"),
                ("verify", f"{patch}{number}", patch, "--json"),
                ("revert", f"{patch}{number}", patch, "--base", f"base{number}", "-o", "back", "--force"),
            ]
            for step in steps:
                done = neft(*step)
                assert (done.code, done.err) == (0, ""), step
                assert "--json" not in step or done.json.get("same_base", True) is True
    save(build(3), tmp_path / "wrong", base_form)
    assert neft("verify", "wrong", "scalars", "--json").json["same_base"] is False


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [E, H, "lm_head*"])
def test_either_name_includes_it(tmp_path: Path, form: str, name: str) -> None:
    a, b = save(build(0), tmp_path / "a", "both"), save(build(1), tmp_path / "b", form)
    patch = ns.extract(a, b, neurons=5, include=[name], only=[name])
    assert list(patch.tensors) == [E]


def test_a_tie_that_the_tuned_model_has_undone(tmp_path: Path) -> None:
    """Its head keeps the base's values: the patch says so, or applying it would change the head too."""
    base, tuned = build(0), build(0, tied=False)
    with torch.no_grad():
        tuned.lm_head.weight.copy_(base.lm_head.weight)
        tuned.model.embed_tokens.weight.copy_(base.lm_head.weight)
        tuned.model.embed_tokens.weight[3] += 1
    a, b = save(base, tmp_path / "a", "both"), save(tuned, tmp_path / "b", "saved by transformers")
    patch = ns.extract(a, b, **LOSSLESS)
    assert {name: patch.index(name).tolist() for name in patch.tensors} == {E: [3], H: [3]}
    ns.apply(a, patch, out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in tuned.state_dict().items():
        np.testing.assert_array_equal(found[name], value.numpy())
    single = save(base, tmp_path / "single", "saved by transformers")
    with pytest.raises(ns.MismatchError, match="one tensor here"):
        ns.apply(single, patch, out=tmp_path / "no")
    scores = ns.diff(single, b)
    assert scores.facts["only_in_tuned"] == [H]  # and that is the truth: one file has it, and it is not tied


def test_two_tensors_that_a_config_unties(tmp_path: Path) -> None:
    """Equal, as some start: a patch of one leaves the other as it is."""
    base, tuned = build(0, tied=False), build(0, tied=False)
    with torch.no_grad():
        for model in (base, tuned):
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        tuned.model.embed_tokens.weight[3] += 1
    a, b = save(base, tmp_path / "a", "both"), save(tuned, tmp_path / "b", "both")
    patch = ns.extract(a, b, **LOSSLESS)
    assert list(patch.tensors) == [E]
    ns.apply(a, patch, out=tmp_path / "out")
    same_as(tmp_path / "out", tuned)
    plan = plan_diff(a, a)
    (said,) = [one for one in plan.warnings if "tied" in one]
    assert "not tied" in said
    assert "equal in the files" in said


def restated(folder: Path, tied: bool | None) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings")
    (folder / "config.json").write_text(
        json.dumps(config | ({} if tied is None else {"tie_word_embeddings": tied}))
    )
    return folder


@pytest.mark.parametrize("stated", [True, None])
def test_copies_that_differ_are_not_tied(tmp_path: Path, stated: bool | None) -> None:
    base, tuned = build(0, tied=False), build(1, tied=False)
    a, b = (
        restated(save(model, tmp_path / name, "both"), stated) for model, name in ((base, "a"), (tuned, "b"))
    )
    plan = plan_extract(a, b, include=["*"], changed=True, with_bias=True)
    assert {E, H} <= plan.selection.tensors.keys()
    assert any("differ in the files" in one for one in plan.warnings) is bool(stated)
    ns.apply(a, plan.run(), out=tmp_path / "out")
    same_as(tmp_path / "out", tuned)  # transformers does not tie them either


@pytest.mark.parametrize("stated", [False, None])
def test_a_head_that_one_side_lacks(tmp_path: Path, stated: bool | None) -> None:
    """A bare model, or one with another head, has no output head: that is no tie."""
    whole = save(build(0, tied=False), tmp_path / "whole", "both")
    bare = restated(save(build(0, tied=False), tmp_path / "bare", "both"), stated)
    arrays = load_file(bare / "model.safetensors")
    save_file({n: v for n, v in arrays.items() if n != H}, bare / "model.safetensors", {"format": "pt"})
    assert ns.diff(whole, bare).facts["only_in_base"] == [H]
    assert ns.diff(bare, whole).facts["only_in_tuned"] == [H]
    plan = plan_diff(whole, bare)
    assert any("hold only the latter" in one for one in plan.warnings) is (stated is False)


def test_files_without_a_config(tmp_path: Path) -> None:
    """The files alone tell: both sides have one name each, or one has equal copies."""
    folders = [save(build(n), tmp_path / str(n), form) for n, form in enumerate(FORMS[:3])]
    files = [folder / "model.safetensors" for folder in folders]
    for folder in folders:
        (folder / "config.json").unlink()
    for one in files:
        for other in files:
            facts = ns.diff(one, other).facts
            assert facts["only_in_base"] == facts["only_in_tuned"] == []


def test_what_an_older_patch_of_both_names_does(tmp_path: Path) -> None:
    """A patch with the same rows under both names fits every form of the base."""
    base, tuned = build(0), build(1)
    a, b = save(base, tmp_path / "a", "both"), save(tuned, tmp_path / "b", "both")
    for folder in (a, b):
        restated(folder, False)
    patch = ns.extract(a, b, **LOSSLESS)
    assert {E, H} <= patch.tensors.keys()
    for form in FORMS:
        ns.apply(save(base, tmp_path / form, form), patch, out=tmp_path / f"out {form}")
        same_as(tmp_path / f"out {form}", tuned)


def test_a_half_patched_tie_is_told(tmp_path: Path) -> None:
    """As an older version may have left it: only one of the copies is patched."""
    base, tuned = build(0), build(1)
    a, b = save(base, tmp_path / "a", "both"), save(tuned, tmp_path / "b", "both")
    patch = ns.extract(a, b, **LOSSLESS)
    arrays = load_file(b / "model.safetensors")
    arrays[H] = load_file(a / "model.safetensors")[H]
    save_file(arrays, b / "model.safetensors", {"format": "pt"})
    plan = plan_verify(b, patch)
    assert ["differ in the files" in one for one in plan.warnings] == [True]
    assert plan.run().state == "patched"
    assert any("differ in the files" in one for one in ns.inspect(b)["warnings"])
    assert ns.inspect(a)["tied"] == {E: [H]}
    assert ns.inspect(a)["parameters"] == sum(p.numel() for p in base.parameters())


def t5(folder: Path, seed: int, form: str) -> Path:
    torch.manual_seed(seed)
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return save(transformers.T5ForConditionalGeneration(config), folder, form)


def bert(folder: Path, seed: int, form: str) -> Path:
    torch.manual_seed(seed)
    config = transformers.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    return save(transformers.RobertaForMaskedLM(config), folder, form)


@pytest.mark.parametrize("family", [t5, bert])
@pytest.mark.parametrize("forms", [(0, 1), (1, 0), (2, 0), (1, 2)])
def test_other_families(tmp_path: Path, family, forms: tuple[int, int]) -> None:
    a, b = (family(tmp_path / str(n), n, FORMS[form]) for n, form in enumerate(forms))
    shutil.copy(a / "config.json", b / "config.json")
    facts = ns.diff(a, b).facts
    assert facts["only_in_base"] == facts["only_in_tuned"] == []
    patch = ns.extract(a, b, **LOSSLESS)
    ns.apply(a, patch, out=tmp_path / "out")
    loader = transformers.AutoModelForSeq2SeqLM if family is t5 else transformers.AutoModelForMaskedLM
    found, expected = (loader.from_pretrained(folder).state_dict() for folder in (tmp_path / "out", b))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_any_module_that_save_model_saved(tmp_path: Path) -> None:
    """Its metadata names what was left out; names of no known model."""

    class Net(torch.nn.Module):
        def __init__(self, seed: int, tied: bool) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.left, self.right, self.mid = (torch.nn.Linear(4, 4) for _ in range(3))
            if tied:
                self.right.weight = self.left.weight

    save_model(Net(0, True), str(tmp_path / "a.safetensors"))
    arrays = {n: v.detach().numpy().copy() for n, v in Net(1, True).state_dict().items()}
    save_file(arrays, tmp_path / "b.safetensors")
    for one, other in (("a", "b"), ("b", "a")):
        facts = ns.diff(tmp_path / f"{one}.safetensors", tmp_path / f"{other}.safetensors").facts
        assert facts["only_in_base"] == facts["only_in_tuned"] == []


def values(path: Path) -> dict[str, NDArray[np.float32]]:
    return load_file(path / "model.safetensors")


def test_patches_of_two_forms_keep_the_tie(tmp_path: Path) -> None:
    """One changes the embedding, one the head, other rows of it: the result is tied and has both."""
    base = build(0)
    both = save(base, tmp_path / "both", "both")
    parts = []
    for number, form in enumerate(FORMS[:2]):
        model = build(0)
        with torch.no_grad():
            model.lm_head.weight[number] += 1
        here = save(base, tmp_path / f"base {number}", form)
        parts.append(ns.extract(here, save(model, tmp_path / f"{number}", form), **LOSSLESS))
    assert [list(part.tensors) for part in parts] == [[E], [H]]
    for form in FORMS[:3]:
        folder = save(base, tmp_path / form, form)
        ns.apply(folder, parts, out=tmp_path / f"out {form}")
        with torch.no_grad():
            expected = build(0)
            expected.lm_head.weight[:2] += 1
        same_as(tmp_path / f"out {form}", expected)
    whole = ns.extract(both, save(build(2), tmp_path / "c", "both"), **LOSSLESS)
    with pytest.raises(ns.MismatchError):
        ns.apply(both, [parts[1], whole], out=tmp_path / "no")


def test_scores_and_selections_that_name_both_copies(tmp_path: Path) -> None:
    """As older versions made them: what they say of either is of the one tensor."""
    base, tuned = build(0), build(1)
    a, b = save(base, tmp_path / "a", "both"), save(tuned, tmp_path / "b", "both")
    for folder in (a, b):
        restated(folder, False)
    scores = ns.diff(a, b, include=["*"])
    selection = scores.select(neurons=20)
    assert {E, H} <= selection.tensors.keys()
    chosen = set(selection.tensors[E].index) | set(selection.tensors[H].index)
    for folder in (a, b):
        restated(folder, True)
    for patch in (ns.extract(a, b, selection), ns.extract(a, b, scores=scores, neurons=20)):
        assert H not in patch.tensors
        assert set(patch.index(E)) == chosen
        ns.apply(a, patch, out=tmp_path / "out", force=True)
        found = load_file(tmp_path / "out" / "model.safetensors")
        np.testing.assert_array_equal(found[E], found[H])


def test_the_commands_say_it(tmp_path: Path, neft: Callable[..., Result]) -> None:
    a, b = save(build(0), tmp_path / "a", "both"), save(build(1), tmp_path / "b", "both")
    assert f"tied: {H} is {E}\n" in neft("diff", a, b).out
    assert f"{E} is {H}" in neft("inspect", a).out
    done = neft("extract", a, b, "--changed", "--include", "*", "-o", "p.safetensors")
    assert "the tuned model, bit for bit\n" in done.out
    (a / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    said = "not tied to model.embed_tokens.weight, but the two are equal in the files"
    assert said in neft("inspect", a).err
    for words in (("verify", a, "p.safetensors"), ("apply", a, "p.safetensors", "-o", "out", "--dry-run")):
        assert said in neft(*words).err
        assert any(said in one for one in neft(*words, "--json").json["warnings"])


def test_folders_that_cannot_be_listed_and_odd_names(tmp_path: Path) -> None:
    """Names of a file that steer a terminal are shown as they are written; nothing is followed."""
    name = "a\n\x1b[2J.lm_head.weight"
    arrays = {name: np.ones((4, 4), np.float32), "a\n\x1b[2J.wte.weight": np.zeros((4, 4), np.float32)}
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    (tmp_path / "loop").symlink_to(tmp_path)
    plan = plan_diff(tmp_path, tmp_path, include=["*"])
    (said,) = [one for one in plan.warnings if "tied" in one]
    assert "\n" not in said
    assert plan.describe()["not_compared"] == []


def test_a_change_of_both_copies_in_place_is_undone_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal has the old rows of every copy."""
    a, b = save(build(0), tmp_path / "a", "both in shards"), save(build(1), tmp_path / "b", FORMS[0])
    patch, before = ns.extract(a, b, **LOSSLESS), snapshot(a)

    def fail(*_: object) -> None:
        raise OSError("no")

    with monkeypatch.context() as broken:
        broken.setattr(rewrite, "fsync", fail)
        broken.setattr(rewrite, "heal_recorded", lambda source: None)
        with pytest.raises(ns.MachineError):
            ns.apply(a, patch, in_place=True)
    changed = snapshot(a)
    assert changed["a.safetensors"] != before["a.safetensors"]
    assert changed["b.safetensors"] != before["b.safetensors"]
    assert ns.heal(a).neurons > patch.neurons  # the rows of the head as well
    assert snapshot(a) == before
