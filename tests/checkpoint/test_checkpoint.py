"""Checkpoints as they really are, and as an attacker, a download or another process may leave them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from support import snapshot, write_file, write_folder

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint, OpenShards
from neftsurgery.checkpoint.ties import missing_tensors
from neftsurgery.errors import CorruptFileError, MachineError, UsageError, boundary
from neftsurgery.sources.resolve import INDEX_NAME, SINGLE_NAME
from neftsurgery.surgery import rewrite
from neftsurgery.surgery.apply import plan_apply
from neftsurgery.surgery.diff import plan_diff
from neftsurgery.surgery.verify import plan_verify

Arrays = dict[str, NDArray[np.float32]]
ARRAYS: Arrays = {
    f"layers.{n}.weight": np.random.default_rng(n).standard_normal((3, 4)).astype(np.float32)
    for n in range(5)
}


def read(checkpoint: Checkpoint, name: str) -> bytes:
    buffer = bytearray(checkpoint.tensors[name].nbytes)
    checkpoint.read_into(name, 0, memoryview(buffer))
    return bytes(buffer)


def assert_holds(checkpoint: Checkpoint, arrays: Arrays) -> None:
    assert checkpoint.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert checkpoint.tensors[name].dtype == "F32"
        assert checkpoint.tensors[name].shape == array.shape
        assert read(checkpoint, name) == array.tobytes()


def reindex(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Write a folder's index again, its weight_map changed."""
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


# What there is.


def test_one_file(tmp_path: Path) -> None:
    path = write_file(tmp_path / "any name.safetensors", ARRAYS)
    checkpoint = Checkpoint.open(path)
    assert_holds(checkpoint, ARRAYS)
    assert checkpoint.is_file
    assert checkpoint.root == tmp_path
    assert [shard.path for shard in checkpoint.shards] == [path]
    assert checkpoint.name == str(path)


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    checkpoint = Checkpoint.open(folder)
    assert_holds(checkpoint, ARRAYS)
    assert not checkpoint.is_file
    assert checkpoint.root == folder


def test_shards(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=3)
    checkpoint = Checkpoint.open(str(folder))
    assert_holds(checkpoint, ARRAYS)
    assert len(checkpoint.shards) == 3
    for name in ARRAYS:
        number, offset = checkpoint.position(name)
        shard = checkpoint.shards[number]
        assert checkpoint.shard_of(name) is shard
        assert shard.path.read_bytes()[offset : offset + 48] == ARRAYS[name].tobytes()
        assert shard.size == shard.path.stat().st_size


