"""Outputs appear whole or not at all: real files, real processes, real signals."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import secrets
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import neftsurgery
from neftsurgery.errors import MachineError, UsageError
from neftsurgery.storage import output
from neftsurgery.storage import output_checks as refusal
from neftsurgery.storage.output import StagedFile, staged_directory, staged_file
from neftsurgery.storage.output_checks import refuse_output, require_space

KINDS = ["file", "directory"]


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def tree(path: Path) -> dict[str, bytes] | bytes:
    """The content of a file, or of every file of a directory."""
    if path.is_file():
        return path.read_bytes()
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def stage(
    kind: str, out: Path, *, force: bool = False
) -> AbstractContextManager[StagedFile] | AbstractContextManager[Path]:
    return staged_file(out, force=force) if kind == "file" else staged_directory(out, force=force)


def fill(staged: StagedFile | Path, content: bytes = b"new") -> None:
    if isinstance(staged, StagedFile):
        staged.write_at(content, 0)
    else:
        (staged / "sub").mkdir()
        (staged / "sub" / "a").write_bytes(content)


def expected(kind: str, content: bytes = b"new") -> dict[str, bytes] | bytes:
    return content if kind == "file" else {"sub/a": content}


def put(what: str, out: Path) -> None:
    """Something that is in the way."""
    match what:
        case "file":
            out.write_bytes(b"old")
        case "full directory":
            (out / "deep" / "deeper").mkdir(parents=True)
            (out / "deep" / "deeper" / "old").write_bytes(b"old")
        case "empty directory":
            out.mkdir()
        case "link to a file":
            (out.parent / "elsewhere").write_bytes(b"linked")
            out.symlink_to("elsewhere")
        case "link to a directory":
            (out.parent / "elsewhere").mkdir()
            out.symlink_to("elsewhere")
        case "dangling link":
            out.symlink_to("nowhere")


WAYS = [
    "file",
    "full directory",
    "empty directory",
    "link to a file",
    "link to a directory",
    "dangling link",
]


# --- what is refused before the work starts


@pytest.mark.parametrize("what", WAYS)
def test_an_existing_output_is_refused_unless_forced(tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    put(what, out)
    refuse_output(out, inputs=[], force=True, kind="directory")
    refuse_output(out, inputs=[], force=True, kind="file")
    with pytest.raises(UsageError, match="exists already"):
        refuse_output(out, inputs=[], force=False, kind="file")
    if what == "empty directory":
        refuse_output(out, inputs=[], force=False, kind="directory")
        refuse_output(out, inputs=[], force=False)
    else:
        with pytest.raises(UsageError, match=r"exists already.*\n.*replace it with force=True$"):
            refuse_output(out, inputs=[], force=False, kind="directory")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="a file system of Linux")
@pytest.mark.parametrize("folder", ["/proc", "/proc/self/fd", "/proc/self/task", "/proc/1/task"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_takes_no_files_ends_at_once(kind: str, folder: str) -> None:
    """The kernel says that the folder is there, and that a new name in it is not."""
    with pytest.raises(OSError, match=r"nothing can be created|not permitted|denied") as caught:
        stage(kind, Path(folder, "neft")).__enter__()
    assert folder in str(getattr(caught.value, "file", None) or caught.value.filename)


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_are_taken_each_time_end_at_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder whose files have other inode numbers when they are asked for again, as some have."""
    monkeypatch.setattr(output, "identity", lambda place: (0, int(isinstance(place, Path))))
    with pytest.raises(MachineError, match="nothing can be created in this folder"):
        stage(kind, tmp_path / "out").__enter__()
    assert entries(tmp_path) == []


