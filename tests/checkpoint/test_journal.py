"""Changes in place, stopped at every step: the files are the old ones or the new ones then, never a mix.

Run as a program, this file is the process that is killed: see `main`.
"""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import write_file, write_folder

import neftsurgery
from neftsurgery.checkpoint.changes import Change
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.healing import heal, heal_recorded, plan_heal
from neftsurgery.checkpoint.journal import journaled, locked
from neftsurgery.checkpoint.unfinished import JOURNAL_NAME, journal_path
from neftsurgery.errors import CorruptFileError, MachineError, MismatchError, UsageError
from neftsurgery.neurons import vectors
from neftsurgery.neurons.layout import Layout
from neftsurgery.neurons.vectors import scatter
from neftsurgery.sources.resolve import SINGLE_NAME, resolve
from neftsurgery.storage import output
from neftsurgery.surgery.apply import undo_unfinished
from neftsurgery.tensors.reader import TensorFile

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Step:
    """New random vectors, from ``seed``, for neurons of a tensor along ``axes``."""

    name: str
    axes: tuple[int, ...]
    index: tuple[int, ...]
    seed: int

    def values(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        width = Layout(shape, self.axes).width
        return np.random.default_rng(self.seed).standard_normal((len(self.index), width)).astype(np.float32)


def change_in_place(path: Path, steps: list[Step], block: int | None = None) -> None:
    """What every command does that changes a checkpoint in place, with blocks of ``block`` bytes."""
    checkpoint = Checkpoint.read(resolve(path))
    changes, rows = [], []
    for step in steps:
        info = checkpoint.tensors[step.name]
        rows.append(step.values(info.shape).view(np.uint8))
        digests = [np.frombuffer(xxhash.xxh3_128_digest(row), np.uint8) for row in rows[-1]]
        index = np.array(step.index, np.int64)
        layout = Layout(info.shape, tuple(step.axes))
        changes.append(Change(info, layout, index, np.array(digests), block))
    shards = {shard.path: shard for shard in (checkpoint.shard_of(step.name) for step in steps)}
    with locked(checkpoint, list(shards.values())) as held, journaled(checkpoint, changes):
        for change, values in zip(changes, rows, strict=True):
            shard = checkpoint.shard_of(change.name)
            for start, stop in change.blocks():
                scatter(
                    held[shard.path],
                    shard.header.offsets[change.name],
                    change.view,
                    change.layout,
                    change.index[start:stop],
                    values[start:stop],
                    str(shard.path),
                    block=block,
                )
        for fd in held.values():
            os.fsync(fd)


def changed(arrays: Arrays, steps: list[Step]) -> Arrays:
    """The oracle: the same by numpy, in memory."""
    result = {name: array.copy() for name, array in arrays.items()}
    for step in steps:
        array = result[step.name]
        places = list(itertools.product(*(range(array.shape[axis]) for axis in step.axes)))
        for neuron, vector in zip(step.index, step.values(array.shape), strict=True):
            where: list[Any] = [slice(None)] * array.ndim
            for axis, at in zip(step.axes, places[neuron], strict=True):
                where[axis] = at
            array[tuple(where)] = vector.reshape(array[tuple(where)].shape)
    return result


def content(path: Path) -> dict[str, bytes]:
    """Everything in a folder but what a killed process leaves beside the files."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {f.name: f.read_bytes() for f in files if not re.fullmatch(r"\..*\.neft-[0-9a-f]{16}", f.name)}


# The process that is killed.


def main(base: Path, runs: Path, steps: list[Step]) -> None:
    """For every n, in a copy of ``base``: make the change, and die at its n-th operation on files.

    The blocks are small, so that small tensors go through all the splitting that large ones do.
    """
    for number in itertools.count():
        target = runs / f"{number}"
        shutil.copytree(base, target)
        if (child := os.fork()) == 0:
            die_at(number)
            change_in_place(target, steps, block=96)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        if status != -signal.SIGKILL:
            sys.exit(f"the change failed by itself: {status}")


def die_at(number: int) -> None:
    ticks = itertools.count()
    pwrite = os.pwrite

    def torn(fd: int, data: memoryview, offset: int) -> int:
        if next(ticks) == number:
            pwrite(fd, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(fd, data, offset)

    os.pwrite = torn  # type: ignore[assignment]

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*args: Any, **kwargs: Any) -> Any:
            if next(ticks) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return dying

    for name in ("fsync", "ftruncate", "unlink", "rename", "link"):
        setattr(os, name, before(getattr(os, name)))
    output._rename_with_flags = before(output._rename_with_flags)


def killed_everywhere(base: Path, runs: Path, steps: list[Step]) -> list[Path]:
    """The folders that `main` leaves, in the order of the deaths; the last one's change was completed."""
    runs.mkdir()
    places = [str(Path(neftsurgery.__file__).parents[1]), str(Path(__file__).parents[1])]
    subprocess.run(
        [sys.executable, __file__, base, runs, json.dumps([asdict(step) for step in steps])],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        timeout=120,
    )
    return sorted(runs.iterdir(), key=lambda path: int(path.name))


RNG = np.random.default_rng(7)


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


ARRAYS: Arrays = {
    "a.rows": normal(9, 8),
    "b.columns": normal(12, 7),
    "c.experts": normal(3, 6, 5),
    "d.bias": normal(6),
    "e.norm": np.ones(8, np.float32),
    "f.frozen": normal(40, 8),
    "g.padded": np.concatenate([np.zeros((3, 8), np.float32), normal(5, 8)]),
}
ALL = tuple(range(100))
CHANGES = {
    "rows": [Step("a.rows", (0,), (0, 1, 4, 8), 1)],
    "all rows": [Step("a.rows", (0,), ALL[:9], 1)],
    "columns": [Step("b.columns", (1,), (0, 2, 3, 6), 1)],
    "all columns": [Step("b.columns", (1,), ALL[:7], 1)],
    "experts' columns": [Step("c.experts", (0, 2), (0, 3, 4, 8, 10, 13), 1)],
    "rows, then columns": [Step("a.rows", (0,), (1, 2, 7), 1), Step("a.rows", (1,), (0, 3, 4, 7), 2)],
    "all columns, then all rows": [Step("a.rows", (1,), ALL[:8], 1), Step("a.rows", (0,), ALL[:9], 2)],
    "the same rows twice": [Step("a.rows", (0,), (1, 2, 7), 1), Step("a.rows", (0,), (2, 3), 2)],
    "a bias": [Step("d.bias", (0,), (0, 1, 2, 4, 5), 1)],
    "a norm of ones": [Step("e.norm", (0,), ALL[:8], 1)],
    "everything": [
        Step("a.rows", (0,), ALL[:9], 1),
        Step("b.columns", (1,), ALL[:7], 2),
        Step("c.experts", (0, 2), ALL[:15], 3),
        Step("d.bias", (0,), ALL[:6], 4),
        Step("e.norm", (0,), ALL[:8], 5),
        Step("f.frozen", (0,), ALL[:40], 6),
        Step("g.padded", (0,), ALL[:8], 7),
    ],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_killed_at_any_step_is_healed(tmp_path: Path, name: str) -> None:
    steps = CHANGES[name]
    shards = 1 if len(steps) == 2 else 3
    base = write_folder(tmp_path / "base", ARRAYS, shards=shards, config={"model_type": "llama"})
    old = content(base)
    results, healed = [], 0
    for run in killed_everywhere(base, tmp_path / "runs", steps):
        journal = (run / JOURNAL_NAME).exists()
        half_done = journal and {n: b for n, b in content(run).items() if n != JOURNAL_NAME} != old
        assert (heal_recorded(run) is not None) == journal, (
            "wherever it was killed, the journal is known as ours"
        )
        healed += half_done
        results.append(content(run))
        assert results[-1].keys() == old.keys()  # no journal either
    new = results[-1]
    assert load(run) == {n: a.tobytes() for n, a in changed(ARRAYS, steps).items()}
    assert all(result in (old, new) for result in results)
    assert results == [old] * results.count(old) + [new] * results.count(new)
    assert results.count(old) > 5
    assert healed > 1


def load(folder: Path) -> dict[str, bytes]:
    files = [folder] if folder.is_file() else folder.glob("*.safetensors")
    return {name: array.tobytes() for file in files for name, array in load_file(file).items()}


def test_what_a_killed_change_left_goes_with_the_next_one(tmp_path: Path) -> None:
    steps = CHANGES["rows"]
    base = write_folder(tmp_path / "base", ARRAYS)
    for run in killed_everywhere(base, tmp_path / "runs", steps):
        heal_recorded(run)
        change_in_place(run, steps)
        assert sorted(os.listdir(run)) == sorted(os.listdir(base))
        assert load(run) == {n: a.tobytes() for n, a in changed(ARRAYS, steps).items()}


# The same in this process: the journal stays when the change fails.


class StopError(Exception):
    pass


def start(path: Path, steps: list[Step]) -> None:
    """Begin a change, and stop when the journal is written and no vector is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "scatter", _stop)
        with suppress(StopError):
            change_in_place(path, steps)
    assert journal_path(resolve(path)).exists()


def _stop(*args: object, **options: object) -> None:
    raise StopError


def shards_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


# So many sectors that not every element of a change is in the same few.
LARGER: Arrays = ARRAYS | {
    "a.rows": normal(150, 8),
    "b.columns": normal(200, 7),
    "c.experts": normal(3, 100, 5),
}


@settings(max_examples=60, deadline=None, database=None)
@given(st.sampled_from(sorted(CHANGES)), st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_power_loss_leaves_any_sectors_written(name: str, seed: int, tenths: int) -> None:
    rng = np.random.default_rng(seed)
    sector = 64
    steps = CHANGES[name]
    with tempfile.TemporaryDirectory() as top:
        base = write_folder(Path(top) / "base", LARGER)
        done = Path(shutil.copytree(base, Path(top) / "done"))
        change_in_place(done, steps)
        old, new = ((folder / SINGLE_NAME).read_bytes() for folder in (base, done))
        assert len(old) == len(new)
        assert old != new
        start(base, steps)
        mixed = bytearray(old)
        for begin in range(0, len(old), sector):
            if rng.integers(10) < tenths:
                mixed[begin : begin + sector] = new[begin : begin + sector]
        (base / SINGLE_NAME).write_bytes(mixed)
        heal(base)
        assert content(base) == {SINGLE_NAME: old}


def half_written(folder: Path, written: NDArray[np.float32]) -> None:
    """Replace the only tensor of a folder, in place and as if by a change that was interrupted."""
    path = folder / SINGLE_NAME
    with path.open("r+b") as file:
        file.seek(Checkpoint.read(resolve(path)).position("w")[1])
        file.write(written.tobytes())


def test_one_column_of_which_only_scattered_elements_are_still_old(tmp_path: Path) -> None:
    steps, arrays = [Step("w", (1,), (3,), 1)], {"w": normal(200, 7)}
    folder = write_folder(tmp_path / "m", arrays)
    old = content(folder)
    start(folder, steps)
    mixed = changed(arrays, steps)["w"]
    mixed[::10] = arrays["w"][::10]
    half_written(folder, mixed)
    heal(folder)
    assert content(folder) == old


def ternary(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).integers(-1, 2, (200, 40)).astype(np.float32)


def test_weights_of_few_values_of_which_only_the_last_row_is_still_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many elements are alike by chance here, old or not; so many in a row are not."""
    arrays = {"w": ternary(0)}
    new = ternary(1)
    new[-1] = -1.5 * arrays["w"][-1] + 0.5
    monkeypatch.setattr(Step, "values", lambda self, shape: np.ascontiguousarray(new.T))
    folder = write_folder(tmp_path / "m", arrays)
    old = content(folder)
    start(folder, [Step("w", (1,), ALL[:40], 1)])
    mixed = new.copy()
    mixed[-1] = arrays["w"][-1]
    half_written(folder, mixed)
    heal(folder)
    assert content(folder) == old


def test_another_model_of_few_values_is_left_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"w": ternary(0)})
    start(folder, [Step("w", (1,), ALL[:40], 1)])
    half_written(folder, ternary(2))
    before = content(folder)
    with pytest.raises(MismatchError):
        heal(folder)
    assert content(folder) == before


