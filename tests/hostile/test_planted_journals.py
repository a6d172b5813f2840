"""A journal is a file that strangers can ship: whatever it says, no command follows it by itself.

The folder of the attacker holds a crafted journal, and weights that are plain files or links of all kinds
into the victim's cache. No command may change a byte of either; the message says what was found.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import LLAMA_CONFIG, Result, llama, snapshot, write_folder

import neftsurgery as ns
from neftsurgery.checkpoint.changes import Change
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.healing import heal_recorded
from neftsurgery.checkpoint.journal import journaled
from neftsurgery.checkpoint.unfinished import JOURNAL_NAME
from neftsurgery.neurons.layout import Layout
from neftsurgery.sources.resolve import SINGLE_NAME, resolve

EVIL = 0x41
TENSOR = "model.layers.0.mlp.up_proj.weight"
Run = Callable[..., Result]


def plant(model: Path) -> Path:
    """A journal that fits ``model``, a file or folder, in every check, and would write letters over rows.

    Its new digests are those of the rows that are there, so it looks like a change that was completed.
    """
    checkpoint = Checkpoint.read(resolve(model))
    info = checkpoint.tensors[TENSOR]
    rows = load_file(checkpoint.shard_of(TENSOR).path)[TENSOR][:3]
    digests = np.array([np.frombuffer(xxhash.xxh3_128_digest(row.tobytes()), np.uint8) for row in rows])
    change = Change(info, Layout(info.shape, (0,)), np.arange(3), digests)
    with pytest.raises(KeyError), journaled(checkpoint, [change]):
        raise KeyError  # the journal stays
    path = model / JOURNAL_NAME if model.is_dir() else model.with_name(f".{model.name}{JOURNAL_NAME}")
    with safe_open(path, framework="numpy") as file:
        document = json.loads(file.metadata()["neft_journal"])
    arrays = load_file(path)
    arrays["0:old"] = np.frombuffer(bytes([EVIL]) * rows.nbytes, np.float32).reshape(rows.shape).copy()
    document["tensors"]["0"]["old_hash"] = xxhash.xxh3_128_hexdigest(arrays["0:old"].tobytes())
    path.unlink()
    save_file(arrays, path, {"neft_journal": json.dumps(document)})
    return path


def plain(attacker: Path, victim: Path) -> Path:
    shutil.copytree(victim, attacker / "model")
    plant(attacker / "model")
    return attacker / "model"


def _linked(attacker: Path, link: Callable[[Path], object]) -> Path:
    """A folder with a config and a journal of its own, whose weights ``link`` makes."""
    model = attacker / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    link(model / SINGLE_NAME)
    plant(model)
    return model


def symlinked_shard(attacker: Path, victim: Path) -> Path:
    return _linked(attacker, lambda path: path.symlink_to(victim / SINGLE_NAME))


def two_hops(attacker: Path, victim: Path) -> Path:
    (attacker / "hop").symlink_to(victim)
    return _linked(attacker, lambda path: path.symlink_to(attacker / "hop" / SINGLE_NAME))


def hard_link(attacker: Path, victim: Path) -> Path:
    return _linked(attacker, lambda path: os.link(victim / SINGLE_NAME, path))


def symlinked_folder(attacker: Path, victim: Path) -> Path:
    plain(attacker, victim)
    (attacker / "link").symlink_to(attacker / "model")
    return attacker / "link"


def file_beside_its_journal(attacker: Path, victim: Path) -> Path:
    shutil.copy(victim / SINGLE_NAME, attacker / "weights.safetensors")
    plant(attacker / "weights.safetensors")
    return attacker / "weights.safetensors"


def symlinked_file(attacker: Path, victim: Path) -> Path:
    """The journal lies beside what the link points to, in a folder that the attacker owns as well."""
    file_beside_its_journal(attacker, victim)
    (attacker / "link.safetensors").symlink_to(attacker / "weights.safetensors")
    return attacker / "link.safetensors"


LINKS = (symlinked_shard, two_hops, hard_link, symlinked_folder, symlinked_file)
ATTACKS = (plain, file_beside_its_journal, *LINKS)

#: Every command that opens a checkpoint, with MODEL for the attacker's, in every place where one is named.
COMMANDS = {
    "diff base": ("diff", "MODEL", "tuned", "-o", "out"),
    "diff tuned": ("diff", "victim", "MODEL"),
    "extract base": ("extract", "MODEL", "tuned", "--neurons", "3%", "-o", "out"),
    "extract tuned": ("extract", "victim", "MODEL", "--changed", "-o", "out"),
    "apply": ("apply", "MODEL", "patch", "-o", "out"),
    "apply --in-place": ("apply", "MODEL", "patch", "--in-place"),
    "revert": ("revert", "MODEL", "patch", "-o", "out"),
    "revert --in-place": ("revert", "MODEL", "patch", "--in-place"),
    "revert --base": ("revert", "patched", "lean", "--base", "MODEL", "-o", "out"),
    "verify": ("verify", "MODEL", "patch"),
    "merge --base": ("merge", "patch", "lean", "--on-overlap", "sum", "--base", "MODEL", "-o", "out"),
    "export --base": ("export", "lean", "--to", "lora", "--base", "MODEL", "-o", "out"),
    "inspect": ("inspect", "MODEL"),
    "report": ("report", "patch", "--utilization", "--base", "MODEL", "--text", "text.txt", "-o", "out"),
    "train": ("train", "recipe.yaml", "--set", "model=MODEL"),
}
NO_DRY_RUN = {"verify", "inspect"}


@pytest.fixture
def setting(tmp_path: Path) -> Path:
    """``victim`` (as if in a cache), ``tuned``, ``patched``, ``patch`` (reversible) and ``lean`` (not)."""
    arrays = llama(32, 48, 2, 40, 0)
    rng = np.random.default_rng(1)
    tuned = {n: a + rng.standard_normal(a.shape).astype(np.float32) * 1e-3 for n, a in arrays.items()}
    write_folder(tmp_path / "victim", arrays, 1, LLAMA_CONFIG)
    write_folder(tmp_path / "tuned", tuned, 1, LLAMA_CONFIG)
    sides = tmp_path / "victim", tmp_path / "tuned"
    ns.extract(*sides, neurons="5%", reversible=True, out=tmp_path / "patch").close()
    ns.extract(*sides, neurons="5%", out=tmp_path / "lean").close()
    ns.apply(sides[0], tmp_path / "patch", out=tmp_path / "patched")
    (tmp_path / "attacker").mkdir()
    (tmp_path / "text.txt").write_text("a text\n" * 40)
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (tmp_path / "recipe.yaml").write_text(
        "model: tuned\nout: run\ndata: {train: data.jsonl}\nselect: {neurons: 3%}\ntrain: {epochs: 1}\n"
    )
    return tmp_path


def everything(folder: Path) -> dict[str, object]:
    return snapshot(folder) | {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_ino, stat.S_IFMT(path.lstat().st_mode))
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("dry", [False, True], ids=["", "--dry-run"])
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_no_command_follows_it(neft: Run, setting: Path, attack: Callable, name: str, dry: bool) -> None:
    if dry and name in NO_DRY_RUN:
        pytest.skip("it has no --dry-run: it never writes")
    model = attack(setting / "attacker", setting / "victim")
    before = everything(setting)
    words = [word.replace("MODEL", str(model)) for word in COMMANDS[name]]
    result = neft(*words, *(["--dry-run"] if dry else []))
    assert everything(setting) == before, "a byte was changed"
    if name == "inspect":
        assert result.code == 0
        assert "a change in place was interrupted" in result.err
    else:
        assert result.code == 5, result.err
        assert "neftsurgery heal" in result.err
    assert JOURNAL_NAME in result.err


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("options", [["--dry-run"], [], ["--json"], ["-q"]], ids=" ".join)
def test_heal_writes_nothing_that_was_not_confirmed(
    neft: Run, setting: Path, attack: Callable, options: list[str]
) -> None:
    model = attack(setting / "attacker", setting / "victim")
    before = everything(setting)
    result = neft("heal", model, *options)
    assert everything(setting) == before
    assert result.code == (0 if options == ["--dry-run"] and attack not in LINKS else 2), result.err
    if attack not in LINKS:
        if options == ["--dry-run"]:
            assert "NOT known to be yours" in result.out
            assert f"{TENSOR}  3 of 48  0-2" in result.out
        else:
            assert "--yes" in result.err


@pytest.mark.parametrize("attack", LINKS, ids=lambda attack: attack.__name__)
def test_nothing_is_healed_through_a_link(neft: Run, setting: Path, attack: Callable) -> None:
    """Not even if a person says so, and not even if the journal is recorded as this user's own."""
    model = attack(setting / "attacker", setting / "victim")
    before = everything(setting)
    for words in (["--yes"], ["--yes", "--json"]):
        result = neft("heal", model, *words)
        assert result.code == 2, result.err
        assert ("hard links" if attack is hard_link else "symlink") in result.err
        assert everything(setting) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neftsurgery.checkpoint.healing.is_recorded", lambda sha256: True)
        with pytest.raises(ns.UsageError, match="hard links" if attack is hard_link else "symlink"):
            heal_recorded(model)
    assert everything(setting) == before


