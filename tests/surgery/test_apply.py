"""apply: what is refused before a byte is written, and what the written checkpoint is like."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from support import (
    assert_same_tensors,
    patched_by_hand,
    raw_file,
    raw_folder,
    raw_read,
    snapshot,
)

import neftsurgery as ns
from neftsurgery.checkpoint.folder_files import folder_files

RNG = np.random.default_rng(0)
SHAPES = {"a.weight": (8, 6), "b.weight": (5, 9), "c.weight": (4, 4), "d.weight": (3, 2)}
BASE = {n: ("BF16", RNG.integers(0, 1 << 14, shape, np.uint16)) for n, shape in SHAPES.items()}
TUNED = {n: (kind, bits ^ np.uint16(7)) for n, (kind, bits) in BASE.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return raw_folder(tmp_path / "base", BASE, 2, {"model_type": "?"})


@pytest.fixture
def patch(base: Path, tmp_path: Path) -> Path:
    """Of rows of ``a`` and columns of ``b``."""
    tuned = raw_folder(tmp_path / "tuned", TUNED)
    options = {"only": ["a.*", "b.*"], "axis": {"b.*": 1}, "score": "random", "reversible": True}
    ns.extract(base, tuned, neurons="50%", out=tmp_path / "patch", **options).close()
    return tmp_path / "patch"


def refused(root: Path, error: type[ns.NeftError], call: Callable[[], object], *says: str) -> ns.NeftError:
    """The call fails as it should, says so, and every file and folder is as it was, hidden ones too."""
    before = snapshot(root)
    with pytest.raises(error) as caught:
        call()
    for word in says:
        assert word in str(caught.value)
    assert snapshot(root) == before
    return caught.value


# What does not fit.


def test_another_base(base: Path, patch: Path, tmp_path: Path) -> None:
    other = dict(BASE)
    with ns.Patch.load(patch) as opened:
        row = int(opened.index("a.weight")[1])
    kind, bits = other["a.weight"]
    other["a.weight"] = kind, bits.copy()
    other["a.weight"][1][row, 3] ^= 1
    wrong = raw_folder(tmp_path / "wrong", other)
    for options in ({"out": tmp_path / "out"}, {"in_place": True}):
        error = refused(
            tmp_path,
            ns.MismatchError,
            lambda options=options: ns.apply(wrong, patch, **options),
            "another base",
            str(wrong),
            str(patch),
            "a.weight",
            "expected the vectors of its base, or its own, found 1 of ",
            " that are neither",
            "verify",
        )
        assert error.tensor == "a.weight"


CHANGED: dict[str, tuple[dict[str, object], str]] = {
    "another shape": (
        {"a.weight": ("BF16", np.zeros((8, 7), "u2"))},
        "expected BF16 [8, 6], found BF16 [8, 7]",
    ),
    "transposed": ({"a.weight": ("BF16", np.zeros((6, 8), "u2"))}, "expected BF16 [8, 6], found BF16 [6, 8]"),
    "another type": ({"a.weight": ("F16", np.zeros((8, 6), "u2"))}, "expected BF16 [8, 6], found F16 [8, 6]"),
    "missing": ({}, "expected BF16 [8, 6], found no such tensor"),
}


@pytest.mark.parametrize(("instead", "says"), CHANGED.values(), ids=CHANGED)
def test_another_model(
    patch: Path, tmp_path: Path, instead: dict[str, tuple[str, np.ndarray]], says: str
) -> None:
    rest = {name: entry for name, entry in BASE.items() if name != "a.weight"}
    other = raw_folder(tmp_path / "other", rest | instead)
    for options in ({"out": tmp_path / "out"}, {"in_place": True}):
        refused(
            tmp_path,
            ns.MismatchError,
            lambda options=options: ns.apply(other, patch, **options),
            says,
            str(other),
            str(patch),
            "made from base",
        )


def test_patches_in_the_wrong_order(base: Path, patch: Path, tmp_path: Path) -> None:
    """The second was made on what the first leaves: the other way round the second has another base."""
    third = raw_folder(tmp_path / "third", {n: (k, bits ^ np.uint16(1)) for n, (k, bits) in TUNED.items()})
    ns.apply(base, patch, out=tmp_path / "first")
    ns.extract(tmp_path / "first", third, changed=True, only=["a.*"], out=tmp_path / "second").close()
    ns.apply(base, [patch, tmp_path / "second"], out=tmp_path / "both")
    assert raw_read(tmp_path / "both")["a.weight"][1].tobytes() == raw_read(third)["a.weight"][1].tobytes()
    for order in ([tmp_path / "second", patch], [tmp_path / "second"]):
        call = lambda order=order: ns.apply(base, order, out=tmp_path / "out")  # noqa: E731
        refused(tmp_path, ns.MismatchError, call, "second was made from another base")


# What makes no sense.


def test_an_output_that_exists(base: Path, patch: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "folder", "link"):
        out = tmp_path / name
        call = lambda out=out: ns.apply(base, patch, out=out)  # noqa: E731
        refused(tmp_path, ns.UsageError, call, "exists already", str(out), "force=True")


def test_an_output_that_is_in_the_way_of_an_input(base: Path, patch: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    shutil.copytree(base, tmp_path / "sub" / "base")
    (tmp_path / "alias").symlink_to(base)
    single = raw_file(tmp_path / "single.safetensors", BASE)
    inner = tmp_path / "sub" / "base"
    for source, out in [
        (base, base),
        (base, tmp_path / "alias"),
        (base, tmp_path / "sub" / ".." / "base"),
        (base, base / "inside"),
        (base, tmp_path / "alias" / "inside"),
        (inner, tmp_path / "sub"),
        (single, single),
        (base, patch),
    ]:
        for force in (False, True):
            call = lambda s=source, o=out, f=force: ns.apply(s, patch, out=o, force=f)  # noqa: E731
            refused(tmp_path, ns.UsageError, call, str(out))


def test_a_patch_inside_the_output(base: Path, patch: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    moved = old / "patch"
    patch.rename(moved)
    refused(tmp_path, ns.UsageError, lambda: ns.apply(base, moved, out=old, force=True), str(old), str(moved))


@pytest.mark.parametrize("patches", [[], ()], ids=str)
def test_no_patch(base: Path, tmp_path: Path, patches: object) -> None:
    refused(tmp_path, ns.UsageError, lambda: ns.apply(base, patches, out=tmp_path / "out"), "no patch")


def test_no_such_base(patch: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    call = lambda: ns.apply(missing, patch, out=tmp_path / "out")  # noqa: E731
    refused(tmp_path, ns.UsageError, call, "no such file or folder", str(missing))


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads(base: Path, patch: Path, tmp_path: Path, threads: int) -> None:
    call = lambda: ns.apply(base, patch, out=tmp_path / "out", threads=threads)  # noqa: E731
    refused(tmp_path, ns.UsageError, call, "threads must be at least 1")


# What is written.

ALONG = {
    "config.json": '{"model_type": "?"}',
    "generation_config.json": "{}",
    "tokenizer.json": "☃",
    "tokenizer.model": "\x00\x01",
    "chat_template.jinja": "{{ messages }}",
    "modeling_custom.py": "raise SystemExit",
    "LICENSE": "mine",
    "README.md": "# model",
    ".gitattributes": "*.safetensors filter=lfs",
    "1_Pooling/config.json": "{}",
    "2_Dense/model.safetensors": "a module of its own",
    "additional/deep/er/file.txt": "x",
}
LEFT = {
    "pytorch_model.bin": "stale",
    "pytorch_model.bin.index.json": "{}",
    "model-Q4_K_M.gguf": "stale",
    "consolidated.safetensors": "stale",
    "tf_model.h5": "stale",
    "flax_model.msgpack": "stale",
    "model.onnx": "stale",
    "original/consolidated.00.pth": "stale",
    "original/params.json": "{}",
    "onnx/model.onnx": "stale",
    ".cache/huggingface/x": "stale",
    ".out.neft-0123456789abcdef/model.safetensors": "left by a killed process",
}


def test_everything_but_stale_weights_comes_along(base: Path, patch: Path, tmp_path: Path) -> None:
    modes = {
        "tokenizer.json": 0o600,
        "modeling_custom.py": 0o755,
        "LICENSE": 0o444,
        "1_Pooling/config.json": 0o640,
    }
    for name, text in (ALONG | LEFT).items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
        (base / name).chmod(modes.get(name, 0o644))
    before = snapshot(base)
    ns.apply(base, patch, out=tmp_path / "out")
    assert snapshot(base) == before
    found = snapshot(tmp_path / "out")
    weights = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    kept = {"model.safetensors.index.json", *ALONG}
    assert {name for name in found if (tmp_path / "out" / name).is_file()} == weights | kept
    assert {name: found[name] for name in kept} == {name: before[name] for name in kept}
    listed = folder_files(ns.Checkpoint.open(base))
    assert {str(path) for path in listed.along} == kept
    names = {name if "/" not in name else name.split("/")[0] for name in LEFT}
    assert {str(path) for path in listed.left} == names - {".out.neft-0123456789abcdef"}


def test_an_index_that_the_single_file_beats_is_left_behind(patch: Path, tmp_path: Path) -> None:
    both = raw_folder(tmp_path / "both", BASE)
    (both / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "gone.safetensors"}}')
    (both / "extra.safetensors").write_bytes(b"not read")
    ns.apply(both, patch, out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert [str(path) for path in folder_files(ns.Checkpoint.open(both)).left] == [
        "extra.safetensors", "model.safetensors.index.json"
    ]  # fmt: skip


def test_a_single_shard_with_an_index(patch: Path, tmp_path: Path) -> None:
    folder = raw_folder(tmp_path / "one", BASE)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    index = {"weight_map": dict.fromkeys(BASE, "weights.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ns.apply(folder, patch, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.safetensors.index.json", "weights.safetensors"
    ]  # fmt: skip
    assert ns.verify(tmp_path / "out", patch).state == "patched"


def header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def test_headers_shards_and_untouched_tensors_are_kept(base: Path, patch: Path, tmp_path: Path) -> None:
    ns.apply(base, patch, out=tmp_path / "out")
    assert_same_tensors(raw_read(tmp_path / "out"), patched_by_hand(BASE, patch))
    for shard in base.glob("*.safetensors"):
        assert header(tmp_path / "out" / shard.name) == header(shard)
        assert b'"part"' in header(shard), "the metadata of each shard is its own"


def test_an_odd_header_is_kept_as_it_is(patch: Path, tmp_path: Path) -> None:
    """Spaces, order and metadata that no writer of ours makes."""
    file = raw_file(tmp_path / "odd.safetensors", dict(reversed(BASE.items())), {"b": "ünïcode", "a": ""})
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].rstrip() + b" " * 4096
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    ns.apply(file, patch, out=tmp_path / "out.safetensors")
    assert header(tmp_path / "out.safetensors") == header(file)
    assert_same_tensors(raw_read(tmp_path / "out.safetensors"), patched_by_hand(BASE, patch))


@pytest.mark.parametrize("mode", [0o640, 0o444, 0o600, 0o400, 0o664])
def test_file_modes_are_kept(base: Path, patch: Path, tmp_path: Path, mode: int) -> None:
    for shard in base.glob("*.safetensors"):
        shard.chmod(mode)
    single = raw_file(tmp_path / "single.safetensors", BASE)
    single.chmod(mode)
    old = os.umask(0o077)
    try:
        ns.apply(base, patch, out=tmp_path / "out")
        ns.apply(single, patch, out=tmp_path / "out.safetensors")
    finally:
        os.umask(old)
    for path in (*(tmp_path / "out").glob("*.safetensors"), tmp_path / "out.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert ns.verify(tmp_path / "out", patch).state == "patched"


def test_linked_shards_become_files(base: Path, patch: Path, tmp_path: Path) -> None:
    """A snapshot in the Hub's cache is a folder of links into a folder of blobs."""
    blobs, links = tmp_path / "blobs", tmp_path / "snapshots"
    base.rename(blobs)
    links.mkdir()
    for path in blobs.iterdir():
        (links / path.name).symlink_to(Path("..") / "blobs" / path.name)
    before = snapshot(blobs)
    ns.apply(links, patch, out=tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert_same_tensors(raw_read(tmp_path / "out"), patched_by_hand(BASE, patch))
    assert snapshot(blobs) == before


def test_force_replaces_whatever_is_there(base: Path, patch: Path, tmp_path: Path) -> None:
    ns.apply(base, patch, out=tmp_path / "fresh")
    expected = snapshot(tmp_path / "fresh")
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("gone")
    ns.apply(base, patch, out=out, force=True)
    assert snapshot(out) == expected
    shutil.rmtree(out)
    out.mkdir()
    ns.apply(base, patch, out=out)
    assert snapshot(out) == expected, "an empty folder is no obstacle"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_relative_output(base: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ns.apply("base", "patch", out="out")
    ns.apply("base/", ["patch"], out="out2/")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "out2")


def test_sparse_files_stay_sparse(patch: Path, tmp_path: Path) -> None:
    size = 64 << 20
    file = tmp_path / "sparse.safetensors"
    raw_file(file, BASE | {"hole": ("U8", np.zeros(0, "u1"))})
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    content = json.loads(data[8:start])
    end = len(data) - start
    content["hole"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
    text = json.dumps(content).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    os.truncate(file, file.stat().st_size + size)
    if file.stat().st_blocks * 512 > size // 2:
        pytest.skip("this file system has no holes")
    ns.apply(file, patch, out=tmp_path / "out.safetensors")
    found = (tmp_path / "out.safetensors").stat()
    assert found.st_size == file.stat().st_size
    assert found.st_blocks * 512 < size // 2
    assert ns.verify(tmp_path / "out.safetensors", patch).state == "patched"


# What the machine does not allow.


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_not_enough_space_is_known_before_the_first_byte(
    base: Path, patch: Path, tmp_path: Path, kind: str
) -> None:
    source = base if kind == "folder" else raw_file(tmp_path / "m.safetensors", BASE)
    need = (
        sum(path.stat().st_size for path in source.iterdir()) if kind == "folder" else source.stat().st_size
    )
    real, written = os.statvfs(tmp_path), []

    def with_room(room: int) -> Callable[[object], os.statvfs_result]:
        return lambda folder: os.statvfs_result((1, 1, real[2], room, room, *real[5:]))

    def write(fd: int, data: bytes, offset: int) -> int:
        written.append(fd)
        raise AssertionError("a byte was written")

    with mock.patch.object(os, "statvfs", with_room(need - 1)), mock.patch.object(os, "pwrite", write):
        refused(
            tmp_path,
            ns.MachineError,
            lambda: ns.apply(source, patch, out=tmp_path / "out"),
            "not enough space",
            "free some space",
        )
    assert not written
    with mock.patch.object(os, "statvfs", with_room(need)):
        ns.apply(source, patch, out=tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MB, where this may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if sys.platform != "linux" or shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs Linux and root")
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # a failed test holds files


def large(root: Path) -> tuple[Path, Path]:
    """Two shards of 1 MB, and a patch of rows in both."""
    base = {f"{n}.weight": ("F32", RNG.integers(0, 1 << 30, (512, 512), np.uint32)) for n in "ab"}
    tuned = {name: (kind, bits ^ np.uint32(1)) for name, (kind, bits) in base.items()}
    source = raw_folder(root / "large", base, 2)
    raw_folder(root / "large tuned", tuned)
    ns.extract(source, root / "large tuned", neurons="50%", score="random", out=root / "large patch").close()
    return source, root / "large patch"


def fill(path: Path) -> None:
    with open(path, "wb", 0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_disk_that_fills_up_meanwhile(small_disk: Path, tmp_path: Path) -> None:
    source, patch = large(tmp_path)

    @contextmanager
    def filling(what: str, total: int) -> Iterator[Callable[[int], None]]:
        def advance(done: int) -> None:
            if what == "copying":
                fill(small_disk / "filler")

        yield advance

    before = snapshot(tmp_path / "large"), snapshot(patch)
    with pytest.raises(ns.MachineError, match=r"(?i)no space") as caught:
        ns.apply(source, patch, out=small_disk / "out", threads=1, progress=filling)
    assert "free some space" in str(caught.value)
    assert os.listdir(small_disk) == ["filler"]
    assert (snapshot(tmp_path / "large"), snapshot(patch)) == before
    (small_disk / "filler").unlink()
    ns.apply(source, patch, out=small_disk / "out")
    assert ns.verify(small_disk / "out", patch).state == "patched"
    # No room for a journal beside it: nothing happens, in words.
    shutil.rmtree(small_disk / "out")
    shutil.copytree(source, small_disk / "model")
    (small_disk / "filler").write_bytes(bytes(800_000))
    before = snapshot(small_disk)
    with pytest.raises(ns.MachineError, match="not enough space"):
        ns.apply(small_disk / "model", patch, in_place=True)
    assert snapshot(small_disk) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_write_that_fails(base: Path, patch: Path, tmp_path: Path, code: int, kind: str) -> None:
    source = base if kind == "folder" else raw_file(tmp_path / "m.safetensors", BASE)
    for number in (1, 2, 3):
        calls, write = [], os.pwrite

        def failing(
            fd: int,
            data: bytes,
            offset: int,
            calls: list[int] = calls,
            write: object = write,
            number: int = number,
        ) -> int:
            calls.append(fd)
            if len(calls) == number:
                raise OSError(code, os.strerror(code))
            return write(fd, data, offset)  # type: ignore[operator]

        with mock.patch.object(os, "pwrite", failing):
            call = lambda: ns.apply(source, patch, out=tmp_path / "out", threads=1)  # noqa: E731
            refused(tmp_path, ns.MachineError, call, os.strerror(code).lower())
        assert len(calls) >= number


def test_a_base_that_changes_meanwhile(base: Path, patch: Path, tmp_path: Path) -> None:
    shard = base / "model-00002-of-00002.safetensors"

    @contextmanager
    def touching(what: str, total: int) -> Iterator[Callable[[int], None]]:
        if what == "copying":
            os.utime(shard, ns=(1, 1))
        yield lambda done: None

    with pytest.raises(ns.NeftError, match="changed"):
        ns.apply(base, patch, out=tmp_path / "out", progress=touching)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "patch", "tuned"]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_patch_that_changes_meanwhile(base: Path, patch: Path, tmp_path: Path, in_place: bool) -> None:
    """Edited after it was checked and before its values are written: none of them stays."""

    @contextmanager
    def edited(what: str, total: int) -> Iterator[Callable[[int], None]]:
        if what != "checking":
            os.truncate(patch, patch.stat().st_size)
            raw = bytearray(patch.read_bytes())
            raw[-200:] = bytes(200)
            with open(patch, "r+b") as file:
                file.write(raw)
        yield lambda done: None

    before, out = snapshot(base), None if in_place else tmp_path / "out"
    with pytest.raises(ns.MachineError, match="changed by someone else"):
        ns.apply(base, patch, out=out, in_place=in_place, progress=edited)
    assert snapshot(base) == before
    assert not (tmp_path / "out").exists()


def test_a_subfolder_that_cannot_be_listed(base: Path, patch: Path, tmp_path: Path) -> None:
    """os.walk passes over it in silence; the copy would lack its files."""
    (base / "sub" / "deep").mkdir(parents=True)
    scandir = os.scandir

    def failing(path: str) -> object:
        if str(path).endswith("deep"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scandir(path)

    before = snapshot(tmp_path)
    with mock.patch.object(os, "scandir", failing), pytest.raises(ns.MachineError, match="deep"):
        ns.apply(base, patch, out=tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_a_folder_without_permission(base: Path, patch: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    call = lambda: ns.apply(base, patch, out=tmp_path / "closed" / "out")  # noqa: E731
    refused(tmp_path, ns.MachineError, call, "permission")


def test_progress_adds_up(base: Path, patch: Path, tmp_path: Path) -> None:
    stages: dict[str, list[int]] = {}

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
        stages[what] = [total, 0]

        def advance(done: int) -> None:
            stages[what][1] += done

        yield advance

    ns.apply(base, patch, out=tmp_path / "out", progress=progress)
    ns.apply(base, patch, in_place=True, progress=progress)
    assert set(stages) == {"checking", "copying", "writing in place"}
    for total, done in stages.values():
        assert done == total > 0
