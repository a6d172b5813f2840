"""Copies are byte-identical whatever road they take, keep holes, and are never short."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from neftsurgery.errors import MismatchError, UsageError
from neftsurgery.storage.copying import copy_file

REFUSALS = ["EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "ETXTBSY", "EPERM", "EIO", "ENOMEM", "EOVERFLOW"]

needs_kernel = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="Linux only")


def content(nbytes: int) -> bytes:
    """Bytes without a period that a step size could hide in."""
    return b"".join(i.to_bytes(4, "little") for i in range(nbytes // 4 + 1))[:nbytes]


def raising(name: str) -> Callable[..., int]:
    number = getattr(errno, name)

    def call(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


#: Small enough for files of test size.
STEP = 32 << 10


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 32 << 10, 100_001])
def test_a_copy_is_identical(tmp_path: Path, nbytes: int) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content(nbytes))
    steps: list[int] = []
    copy_file(source, target, progress=steps.append)
    assert target.read_bytes() == content(nbytes)
    assert sum(steps) == nbytes
    target.write_bytes(b"changed")
    assert source.read_bytes() == content(nbytes)


@pytest.mark.parametrize("nbytes", [0, 1, 32 << 10, 100_001])
def test_steps_are_small_and_complete(tmp_path: Path, nbytes: int) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content(nbytes))
    steps: list[int] = []
    copy_file(source, target, progress=steps.append, step=STEP)
    assert target.read_bytes() == content(nbytes)
    assert sum(steps) == nbytes
    assert max(steps, default=0) <= 32 << 10


@needs_kernel
@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("after", [0, 1])
def test_where_the_kernel_refuses_the_copy_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str, after: int
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content(100_001))
    real, calls, read = os.copy_file_range, 0, 0
    real_pread = os.pread

    def refusing(src: int, dst: int, count: int, offset_src: int, offset_dst: int) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(getattr(errno, refusal), "no")
        return real(src, dst, count, offset_src, offset_dst)

    def pread(fd: int, count: int, offset: int) -> bytes:
        nonlocal read
        data = real_pread(fd, count, offset)
        read += len(data)
        return data

    monkeypatch.setattr(os, "copy_file_range", refusing)
    monkeypatch.setattr(os, "pread", pread)
    steps: list[int] = []
    copy_file(source, target, progress=steps.append, step=STEP)
    assert target.read_bytes() == content(100_001)
    assert sum(steps) == 100_001
    assert calls == after + 1  # asked once too often, then never again
    assert read == 100_001 - after * (32 << 10)


def test_a_system_without_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.delattr(os, "SEEK_DATA", raising=False)
    monkeypatch.delattr(os, "SEEK_HOLE", raising=False)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content(100_001))
    copy_file(source, target, step=STEP)
    assert target.read_bytes() == content(100_001)


@needs_kernel
def test_a_kernel_that_says_zero_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *arguments: 0)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content(100_001))
    copy_file(source, target, step=STEP)
    assert target.read_bytes() == content(100_001)


@needs_kernel
def test_the_kernel_does_the_work_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content(100_001))
    copied = 0
    real = os.copy_file_range

    def counting(*arguments: int) -> int:
        nonlocal copied
        done = real(*arguments)
        copied += done
        return done

    monkeypatch.setattr(os, "copy_file_range", counting)
    copy_file(source, target, step=STEP)
    if copied == 0:
        pytest.skip("this file system does not copy in the kernel")
    assert copied == 100_001
    assert target.read_bytes() == content(100_001)


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", raising("EXDEV"), raising=False)
    monkeypatch.setattr(os, "pread", raising("EIO"))
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content(1000))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
        copy_file(source, target, step=STEP)
    assert caught.value.filename == str(source)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("failure", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_real_failure_is_an_error_that_names_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, by_kernel: bool
) -> None:
    if by_kernel and not hasattr(os, "copy_file_range"):
        pytest.skip("Linux only")
    monkeypatch.setattr(os, "copy_file_range", raising(failure if by_kernel else "EXDEV"), raising=False)
    monkeypatch.setattr(os, "pwrite", raising(failure))
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content(1000))
    with pytest.raises(OSError, match=os.strerror(getattr(errno, failure))) as caught:
        copy_file(source, target, step=STEP)
    assert caught.value.filename == str(target)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(not Path("/proc/version").is_file(), reason="a file system of Linux")
def test_a_file_that_is_longer_than_it_says_is_an_error(tmp_path: Path) -> None:
    assert os.stat("/proc/version").st_size == 0
    with pytest.raises(MismatchError, match="expected 0 bytes, found more"):
        copy_file("/proc/version", tmp_path / "b")
    assert os.listdir(tmp_path) == []


def test_from_one_file_system_to_another(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        if os.stat(folder).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("there is one file system here")
        (Path(folder) / "a").write_bytes(content(100_001))
        copy_file(Path(folder) / "a", tmp_path / "b", step=STEP)
        copy_file(tmp_path / "b", Path(folder) / "c", step=STEP)
        assert (tmp_path / "b").read_bytes() == (Path(folder) / "c").read_bytes() == content(100_001)


def test_a_copy_of_another_size_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that says it has written what it has not, beyond the end of the copy."""
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: None)
    monkeypatch.setattr(os, "copy_file_range", lambda src, dst, count, *offsets: count, raising=False)
    (tmp_path / "a").write_bytes(content(1000))
    with pytest.raises(OSError, match="the copy has 0 bytes instead of 1000") as caught:
        copy_file(tmp_path / "a", tmp_path / "b")
    assert caught.value.filename == str(tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]