@pytest.mark.parametrize("shards", [1, 3])
def test_a_single_file_and_a_folder(tmp_path: Path, shards: int) -> None:
    base = write_folder(tmp_path / "m", ARRAYS, shards=shards)
    old = content(base)
    start(base, CHANGES["everything"])
    assert JOURNAL_NAME in os.listdir(base)
    assert heal(base).journals == (base / JOURNAL_NAME,)
    assert content(base) == old
    assert heal(base).journals == ()

    file = write_file(tmp_path / "x.safetensors", ARRAYS)
    raw = file.read_bytes()
    start(file, CHANGES["everything"])
    assert (tmp_path / ".x.safetensors.neft-journal").exists()
    scribble(file, "a.rows")
    heal(file)
    assert file.read_bytes() == raw
    assert sorted(os.listdir(tmp_path)) == ["m", "x.safetensors"]


def scribble(path: Path, name: str) -> None:
    """A part of a row of ``name`` that all changes of its rows replace, as if it had been written."""
    for file in shards_of(path):
        checkpoint = Checkpoint.read(resolve(file))
        if name in checkpoint.tensors:
            with file.open("r+b") as stream:
                stream.seek(checkpoint.position(name)[1] + 4 * 32)
                stream.write(b"\x55" * 20)


def test_the_same_files_named_otherwise_are_healed_too(tmp_path: Path) -> None:
    """A folder's file opened by itself, and a file's folder; through a link to either nothing is written."""
    folder = write_folder(tmp_path / "m", ARRAYS)
    file = folder / SINGLE_NAME
    raw = file.read_bytes()
    (tmp_path / "folder").symlink_to(folder)
    (tmp_path / "link.safetensors").symlink_to(file)
    for begun, opened in itertools.product([folder, file], [folder, file]):
        start(begun, CHANGES["rows"])
        scribble(file, "a.rows")
        torn = file.read_bytes()
        assert torn != raw
        for link in (tmp_path / "folder", tmp_path / "link.safetensors"):
            for verb in (heal, heal_recorded):
                with pytest.raises(UsageError, match="through a symlink") as error:
                    verb(link)
                assert str(link) in str(error.value)
                assert file.read_bytes() == torn
        assert heal(opened).journals
        assert file.read_bytes() == raw
        assert os.listdir(folder) == [SINGLE_NAME]


