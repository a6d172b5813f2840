"""Lossless patches in place: what is refused, what is said, which bytes are written and journaled."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from lossless_support import Counted, contents, folder, tensor, touched, unchanged

import neftsurgery as ns

RNG = np.random.default_rng(0)
FILES = {"config.json": b'{"a": 1}', "tokenizer.json": b"{}", "README.md": b"# mine"}
BASE = {"a.weight": tensor("BF16", (900, 200), RNG), "b": tensor("F32", (9, 70), RNG)}
TUNED = {name: touched(one, 0.3, RNG) for name, one in BASE.items()}
METADATA = {"format": "pt"}


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base and tuned of the same layout, and a patch that is not reversible."""
    base = folder(tmp_path / "base", BASE, 2, FILES, METADATA)
    tuned = folder(tmp_path / "tuned", TUNED, 2, {**FILES, "config.json": b'{"a": 2}'}, METADATA)
    ns.extract(base, tuned, lossless=True, out=tmp_path / "p").close()
    return base, tuned, tmp_path / "p"


def test_the_command_line(sides, tmp_path: Path, neft) -> None:
    before = contents(sides[0])
    planned = neft("apply", "base", "p", "--in-place", "--dry-run", "--json").json
    assert contents(sides[0]) == before
    done = neft("apply", "base", "p", "--in-place", "--json").json
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json"]
    assert planned["files"] == done["files"] == names
    assert (planned["written"], done["written"], done["in_place"], done["out"]) == (False, True, True, None)
    assert contents(sides[0]) == contents(sides[1])
    again = neft("apply", "base", "p", "--in-place")
    assert (again.code, "base is patched already" in again.out) == (0, True)
    assert "nothing to write" in neft("apply", "base", "p", "--in-place", "--dry-run").out
    back = folder(tmp_path / "original", BASE, 2, FILES, METADATA)
    assert neft("revert", "base", "p", "--base", back, "--in-place").code == 0
    assert contents(sides[0]) == before


@pytest.mark.parametrize(
    ("case", "says"),
    {
        "shards": ("model-00001-of-00002.safetensors", "no such file"),
        "dtype": ("tensor b", "F16"),
        "shape": ("tensor b", "[9, 80]"),
        "missing": ("tensor b", "no such tensor"),
        "metadata": ("model-00001-of-00002.safetensors", "header"),
        "file": ("base/model", "a folder"),
    }.items(),
)
def test_other_files_are_refused_and_the_difference_is_named(
    sides, tmp_path: Path, neft, case: str, says: tuple[str, str]
) -> None:
    base, _, _ = sides
    shutil.rmtree(tmp_path / "tuned")
    named, tensors, shards, metadata = "base", dict(TUNED), 2, METADATA
    if case == "shards":
        shards = 1
    elif case == "dtype":
        tensors["b"] = tensor("F16", (9, 70), RNG)
    elif case == "shape":
        tensors["b"] = tensor("F32", (9, 80), RNG)
    elif case == "missing":
        tensors["c"] = tensors.pop("b")
    elif case == "metadata":
        metadata = {"format": "np"}
    tuned = folder(tmp_path / "tuned", tensors, shards, FILES, metadata)
    if case == "file":
        named = "base/model-00001-of-00002.safetensors"
        base = tmp_path / named
    ns.extract(base, tuned, lossless=True, out=tmp_path / "q").close()
    with unchanged(tmp_path):
        done = neft("apply", named, "q", "--in-place")
        assert done.code == 2
        assert "-o OUT" in done.err
        for text in says:
            assert text in done.err, done.err
    assert neft("apply", named, "q", "-o", "out").code == 0


def test_only_changed_ranges_are_journaled_and_written(tmp_path: Path) -> None:
    """Three elements of 8 MB: three ranges of 64 kB, and one journal of little more."""
    rng = np.random.default_rng(1)
    base = {"w": tensor("F32", (2_000_003,), rng), "v": tensor("F32", (20_000,), rng)}
    data = np.frombuffer(base["w"][2], np.uint32).copy()
    data[[5, 1_048_576, 2_000_002]] ^= 1
    sides = (
        folder(tmp_path / "base", base),
        folder(tmp_path / "tuned", base | {"w": ("F32", (2_000_003,), data.tobytes())}),
    )
    ns.extract(*sides, lossless=True, out=tmp_path / "p").close()
    written: list[tuple[int, int]] = []
    real, file = os.pwrite, (sides[0] / "model.safetensors").stat().st_ino

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        written.append((os.fstat(fd).st_ino, len(data)))
        return real(fd, data, offset)

    progress = Counted()
    with mock.patch.object(os, "pwrite", pwrite):
        ns.apply(sides[0], tmp_path / "p", in_place=True, progress=progress)
    assert sum(size for inode, size in written if inode == file) == 2 * 65536 + 2_000_003 * 4 % 65536
    assert sum(size for inode, size in written if inode != file) < 4 * 65536
    assert all(total == done for total, done in progress.stages.values()), progress.stages
    assert contents(sides[0]) == contents(sides[1])