def test_links_are_followed_and_permissions_kept(tmp_path: Path) -> None:
    blob, link = tmp_path / "blob", tmp_path / "model.safetensors"
    blob.write_bytes(b"weights")
    link.symlink_to("blob")
    for mode in (0o640, 0o444, 0o755, 0o4755):
        blob.chmod(mode)
        target = tmp_path / f"copy-{mode:o}"
        assert copy_file(link, target) == mode & 0o777
        assert not target.is_symlink()
        assert stat.S_IMODE(target.stat().st_mode) == mode & 0o777
        assert target.read_bytes() == b"weights"


def test_a_descriptor_is_filled_and_left_open(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content(10_000))
    source.chmod(0o444)
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        assert copy_file(source, fd) == 0o444
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
        os.pwrite(fd, b"PATCH", 100)
        with pytest.raises(ValueError, match="must be empty"):
            copy_file(source, fd)
    finally:
        os.close(fd)
    wanted = bytearray(content(10_000))
    wanted[100:105] = b"PATCH"
    assert target.read_bytes() == bytes(wanted)
    assert source.read_bytes() == content(10_000)


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_bytes(b"new")
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("victim")
    for target in (tmp_path / "file", tmp_path / "link", source):
        with pytest.raises(FileExistsError):
            copy_file(source, target)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert not (tmp_path / "victim").exists()


def test_only_regular_files_are_copied(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UsageError, match="not a regular file"):
            copy_file(source, tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        copy_file(tmp_path / "missing", tmp_path / "b")
    assert os.listdir(tmp_path) == ["pipe"]


# --- holes


def sparse(path: Path, size: int, islands: dict[int, bytes]) -> None:
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, data in islands.items():
            os.pwrite(file.fileno(), data, offset)
    if path.stat().st_blocks * 512 > size // 2:
        pytest.skip("this file system keeps no holes")


@pytest.mark.parametrize("by_kernel", [True, False])
def test_holes_stay_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_kernel: bool) -> None:
    if not by_kernel:
        monkeypatch.setattr(os, "copy_file_range", raising("EXDEV"), raising=False)
    size = 100 << 30  # through a buffer this would take minutes
    islands = {0: b"head", 50 << 30: content(70_000), size - 3: b"end"}
    source, target = tmp_path / "a", tmp_path / "b"
    sparse(source, size, islands)
    steps: list[int] = []
    copy_file(source, target, progress=steps.append)
    assert target.stat().st_size == size
    assert sum(steps) == size
    assert target.stat().st_blocks * 512 <= source.stat().st_blocks * 512 + (64 << 10)
    with open(target, "rb") as file:
        for offset, data in islands.items():
            assert os.pread(file.fileno(), len(data), offset) == data
        assert os.pread(file.fileno(), 4096, 20 << 30) == bytes(4096)


@pytest.mark.parametrize(
    "islands",
    [
        {},
        {0: b"x"},
        {(1 << 20) - 1: b"x"},
        {300_000: content(100_000)},
        {0: b"a", 500_000: b"b", 900_000: b"c"},
    ],
)
def test_sparse_content_is_identical(tmp_path: Path, islands: dict[int, bytes]) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    sparse(source, 1 << 20, islands)
    steps: list[int] = []
    copy_file(source, target, progress=steps.append)
    assert target.read_bytes() == source.read_bytes()
    assert sum(steps) == 1 << 20


def test_a_file_system_that_cannot_seek_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    sparse(source, 1 << 20, {500_000: b"middle"})
    monkeypatch.setattr(os, "lseek", raising("EINVAL"))
    copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()


def test_a_file_system_that_finds_its_holes_where_its_data_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data from here, and a hole from here, too: the rest is copied, and the search ends."""
    source, target = tmp_path / "a", tmp_path / "b"
    sparse(source, 1 << 20, {0: b"a", 500_000: b"b"})
    monkeypatch.setattr(os, "lseek", lambda fd, position, how: position)
    copy_file(source, target, step=STEP)
    assert target.read_bytes() == source.read_bytes()


# --- a source that does not hold still


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("size", [0, 40_000, 99_999, 100_002, 200_000])
def test_a_source_that_changes_size_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_kernel: bool, size: int
) -> None:
    if not by_kernel:
        monkeypatch.setattr(os, "copy_file_range", raising("EXDEV"), raising=False)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content(100_001))
    os.utime(source, ns=(0, 0))

    def resize(nbytes: int) -> None:
        os.truncate(source, size)
        os.utime(source, ns=(0, 0))  # the time alone must not be what tells

    with pytest.raises(MismatchError, match=r"expected \d+ bytes, found \d+") as caught:
        copy_file(source, target, progress=resize, step=STEP)
    assert caught.value.file == str(source)
    assert os.listdir(tmp_path) == ["a"]


def test_a_source_that_is_rewritten_is_an_error(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content(100_001))
    os.utime(source, ns=(0, 0))

    def rewrite(nbytes: int) -> None:
        with open(source, "r+b") as file:
            file.write(b"other")

    with pytest.raises(MismatchError, match="changed while it was being copied"):
        copy_file(source, target, progress=rewrite, step=STEP)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_an_interrupted_copy_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content(100_001))

    def interrupt(nbytes: int) -> None:
        raise failure

    with pytest.raises(failure):
        copy_file(source, target, progress=interrupt, step=STEP)
    assert os.listdir(tmp_path) == ["a"]