def test_a_file_beside_the_model_does_not_stand_in_its_way(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    other = write_file(folder / "other.safetensors", ARRAYS)
    start(other, CHANGES["rows"])
    heal(folder)
    assert journal_path(resolve(other)).exists()
    heal(other)
    assert not journal_path(resolve(other)).exists()
    start(folder, CHANGES["rows"])
    heal(other)
    assert (folder / JOURNAL_NAME).exists()


def test_a_copy_of_the_folder_heals_like_the_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=2)
    old = content(folder)
    start(folder, CHANGES["everything"])
    scribble(folder, "a.rows")
    copy = shutil.copytree(folder, tmp_path / "copy")
    heal(copy)
    assert content(copy) == old
    assert (folder / JOURNAL_NAME).exists()


def test_a_journal_of_a_change_that_fails_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    monkeypatch.setattr(sys.modules[__name__], "scatter", _stop)
    with pytest.raises(StopError):
        change_in_place(folder, CHANGES["rows"])
    assert (folder / JOURNAL_NAME).exists()


def test_the_journal_holds_the_old_vectors_and_is_synced_before_the_first_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    calls: list[str] = []
    fsync, rename = os.fsync, output._rename_with_flags

    def noted_fsync(fd: int) -> None:
        calls.append("sync folder" if os.path.isdir(f"/dev/fd/{fd}") else "sync file")
        fsync(fd)

    def noted_rename(*args: Any, **kwargs: Any) -> bool:
        calls.append("rename")
        return rename(*args, **kwargs)

    def noted_scatter(*args: Any, **options: Any) -> int:
        calls.append("write")
        found = load_file(folder / JOURNAL_NAME)
        np.testing.assert_array_equal(found["0:old"], ARRAYS["a.rows"][[0, 1, 4, 8]])
        return vectors.scatter(*args, **options)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(output, "_rename_with_flags", noted_rename)
    monkeypatch.setattr(sys.modules[__name__], "scatter", noted_scatter)
    change_in_place(folder, CHANGES["rows"])
    recorded = ["sync file", "sync folder"]
    journal = ["sync file", "rename", "sync folder"]
    assert calls == [*recorded, *journal, "write", "sync file", "sync folder"]