def with_byte(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_another_checkpoint_is_refused_before_a_byte_is_written(
    sides, tmp_path: Path, neft, verb: str
) -> None:
    """By the hash of a block: the fingerprint does not see the middle of a tensor."""
    base, tuned, _ = sides
    model = tmp_path / "model"
    for wrong in ("model", "base") if verb == "revert" else ("model",):
        shutil.copytree(base if verb == "apply" else tuned, model)
        kept = (tmp_path / wrong / "model-00001-of-00002.safetensors").read_bytes()
        with_byte(tmp_path / wrong / "model-00001-of-00002.safetensors", 100_000)
        with unchanged(tmp_path):
            done = neft(verb, "model", "p", "--in-place", *(("--base", "base") if verb == "revert" else ()))
            assert (done.code, f"{wrong}, tensor a.weight" in done.err) == (3, True), done.err
        (tmp_path / wrong / "model-00001-of-00002.safetensors").write_bytes(kept)
        shutil.rmtree(model)


def test_damaged_code_is_refused_before_a_byte_is_written(sides, tmp_path: Path, neft) -> None:
    with_byte(sides[2], -1)
    with unchanged(tmp_path):
        assert neft("apply", "base", "p", "--in-place").code == 4
        assert neft("verify", "base", "p").code == 4, "verify decodes"


def test_a_file_beside_the_weights_that_cannot_be_replaced(sides, tmp_path: Path, neft) -> None:
    base = sides[0]
    (base / "config.json").rename(tmp_path / "shared.json")
    (base / "config.json").symlink_to(tmp_path / "shared.json")
    with unchanged(tmp_path):
        done = neft("apply", "base", "p", "--in-place")
        assert (done.code, "config.json" in done.err, "-o OUT" in done.err) == (2, True, True), done.err
    (base / "config.json").unlink()
    os.link(tmp_path / "shared.json", base / "config.json")
    assert neft("apply", "base", "p", "--in-place").code == 0
    assert (tmp_path / "shared.json").read_bytes() == FILES["config.json"], (
        "its other name is another file now"
    )
    assert contents(base) == contents(sides[1])


@pytest.mark.parametrize("how", ["symlink", "hard link", "folder", "hub"])
def test_links_and_hub_ids_are_refused(sides, tmp_path: Path, neft, how: str) -> None:
    file, named = sides[0] / "model-00002-of-00002.safetensors", "base"
    if how == "symlink":
        file.rename(tmp_path / "blob")
        file.symlink_to(tmp_path / "blob")
    elif how == "hard link":
        os.link(file, tmp_path / "second")
    elif how == "folder":
        (tmp_path / "link").symlink_to(sides[0])
        named = "link"
    else:
        named = "some-org/some-model"
    with unchanged(tmp_path):
        done = neft("apply", named, "p", "--in-place")
        assert (done.code, {"hub": "Hub", "hard link": how}.get(how, "symlink") in done.err) == (2, True)


def test_too_little_disk_space_for_the_journal(sides, tmp_path: Path, neft) -> None:
    real = os.statvfs
    full = lambda folder: os.statvfs_result((*real(folder)[:4], 0, *real(folder)[5:]))  # noqa: E731
    with unchanged(tmp_path), mock.patch.object(os, "statvfs", full):
        done = neft("apply", "base", "p", "--in-place")
        assert (done.code, "not enough space" in done.err) == (5, True)


def test_heal_says_what_it_would_write(sides, tmp_path: Path, neft) -> None:
    from neftsurgery.checkpoint import journal
    from neftsurgery.surgery import rewrite

    before = contents(sides[0])
    with (
        pytest.raises(KeyboardInterrupt),
        mock.patch.object(journal, "remove_journal", side_effect=KeyboardInterrupt),
        mock.patch.object(rewrite, "heal_recorded"),
    ):
        ns.apply(sides[0], sides[2], in_place=True)
    planned = neft("heal", "base", "--dry-run")
    assert "would write 7 ranges" in planned.out, planned.out
    assert "base/config.json" in planned.out
    assert "healed: 7 ranges written back" in neft("heal", "base", "--yes").out
    assert contents(sides[0]) == before
