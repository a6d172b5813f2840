"""Checkpoints made of several models: their names, configs and files, and every verb on them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parts_support import (
    DENSE,
    MODULES,
    PIPELINE,
    contents,
    shifted,
    text_encoder,
    unet,
    write_pipeline,
    write_sentence_transformer,
)
from safetensors.numpy import load_file, save_file
from support import write_file, write_folder

import neftsurgery as ns
from neftsurgery.checkpoint.changes import Change
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.folder_files import is_side
from neftsurgery.checkpoint.journal import journaled
from neftsurgery.checkpoint.provenance import fingerprint
from neftsurgery.checkpoint.unfinished import refuse_unfinished
from neftsurgery.checkpoint.weight_files import is_plain, is_plain_path, listed_parts
from neftsurgery.errors import CorruptFileError, MachineError, UsageError
from neftsurgery.neurons.layout import Layout
from neftsurgery.sources.resolve import resolve

BOTH = {"pipeline": write_pipeline, "sentence-transformers": write_sentence_transformer}


@pytest.fixture(params=BOTH)
def sides(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A base and a tuned checkpoint of two kinds of parts."""
    write = BOTH[request.param]
    return write(tmp_path / "base"), write(tmp_path / "tuned", 0.25)


def names_of(folder: Path) -> set[str]:
    return set(Checkpoint.open(folder).tensors)


# Names, configs and files.


def test_tensors_of_a_pipeline_have_the_names_of_their_parts(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_pipeline(tmp_path / "p"))
    expected = {f"unet/{name}" for name in unet()} | {f"text_encoder/{name}" for name in text_encoder()}
    assert checkpoint.tensors.keys() == expected
    assert not checkpoint.is_file
    for part, tensors in (("unet/", unet()), ("text_encoder/", text_encoder())):
        for name, array in tensors.items():
            buffer = bytearray(array.nbytes)
            checkpoint.read_into(part + name, 0, memoryview(buffer))
            assert buffer == array.tobytes()


def test_tensors_of_a_part_in_the_folder_itself_keep_their_names(tmp_path: Path) -> None:
    assert names_of(write_sentence_transformer(tmp_path / "s")) == {*text_encoder(), DENSE}


