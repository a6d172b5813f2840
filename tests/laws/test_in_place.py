"""The laws of changes in place: they give the same bytes as a copy, and the old bytes if interrupted.

These tests simulate a crash at every single write and sync, and a loss of power by any mix of old and new
disk sectors. ``tests/torture/test_killed.py`` kills real processes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import raw_file, raw_folder, snapshot, write_file

import neftsurgery as ns
from neftsurgery.checkpoint.healing import heal_recorded
from neftsurgery.surgery import rewrite as verbs

law = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))

#: Per case the neuron axes of the patches that are applied together, of one [24, 40] tensor.
CUTS: dict[str, list[tuple[int, ...]]] = {
    "rows": [(0,)],
    "columns": [(1,)],
    "rows, then columns": [(0,), (1,)],
    "columns, then rows": [(1,), (0,)],
}


class Killed(BaseException):
    """Stands for SIGKILL: no exception handler of the package may catch it."""


@contextmanager
def killed_at(number: int, part: float = 0.5) -> Iterator[list[int]]:
    """Do half of the ``number``-th write or sync, and end the work there without clean-up."""
    calls = [0]
    write, sync = os.pwrite, os.fsync

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        calls[0] += 1
        if calls[0] == number:
            view = memoryview(data).cast("B")
            write(fd, view[: int(len(view) * part)], offset)
            raise Killed
        return write(fd, data, offset)

    def fsync(fd: int) -> None:
        calls[0] += 1
        if calls[0] == number:
            raise Killed
        sync(fd)

    with (
        mock.patch.object(os, "pwrite", pwrite),
        mock.patch.object(os, "fsync", fsync),
        mock.patch.object(verbs, "heal_recorded"),
    ):
        yield calls


def model(seed: int, others: int = 1) -> dict[str, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    tensors = {"cut.weight": ("BF16", rng.integers(0, 1 << 16, (24, 40), np.uint16))}
    for number in range(others):
        tensors[f"other{number}.weight"] = "F32", rng.integers(0, 1 << 32, (5, 6), np.uint32)
    return tensors


def patches_between(root: Path, base: Path, cuts: list[tuple[int, ...]], share: float) -> list[Path]:
    """Patches of random neurons of ``cut.weight``, each based on the result of the earlier ones."""
    here, made = base, []
    for number, axes in enumerate(cuts):
        there = root / f"tuned{number}"
        raw_folder(there, model(number + 1))
        options = {"axis": {"cut.weight": axes}, "only": ["cut.weight"], "score": "random", "seed": 7}
        patch = root / f"p{number}"
        budget = {"changed": True} if share == 1 else {"neurons": f"{share:.0%}"}
        with ns.extract(here, there, out=patch, reversible=True, **options, **budget) as opened:
            if number + 1 < len(cuts):
                ns.apply(here, opened, out=root / f"state{number}")
                here = root / f"state{number}"
        made.append(patch)
    return made


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("share", [0.2, 1])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_in_place_equals_a_copy(
    tmp_path: Path, cuts: list[tuple[int, ...]], share: float, shards: int
) -> None:
    base = raw_folder(tmp_path / "base", model(0), shards, {"model_type": "?"})
    patches = patches_between(tmp_path, base, cuts, share)
    before = snapshot(base)
    ns.apply(base, patches, out=tmp_path / "copy")
    assert snapshot(tmp_path / "copy") != before
    ns.apply(base, patches, in_place=True)
    assert snapshot(base) == snapshot(tmp_path / "copy")
    for patch in reversed(patches):
        ns.revert(base, patch, in_place=True)
    assert snapshot(base) == before


def test_a_single_file_in_place(tmp_path: Path) -> None:
    file = raw_file(tmp_path / "m.safetensors", model(0), {"note": "kept"})
    file.chmod(0o640)
    patches = patches_between(tmp_path, file, [(1,)], 0.3)
    before, beside = snapshot(file), set(tmp_path.iterdir())
    ns.apply(file, patches, out=tmp_path / "copy.safetensors")
    ns.apply(file, patches, in_place=True)
    assert snapshot(file) == snapshot(tmp_path / "copy.safetensors")
    ns.revert(file, patches[0], in_place=True)
    assert snapshot(file) == before
    assert set(tmp_path.iterdir()) == beside | {tmp_path / "copy.safetensors"}


@law
@given(st.integers(0, 2**32), st.sampled_from(list(CUTS.values())), st.sampled_from([0.1, 0.6, 1]))
def test_in_place_equals_a_copy_from_any_state_on_the_way(
    seed: int, cuts: list[tuple[int, ...]], share: float
) -> None:
    """From base, from patched, and from a checkpoint that has some rows of the patch already."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = raw_folder(root / "base", model(seed % 1000 + 10))
        patches = patches_between(root, base, cuts, share)
        ns.apply(base, patches, out=root / "out")
        rng = np.random.default_rng(seed)
        first = ns.Patch.load(patches[0])
        chosen = {name: first.selection.tensors[name] for name in first.tensors}
        part = type(chosen["cut.weight"])(
            chosen["cut.weight"].info,
            chosen["cut.weight"].layout,
            np.sort(rng.permutation(first.index("cut.weight"))[: 1 + rng.integers(first.neurons)]),
        )
        ns.extract(base, root / "tuned0", ns.Selection({"cut.weight": part}, {}), out=root / "part").close()
        ns.apply(base, root / "part", in_place=True)
        ns.apply(base, patches, in_place=True)
        assert snapshot(base) == snapshot(root / "out")
        stamps = [path.stat().st_mtime_ns for path in sorted(base.iterdir())]
        ns.apply(base, patches, in_place=True)
        assert snapshot(base) == snapshot(root / "out")
        assert stamps == [path.stat().st_mtime_ns for path in sorted(base.iterdir())], "nothing to do"


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("share", [0.2, 1])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_a_crash_at_any_write_leaves_the_old_bytes(
    tmp_path: Path, cuts: list[tuple[int, ...]], share: float, others: int
) -> None:
    base = raw_folder(tmp_path / "base", model(0, others))
    patches = patches_between(tmp_path, base, cuts, share)
    before = snapshot(base)
    ns.apply(base, patches, out=tmp_path / "copy")
    after = snapshot(tmp_path / "copy")
    number = outcomes = 0
    while snapshot(base) == before:
        number += 1
        with suppress(Killed), killed_at(number, part=(number * 0.37) % 1):
            ns.apply(base, patches, in_place=True)
        journal = (base / ".neft-journal").exists()
        outcomes += journal
        assert (heal_recorded(base) is not None) == journal
        if journal:
            assert snapshot(base) == before, f"killed at write {number}"
    assert snapshot(base) == after
    assert outcomes > 2, "no crash came after the journal was in place"


