"""Push, pull, and Hub ids in place of patch files: the real client, and a Hub in another process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
from hub_support import SECRETS
from huggingface_hub import ModelCard
from support import snapshot

import neftsurgery as ns

NAME = "neuron_patch.safetensors"


def test_push_then_pull_elsewhere_then_apply_is_as_the_local_file(hub, on_hub, several, patch_file, tmp_path):
    pushed = on_hub("push", "p.safetensors", "me/patch", "--json")
    assert pushed.code == 0, pushed
    assert pushed.json["created"]
    assert pushed.json["commit"] == hub.repos["me/patch"]["refs"]["main"]
    assert hub.read("me/patch", NAME) == patch_file.read_bytes()
    assert hub.read("me/patch", "README.md").decode() == pushed.json["card"]
    results = several(
        [
            ("pull", "me/patch", "-o", "q.safetensors", "--json"),
            ("apply", "base", "q.safetensors", "-o", "pulled"),
            ("apply", "base", "p.safetensors", "-o", "local"),
            ("apply", "base", "me/patch", "-o", "direct"),
        ],
        home="fresh",
    )
    assert [result.code for result in results] == [0, 0, 0, 0], results
    assert results[0].json["commit"] == pushed.json["commit"]
    assert (tmp_path / "q.safetensors").read_bytes() == patch_file.read_bytes()
    assert snapshot(tmp_path / "pulled") == snapshot(tmp_path / "local") == snapshot(tmp_path / "direct")
    assert "a token was sent to the storage" not in hub.state["calls"]
    assert (
        hub.state["sent"][hashlib.sha256(patch_file.read_bytes()).hexdigest()] == patch_file.stat().st_size
    )  # fetched once, then cached
    assert "README.md" not in hub.state["sent"]  # only the patch is fetched


def test_a_push_is_one_commit_on_top_of_what_was_there(hub, several, patch_file):
    hub.make("me/patch", {"notes.txt": b"mine"})
    first, again = several(
        [
            ("push", "p.safetensors", "me/patch", "-m", "The first", "--json"),
            ("push", "p.safetensors", "me/patch", "--json"),
        ]
    )
    assert (first.code, again.code) == (0, 0), (first, again)
    found = hub.repos["me/patch"]
    assert found["titles"] == ["initial commit", "by hand", "The first"]
    assert set(found["files"]["main"]) == {".gitattributes", "notes.txt", NAME, "README.md", "neurons.png"}
    assert (again.json["changed"], again.json["commit"]) == (False, first.json["commit"])


def test_every_command_that_takes_a_patch_takes_a_hub_id(hub, several, patch_file, tmp_path):
    ns.extract(
        tmp_path / "base", tmp_path / "tuned", neurons=30, per="layer", out=tmp_path / "r.safetensors"
    ).close()
    hub.make("org/one", {NAME: patch_file.read_bytes()})
    older = hub.make("org/two", {NAME: (tmp_path / "r.safetensors").read_bytes()})
    hub.make("org/two", {NAME: b"no longer a patch"})
    commands = [
        ("apply", "base", "org/one", "-o", "patched"),
        ("verify", "patched", "org/one", "--expect", "patched", "--json"),
        ("revert", "patched", "org/one", "--base", "base", "-o", "back"),
        ("inspect", "org/one", "--json"),
        ("inspect", "org/one", f"org/two@{older}", "--json"),
        ("merge", "org/one", f"org/two@{older}", "--on-overlap", "first", "-o", "m.safetensors"),
        ("export", "org/one", "--to", "lora", "--base", "base", "-o", "adapter"),
        ("push", "org/one", "me/copy"),
        ("apply", "base", "org/one", f"org/two@{older}", "-o", "both"),
        ("apply", "base", "org/two", "-o", "none"),
    ]
    results = several(commands)
    assert [result.code for result in results] == [0] * 9 + [4], results
    assert results[3].json["name"] == "org/one"
    assert [one["name"] for one in results[4].json["patches"]] == ["org/one", f"org/two@{older}"]
    assert "org/two" in results[9].err
    assert "snapshots" not in results[9].err  # errors do not name files of the cache
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "base")
    assert hub.read("me/copy", NAME) == patch_file.read_bytes()
    with ns.Patch.load(tmp_path / "m.safetensors") as merged:
        parts = merged.facts["merged"]["patches"]
    assert [(part["name"], part["revision"]) for part in parts] == [
        ("org/one", hub.repos["org/one"]["refs"]["main"]),
        ("org/two", older),
    ]
    with ns.Patch.load(tmp_path / "p.safetensors") as one, ns.Patch.load(tmp_path / "r.safetensors") as two:
        ns.merge([one, two], on_overlap="first", out=tmp_path / "n.safetensors").close()
    local, remote = (ns.Patch.load(tmp_path / f"{name}.safetensors") for name in "nm")
    for name in local.tensors:
        np.testing.assert_array_equal(local.values(name), remote.values(name))


def test_a_local_path_beats_a_hub_id(hub, several, patch_file, tmp_path):
    hub.make("org/one", {NAME: b"not this"})
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "one").write_bytes(patch_file.read_bytes())
    (result,) = several([("apply", "base", "org/one", "-o", "patched")])
    assert result.code == 0, result
    assert not any("org/one" in call for call in hub.state["calls"])


def test_inspect_of_a_hub_checkpoint_is_still_that(hub, several, pair, tmp_path):
    base, _ = pair
    hub.make("org/base", {file.name: file.read_bytes() for file in base.iterdir()})
    (result,) = several([("inspect", "org/base", "--json")])
    assert (result.code, result.json["kind"]) == (0, "checkpoint")


PYTHON = """
import json, sys
import neftsurgery as ns
patch = ns.extract("base", "tuned", neurons=12)                     # never saved
done = ns.push(patch, "me/made-here", base="org/base", message="From Python")
pulled = ns.pull("me/made-here")
kept = ns.pull(f"me/made-here@{done.commit}", out="kept.safetensors")
loaded = ns.Patch.load("me/made-here")
ns.apply("base", "me/made-here", out="patched")
state = ns.verify("patched", "me/made-here").state
ns.revert("patched", "me/made-here", base="base", out="back")
merged = ns.merge(["me/made-here", patch], on_overlap="last")
print(json.dumps([done.created, done.changed, done.commit, pulled.neurons, kept.path.name, loaded.name, state,
                  merged.neurons, "torch" in sys.modules]))
