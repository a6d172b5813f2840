"""The SHA-256 of a patch's whole file: inspect shows it, and apply demands it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from support import snapshot

import neftsurgery as ns
from neftsurgery.surgery.chains import opened_patches
from neftsurgery.surgery.verb import check_sha256


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def files(pair: tuple[Path, Path], tmp_path: Path) -> dict[str, str]:
    """Two patches in ``tmp_path`` that follow each other or stand alone, by name: their SHA-256."""
    for name, neurons in (("p", 20), ("q", 5)):
        ns.extract(*pair, neurons=neurons, out=tmp_path / name).close()
    return {name: sha256(tmp_path / name) for name in ("p", "q")}


def test_inspect_shows_it(files: dict[str, str], neft: Any, tmp_path: Path) -> None:
    assert f"sha256      {files['p']}\n" in neft("inspect", "p").out
    assert neft("inspect", "p", "--json").json["sha256"] == files["p"]
    both = neft("inspect", "p", "q", "--json").json["patches"]
    assert [patch["sha256"] for patch in both] == list(files.values())
    assert f"sha256  {files['p']}" in str(ns.inspect(tmp_path / "p"))
    assert ns.Patch.load(tmp_path / "p").sha256() == files["p"]


def test_apply_takes_the_file_that_was_meant(files: dict[str, str], neft: Any, tmp_path: Path) -> None:
    p, q = files.values()
    assert neft("apply", "base", "p", "-o", "out1", "--sha256", p).code == 0
    assert neft("apply", "base", "p", "-o", "out2", "--sha256", p.upper()).code == 0
    assert neft("apply", "base", "p", "q", "-o", "out3", "--sha256", p, "--sha256", q).code == 0
    assert neft("apply", "out1", "q", "--in-place", "--sha256", q).code == 0
    ns.apply(tmp_path / "base", tmp_path / "p", out=tmp_path / "out4", sha256=p)
    ns.apply(tmp_path / "base", ns.Patch.load(tmp_path / "p"), out=tmp_path / "out5", sha256=[p])
    assert snapshot(tmp_path / "out4") == snapshot(tmp_path / "out5") == snapshot(tmp_path / "out2")


def test_any_other_file_is_refused_before_anything_is_written(
    files: dict[str, str], neft: Any, tmp_path: Path
) -> None:
    p, q = files.values()
    changed = p[:-1] + ("0" if p[-1] != "0" else "1")
    for patches, given in ((["p"], [q]), (["p"], [changed]), (["p", "q"], [q, p]), (["p", "q"], [p, p])):
        for place in (("-o", "out"), ("--in-place",), ("-o", "out", "--dry-run")):
            before = snapshot(tmp_path)
            words = [word for one in given for word in ("--sha256", one)]
            refused = neft("apply", "base", *patches, *place, *words)
            assert (refused.code, refused.out, snapshot(tmp_path)) == (4, "", before)
            assert "this is not the file whose --sha256 was given (expected " in refused.err
            assert given[-1] in refused.err or given[0] in refused.err
    with pytest.raises(ns.CorruptFileError, match="whose sha256 was given") as caught:
        ns.apply(tmp_path / "base", tmp_path / "p", out=tmp_path / "out", sha256=q)
    assert (caught.value.expected, caught.value.found, caught.value.file) == (q, p, str(tmp_path / "p"))


def test_a_patch_whose_own_hashes_were_forged_too_has_another(
    files: dict[str, str], neft: Any, tmp_path: Path
) -> None:
    """Whoever writes a patch writes its hashes: only the SHA-256 that the author published tells."""
    ns.extract(tmp_path / "base", tmp_path / "tuned", neurons=20, policy="reversed", out=tmp_path / "forged")
    assert neft("verify", "base", "forged").code == 0
    assert neft("apply", "base", "forged", "-o", "out", "--sha256", files["p"]).code == 4


@pytest.mark.parametrize(
    "wrong", ["", "abc", "g" * 64, "0" * 63, "0" * 65, "0" * 63 + "\n", f"sha256:{'0' * 64}"]
)
def test_what_is_no_sha256_is_a_wrong_command_line(
    files: dict[str, str], neft: Any, tmp_path: Path, wrong: str
) -> None:
    before = snapshot(tmp_path)
    for words in (("apply", "base", "p", "-o", "out"), ("pull", "me/patch", "-o", "out")):
        refused = neft(*words, "--sha256", wrong)
        assert (refused.code, snapshot(tmp_path)) == (2, before)
        assert "--sha256 is not a SHA-256 (expected 64 hexadecimal digits" in refused.err
    with pytest.raises(ns.UsageError, match="sha256 is not a SHA-256"):
        ns.pull("me/patch", sha256=wrong)


def test_there_is_one_for_each_patch(files: dict[str, str], neft: Any) -> None:
    p, q = files.values()
    for patches, given in ((["p", "q"], [p]), (["p"], [p, q])):
        words = [word for one in given for word in ("--sha256", one)]
        refused = neft("apply", "base", *patches, "-o", "out", *words)
        assert refused.code == 2
        assert f"expected one --sha256 per patch, in order (expected {len(patches)}" in refused.err
    assert check_sha256(None, 2) == check_sha256((), 2) == [None, None]


def test_what_is_read_afterwards_is_the_file_that_was_hashed(files: dict[str, str], tmp_path: Path) -> None:
    """It is opened once: another file under its name is not read, and an edit of it is noticed."""
    (patch,) = opened_patches([tmp_path / "p"], files["p"])
    content = patch.values(next(iter(patch.tensors)))
    os.replace(tmp_path / "q", tmp_path / "p")
    assert (patch.values(next(iter(patch.tensors))) == content).all()
    assert patch.sha256() == files["p"]
    ns.apply(tmp_path / "base", patch, out=tmp_path / "out", sha256=files["p"])

    (edited,) = opened_patches([tmp_path / "p"], files["q"])
    with (tmp_path / "p").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0\0")
    with pytest.raises(ns.NeftError):
        ns.apply(tmp_path / "base", edited, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()