@pytest.mark.parametrize("cuts", [CUTS["rows"], CUTS["columns"]], ids=["rows", "columns"])
def test_a_crash_of_revert_leaves_the_patched_bytes(tmp_path: Path, cuts: list[tuple[int, ...]]) -> None:
    base = raw_folder(tmp_path / "base", model(0))
    (patch,) = patches_between(tmp_path, base, cuts, 0.3)
    before = snapshot(base)
    ns.apply(base, patch, in_place=True)
    patched = snapshot(base)
    number = 0
    while snapshot(base) == patched:
        number += 1
        with suppress(Killed), killed_at(number):
            ns.revert(base, patch, in_place=True)
        heal_recorded(base)
    assert snapshot(base) == before
    assert number > 5


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_healing_can_be_interrupted_too(tmp_path: Path, cuts: list[tuple[int, ...]]) -> None:
    base = raw_folder(tmp_path / "base", model(0))
    patches = patches_between(tmp_path, base, cuts, 0.5)
    before = snapshot(base)
    half_written(base, patches)
    torn = snapshot(base)
    assert torn != before
    number = 0
    while (base / ".neft-journal").exists():
        number += 1
        with suppress(Killed), killed_at(number):
            ns.heal(base)
    assert snapshot(base) == before
    assert number > 1