def test_a_new_name_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "base"
    source.mkdir()
    refuse_output(tmp_path / "out", inputs=[source], force=False)
    refuse_output(tmp_path / "base2", inputs=[source], force=False)  # a shared prefix is not "inside"
    monkeypatch.chdir(tmp_path)
    refuse_output("out", inputs=["base"], force=False)
    assert entries(tmp_path) == ["base"]


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_touches_an_input_is_always_refused(tmp_path: Path, force: bool) -> None:
    base = tmp_path / "holder" / "base"
    base.mkdir(parents=True)
    weights = base / "model.safetensors"
    weights.write_bytes(b"x")
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "alias").symlink_to(base)
    os.link(weights, tmp_path / "hardlink")

    def refused(out: Path, source: Path, words: str) -> None:
        with pytest.raises(UsageError, match=words):
            refuse_output(out, inputs=[other, source], force=force)

    refused(base, base, "is the input")
    refused(tmp_path / "alias", base, "is the input")
    refused(base, tmp_path / "alias", "is the input")
    refused(base / "..", base, "no name of its own")
    refused(base / ".." / "base", base, "is the input")
    refused(weights, weights, "is the input")
    refused(tmp_path / "hardlink", weights, "is the input")
    refused(weights, base, "inside the input")
    refused(base / "patched", base, "inside the input")
    refused(tmp_path / "alias" / "patched", base, "inside the input")
    refused(base.parent, base, "holds files of the input")
    refused(base.parent, weights, "holds files of the input")
    assert weights.read_bytes() == b"x"


def test_the_blobs_that_a_hub_snapshot_links_to_are_inputs(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "0123").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    for out in (blobs, blobs / "0123"):
        with pytest.raises(UsageError, match="holds files of the input"):
            refuse_output(out, inputs=[snapshot], force=True)


def test_the_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not exist\ncreate it first"):
        refuse_output(tmp_path / "no" / "out", inputs=[], force=False)
    (tmp_path / "plain").write_bytes(b"")
    with pytest.raises(UsageError, match="is not a folder"):
        refuse_output(tmp_path / "plain" / "out", inputs=[], force=False)
    for kind in KINDS:
        with pytest.raises(UsageError, match="does not exist"), stage(kind, tmp_path / "no" / "out"):
            pass


def test_names_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ends in a slash"):
        refuse_output(f"{tmp_path}/out/", inputs=[], force=False, kind="file")
    refuse_output(f"{tmp_path}/out/", inputs=[], force=False, kind="directory")
    for name in ("", ".", "..", "/"):
        with pytest.raises(UsageError, match="no name of its own"):
            refuse_output(name, inputs=[], force=True)
    with pytest.raises(UsageError, match="longer than 255 bytes"):
        refuse_output(tmp_path / ("ü" * 128), inputs=[], force=False)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    for name in ("pipe", "to-pipe"):
        with pytest.raises(UsageError, match="device, pipe or socket"):
            refuse_output(tmp_path / name, inputs=[], force=True)


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="needs a mount point that is surely there")
def test_a_mount_point_cannot_be_replaced() -> None:
    with pytest.raises(UsageError, match="mount point"):
        refuse_output("/proc", inputs=[], force=True)


def test_the_current_folder_and_home_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "here").mkdir(parents=True)
    (tmp_path / "users" / "me").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "users" / "me"))
    for name in ("work", "work/here", "users", "users/me"):
        with pytest.raises(UsageError, match="current folder or your home"):
            refuse_output(tmp_path / name, inputs=[], force=True)


def test_a_folder_without_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write everywhere: ask the check what it asks the system.
    def access(path: Path, mode: int) -> bool:
        return not (path == tmp_path and mode & os.W_OK)

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(MachineError, match="no permission") as caught:
        refuse_output(tmp_path / "out", inputs=[], force=False)
    assert caught.value.errno == errno.EACCES