"""


def test_the_python_api(hub, pair, tmp_path):
    hub.make("org/base", {"README.md": b"---\nlicense: mit\n---\n"})
    done = subprocess.run(
        [sys.executable, "-c", PYTHON],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS)
    found = json.loads(done.stdout)
    head = hub.repos["me/made-here"]["refs"]["main"]
    assert found == [True, True, head, 12, "kept.safetensors", "me/made-here", "patched", 12, False]
    assert (tmp_path / "kept.safetensors").read_bytes() == hub.read("me/made-here", NAME)
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "base")
    card = ModelCard(hub.read("me/made-here", "README.md").decode())
    assert (card.data.base_model, card.data.license) == ("org/base", "mit")


def test_a_lora_repository_as_tuned_is_as_the_local_folder(hub, several, pair, patch_file, tmp_path):
    base, _ = pair
    with ns.Patch.load(patch_file) as patch:
        ns.export_lora(patch, tmp_path / "lora", base=base)
    files = {file.name: file.read_bytes() for file in (tmp_path / "lora").iterdir()}
    commit = hub.make("org/lora", files)
    hub.make("org/base", {file.name: file.read_bytes() for file in base.iterdir()})
    local, remote, both, here, there = several(
        [
            ("diff", "base", "lora", "--json"),
            ("diff", "base", "org/lora", "-o", "s.safetensors", "--json"),
            ("diff", "org/base", f"org/lora@{commit}", "--json"),
            ("extract", "base", "lora", "--neurons", "9", "-o", "here.safetensors"),
            ("extract", "org/base", "org/lora", "--neurons", "9", "-o", "there.safetensors"),
        ]
    )
    assert {one.code for one in (local, remote, both, here, there)} == {0}, (local, remote, both, here, there)
    for one, named in ((remote, "org/lora"), (both, f"org/lora@{commit}")):
        assert one.json["tuned"] == named
        for key in ("neurons", "changed_neurons", "cosine", "relative_change", "most_sensitive"):
            assert one.json[key] == local.json[key], key
    with ns.Scores.load(tmp_path / "s.safetensors") as scores:
        assert (scores.tuned.repo, scores.tuned.revision) == ("org/lora", commit)
    one, two = (ns.Patch.load(tmp_path / f"{name}.safetensors") for name in ("here", "there"))
    with one, two:
        assert list(one.tensors) == list(two.tensors)
        for name in one.tensors:
            np.testing.assert_array_equal(one.index(name), two.index(name))
            np.testing.assert_array_equal(one.values(name), two.values(name))


def test_messages_name_repositories_and_not_where_they_are_kept(hub, several, pair, patch_file, tmp_path):
    base, _ = pair
    data = {file.name: file.read_bytes() for file in base.iterdir()}
    weights = next(name for name in data if name.endswith(".safetensors"))
    one = hub.make("org/one", {NAME: patch_file.read_bytes()})
    two = hub.make("org/two", {NAME: patch_file.read_bytes()})
    damaged = hub.make("org/damaged", data | {weights: b"\xff" * 8 + data[weights][8:]})
    altered = hub.make("org/altered", {NAME: patch_file.read_bytes().replace(b"sensitive", b"sensible!")})
    results = several(
        [
            ("merge", "org/one", "org/two", "-o", "m.safetensors", "--on-overlap", "error"),
            ("merge", "org/one", "org/two", "-o", "m.safetensors", "--on-overlap", "mean"),
            ("inspect", "m.safetensors"),
            ("diff", "org/one", "base"),
            ("diff", "base", "org/one", "--json"),
            ("diff", "base", "org/damaged"),
            ("verify", f"org/damaged@{damaged}", "org/one"),
            ("merge", "org/one", "org/altered", "-o", "n.safetensors", "--on-overlap", "mean"),
            ("verify", "base", "org/altered"),
        ]
    )
    assert [result.code for result in results] == [3, 0, 0, 2, 2, 4, 4, 4, 4], results
    for result in results:
        assert "snapshots" not in result.out + result.err, result
        assert str(tmp_path / "home") not in result.out + result.err, result
    assert "org/one and org/two overlap" in results[0].err
    assert f"merged      from org/one@{one}, org/two@{two} (mean)" in results[2].out
    assert f"org/one@{one}: " in results[3].err
    assert results[4].json["file"] == f"org/one@{one}"
    assert f"org/damaged@{damaged}/{weights}: " in results[5].err
    assert f"org/damaged@{damaged}/{weights}: " in results[6].err
    for result in results[7:]:
        assert f"org/altered@{altered}/{NAME}: the patch does not match its hash" in result.err