# Journals that belong to other files.


def others() -> Arrays:
    """Another model of the same architecture: all but what is often alike: ones, zeros, a few elements."""
    rng = np.random.default_rng(99)
    result = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in ARRAYS.items()}
    result["e.norm"] = ARRAYS["e.norm"]
    result["g.padded"][:3] = 0
    result["d.bias"][:2] = ARRAYS["d.bias"][:2]
    return result


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", [name for name in CHANGES if name != "a norm of ones"])
def test_another_model_of_the_same_architecture_is_left_alone(tmp_path: Path, name: str, shards: int) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=shards)
    other = write_folder(tmp_path / "other", others(), shards=shards)
    start(folder, CHANGES[name])
    journal = (folder / JOURNAL_NAME).read_bytes()
    for path in shards_of(other):
        path.replace(folder / path.name)
    before = content(folder)
    with pytest.raises(MismatchError, match="journal of a change in place was not written for") as error:
        heal(folder)
    assert content(folder) == before
    assert (folder / JOURNAL_NAME).read_bytes() == journal
    assert error.value.file == str(folder / JOURNAL_NAME)
    assert "delete the journal" in str(error.value.hint)


def test_a_model_that_shares_all_but_the_changed_rows_is_left_alone(tmp_path: Path) -> None:
    """Two tunings of the same rows of one base: only the touched vectors tell them apart."""
    steps = [Step("a.rows", (0,), (1, 4), 1)]
    folder = write_folder(tmp_path / "m", ARRAYS)
    start(folder, steps)
    other = write_folder(tmp_path / "o", changed(ARRAYS, [Step("a.rows", (0,), (1, 4), 2)]))
    (other / SINGLE_NAME).replace(folder / SINGLE_NAME)
    before = content(folder)
    with pytest.raises(MismatchError):
        heal(folder)
    assert content(folder) == before