def half_written(base: Path, patches: list[Path]) -> None:
    """Crash at the first write after the journal appeared."""
    for number in range(1, 1000):
        try:
            with killed_at(number):
                ns.apply(base, patches, in_place=True)
        except Killed:
            if (base / ".neft-journal").exists() and changed_data(number, base, patches):
                return
    raise AssertionError("there was no crash with a journal")


def changed_data(number: int, base: Path, patches: list[Path]) -> bool:
    """Whether the crash came after data was written: only then the journal is kept."""
    journal = (base / ".neft-journal").read_bytes()
    torn = {path: path.read_bytes() for path in base.glob("*.safetensors")}
    heal_recorded(base)
    if all(path.read_bytes() == data for path, data in torn.items()):
        return False
    for path, data in torn.items():
        path.write_bytes(data)
    (base / ".neft-journal").write_bytes(journal)
    return True


@law
@given(
    st.integers(0, 2**32),
    st.sampled_from(["rows", "columns"]),
    st.sampled_from([{"neurons": "40%"}, {"changed": True}]),
    st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
)
def test_any_mix_of_old_and_new_sectors_heals(
    seed: int, cuts: str, budget: dict[str, object], share: float
) -> None:
    """After a loss of power, each disk sector is old or new, in any combination."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base, tuned = (
            raw_folder(root / name, {"cut.weight": ("F32", rng.integers(0, 1 << 30, (64, 512), np.uint32))})
            for name in ("base", "tuned")
        )
        axis = {"*": CUTS[cuts][0]}
        ns.extract(base, tuned, axis=axis, score="random", out=root / "p", **budget).close()
        before, file = snapshot(base), base / "model.safetensors"
        old = file.read_bytes()
        ns.apply(base, root / "p", out=root / "copy")
        new = (root / "copy" / "model.safetensors").read_bytes()
        half_written(base, [root / "p"])
        sectors = [slice(start, start + 512) for start in range(0, len(old), 512)]
        file.write_bytes(b"".join((new if rng.random() < share else old)[part] for part in sectors))
        ns.heal(base)
        assert snapshot(base) == before


@pytest.mark.parametrize("cuts", [CUTS["rows"], CUTS["columns"]], ids=["rows", "columns"])
def test_a_full_disk_or_an_io_error_undoes_it_at_once(tmp_path: Path, cuts: list[tuple[int, ...]]) -> None:
    base = raw_folder(tmp_path / "base", model(0))
    patches = patches_between(tmp_path, base, cuts, 0.3)
    before = snapshot(base)
    for code in (errno.ENOSPC, errno.EIO):
        for number in range(1, 100):
            with failing_at(number, code):
                found = outcome(base, patches)
            if found is None:
                break
            assert os.strerror(code).lower() in str(found).lower()
            assert snapshot(base) == before, "undone at once, no journal left"
        assert number > 4
        ns.revert(base, patches[0], in_place=True)
        assert snapshot(base) == before


def outcome(base: Path, patches: list[Path]) -> ns.MachineError | None:
    try:
        ns.apply(base, patches, in_place=True)
    except ns.MachineError as error:
        return error
    return None


@contextmanager
def failing_at(number: int, code: int) -> Iterator[None]:
    """Do half of the ``number``-th write, then fail; later writes work again."""
    write, calls = os.pwrite, 0

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == number:
            view = memoryview(data).cast("B")
            write(fd, view[: len(view) // 2], offset)
            raise OSError(code, os.strerror(code))
        return write(fd, data, offset)

    with mock.patch.object(os, "pwrite", pwrite):
        yield


@contextmanager
def watched(journal: Path) -> Iterator[list[tuple[str, int, bool]]]:
    """Writes and syncs in order: the call, the inode, and whether the journal was in place."""
    events: list[tuple[str, int, bool]] = []
    write, sync = os.pwrite, os.fsync

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        events.append(("write", os.fstat(fd).st_ino, journal.exists()))
        return write(fd, data, offset)

    def fsync(fd: int) -> None:
        events.append(("sync", os.fstat(fd).st_ino, journal.exists()))
        sync(fd)

    with mock.patch.object(os, "pwrite", pwrite), mock.patch.object(os, "fsync", fsync):
        yield events


@pytest.mark.parametrize("cuts", [CUTS["rows"], CUTS["columns"]], ids=["rows", "columns"])
def test_writes_and_syncs_reach_the_disk_in_the_right_order(
    tmp_path: Path, cuts: list[tuple[int, ...]]
) -> None:
    """The journal and its folder before the first vector; the last vector before the journal's removal."""
    base = raw_folder(tmp_path / "base", model(0))
    patches = patches_between(tmp_path, base, cuts, 0.3)
    data = (base / "model.safetensors").stat().st_ino
    folder = base.stat().st_ino
    with watched(base / ".neft-journal") as events:
        ns.apply(base, patches, in_place=True)
    first = events.index(("write", data, True))
    assert ("sync", folder, True) in events[:first]
    others = {inode for what, inode, _ in events[:first] if what == "write"}
    assert len(others) == 1, "the journal"
    assert {("sync", inode, False) for inode in others} <= set(events[:first])
    assert_synced_last(events, data)
    ns.revert(base, patches[0], in_place=True)
    half_written(base, patches)
    with watched(base / ".neft-journal") as events:
        ns.heal(base)
    assert_synced_last(events, data)