def test_space_is_checked_in_words(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    require_space(tmp_path, 0)
    require_space(tmp_path, 1)
    too_much = status.f_frsize * status.f_blocks + 10**15
    with pytest.raises(MachineError, match=r"\d+\.\d TB are needed, [\d.]+ \w+ are free") as caught:
        require_space(tmp_path, too_much)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.file == str(tmp_path)


@pytest.mark.parametrize(
    ("nbytes", "up", "down"),
    [
        (0, "0 bytes", "0 bytes"),
        (999, "999 bytes", "999 bytes"),
        (1000, "1.0 kB", "1.0 kB"),
        (1_234_567, "1.3 MB", "1.2 MB"),
        (1_000_000_000, "1.0 GB", "1.0 GB"),
        (1_000_000_001, "1.1 GB", "1.0 GB"),
        (12_345_678_901_234_567, "12345.7 TB", "12345.6 TB"),
    ],
)
def test_sizes_never_hide_which_is_larger(nbytes: int, up: str, down: str) -> None:
    assert (refusal._size(nbytes, up=True), refusal._size(nbytes, up=False)) == (up, down)


# --- writing


def test_a_file_appears_when_the_context_ends(tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    with staged_file(out) as staged:
        assert not out.exists()
        assert re.fullmatch(r"\.out\.bin\.neft-[0-9a-f]{16}", staged.path.name)
        assert staged.path.parent == tmp_path
        staged.write_at(b"world", 5)
        staged.write_at(memoryview(b"hello"), 0)
        staged.write_at(b"", 0)
        with os.fdopen(os.dup(staged.fd), "r+b") as stream:
            assert stream.read() == b"helloworld"
            stream.write(b"!")
    assert out.read_bytes() == b"helloworld!"
    assert entries(tmp_path) == ["out.bin"]


def test_a_directory_appears_when_the_context_ends(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_directory(out) as folder:
        assert not out.exists()
        fill(folder)
        (folder / "link").symlink_to("sub/a")
        (folder / "dangling").symlink_to("nowhere")
        (folder / "empty").mkdir()
    assert tree(out) == {"sub/a": b"new", "link": b"new"}
    assert entries(out) == ["dangling", "empty", "link", "sub"]
    assert entries(tmp_path) == ["out"]


def test_modes_honour_the_umask_or_the_argument(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged_file(tmp_path / "a"):
            pass
        with staged_file(tmp_path / "b", mode=0o664) as staged:
            assert stat.S_IMODE(os.fstat(staged.fd).st_mode) == 0o600
        with staged_directory(tmp_path / "c"):
            pass
    finally:
        os.umask(before)
    modes = {name: oct(stat.S_IMODE(os.stat(tmp_path / name).st_mode)) for name in "abc"}
    assert modes == {"a": "0o640", "b": "0o664", "c": "0o750"}


def test_the_current_folder_may_change_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged_file("out") as staged:
        staged.write_at(b"1", 0)
        monkeypatch.chdir("x")
    assert (tmp_path / "out").read_bytes() == b"1"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "n" * 229, "n" * 228])
def test_names_up_to_the_limit_work(tmp_path: Path, kind: str, name: str) -> None:
    with stage(kind, tmp_path / name) as staged:
        fill(staged)
        (staging,) = entries(tmp_path)
        assert len(os.fsencode(staging)) <= 255
    assert entries(tmp_path) == [name]
    twin = tmp_path / (name[:-1] + "x")
    assert output._staging_prefix(tmp_path / name) != output._staging_prefix(twin)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [False, True])
def test_a_failure_leaves_nothing(tmp_path: Path, kind: str, failure: type[BaseException], old: bool) -> None:
    out = tmp_path / "out"
    if old:
        put("full directory", out)
    with pytest.raises(failure), stage(kind, out, force=old) as staged:
        fill(staged)
        raise failure
    assert entries(tmp_path) == (["out"] if old else [])
    if old:
        assert tree(out) == {"deep/deeper/old": b"old"}


@pytest.mark.parametrize("step", ["fsync", "_fsync_tree", "_place", "_replace"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_at_the_end_leaves_nothing(
    tmp_path: Path, kind: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "file" and step == "_fsync_tree":
        step = "fsync"
    out = tmp_path / "out"
    force = step == "_replace"
    if force:
        put("file", out)

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(output, step, fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), stage(kind, out, force=force) as staged:
        fill(staged)
    assert entries(tmp_path) == (["out"] if force else [])


@pytest.fixture
def _read_only_means_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read-only for root: have the removal refuse what it would refuse anyone else."""
    rmtree = shutil.rmtree

    def refusing(path: Path) -> None:
        for folder in [path, *path.rglob("*")]:
            if folder.is_dir() and not folder.stat().st_mode & stat.S_IWUSR:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", refusing)


@pytest.mark.usefixtures("_read_only_means_it")
def test_read_only_folders_inside_are_removed_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_directory(tmp_path / "out") as folder:
        fill(folder)
        (folder / "sub").chmod(0o500)
        raise ZeroDivisionError
    assert entries(tmp_path) == []


@pytest.mark.usefixtures("_read_only_means_it")
def test_a_read_only_output_is_replaced_by_force(tmp_path: Path) -> None:
    put("full directory", tmp_path / "out")
    (tmp_path / "out" / "deep").chmod(0o500)
    with staged_directory(tmp_path / "out", force=True) as folder:
        fill(folder)
    assert entries(tmp_path) == ["out"]
    assert tree(tmp_path / "out") == {"sub/a": b"new"}


def test_a_second_ctrl_c_does_not_stop_the_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree, calls = shutil.rmtree, 0

    def interrupted(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "out") as folder:
        fill(folder)
        raise KeyboardInterrupt
    assert calls == 2
    assert entries(tmp_path) == []


@pytest.mark.parametrize("removable", ["deep", "deep/deeper"])
def test_making_a_tree_removable_follows_no_links(tmp_path: Path, removable: str) -> None:
    put("full directory", tmp_path / "out")
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    (tmp_path / "out" / removable / "link").symlink_to(outside)
    (tmp_path / "out" / removable).chmod(0o555)
    output._make_removable(tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out" / removable).stat().st_mode) == 0o700
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755


def test_everything_is_synced_inside_out_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    out = tmp_path / "out"

    def name_of(fd: int) -> str:
        return re.sub(r"\.neft-[0-9a-f]+", "", os.readlink(f"/proc/self/fd/{fd}"))

    def fsync(fd: int) -> None:
        log.append(f"{os.path.relpath(name_of(fd), tmp_path)} {'after' if out.exists() else 'before'}")

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("names of descriptors come from /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    with staged_directory(out) as folder:
        fill(folder)
        (folder / "b").write_bytes(b"")
    assert log == [".out/sub/a before", ".out/sub before", ".out/b before", ".out before", ". after"]
    log.clear()
    out = tmp_path / "file"
    with staged_file(out):
        pass
    assert log == [".file before", ". after"]


# --- what is in the way at the end


@pytest.fixture(params=["renameat2", "without it"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernel's special renames, and on a system that lacks them."""
    if request.param == "without it":
        monkeypatch.setattr(output, "_rename_with_flags", lambda path, out, exchange: False)
    return str(request.param)


@pytest.mark.parametrize("what", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_appears_meanwhile_is_kept(tmp_path: Path, kind: str, what: str, system: str) -> None:
    out = tmp_path / "out"
    if kind == "directory" and what == "empty directory":
        with stage(kind, out) as staged:
            fill(staged)
            put(what, out)
        assert tree(out) == expected(kind)
        return
    with pytest.raises(UsageError, match="appeared while it was being written"), stage(kind, out) as staged:
        fill(staged)
        put(what, out)
        before = tree(out)
    assert tree(out) == before
    assert out.is_symlink() == ("link" in what)
    assert [name for name in entries(tmp_path) if name != "elsewhere"] == ["out"]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(output, "_rename_with_flags", lambda path, out, exchange: False)
    monkeypatch.setattr(os, "link", link)
    with staged_file(tmp_path / "out") as staged:
        staged.write_at(b"1", 0)
    with pytest.raises(UsageError, match="appeared"), staged_file(tmp_path / "out") as staged:
        staged.write_at(b"2", 0)
    assert (tmp_path / "out").read_bytes() == b"1"
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("what", [*WAYS, "nothing"])
@pytest.mark.parametrize("kind", KINDS)
def test_force_replaces_anything(tmp_path: Path, kind: str, what: str, system: str) -> None:
    out = tmp_path / "out"
    put(what, out)
    with stage(kind, out, force=True) as staged:
        fill(staged)
        assert os.path.lexists(out) == (what != "nothing")
    assert tree(out) == expected(kind)
    assert not out.is_symlink()
    rest = [name for name in entries(tmp_path) if name != "out"]
    assert rest == (["elsewhere"] if what.startswith("link") else [])
    if what == "link to a file":
        assert (tmp_path / "elsewhere").read_bytes() == b"linked"


def test_the_exchange_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path exists at every moment: nothing but the exchange touches it."""
    out = tmp_path / "out"
    put("full directory", out)
    seen: list[bool] = []
    special = output._rename_with_flags

    def spy(path: Path, target: Path, *, exchange: bool) -> bool:
        seen.append(tree(target) == {"deep/deeper/old": b"old"})
        done = special(path, target, exchange=exchange)
        seen.append(tree(target) == {"sub/a": b"new"})
        return done

    monkeypatch.setattr(output, "_rename_with_flags", spy)
    try:
        with staged_directory(out, force=True) as folder:
            fill(folder)
    finally:
        monkeypatch.undo()
    if sys.platform == "linux":
        assert seen == [True, True]
    assert tree(out) == {"sub/a": b"new"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [1, 2])
def test_without_exchange_a_failure_puts_the_old_one_back(
    tmp_path: Path, kind: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    put("full directory", out)
    rename, calls = os.rename, 0

    def failing(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(output, "_rename_with_flags", lambda path, out, exchange: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), stage(kind, out, force=True) as staged:
        fill(staged)
    assert tree(out) == {"deep/deeper/old": b"old"}
    assert entries(tmp_path) == ["out"]


# --- killed processes, live ones and races

CHILD = """
import sys
from neftsurgery.storage.output import staged_directory, staged_file
from neftsurgery.errors import UsageError
kind, who, *outs = sys.argv[1:]
for out in outs:
    try:
        with (staged_file if kind == "file" else staged_directory)(out) as staged:
            if kind == "file":
                staged.write_at(who.encode(), 0)
            else:
                (staged / "who").write_text(who)
            print("staged", flush=True)
            sys.stdin.readline()
        print("won", flush=True)
    except UsageError:
        print("lost", flush=True)
"""


def child(kind: str, who: str, *outs: Path, stderr: int | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(neftsurgery.__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, kind, who, *map(str, outs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment,
        # Also where it is ignored, as by the background jobs of a script.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_process_left_is_removed_and_a_live_one_is_not(tmp_path: Path, kind: str) -> None:
    out, other = tmp_path / "out", tmp_path / "out.neft-0"
    with (
        child(kind, "killed", out) as killed,
        child(kind, "live", out) as live,
        child(kind, "elsewhere", other) as elsewhere,
    ):
        processes = (killed, live, elsewhere)
        assert [hear(process) for process in processes] == ["staged"] * 3
        for process in (killed, elsewhere):
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert len(entries(tmp_path)) == 3
        with stage(kind, out) as staged:
            fill(staged)
            # Ours, the live one, and the one of another output, which is not ours to judge.
            assert len(entries(tmp_path)) == 3
            assert len([n for n in entries(tmp_path) if n.startswith(".out.neft-0.neft-")]) == 1
        assert len(entries(tmp_path)) == 3
        with stage(kind, other) as staged:
            fill(staged)
        assert len(entries(tmp_path)) == 3
        tell(live)
        assert hear(live) == "lost"
    assert entries(tmp_path) == ["out", "out.neft-0"]
    assert tree(out) == expected(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_leaves_nothing(tmp_path: Path, kind: str) -> None:
    with child(kind, "x", tmp_path / "out", stderr=subprocess.DEVNULL) as process:
        assert hear(process) == "staged"
        assert len(entries(tmp_path)) == 1
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()  # else the context would wait for it, whatever went wrong
    assert process.returncode == -signal.SIGINT
    assert entries(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["_lock", "identity", "_place", "remove_stale"])
def test_ctrl_c_within_any_step_leaves_nothing(
    tmp_path: Path, kind: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal is heard when the system call that it met returns: the name is there, and not yet ours."""
    step = getattr(output, where)

    def interrupted(*arguments: object) -> None:
        step(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(output, where, interrupted)
    with pytest.raises(KeyboardInterrupt), stage(kind, tmp_path / "out") as staged:
        fill(staged)
    assert entries(tmp_path) == (["out"] if where == "_place" else [])


@pytest.mark.parametrize("stage", [staged_file, staged_directory])
def test_a_context_left_without_its_end_is_removed_at_exit(
    tmp_path: Path, stage: Callable[[Path], AbstractContextManager[object]]
) -> None:
    """As after a signal between the end of ``__enter__`` and the block; only its own process removes it."""
    context = stage(tmp_path / "out")
    context.__enter__()
    assert len(os.listdir(tmp_path)) == 1
    child = os.fork()
    if not child:
        output.remove_unfinished()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 1
    output.remove_unfinished()
    assert os.listdir(tmp_path) == []
    output.remove_unfinished()


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_racing_processes_one_wins(tmp_path: Path, kind: str) -> None:
    outs = [tmp_path / f"out{i}" for i in range(25)]
    with child(kind, "a", *outs) as a, child(kind, "b", *outs) as b:
        for out in outs:
            assert [hear(a), hear(b)] == ["staged", "staged"]
            tell(a)
            tell(b)
            words = {"a": hear(a), "b": hear(b)}
            assert sorted(words.values()) == ["lost", "won"]
            winner = next(who for who, word in words.items() if word == "won").encode()
            assert tree(out) == (winner if kind == "file" else {"who": winner})
            assert [n for n in entries(tmp_path) if n.startswith(f".{out.name}.neft-")] == []
    assert entries(tmp_path) == sorted(out.name for out in outs)
    assert a.returncode == b.returncode == 0


def test_two_stagings_in_one_process_do_not_meet(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_file(out, force=True) as first:
        first.write_at(b"first", 0)
        with staged_file(out, force=True) as second:
            second.write_at(b"2nd", 0)
            assert first.path != second.path
        assert out.read_bytes() == b"2nd"
    assert out.read_bytes() == b"first"


@pytest.mark.parametrize("placed", [False, True])
def test_what_was_set_aside_by_a_killed_process_is_put_back_or_removed(tmp_path: Path, placed: bool) -> None:
    """Between the two renames of a system without exchange the old output exists under another name only."""
    out = tmp_path / "out"
    put("full directory", tmp_path / ".out.neft-old-0123456789abcdef")
    if placed:
        out.write_bytes(b"new")
    with pytest.raises(ValueError), staged_directory(out):
        raise ValueError
    assert entries(tmp_path) == ["out"]
    assert tree(out) == (b"new" if placed else {"deep/deeper/old": b"old"})


def test_names_that_only_look_like_ours_are_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"x")
    keep = [
        ".out.neft-journal",
        ".out.neft-0123",
        ".out.neft-0123456789abcdef0",
        ".other.neft-0123456789abcdef",
    ]
    for name in keep:
        (tmp_path / name).write_bytes(b"")
    link = ".out.neft-0000000000000000"
    (tmp_path / link).symlink_to(target)
    pipe = ".out.neft-1111111111111111"
    os.mkfifo(tmp_path / pipe)
    with staged_file(tmp_path / "out"):
        pass
    assert entries(tmp_path) == sorted([*keep, link, pipe, "out", "precious"])
    assert target.read_bytes() == b"x"


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_planted_at_the_staging_name_is_not_followed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    tokens = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(secrets, "token_hex", lambda nbytes: next(tokens))
    (tmp_path / f".out.neft-{'0' * 16}").symlink_to(victim)
    with stage(kind, tmp_path / "out") as staged:
        fill(staged)
    assert not victim.exists()
    assert tree(tmp_path / "out") == expected(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", ["locked", "removed"])
def test_a_staging_name_taken_for_stale_before_its_lock_is_chosen_again(
    tmp_path: Path, kind: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may clean up between the creation of the name and its lock."""
    lock, calls = output._lock, 0

    def late(fd: int) -> bool | None:
        nonlocal calls
        calls += 1
        if calls > 1:
            return lock(fd)
        if moment == "locked":
            return False
        (name,) = entries(tmp_path)
        output._remove(tmp_path / name)
        return lock(fd)

    monkeypatch.setattr(output, "_lock", late)
    with stage(kind, tmp_path / "out") as staged:
        fill(staged)
        assert calls == 2
        assert len(entries(tmp_path)) == 1
    assert tree(tmp_path / "out") == expected(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_without_locks_nothing_counts_as_stale(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    left = ".out.neft-0123456789abcdef"
    (tmp_path / left).write_bytes(b"")
    with stage(kind, tmp_path / "out") as staged:
        fill(staged)
    assert entries(tmp_path) == [left, "out"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may have more than 1,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_errors_of_the_kernel_name_the_output_and_not_its_staging_name(tmp_path: Path) -> None:
    """The kernel knows a descriptor; the user knows OUT."""
    out = tmp_path / "out"

    def failing(staging: AbstractContextManager[Any], write: Callable[[Any], object]) -> str:
        with pytest.raises(OSError, match="too large") as caught, staging as staged:
            write(staged)
        assert os.listdir(tmp_path) == []
        return str(caught.value.filename)

    assert failing(staged_file(out), lambda staged: staged.write_at(bytes(2000), 0)) == str(out)
    assert failing(staged_file(out), lambda staged: os.ftruncate(staged.fd, 2000)) == str(out)
    assert failing(staged_directory(out), lambda folder: (folder / "a").write_bytes(bytes(2000))) == str(out)
    path = "no such file"
    with pytest.raises(FileNotFoundError) as caught, staged_file(out):
        Path(path).read_bytes()
    assert caught.value.filename == path  # an input keeps its own name


def test_a_file_of_an_output_folder_is_named_by_its_place_in_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, staged_directory(tmp_path / "out") as folder:
        (folder / "sub" / "file").read_bytes()
    assert caught.value.filename == str(tmp_path / "out" / "sub" / "file")