def test_an_unchanged_norm_of_ones_is_no_other_model(tmp_path: Path) -> None:
    """Its vectors tell nothing, but they are all there."""
    folder = write_folder(tmp_path / "m", ARRAYS)
    old = content(folder)
    start(folder, CHANGES["a norm of ones"])
    heal(folder)
    assert content(folder) == old


def header_changed(folder: Path) -> None:
    path = folder / SINGLE_NAME
    write_file(path, ARRAYS, {"format": "np"})


def size_changed(folder: Path) -> None:
    write_file(folder / SINGLE_NAME, ARRAYS | {"more": np.ones(3, np.float32)})


def tensor_gone(folder: Path) -> None:
    write_file(folder / SINGLE_NAME, {n: a for n, a in ARRAYS.items() if n != "a.rows"})


def shape_changed(folder: Path) -> None:
    write_file(folder / SINGLE_NAME, ARRAYS | {"a.rows": ARRAYS["a.rows"].reshape(8, 9)})


def sharded_now(folder: Path) -> None:
    (folder / SINGLE_NAME).unlink()
    for path in write_folder(folder / "new", ARRAYS, shards=2).iterdir():
        path.replace(folder / path.name)
    (folder / "new").rmdir()


@pytest.mark.parametrize("how", [header_changed, size_changed, tensor_gone, shape_changed, sharded_now])
def test_files_that_are_others_are_left_alone(tmp_path: Path, how: Callable[[Path], None]) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    start(folder, CHANGES["rows"])
    how(folder)
    before = content(folder)
    with pytest.raises(MismatchError):
        heal(folder)
    assert content(folder) == before