def assert_synced_last(events: list[tuple[str, int, bool]], data: int) -> None:
    last = max(number for number, event in enumerate(events) if event[:2] == ("write", data))
    assert events[last][2]
    assert ("sync", data, True) in events[last:]


def test_shards_without_changes_are_not_written(tmp_path: Path) -> None:
    base = raw_folder(tmp_path / "base", model(0, 3), 4)
    patches = patches_between(tmp_path, base, [(0,)], 0.2)
    stamps = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in base.iterdir()}
    ns.apply(base, patches, in_place=True)
    now = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in base.iterdir()}
    assert {name for name in now if now[name] != stamps[name]} == {"model-00001-of-00004.safetensors"}
    assert {name: ino for name, (_, ino) in now.items()} == {name: ino for name, (_, ino) in stamps.items()}


@pytest.fixture
def setting(tmp_path: Path) -> tuple[Path, Path]:
    base = raw_folder(tmp_path / "base", model(0))
    return base, patches_between(tmp_path, base, [(0,)], 0.3)[0]


@pytest.fixture(params=["apply", "revert"])
def change(request: pytest.FixtureRequest) -> Callable[..., None]:
    return getattr(ns, request.param)


def assert_refused(
    change: Callable[..., None], named: object, patch: Path, root: Path, error: type, says: str
) -> None:
    before = snapshot(root)
    with pytest.raises(error, match=says):
        change(named, patch, in_place=True)
    assert snapshot(root) == before


def test_a_linked_folder_is_refused(setting: tuple[Path, Path], change: Callable[..., None]) -> None:
    base, patch = setting
    (base.parent / "link").symlink_to(base)
    assert_refused(change, base.parent / "link", patch, base.parent, ns.UsageError, "symlink")


def test_a_linked_file_is_refused(setting: tuple[Path, Path], change: Callable[..., None]) -> None:
    base, patch = setting
    link = base.parent / "link.safetensors"
    link.symlink_to(base / "model.safetensors")
    assert_refused(change, link, patch, base.parent, ns.UsageError, "symlink")


def test_a_folder_of_linked_shards_is_refused(
    setting: tuple[Path, Path], change: Callable[..., None]
) -> None:
    base, patch = setting
    blob = base.parent / "blob"
    (base / "model.safetensors").rename(blob)
    (base / "model.safetensors").symlink_to(blob)
    assert_refused(change, base, patch, base.parent, ns.UsageError, "symlink")


def test_a_hard_linked_file_is_refused(setting: tuple[Path, Path], change: Callable[..., None]) -> None:
    base, patch = setting
    os.link(base / "model.safetensors", base.parent / "second name")
    assert_refused(change, base, patch, base.parent, ns.UsageError, "hard links")
    assert_refused(change, base / "model.safetensors", patch, base.parent, ns.UsageError, "hard links")