def test_reads_from_any_position_are_counted(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", ARRAYS, shards=2))
    assert checkpoint.bytes_read == 0
    buffer = bytearray(7)
    checkpoint.read_into("layers.3.weight", 5, memoryview(buffer))
    assert bytes(buffer) == ARRAYS["layers.3.weight"].tobytes()[5:12]
    assert checkpoint.bytes_read == 7


@pytest.mark.parametrize("inside", [True, False])
def test_an_index_named_directly_stands_for_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=3)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.chdir(folder if inside else tmp_path)
    named = INDEX_NAME if inside else f"m/{INDEX_NAME}"
    checkpoint = Checkpoint.open(named)
    assert_holds(checkpoint, ARRAYS)
    assert (checkpoint.name, checkpoint.is_file) == (named, False)
    assert checkpoint.config == {"model_type": "llama"}
    tuned = write_folder(tmp_path / "t", {name: array + 1 for name, array in ARRAYS.items()})
    patch = ns.extract(named, tuned, changed=True)
    assert patch.base.name == "m"
    ns.apply(named, patch, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(os.listdir(folder))
    with pytest.raises(UsageError, match="inside"):
        ns.apply(named, patch, out=folder / "out")
    ns.apply(named, patch, in_place=True)
    assert ns.verify(named, patch).state == ns.verify(tmp_path / "out", patch).state == "patched"


def test_an_index_that_no_reader_takes_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    write_file(folder / SINGLE_NAME, {"only": np.ones((2, 2), np.float32)})
    with pytest.raises(UsageError, match=f"readers take the {re.escape(SINGLE_NAME)}") as error:
        Checkpoint.open(folder / INDEX_NAME)
    assert error.value.file == str(folder / INDEX_NAME)


def test_a_single_file_beats_an_index_beside_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    single = {"only": np.ones((2, 2), np.float32)}
    write_file(folder / SINGLE_NAME, single)
    assert_holds(Checkpoint.open(folder), single)


def test_a_tensor_missing_from_the_weight_map_still_loads(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    reindex(folder, lambda weight_map: weight_map.pop("layers.3.weight"))
    assert_holds(Checkpoint.open(folder), ARRAYS)


def test_a_file_beside_the_shards_that_no_index_names_is_ignored(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    write_file(folder / "adapter.safetensors", {"x": np.ones(3, np.float32)})
    assert_holds(Checkpoint.open(folder), ARRAYS)


def test_symlinked_shards_as_in_the_hub_cache(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number}")
        path.symlink_to(f"../blobs/{number}")
    checkpoint = Checkpoint.open(folder)
    assert_holds(checkpoint, ARRAYS)
    checkpoint.check_unchanged()


def test_parameters_and_bytes(tmp_path: Path) -> None:
    arrays = {
        "w": np.zeros((3, 4), np.float16),
        "b": np.zeros(3, np.float64),
        "step": np.zeros((), np.int64),
        "mask": np.zeros(10, np.bool_),
    }
    checkpoint = Checkpoint.open(write_file(tmp_path / "x.safetensors", arrays))
    assert checkpoint.parameters == 15
    assert checkpoint.nbytes == 24 + 24 + 8 + 10


def test_a_folder_with_neither_names_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds neither") as error:
        Checkpoint.open(tmp_path)
    assert str(error.value.hint).startswith("there are no safetensors weights here")
    for name in ("d", "b", "c", "a"):
        write_file(tmp_path / f"{name}.safetensors", {})
    with pytest.raises(UsageError) as error:
        Checkpoint.open(tmp_path)
    assert error.value.hint == "it does hold a.safetensors, b.safetensors, c.safetensors: name that file"


# Hostile and broken indices.

OUTSIDE = [
    "../x.safetensors",
    "../m/sub/x.safetensors",
    "sub/../../x.safetensors",
    "sub\\x.safetensors",
    "x\0.safetensors",
    "..",
    ".",
    "",
    "/etc/passwd",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_cannot_point_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    extra = {"extra": np.ones(3, np.float32)}
    (folder / "sub").mkdir()
    for place in (
        tmp_path / "x.safetensors",
        folder / "sub" / "x.safetensors",
        folder / "sub\\x.safetensors",
    ):
        write_file(place, extra)
    reindex(folder, lambda weight_map: weight_map.update(extra=name))
    with pytest.raises(CorruptFileError, match="outside") as error:
        Checkpoint.open(folder)
    assert error.value.file == str(folder / INDEX_NAME)
    assert "\0" not in str(error.value)


SPELLED = [
    ("./x.safetensors", "x.safetensors"),
    ("sub/x.safetensors", "sub/x.safetensors"),
    ("sub/../x.safetensors", "x.safetensors"),
    ("sub//deep/./x.safetensors", "sub/deep/x.safetensors"),
]
EXTRA = {"extra.weight": np.arange(24, dtype=np.float32).reshape(6, 4)}


@pytest.mark.parametrize(("name", "place"), SPELLED)
def test_an_index_may_spell_a_shard_in_any_way(tmp_path: Path, name: str, place: str) -> None:
    """Two spellings of one file are one file; a patched copy has it in the same place."""
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    (folder / "sub" / "deep").mkdir(parents=True)
    extra = EXTRA | {"extra.bias": np.ones(3, np.float32)}
    write_file(folder / place, extra)
    reindex(folder, lambda weight_map: weight_map.update({"extra.weight": name, "extra.bias": place}))
    assert_holds(Checkpoint.open(folder), ARRAYS | extra)
    tuned = write_file(tmp_path / "t.safetensors", {n: a + 1 for n, a in (ARRAYS | extra).items()})
    patch = ns.extract(folder, tuned, changed=True, only=["extra.weight", "layers.0.weight"])
    out = tmp_path / "out"
    ns.apply(folder, patch, out=out)
    np.testing.assert_array_equal(load_file(out / place)["extra.weight"], extra["extra.weight"] + 1)
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == files
    ns.apply(folder, patch, in_place=True)
    for path in files:
        assert (folder / path).read_bytes() == (out / path).read_bytes()


def test_two_shards_of_one_name_in_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal tells them apart, and naming a shard alone shows the journal of its folder."""
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    (folder / "sub").mkdir()
    name = "model-00001-of-00002.safetensors"
    write_file(folder / "sub" / name, EXTRA)
    reindex(folder, lambda weight_map: weight_map.update({"extra.weight": f"sub/{name}"}))
    before = snapshot(folder)
    tuned = write_file(tmp_path / "t.safetensors", {n: a + 1 for n, a in (ARRAYS | EXTRA).items()})
    for named, patch in ((folder, None), (folder / "sub" / name, ["extra.weight"])):
        patch = ns.extract(folder, tuned, changed=True, only=patch or ())
        with monkeypatch.context() as broken:
            broken.setattr(rewrite, "fsync", fail)
            broken.setattr(rewrite, "heal_recorded", lambda source: None)
            with pytest.raises(MachineError):
                ns.apply(named, patch, in_place=True)
        assert snapshot(folder) != before
        for one in (folder, named):
            with pytest.raises(MachineError, match="interrupted"):
                Checkpoint.open(one)
        ns.heal(named)
        assert snapshot(folder) == before


def fail(fd: int) -> None:
    raise OSError("no")


def test_tensors_that_only_the_index_has(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    name = "model-00001-of-00002.safetensors"
    reindex(folder, lambda weight_map: weight_map.update({"lost.weight": name, "gone.weight": name}))
    assert Checkpoint.open(folder).absent == ("gone.weight", "lost.weight")
    plan = plan_diff(folder, folder)
    (said,) = [one for one in plan.warnings if "index" in one]
    assert said == f"{folder}: the index lists 2 tensors that no file has: gone.weight, lost.weight"
    assert plan.describe()["not_compared"] == ["gone.weight", "lost.weight"]
    assert ns.inspect(folder)["not_read"] == ["gone.weight", "lost.weight"]
    tuned = write_file(tmp_path / "t.safetensors", {n: a + 1 for n, a in ARRAYS.items()})
    patch = ns.extract(folder, tuned, neurons=2)
    assert said in plan_apply(folder, [patch], out=tmp_path / "o").warnings
    assert said in plan_verify(folder, patch).warnings


def test_a_tied_tensor_that_only_the_index_has_is_no_loss(tmp_path: Path) -> None:
    arrays = {"model.embed_tokens.weight": ARRAYS["layers.0.weight"], **ARRAYS}
    folder = write_folder(tmp_path / "m", arrays, shards=2, config={"tie_word_embeddings": True})
    name = "model-00001-of-00002.safetensors"
    reindex(folder, lambda weight_map: weight_map.update({"lm_head.weight": name}))
    assert missing_tensors(Checkpoint.open(folder)) == []
    (folder / "config.json").write_text('{"tie_word_embeddings": false}')
    assert missing_tensors(Checkpoint.open(folder)) == ["lm_head.weight"]


def test_a_stale_index(tmp_path: Path) -> None:
    """It is of a save with another number of shards."""
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    old = (folder / INDEX_NAME).read_bytes()
    shutil.rmtree(folder)
    write_folder(folder, ARRAYS, shards=3)
    (folder / INDEX_NAME).write_bytes(old)
    with pytest.raises(CorruptFileError, match="the index is stale") as error:
        Checkpoint.open(folder)
    assert "00001-of-00002" in str(error.value)
    assert "00001-of-00003" in str(error.value)


def test_shards_of_an_older_save_beside_the_checkpoint(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    for path in write_folder(tmp_path / "old", ARRAYS, shards=3).glob("*.safetensors"):
        path.rename(folder / path.name)
    (said,) = [one for one in plan_diff(folder, folder).warnings if "shards" in one]
    assert "another save" in said
    assert "model-00001-of-00003.safetensors" in said


def test_an_absolute_path_in_an_index_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    path = write_file(tmp_path / "x.safetensors", {"extra": np.ones(3, np.float32)})
    reindex(folder, lambda weight_map: weight_map.update(extra=str(path)))
    with pytest.raises(CorruptFileError, match="outside"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["none.safetensors", "n" * 300, "ü" * 200, "\ud800.safetensors", "sub"])
def test_a_missing_shard(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    (folder / "sub").mkdir()
    write_file(folder / "adapter.safetensors", EXTRA)  # says nothing of the index
    reindex(folder, lambda weight_map: weight_map.update(extra=name))
    with pytest.raises(CorruptFileError, match="is not there") as error:
        Checkpoint.open(folder)
    assert error.value.file == str(folder / INDEX_NAME)
    str(error.value).encode()


def test_a_shard_that_is_no_safetensors_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2, config={"model_type": "llama"})
    reindex(folder, lambda weight_map: weight_map.update(extra="config.json"))
    with pytest.raises(CorruptFileError) as error:
        Checkpoint.open(folder)
    assert error.value.file == str(folder / "config.json")


DEEP = "[" * 200_000
HUGE = "9" * 10_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ["model-00001-of-00002.safetensors"]}}',
        '{"weight_map": {"a": {}}}',
        f'{{"weight_map": {{"a": {HUGE}}}}}',
        f'{{"total_size": {HUGE}, "weight_map": {{"a": "model-00001-of-00002.safetensors"}}}}',
        DEEP,
        f'{{"weight_map": {DEEP}',
        '{"weight_map": ' + '{"a":' * 200_000,
        b"\xff\xfe{}",
        b'{"weight_map": {"a": "\xff"}}',
    ],
    ids=lambda text: (text if isinstance(text, str) else repr(text))[:30],
)
def test_a_broken_index(tmp_path: Path, text: str | bytes) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    (folder / INDEX_NAME).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(CorruptFileError) as error:
        Checkpoint.open(folder)
    assert error.value.file == str(folder / INDEX_NAME)
    assert len(str(error.value)) < 1000


def test_a_huge_index_is_not_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    os.truncate(folder / INDEX_NAME, 1 << 40)  # sparse
    with pytest.raises(CorruptFileError, match="larger than"):
        Checkpoint.open(folder)


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    write_file(folder / "third.safetensors", {"layers.1.weight": ARRAYS["layers.1.weight"]})
    reindex(folder, lambda weight_map: weight_map.update(extra="third.safetensors"))
    with pytest.raises(
        CorruptFileError, match=r"model-00002-of-00002\.safetensors and third\.safetensors"
    ) as error:
        Checkpoint.open(folder)
    assert error.value.tensor == "layers.1.weight"


# Configs.


def test_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, config={"model_type": "llama"})
    assert Checkpoint.open(folder).config == {"model_type": "llama"}
    assert Checkpoint.open(folder / SINGLE_NAME).config == {"model_type": "llama"}
    (folder / "config.json").unlink()
    assert Checkpoint.open(folder).config is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", DEEP, '{"a":' * 200_000, b'{"a": "\xff"}', f'{{"a": {HUGE}}}'],
    ids=lambda t: t[:9],
)
def test_a_broken_config(tmp_path: Path, text: str | bytes) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    (folder / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    checkpoint = Checkpoint.open(folder)  # the weights are fine
    with pytest.raises(CorruptFileError) as error:
        _ = checkpoint.config
    assert error.value.file == str(folder / "config.json")


# Files that change under our hands.


def edit(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # whatever the clock's resolution


def replace(path: Path) -> None:
    status = path.stat()
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


CHANGES = [edit, replace, truncate, lengthen]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("linked", [False, True])
def test_a_changed_file_is_noticed(tmp_path: Path, change: Callable[[Path], None], linked: bool) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    path = folder / "model-00002-of-00002.safetensors"
    if linked:
        real = tmp_path / "blob"
        path.rename(real)
        path.symlink_to(real)
        path = real
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_unchanged()
    change(path)
    with pytest.raises(MachineError, match="changed by someone else") as error:
        checkpoint.check_unchanged()
    assert error.value.file == str(folder / "model-00002-of-00002.safetensors")
    with pytest.raises(MachineError, match="changed by someone else"):
        read(checkpoint, "layers.1.weight")
    assert read(checkpoint, "layers.0.weight") == ARRAYS["layers.0.weight"].tobytes()


def test_a_file_cut_short_while_it_is_read(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", ARRAYS)
    checkpoint = Checkpoint.open(path)
    read(checkpoint, "layers.0.weight")
    truncate(path)
    last = max(ARRAYS, key=checkpoint.position)
    with pytest.raises(CorruptFileError, match="too soon") as error:
        read(checkpoint, last)
    assert error.value.file == str(path)


def test_a_replaced_file_is_read_on_but_noticed(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", ARRAYS)
    checkpoint = Checkpoint.open(path)
    read(checkpoint, "layers.0.weight")
    write_file(tmp_path / "y", {n: -a for n, a in ARRAYS.items()}).replace(path)
    assert_holds(checkpoint, ARRAYS)
    with pytest.raises(MachineError):
        checkpoint.check_unchanged()


def test_a_deleted_file_is_noticed(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", ARRAYS)
    checkpoint = Checkpoint.open(path)
    path.unlink()
    with pytest.raises(MachineError, match="changed by someone else"):
        checkpoint.check_unchanged()
    with pytest.raises(MachineError, match="changed by someone else"):
        read(checkpoint, "layers.0.weight")


def test_a_file_replaced_while_it_was_closed_is_noticed(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", ARRAYS)
    checkpoint = Checkpoint.open(path)
    read(checkpoint, "layers.0.weight")
    checkpoint.close()
    assert read(checkpoint, "layers.0.weight") == ARRAYS["layers.0.weight"].tobytes()
    checkpoint.close()
    replace(path)
    with pytest.raises(MachineError):
        read(checkpoint, "layers.0.weight")


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Take the permission to read a file away, from root as well."""
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(0o600)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", INDEX_NAME])
def test_an_unreadable_file(name: str) -> None:
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        folder = write_folder(Path(top) / "m", ARRAYS, shards=2)
        with unreadable(folder / name), pytest.raises(MachineError, match="permission denied") as error:
            boundary(Checkpoint.open)(folder)
        assert error.value.file == str(folder / name)


# More shards than files may be open.


def test_more_shards_than_are_held_open_are_read_right_from_many_threads(
    tmp_path: Path,
) -> None:
    arrays = {f"t{n:02}": np.full((50, 40), n, np.float32) for n in range(20)}
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", arrays, shards=20))
    checkpoint = dataclasses.replace(checkpoint, opened=OpenShards(most=3))
    wrong: list[str] = []
    before = len(os.listdir("/dev/fd"))

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for number in rng.integers(0, 20, 150):
            name = f"t{number:02}"
            if read(checkpoint, name) != arrays[name].tobytes():
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert checkpoint.bytes_read == 8 * 150 * 8000
    assert len(os.listdir("/dev/fd")) == before + 3
    checkpoint.close()
    assert len(os.listdir("/dev/fd")) == before


def test_as_many_shards_as_real_models_have(tmp_path: Path) -> None:
    arrays = {f"t{n:03}": np.full(3, n, np.float32) for n in range(64 + 10)}
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", arrays, shards=len(arrays)))
    before = len(os.listdir("/dev/fd"))
    assert_holds(checkpoint, arrays)
    assert len(os.listdir("/dev/fd")) <= before + 64
    assert_holds(checkpoint, arrays)


def test_a_checkpoint_closes_its_files_when_it_goes(tmp_path: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", ARRAYS, shards=2))
    assert len(os.listdir("/dev/fd")) == before
    assert_holds(checkpoint, ARRAYS)
    assert len(os.listdir("/dev/fd")) == before + 2
    del checkpoint
    assert len(os.listdir("/dev/fd")) == before