# Locks and races.


def test_a_locked_checkpoint_is_the_machines_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    start(folder, CHANGES["rows"])
    before = content(folder)
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, folder / SINGLE_NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(MachineError, match="another process is changing this checkpoint") as error:
            heal(folder)
        with pytest.raises(MachineError, match="another process"):
            change_in_place(folder, CHANGES["rows"])
        assert content(folder) == before
        other.communicate(b"\n")
    assert error.value.file == str(folder / SINGLE_NAME)
    heal(folder)
    assert not (folder / JOURNAL_NAME).exists()


def test_locks_are_released(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS, shards=3)
    checkpoint = Checkpoint.read(resolve(folder))
    shards = checkpoint.shards
    gc.collect()  # files of earlier tests
    descriptors = len(os.listdir("/dev/fd"))
    with locked(checkpoint, shards) as held:
        assert list(held) == [shard.path for shard in shards]
        with pytest.raises(MachineError), locked(checkpoint, shards[2:]):
            pass
    with locked(checkpoint, shards[:2]), locked(checkpoint, shards[2:]):
        pass
    with pytest.raises(MachineError), locked(checkpoint, shards[2:]), locked(checkpoint, shards):
        pass
    assert len(os.listdir("/dev/fd")) == descriptors
    with pytest.raises(StopError), locked(checkpoint, shards):
        _stop()
    with locked(checkpoint, shards):
        pass