def test_a_journal_of_ones_own_is_told_from_a_planted_one(neft: Run, setting: Path) -> None:
    model = plain(setting / "attacker", setting / "victim")
    facts = neft("heal", model, "--dry-run", "--json").json
    (journal,) = facts["journals"]
    assert not journal["recorded"]
    assert journal["tensors"][0]["ranges"] == [[0, 2]]
    assert facts["neurons"] == 3
    assert facts["healed"] is False
    assert neft("heal", model, "--yes").code == 0  # asked for: the letters are in
    assert (load_file(model / SINGLE_NAME)[TENSOR][:3].view(np.uint8) == EVIL).all()
    assert (load_file(setting / "victim" / SINGLE_NAME)[TENSOR][:3].view(np.uint8) != EVIL).any()


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder"])
def test_a_journal_that_is_no_file_is_not_followed(neft: Run, setting: Path, kind: str) -> None:
    model = plain(setting / "attacker", setting / "victim")
    journal = model / JOURNAL_NAME
    journal.rename(setting / "elsewhere")
    if kind == "symlink":
        journal.symlink_to(setting / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(journal)
    else:
        journal.mkdir()
    weights = (model / SINGLE_NAME).read_bytes()
    assert neft("inspect", model).code == 0
    assert neft("verify", model, "patch").code == 5
    assert neft("heal", model, "--yes").code == 4
    assert neft("apply", model, "patch", "--in-place").code == 5
    assert (model / SINGLE_NAME).read_bytes() == weights


def test_weights_that_become_a_link_after_they_were_checked(setting: Path) -> None:
    """Between the plan and the write the attacker swaps the shard for a link into the cache."""
    from neftsurgery.checkpoint.healing import plan_heal

    model = plain(setting / "attacker", setting / "victim")
    plan = plan_heal(model)
    (model / SINGLE_NAME).unlink()
    (model / SINGLE_NAME).symlink_to(setting / "victim" / SINGLE_NAME)
    before = everything(setting)
    with pytest.raises(ns.UsageError, match="symlink"):
        plan.run()
    assert everything(setting) == before
    (model / SINGLE_NAME).unlink()
    os.link(setting / "victim" / SINGLE_NAME, model / SINGLE_NAME)
    before = everything(setting)
    with pytest.raises(ns.UsageError, match="hard links"):
        plan.run()
    assert everything(setting) == before


def test_a_folder_that_becomes_a_link_after_it_was_checked(setting: Path) -> None:
    from neftsurgery.checkpoint.healing import plan_heal

    model = plain(setting / "attacker", setting / "victim")
    plan = plan_heal(model)
    model.rename(setting / "attacker" / "moved")
    model.symlink_to(setting / "victim")
    before = everything(setting)
    with pytest.raises(ns.UsageError, match="symlink"):
        plan.run()
    assert everything(setting) == before