def test_several_models_of_one_kind_are_parts_of_their_own(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    (folder / "model_index.json").write_text(json.dumps(PIPELINE | {"net": ["diffusers", "MultiControlNet"]}))
    for name in ("net", "net_1", "net_2"):
        write_folder(folder / name, {"w": np.ones((2, 2), np.float32)}, config={"_class_name": "ControlNet"})
    assert {name for name in names_of(folder) if name.startswith("net")} == {"net/w", "net_1/w", "net_2/w"}


def test_modules_of_a_router_are_parts(tmp_path: Path) -> None:
    router = {"path": "", "type": "sentence_transformers.models.Router"}
    for name in ("query_0_StaticEmbedding", "document_0_Transformer"):
        write_folder(tmp_path / "s" / name, text_encoder())
    (tmp_path / "s" / "modules.json").write_text(json.dumps([router, MODULES[3]]))
    types = {"query_0_StaticEmbedding": "a.StaticEmbedding", "document_0_Transformer": "b.Transformer"}
    (tmp_path / "s" / "router_config.json").write_text(json.dumps({"types": types, "structure": {}}))
    assert names_of(tmp_path / "s") == {f"{part}/{name}" for part in types for name in text_encoder()}
    shutil.rmtree(tmp_path / "s" / "document_0_Transformer")
    assert refused(tmp_path / "s").file == str(tmp_path / "s" / "document_0_Transformer")


def test_each_part_is_read_with_its_own_config(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    seen = ns.inspect(folder)
    listed = {one["name"]: one for one in seen["tensors"]}
    assert listed["unet/down_blocks.0.attn.to_q.weight"]["neuron_axes"] == [0]
    assert listed["unet/conv_in.weight"]["reason"] == "a weight of an unknown layer (4 axes)"
    assert listed["text_encoder/model.embed_tokens.weight"]["reason"] == "embedding"
    assert listed["text_encoder/lm_head.weight"]["reason"] == "output head"
    first, second = seen["warnings"]
    assert first.startswith("unet/config.json names no model_type, and 'UNet2DConditionModel' is not known: ")
    assert "unet/conv_in.weight" in second
    assert seen["parts"] == {"scheduler": "", "text_encoder": "llama", "unet": "UNet2DConditionModel"}


def test_units_come_from_the_parts_that_have_them(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    alone = ns.inspect(folder / "text_encoder", anatomy="units")
    whole = ns.inspect(folder, anatomy="units")
    assert (whole["units"], whole["neurons"]) == (alone["units"], alone["neurons"])


def test_axes_of_convolutions_can_be_given(tmp_path: Path) -> None:
    base, tuned = write_pipeline(tmp_path / "b"), write_pipeline(tmp_path / "t", 0.5)
    scores = ns.diff(base, tuned, axis={"unet/conv*": 0})
    assert scores.tensors["unet/conv_in.weight"].layout.count == 8


def test_a_part_without_a_config_is_not_taken_for_the_model_around_it(tmp_path: Path) -> None:
    folder = write_sentence_transformer(tmp_path / "s")
    (folder / "2_Dense" / "config.json").unlink()
    (warning,) = ns.inspect(folder)["warnings"]
    assert warning.startswith("there is no 2_Dense/config.json to say what the model is")


def test_a_tie_is_within_a_part(tmp_path: Path) -> None:
    tensors = text_encoder()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    folder = write_pipeline(tmp_path / "p")
    shutil.rmtree(folder / "text_encoder")
    config = {"model_type": "llama", "num_attention_heads": 4, "tie_word_embeddings": True}
    write_folder(folder / "text_encoder", tensors, config=dict(config))
    write_folder(folder / "text_encoder_1", shifted(tensors, 1), config=dict(config))
    assert ns.inspect(folder)["tied"] == {
        f"{part}/model.embed_tokens.weight": [f"{part}/lm_head.weight"]
        for part in ("text_encoder", "text_encoder_1")
    }


def test_a_quantized_part_says_nothing_of_the_others(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    write_file(path, {"a.weight": np.ones((4, 4), np.uint8)})
    write_file(folder / "text_encoder" / "model-00001-of-00002.safetensors", text_encoder())
    (folder / "text_encoder" / "model.safetensors.index.json").unlink()
    (folder / "text_encoder" / "model-00002-of-00002.safetensors").unlink()
    (folder / "text_encoder" / "model-00001-of-00002.safetensors").rename(
        folder / "text_encoder" / "model.safetensors"
    )
    (folder / "unet" / "config.json").write_text('{"quantization_config": {"quant_method": "x"}}')
    listed = {one["name"]: one.get("reason", "") for one in ns.inspect(folder)["tensors"]}
    assert listed["unet/a.weight"] == "quantized: by unet/config.json, with x"
    assert not any(why.startswith("quantized") for name, why in listed.items() if "text" in name)


# Verbs.


def test_apply_keeps_the_shape_of_the_folder_and_revert_its_bytes(
    sides: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = sides
    (base / "1_Pooling" if (base / "1_Pooling").is_dir() else base / "unet").joinpath("x.bin").write_text("x")
    before = contents(base)
    patch = ns.extract(base, tuned, changed=True, with_bias=True, include=["*"], axis={"*": 0})
    result = ns.apply(base, patch, out=tmp_path / "out")
    assert [path.name for path in result.left_behind] == ["x.bin"]
    after = contents(tmp_path / "out")
    assert {name for name in before if not name.endswith("x.bin")} == after.keys()
    assert {n: v for n, v in after.items() if not n.endswith(".safetensors")} == {
        n: v for n, v in before.items() if n in after and not n.endswith(".safetensors")
    }
    for name in after:
        if name.endswith(".safetensors"):
            got, wanted = load_file(tmp_path / "out" / name), load_file(tuned / name)
            assert got.keys() == wanted.keys()
            assert all(np.array_equal(got[key], wanted[key]) for key in got)
    assert ns.verify(tmp_path / "out", patch).state == "patched"
    ns.revert(tmp_path / "out", patch, base=base, out=tmp_path / "back")
    assert contents(tmp_path / "back") == {name: before[name] for name in after}


def test_in_place_and_back(sides: tuple[Path, Path]) -> None:
    base, tuned = sides
    before = contents(base)
    patch = ns.extract(base, tuned, changed=True, reversible=True)
    ns.apply(base, patch, in_place=True)
    assert ns.verify(base, patch).state == "patched"
    assert contents(base).keys() == before.keys()
    ns.revert(base, patch, in_place=True)
    assert contents(base) == before


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_lossless_patch_holds_all_parts(
    sides: tuple[Path, Path], tmp_path: Path, weights_only: bool
) -> None:
    base, tuned = sides
    (tuned / "README.md").unlink(missing_ok=True)
    (base / "README.md").unlink(missing_ok=True)
    patch = ns.extract(base, tuned, lossless=True, reversible=True, weights_only=weights_only)
    assert set(patch.forward.tensors) == names_of(base)
    ns.apply(base, patch, out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tuned)
    ns.apply(base, patch, in_place=True)
    assert contents(base) == contents(tuned)
    ns.revert(base, patch, in_place=True)
    ns.revert(tuned, patch, out=tmp_path / "back")
    assert contents(base) == contents(tmp_path / "back")


def test_a_changed_file_beside_the_weights_of_a_part_is_carried_in_place(tmp_path: Path) -> None:
    base, tuned = write_pipeline(tmp_path / "base"), write_pipeline(tmp_path / "tuned", 0.5)
    (tuned / "scheduler" / "scheduler_config.json").write_text('{"steps": 4}')
    patch = ns.extract(base, tuned, lossless=True, reversible=True)
    assert patch.not_carried == ("README.md",)
    before = contents(base)
    ns.apply(base, patch, in_place=True)
    assert contents(base) == contents(tuned)
    ns.revert(base, patch, in_place=True)
    assert contents(base) == before


def test_a_file_in_a_linked_folder_is_not_replaced(tmp_path: Path) -> None:
    base, tuned = write_pipeline(tmp_path / "base"), write_pipeline(tmp_path / "tuned")
    (tuned / "scheduler" / "scheduler_config.json").write_text('{"steps": 4}')
    patch = ns.extract(base, tuned, lossless=True)
    (base / "scheduler").rename(tmp_path / "elsewhere")
    (base / "scheduler").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="regular file"):
        ns.apply(base, patch, in_place=True)
    assert contents(tmp_path / "elsewhere") == before


def test_the_other_verbs_from_the_command_line(tmp_path: Path, neft: Any) -> None:
    base, tuned = write_pipeline(tmp_path / "base"), write_pipeline(tmp_path / "tuned", 0.25)

    def run(*words: object) -> None:
        assert neft(*words).code == 0

    run("diff", base, tuned, "-o", "scores")
    run("select", "scores", "--neurons", "10%", "-o", "selection")
    run("extract", base, tuned, "--selection", "selection", "-o", "selected.safetensors")
    for part in ("unet", "text_encoder"):
        run("extract", base, tuned, "--neurons", "50%", "--only", f"{part}/*", "-o", f"{part}.safetensors")
    run("merge", "unet.safetensors", "text_encoder.safetensors", "-o", "both.safetensors")
    merged = ns.Patch.load(tmp_path / "both.safetensors")
    assert {name.partition("/")[0] for name in merged.tensors} == {"unet", "text_encoder"}
    run("apply", base, "both.safetensors", "-o", "out")
    run("verify", "out", "both.safetensors", "--expect", "patched")
    run("push", "both.safetensors", "me/it", "--dry-run")
    run("report", "scores", "-o", "report.html")


def test_a_part_beside_the_whole_is_compared_under_its_prefix(tmp_path: Path) -> None:
    base, tuned = write_pipeline(tmp_path / "base"), write_pipeline(tmp_path / "tuned", 0.25)
    with pytest.raises(ns.MismatchError) as error:
        ns.diff(base, tuned / "unet")
    assert "add_prefix='unet/'" in str(error.value)
    patch = ns.extract(base, tuned / "unet", changed=True, add_prefix="unet/")
    assert ns.verify(tuned, patch).state == "patched"


def test_names_count_in_the_fingerprint(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    parts = [(f"unet/{name}", array) for name, array in unet().items()]
    parts += [(f"text_encoder/{name}", array) for name, array in text_encoder().items()]
    flat = write_file(tmp_path / "flat.safetensors", dict(parts))
    assert fingerprint(Checkpoint.open(folder)) == fingerprint(Checkpoint.open(flat))


# Journals.


def begin(folder: Path, name: str) -> None:
    """Leave a journal as a change that was killed does."""
    checkpoint = Checkpoint.open(folder)
    info = checkpoint.tensors[name]
    layout = Layout.of(info.shape, (0,))
    change = Change(info, layout, np.array([0]), np.zeros((1, 16), np.uint8))
    with pytest.raises(KeyboardInterrupt), journaled(checkpoint, [change]):
        raise KeyboardInterrupt


@pytest.mark.parametrize("begun", ["", "unet", "unet/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("opened", ["", "unet", "unet/diffusion_pytorch_model.safetensors"])
def test_an_unfinished_change_is_found_from_the_whole_and_from_the_part(
    tmp_path: Path, begun: str, opened: str
) -> None:
    folder = write_pipeline(tmp_path / "p")
    begin(folder / begun, ("" if begun else "unet/") + "down_blocks.0.attn.to_q.weight")
    with pytest.raises(MachineError, match="interrupted"):
        refuse_unfinished(resolve(folder / opened))
    if (begun, opened) in (("", "unet"), ("unet", "unet/diffusion_pytorch_model.safetensors")):
        return
    before = contents(folder)
    ns.heal(folder / opened)
    assert contents(folder).keys() == {name for name in before if "neft-journal" not in name}


def test_the_journal_of_a_stranger_names_no_file_outside() -> None:
    assert is_side("config.json")
    assert is_side("unet/config.json")
    for name in ("../config.json", "a/b/config.json", ".git/config.json", "/config.json", "unet/", "x.py"):
        assert not is_side(name)


# Bad input.


def refused(folder: Path) -> ns.NeftError:
    with pytest.raises(ns.NeftError) as error:
        Checkpoint.open(folder)
    return error.value


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "..", ".", ".git", "a\\b", "a\0b", "x" * 300])
@pytest.mark.parametrize("kind", ["model_index.json", "modules.json"])
def test_parts_do_not_leave_the_folder(tmp_path: Path, kind: str, name: str) -> None:
    folder = write_pipeline(tmp_path / "p")
    content = PIPELINE | {name: ["diffusers", "UNet2DConditionModel"]}
    modules = [*MODULES, {"path": name, "type": "sentence_transformers.models.Dense"}]
    if kind == "modules.json":
        (folder / "model_index.json").unlink()
    (folder / kind).write_text(json.dumps(content if kind == "model_index.json" else modules))
    error = refused(folder)
    assert isinstance(error, CorruptFileError)
    assert "outside of its folder" in str(error)
    assert error.file == str(folder / kind)


def test_plain_names() -> None:
    assert is_plain_path("a/b")
    for name in ("a//b", "a/", "/a", "a/..", "../a", "a/b/c", ".a/b", "", "a/\0"):
        assert not is_plain_path(name)
    assert not is_plain("a/b")


@pytest.mark.parametrize("content", ["[1]", '{"a": 1}', '[{"path": 3}]', "nothing"])
def test_a_damaged_list_of_modules(tmp_path: Path, content: str) -> None:
    folder = write_sentence_transformer(tmp_path / "s")
    (folder / "modules.json").write_text(content)
    error = refused(folder)
    assert isinstance(error, CorruptFileError)
    assert error.file == str(folder / "modules.json")


def test_no_list_no_parts(tmp_path: Path) -> None:
    assert listed_parts(tmp_path) == []
    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "safety_checker": [null, null]}')
    assert listed_parts(tmp_path) == []


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    shutil.rmtree(folder / "unet")
    error = refused(folder)
    assert isinstance(error, CorruptFileError)
    assert error.file == str(folder / "unet")
    assert "model_index.json names this part, a UNet2DConditionModel" in str(error)
    assert "fetch the checkpoint again" in str(error.hint)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_part_without_weights_is_named(tmp_path: Path, part: str) -> None:
    folder = write_pipeline(tmp_path / "p")
    for path in (folder / part).glob("*.safetensors*"):
        path.unlink()
    assert refused(folder).file == str(folder / part)


def test_a_dense_layer_without_weights_is_named_and_a_pooling_needs_none(tmp_path: Path) -> None:
    folder = write_sentence_transformer(tmp_path / "s")
    (folder / "3_Normalize").rmdir()  # as git leaves it
    assert DENSE in names_of(folder)
    (folder / "2_Dense" / "model.safetensors").unlink()
    assert refused(folder).file == str(folder / "2_Dense")


def test_a_part_of_pickles_says_how_to_convert_it(tmp_path: Path) -> None:
    folder = write_sentence_transformer(tmp_path / "s")
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    error = refused(folder)
    assert isinstance(error, UsageError)
    assert error.file == str(folder / "2_Dense")
    assert "torch" in str(error.hint)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(path, 300)
    error = refused(folder)
    assert isinstance(error, CorruptFileError)
    assert error.file == str(path)
    assert "fetch" in str(error.hint)


def test_a_missing_shard_of_a_part_is_named(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    (folder / "text_encoder" / "model-00002-of-00002.safetensors").unlink()
    error = refused(folder)
    assert error.file == str(folder / "text_encoder" / "model.safetensors.index.json")
    assert "model-00002-of-00002.safetensors" in str(error)


def test_a_pipeline_of_no_models(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    (folder / "model_index.json").write_text('{"scheduler": ["diffusers", "DDIMScheduler"]}')
    assert "none of the parts that model_index.json names holds weights" in str(refused(folder))


def test_weights_that_no_part_holds_are_named(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    save_file({"w": np.ones(3)}, folder / "v1-5-pruned.safetensors")
    save_file({"w": np.ones(3)}, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    seen = ns.inspect(folder)
    others = ["unet/diffusion_pytorch_model.fp16.safetensors", "v1-5-pruned.safetensors"]
    assert sorted(seen["not_read"]) == sorted(seen["left_behind_by_apply"]) == others