def test_a_journal_that_another_process_has_dealt_with_meanwhile_is_not_applied(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    start(folder, CHANGES["rows"])
    plan = plan_heal(folder)
    assert heal(folder).journals
    change_in_place(folder, CHANGES["rows"])
    assert not plan.run().journals
    assert load(folder) == {n: a.tobytes() for n, a in changed(ARRAYS, CHANGES["rows"]).items()}


def test_a_journal_that_goes_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    start(folder, CHANGES["rows"])
    real = TensorFile.open

    def late(path: Path) -> TensorFile:
        (folder / JOURNAL_NAME).unlink()
        return real(path)

    monkeypatch.setattr(TensorFile, "open", late)
    assert not heal(folder).journals


def test_a_hub_model_is_never_healed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    start(folder, CHANGES["rows"])
    source = resolve(folder)
    hub = type(source)(source.path, "org/name", "org/name", "0" * 40)
    assert not plan_heal(hub).run().journals
    assert heal_recorded(hub) is None
    assert (folder / JOURNAL_NAME).exists()


# Journals that are damaged.


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change a journal's document and arrays, and write it again."""
    path = folder / JOURNAL_NAME
    with safe_open(path, framework="numpy") as file:
        document = json.loads(file.metadata()["neft_journal"])
    arrays = load_file(path)
    change(document, arrays)
    save_file(arrays, path, {"neft_journal": json.dumps(document)})


BAD: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "newer": lambda d, a: d.update(version=3),
    "no version": lambda d, a: d.pop("version"),
    "files beside the weights no list": lambda d, a: d.update(side=5),
    "a file beside the weights no object": lambda d, a: d.update(side=["config.json"]),
    "a file beside the weights twice": lambda d, a: d.update(side=[{"name": "config.json"}] * 2),
    "a file beside the weights without content": lambda d, a: d.update(
        side=[{"name": "config.json", "old": "0" * 32}]
    ),
    "a file beside the weights with a mode of its own": lambda d, a: d.update(
        side=[{"name": "config.json", "mode": 0o4777}]
    ),
    "no files": lambda d, a: d.pop("files"),
    "files no list": lambda d, a: d.update(files={"name": "x"}),
    "file no object": lambda d, a: d.update(files=["x"]),
    "a file twice": lambda d, a: d.update(files=2 * d["files"]),
    "no tensors": lambda d, a: d.pop("tensors"),
    "a tensor no object": lambda d, a: d["tensors"].update({"0": 7}),
    "another number": lambda d, a: d.update(tensors={"7": d["tensors"]["0"]}),
    "wrong order": lambda d, a: d.update(tensors=dict(reversed(d["tensors"].items()))),
    "no name": lambda d, a: d["tensors"]["0"].pop("name"),
    "name no text": lambda d, a: d["tensors"]["0"].update(name=7),
    "no shape": lambda d, a: d["tensors"]["0"].pop("shape"),
    "negative shape": lambda d, a: d["tensors"]["0"].update(shape=[-9, 8]),
    "no dtype": lambda d, a: d["tensors"]["0"].pop("dtype"),
    "dtype no text": lambda d, a: d["tensors"]["0"].update(dtype=["F32"]),
    "packed dtype": lambda d, a: d["tensors"]["0"].update(dtype="F4"),
    "other dtype": lambda d, a: d["tensors"]["0"].update(dtype="F64"),
    "axis out of range": lambda d, a: d["tensors"]["0"].update(neuron_axes=[2]),
    "other axis": lambda d, a: d["tensors"]["0"].update(neuron_axes=[1]),
    "no index": lambda d, a: a.pop("0:index"),
    "index of another type": lambda d, a: a.update({"0:index": a["0:index"].astype(np.int32)}),
    "index too short": lambda d, a: a.update({"0:index": a["0:index"][1:]}),
    "index descending": lambda d, a: a.update({"0:index": a["0:index"][::-1].copy()}),
    "index repeating": lambda d, a: a["0:index"].__setitem__(1, 0),
    "index negative": lambda d, a: a["0:index"].__setitem__(0, -1),
    "index out of range": lambda d, a: a["0:index"].__setitem__(-1, 9),
    "index flat": lambda d, a: a.update({"0:index": np.array(0)}),
    "no digests": lambda d, a: a.pop("0:new_digest"),
    "digests too short": lambda d, a: a.update({"0:new_digest": a["0:new_digest"][:, :8].copy()}),
    "no old": lambda d, a: a.pop("0:old"),
    "old too wide": lambda d, a: a.update({"0:old": np.zeros((4, 9), np.float32)}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_journal(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    start(folder, [*CHANGES["rows"], *CHANGES["columns"]])
    rewrite(folder, BAD[name])
    before = content(folder)
    with pytest.raises(CorruptFileError) as error:
        heal(folder)
    assert error.value.file == str(folder / JOURNAL_NAME)
    assert content(folder) == before


def test_a_journal_rewritten_as_it_was_still_heals(tmp_path: Path) -> None:
    """What the damaged ones are compared with."""
    folder = write_folder(tmp_path / "m", ARRAYS)
    old = content(folder)
    start(folder, [*CHANGES["rows"], *CHANGES["columns"]])
    scribble(folder, "a.rows")
    rewrite(folder, lambda d, a: None)
    heal(folder)
    assert content(folder) == old


@pytest.mark.parametrize("raw", [b"", b"{}", b"\0" * 64, b"\xff" * 64])
def test_a_journal_of_garbage(tmp_path: Path, raw: bytes) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    (folder / JOURNAL_NAME).write_bytes(raw)
    before = content(folder)
    with pytest.raises(CorruptFileError) as error:
        heal(folder)
    assert error.value.file == str(folder / JOURNAL_NAME)
    assert content(folder) == before


def test_another_file_of_ours_is_no_journal(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    write_file(folder / JOURNAL_NAME, {"a:index": np.zeros(1, np.int32)}, {"neuron_patch": "{}"})
    with pytest.raises(CorruptFileError, match="not a journal"):
        heal(folder)


@settings(max_examples=150, deadline=None, database=None)
@given(st.data())
def test_any_damage_to_a_journals_header_is_refused_or_harmless(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as top:
        folder = write_folder(Path(top) / "m", ARRAYS)
        old = content(folder)
        start(folder, [*CHANGES["rows"], *CHANGES["columns"]])
        raw = bytearray((folder / JOURNAL_NAME).read_bytes())
        size = 8 + int.from_bytes(raw[:8], "little")
        for _ in range(data.draw(st.integers(1, 2))):
            raw[data.draw(st.integers(0, size - 1))] = data.draw(st.sampled_from(b' 0179",:{}[]aXF\x00\xff'))
        (folder / JOURNAL_NAME).write_bytes(raw)
        with suppress(CorruptFileError, MismatchError):
            heal(folder)
        assert {n: b for n, b in content(folder).items() if n != JOURNAL_NAME} == old


# Checkpoints that cannot be written.


def test_a_read_only_file_system_is_the_machines_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    start(folder, CHANGES["rows"])
    before = content(folder)
    real = os.open

    def refusing(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(MachineError, match="read-only file system") as error:
        heal(folder)
    assert error.value.file == str(folder / SINGLE_NAME)
    assert "the journal is kept" in str(error.value.hint)
    assert content(folder) == before


@pytest.mark.parametrize("call", ["pwrite", "fsync", "unlink"])
def test_a_disk_that_fails_while_healing_keeps_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    old = content(folder)
    start(folder, CHANGES["rows"])
    scribble(folder, "a.rows")

    def failing(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(MachineError, match="input/output error") as error:
            heal(folder)
    assert error.value.file == str(folder / (JOURNAL_NAME if call == "unlink" else "model.safetensors"))
    assert (folder / JOURNAL_NAME).exists()
    heal(folder)
    assert content(folder) == old


@pytest.mark.parametrize("what", ["folder", "file"])
def test_without_permission_to_write(what: str) -> None:
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        folder = write_folder(Path(top) / "m", ARRAYS)
        old = content(folder)
        start(folder, CHANGES["rows"])
        (folder / JOURNAL_NAME).chmod(0o644)
        (folder / SINGLE_NAME).chmod(0o444 if what == "file" else 0o666)
        folder.chmod(0o555)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(MachineError, match="permission denied") as error:
                heal(folder)
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)
            (folder / SINGLE_NAME).chmod(0o644)
        assert error.value.file == str(folder / (SINGLE_NAME if what == "file" else JOURNAL_NAME))
        assert (folder / JOURNAL_NAME).exists()
        heal(folder)
        assert content(folder) == old


def test_a_journal_that_cannot_be_written_leaves_the_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    old = content(folder)

    def full(fd: int, *args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="space"):
        change_in_place(folder, CHANGES["rows"])
    assert content(folder) == old
    assert os.listdir(folder) == [SINGLE_NAME]


def test_healing_before_a_change_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path / "m", ARRAYS)
    undo_unfinished(folder)
    assert caplog.records == []
    start(folder, CHANGES["rows"])
    undo_unfinished(folder)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "was interrupted" in caplog.text
    assert os.listdir(folder) == [SINGLE_NAME]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Step(**step) for step in json.loads(sys.argv[3])])
