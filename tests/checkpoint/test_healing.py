"""Healing by whoever asks for it: what it shows, who may; a checkpoint parted from its journal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import Result, snapshot, write_folder

import neftsurgery as ns
from neftsurgery.checkpoint.healing import heal_recorded, plan_heal
from neftsurgery.surgery import rewrite

Run = Callable[..., Result]


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, dict[str, object]]:
    """A checkpoint of two shards that was half patched in place, its patch, and what it was before."""
    rng = np.random.default_rng(0)
    arrays = {f"layers.{n}.weight": rng.standard_normal((40, 8)).astype(np.float32) for n in range(3)}
    base = write_folder(tmp_path / "base", arrays, 2)
    tuned = write_folder(tmp_path / "tuned", {n: a + 1 for n, a in arrays.items()}, 2)
    ns.extract(base, tuned, neurons="40%", out=tmp_path / "patch").close()
    before = snapshot(base)
    write, calls = rewrite._write_rows, []

    def torn(*args: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(rewrite, "_write_rows", torn)
        broken.setattr(rewrite, "heal_recorded", lambda source: None)
        with pytest.raises(KeyboardInterrupt):
            ns.apply(base, tmp_path / "patch", in_place=True, threads=1)
    assert snapshot(base) != before
    return base, tmp_path / "patch", before


def test_the_next_change_in_place_heals_what_is_recorded(interrupted, neft: Run, tmp_path: Path) -> None:
    base, patch, _ = interrupted
    for words in (["verify", base, patch], ["apply", base, patch, "--in-place", "--dry-run"],
                  ["apply", base, patch, "-o", "out"]):  # fmt: skip
        torn = snapshot(base)
        result = neft(*words)
        assert result.code == 5
        assert f"neftsurgery heal {base}" in result.err
        assert snapshot(base) == torn
    assert neft("inspect", base, "--json").json["unfinished"] == [str(base / ".neft-journal")]
    result = neft("apply", base, patch, "--in-place")
    assert result.code == 0
    assert "interrupted; it is undone" in result.err
    assert ns.verify(base, patch).state == "patched"
    assert not (base / ".neft-journal").exists()
    assert neft("inspect", base, "--json").json["unfinished"] == []


def test_a_copy_with_another_inode_and_owner_heals(interrupted, tmp_path: Path) -> None:
    base, _, before = interrupted
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(base, copy)
    shutil.rmtree(base)
    if os.geteuid() == 0:
        for path in (copy, *copy.iterdir()):
            os.chown(path, 65534, 65534)
    assert ns.heal(copy).neurons == 48
    assert snapshot(copy) == before


def test_a_journal_of_the_last_version_heals_when_asked(interrupted, neft: Run) -> None:
    """It has no id, and nobody recorded it."""
    base, patch, before = interrupted
    path = base / ".neft-journal"
    with safe_open(path, framework="numpy") as file:
        document = json.loads(file.metadata()["neft_journal"])
    del document["id"]
    arrays = load_file(path)
    path.unlink()
    save_file(arrays, path, {"neft_journal": json.dumps(document)})
    assert neft("apply", base, patch, "--in-place").code == 5
    assert neft("heal", base, "--yes").code == 0
    assert snapshot(base) == before


def test_what_heal_shows(interrupted, neft: Run) -> None:
    base, _, before = interrupted
    result = neft("heal", base, "--dry-run")
    assert result.code == 0
    assert "written here by you" in result.out
    assert "would write 48 neurons (1.5 kB) into" in result.out
    for path in sorted(base.glob("*.safetensors")):
        assert str(path) in result.out
    with safe_open(base / ".neft-journal", framework="numpy") as file:
        index = file.get_tensor("0:index")
    facts = neft("heal", base, "--dry-run", "--json").json
    first = facts["journals"][0]["tensors"][0]
    assert first["of"] == 40
    shown = [n for low, high in first["ranges"] for n in range(low, high + 1)]
    assert shown == index.tolist()[: len(shown)]
    assert facts["journals"][0]["recorded"]
    done = neft("heal", base, "--yes", "--json").json
    assert done["healed"]
    assert done["neurons"] == 48
    assert snapshot(base) == before


def test_heal_asks_on_a_terminal(interrupted, neft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, before = interrupted
    torn = snapshot(base)

    class Terminal:
        def __init__(self, answer: str) -> None:
            self.answer = answer

        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return self.answer

        def fileno(self) -> int:
            raise OSError

    for answer, code in (("n\n", 130), ("\n", 130), ("y\n", 0)):
        assert snapshot(base) == torn
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        result = neft("heal", base)
        assert result.code == code, result.err
        assert "Write them? [y/N]" in result.err
    assert snapshot(base) == before


def test_nothing_to_heal(tmp_path: Path, neft: Run) -> None:
    base = write_folder(tmp_path / "base", {"w": np.ones((2, 3), np.float32)})
    assert plan_heal(base).restorations == ()
    assert heal_recorded(base) is None
    for more in ((), ("--dry-run",)):
        result = neft("heal", base, *more)
        assert result.code == 0
        assert "nothing to heal" in result.out
    assert neft("heal", tmp_path / "missing").code == 2


def test_two_healers_at_once(interrupted) -> None:
    """One of them heals; the other finds it done, or is told that somebody is at it."""
    base, _, before = interrupted
    code = (
        "import sys, neftsurgery as ns\nfrom neftsurgery.checkpoint import healing\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: print(len(ns.heal(sys.argv[1]).journals))\n"
        "except ns.MachineError as error: print('another process' in str(error) and 'busy')"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, base], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    ends = sorted(racer.communicate("go\n", timeout=60)[0].strip() for racer in racers)
    assert ends in (["0", "1"], ["1", "busy"]), ends
    assert snapshot(base) == before


def test_a_checkpoint_parted_from_its_journal_is_told_of_it(interrupted, neft: Run, tmp_path: Path) -> None:
    """``cp ckpt/* new/`` leaves hidden files behind. A torn row is neither old nor new: the hint says why."""
    base, patch, _ = interrupted
    parted = tmp_path / "parted"
    shutil.copytree(base, parted, ignore=shutil.ignore_patterns(".*"))
    with ns.Patch.load(patch) as opened:
        name = next(iter(opened.tensors))
        row = int(opened.index(name)[0])
    for path in parted.glob("*.safetensors"):
        arrays = load_file(path)
        if name in arrays:
            arrays[name][row, :4] = 7
            save_file(arrays, path)
    for words in (["apply", parted, patch, "-o", "out"], ["apply", parted, patch, "--in-place"],
                  ["verify", parted, patch]):  # fmt: skip
        result = neft(*words)
        assert result.code == 3
        assert ".neft-journal" in result.err
        assert "may still be at the old place" in result.err


@pytest.mark.parametrize("what", ["overlap", "too many"])
def test_a_journal_that_contradicts_itself_or_is_larger_than_the_checkpoint(
    interrupted, neft: Run, what: str
) -> None:
    import xxhash

    base, _, _ = interrupted
    path = base / ".neft-journal"
    with safe_open(path, framework="numpy") as file:
        document = json.loads(file.metadata()["neft_journal"])
    arrays, tensors = load_file(path), document["tensors"]
    for _ in range(1 if what == "overlap" else 17):
        number = str(len(tensors))
        tensors[number] = dict(tensors["0"])
        arrays |= {f"{number}:{part}": arrays[f"0:{part}"].copy() for part in ("index", "new_digest", "old")}
    if what == "overlap":
        arrays[f"{number}:old"][0] = 7
        tensors[number]["old_hash"] = xxhash.xxh3_128_hexdigest(arrays[f"{number}:old"].tobytes())
    path.unlink()
    save_file(arrays, path, {"neft_journal": json.dumps(document)})
    torn = snapshot(base)
    result = neft("heal", base, "--yes")
    assert result.code == 4
    assert ("overlap" if what == "overlap" else "larger than the checkpoint") in result.err
    assert snapshot(base) == torn


def test_the_journal_that_is_followed_is_the_one_whose_record_was_found(
    interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened once: another file put in its place afterwards is not followed."""
    from neftsurgery.checkpoint import healing

    base, _, _ = interrupted
    journal, torn = base / ".neft-journal", snapshot(base)
    content = journal.read_bytes()

    def found(sha256: str) -> bool:
        journal.unlink()
        journal.write_bytes(content)  # as good, but it is not the file that was hashed
        return True

    monkeypatch.setattr(healing, "is_recorded", found)
    assert heal_recorded(base) is None
    assert {name for name, entry in snapshot(base).items() if torn.get(name) != entry} <= {".neft-journal"}