def test_a_hub_model_is_refused(
    setting: tuple[Path, Path], change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, patch = setting
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(base))
    assert_refused(change, "some-org/some-model", patch, base.parent, ns.UsageError, "Hub")
    ns.apply("some-org/some-model", patch, out=base.parent / "out")
    assert ns.verify(base.parent / "out", patch).state == "patched"


def test_a_checkpoint_that_another_process_changes_is_refused(
    setting: tuple[Path, Path],
) -> None:
    base, patch = setting
    # A lock belongs to the open file, so a second descriptor stands for the other process.
    with open(base / "model.safetensors", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert_refused(ns.apply, base, patch, base.parent, ns.MachineError, "another process")
    ns.apply(base, patch, in_place=True)
    assert ns.verify(base, patch).state == "patched"


def test_too_little_disk_space_for_the_journal(
    setting: tuple[Path, Path], change: Callable[..., None]
) -> None:
    base, patch = setting
    if change is ns.revert:
        ns.apply(base, patch, in_place=True)
    real = os.statvfs
    full = lambda folder: os.statvfs_result((*real(folder)[:4], 0, *real(folder)[5:]))  # noqa: E731
    with mock.patch.object(os, "statvfs", full):
        assert_refused(change, base, patch, base.parent, ns.MachineError, "not enough space")


def test_a_wrong_base_is_refused_before_anything_is_written(setting: tuple[Path, Path]) -> None:
    base, patch = setting
    wrong = raw_folder(base.parent / "wrong", model(5))
    assert_refused(ns.apply, wrong, patch, base.parent, ns.MismatchError, "another base")
    assert_refused(ns.revert, wrong, patch, base.parent, ns.MismatchError, "another base")
    ns.apply(base, patch, in_place=True)
    before = snapshot(base.parent)
    with pytest.raises(ns.MismatchError, match="not the base that the patch was made from"):
        ns.revert(base, patch, base=wrong, in_place=True)
    assert snapshot(base.parent) == before


def test_both_or_neither_of_out_and_in_place(setting: tuple[Path, Path], change: Callable[..., None]) -> None:
    base, patch = setting
    before = snapshot(base.parent)
    for options in ({}, {"in_place": True, "out": base.parent / "out"}):
        with pytest.raises(ns.UsageError, match="in_place=True"):
            change(base, patch, **options)
    assert snapshot(base.parent) == before


def test_the_journal_moves_with_its_folder(setting: tuple[Path, Path]) -> None:
    """A half-written checkpoint still heals after it is moved or copied."""
    base, patch = setting
    before = snapshot(base)
    half_written(base, [patch])
    shutil.copytree(base, base.parent / "elsewhere")
    ns.heal(base.parent / "elsewhere")
    assert snapshot(base.parent / "elsewhere") == before


def test_the_journal_is_removed_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a healing process could remove the journal of a later process."""

    from neftsurgery.checkpoint import healing, journal

    arrays = {"a.weight": np.arange(12, dtype=np.float32).reshape(4, 3)}
    base = write_file(tmp_path / "base.safetensors", arrays)
    tuned = write_file(tmp_path / "tuned.safetensors", {"a.weight": arrays["a.weight"] + 1})
    patch = ns.extract(base, tuned, neurons=2, out=tmp_path / "p.safetensors")
    original, remove, held = base.read_bytes(), journal.remove_journal, []

    def noted(path: Path, sha256: str) -> None:
        with open(base, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(path)
        remove(path, sha256)

    def torn(*arguments: object) -> None:
        raise OSError(5, "injected")

    for module in (journal, healing):
        monkeypatch.setattr(module, "remove_journal", noted)
    ns.apply(base, patch, in_place=True)
    assert len(held) == 1
    base.write_bytes(original)
    with monkeypatch.context() as broken:
        broken.setattr(verbs, "_write_rows", torn)
        with pytest.raises(ns.MachineError):
            ns.apply(base, patch, in_place=True)
    assert len(held) == 2  # healed at once
    assert base.read_bytes() == original
