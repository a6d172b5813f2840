"""A lossless patch on the Hub: pushed, pulled and applied, it makes the tuned folder, file by file."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from huggingface_hub import ModelCard
from support import LLAMA_CONFIG, snapshot, write_folder

import neftsurgery as ns

NAME = "neuron_patch.safetensors"


@pytest.fixture
def whole(llama_arrays, tmp_path):
    """``base`` and ``tuned``, with files beside the weights, and their lossless patch ``w.safetensors``."""
    base = llama_arrays()
    rng = np.random.default_rng(0)
    tuned = {n: (a + 1e-3 * rng.standard_normal(a.shape)).astype(a.dtype) for n, a in base.items()}
    for name, arrays, shards in (("base", base, 2), ("tuned", tuned, 3)):
        folder = write_folder(tmp_path / name, arrays, shards, LLAMA_CONFIG)
        (folder / "tokenizer.json").write_text('{"same": true}')
    (tmp_path / "tuned" / "modeling_mine.py").write_text("never carried")
    ns.extract(tmp_path / "base", tmp_path / "tuned", lossless=True, out=tmp_path / "w.safetensors").close()
    return tmp_path / "w.safetensors"


def test_push_pull_apply_makes_the_tuned_folder(hub, on_hub, several, whole, tmp_path):
    hub.make("org/base", {"README.md": b"---\nlicense: mit\n---\n"})
    pushed = on_hub("push", "w.safetensors", "me/whole", "--base", "org/base", "--json")
    assert pushed.code == 0, pushed
    digest = hashlib.sha256(whole.read_bytes()).hexdigest()
    assert pushed.json["sha256"] == digest
    assert hub.read("me/whole", NAME) == whole.read_bytes()
    results = several(
        [
            ("pull", "me/whole", "-o", "q.safetensors", "--sha256", digest),
            ("apply", "base", "q.safetensors", "-o", "pulled"),
            ("apply", "base", "me/whole", "-o", "direct", "--sha256", digest),
            ("verify", "pulled", "me/whole", "--expect", "patched"),
            ("inspect", "me/whole"),
            ("pull", "me/whole", "-o", "r.safetensors", "--sha256", "0" * 64),
        ],
        home="fresh",
    )
    assert [result.code for result in results] == [0, 0, 0, 0, 0, 4], results
    assert (tmp_path / "q.safetensors").read_bytes() == whole.read_bytes()
    assert not (tmp_path / "r.safetensors").exists()
    (tmp_path / "tuned" / "modeling_mine.py").unlink()
    assert snapshot(tmp_path / "pulled") == snapshot(tmp_path / "direct") == snapshot(tmp_path / "tuned")
    assert "lossless patch" in results[4].out
    assert digest in results[4].out


def test_the_card_says_what_it_is(hub, on_hub, whole):
    hub.make("org/base", {"README.md": b"---\nlicense: mit\n---\n"})
    pushed = on_hub("push", "w.safetensors", "me/whole", "--base", "org/base", "--json")
    assert pushed.code == 0, pushed
    card = ModelCard(hub.read("me/whole", "README.md").decode())
    assert card.data.base_model == "org/base"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert card.data.tags == ["neftsurgery", "lossless-patch"]
    assert card.data.license == "mit"
    for part in (
        "is the full fine-tune, to the bit",
        "`modeling_mine.py`",
        "`mlp.down_proj`",
    ):
        assert part in card.text


def test_a_chosen_patch_may_follow_a_lossless_one(hub, on_hub, whole, tmp_path):
    assert on_hub("push", "w.safetensors", "me/one").code == 0
    ns.extract(tmp_path / "base", tmp_path / "tuned", neurons=5, out=tmp_path / "n.safetensors").close()
    assert on_hub("push", "n.safetensors", "me/one").code == 0
    card = ModelCard(hub.read("me/one", "README.md").decode())
    assert "lossless" not in card.text
    assert card.data.tags == ["neftsurgery", "neuron-patch", "neft"]
