"""Checkpoints behind URLs: every reading verb gives what it gives on the files, and fetches what it needs."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from range_server import RangeServer, range_server
from support import process, write_file, write_folder

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.provenance import fingerprint
from neftsurgery.errors import CorruptFileError, MachineError, UsageError
from neftsurgery.neurons.layout import Layout
from neftsurgery.scoring.engine import stream
from neftsurgery.scoring.partial_sums import CutSizes, Job
from neftsurgery.sources.remote import FETCHED, RemoteFolder, remote_file
from neftsurgery.storage.threads import Limits

ROWS, WIDTH = 1024, 1024
CONFIG = {"model_type": "llama"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RangeServer]:
    """Base and tuned, 25 MB each, of several shards; and patches of 3% of the rows, one of them lossless."""
    folder = tmp_path_factory.mktemp("served")
    rng = np.random.default_rng(0)
    names = [f"model.layers.{n}.mlp.{kind}_proj.weight" for n in range(2) for kind in ("up", "gate", "down")]
    base = {name: rng.standard_normal((ROWS, WIDTH)).astype(np.float32) for name in names}
    tuned = {name: array + rng.random((ROWS, 1), np.float32) ** 8 for name, array in base.items()}
    write_folder(folder / "base", base, shards=1, config=CONFIG)
    write_folder(folder / "tuned", tuned, shards=3, config=CONFIG)
    for name in ("tokenizer.json", "notes.txt"):
        (folder / "tuned" / name).write_text('{"kept": true}')
    scores = ns.diff(folder / "base", folder / "tuned")
    scores.save(folder / "scores.safetensors")
    selection = scores.select(neurons="3%")
    selection.save(folder / "selection.safetensors")
    ns.extract(folder / "base", folder / "tuned", selection, out=folder / "patch.safetensors")
    with range_server(folder) as state:
        yield state


def test_diff(server: RangeServer, tmp_path: Path) -> None:
    server.start_count()
    ns.diff(f"{server.url}/base", f"{server.url}/tuned").save(tmp_path / "scores")
    assert (tmp_path / "scores").read_bytes() == (server.folder / "scores.safetensors").read_bytes()
    weights = 2 * 6 * ROWS * WIDTH * 4
    assert weights <= server.sent < 1.05 * weights  # each byte once; headers, and edges for fingerprints


def test_extract_fetches_the_selected_rows(server: RangeServer, tmp_path: Path) -> None:
    selection = ns.Selection.load(server.folder / "selection.safetensors")
    server.start_count()
    ns.extract(f"{server.url}/base", f"{server.url}/tuned", selection, out=tmp_path / "patch")
    assert (tmp_path / "patch").read_bytes() == (server.folder / "patch.safetensors").read_bytes()
    assert server.sent < 0.06 * 2 * 6 * ROWS * WIDTH * 4


@pytest.mark.parametrize(("side", "state"), [("base", "base"), ("tuned", "patched")])
def test_verify_fetches_under_4_percent(server: RangeServer, side: str, state: str) -> None:
    server.start_count()
    found = ns.verify(f"{server.url}/{side}", server.folder / "patch.safetensors")
    here = ns.verify(server.folder / side, server.folder / "patch.safetensors")
    assert found == replace(here, timing=found.timing)
    assert found.state == state
    if side == "base":
        assert server.sent < 0.04 * 6 * ROWS * WIDTH * 4
        assert FETCHED[-1].nbytes == server.sent


def test_revert_takes_the_rows_of_a_base_behind_a_url(server: RangeServer, tmp_path: Path) -> None:
    patch = server.folder / "patch.safetensors"
    ns.apply(server.folder / "base", patch, out=tmp_path / "patched")
    server.start_count()
    ns.revert(tmp_path / "patched", patch, out=tmp_path / "back", base=f"{server.url}/base")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (server.folder / "base" / name).read_bytes()
    assert server.sent < 0.06 * 6 * ROWS * WIDTH * 4


def test_inspect_fetches_headers(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 14, 1 << 15], "data_offsets": [0, 1 << 31]}})
    place = tmp_path / "large" / "model.safetensors"
    place.parent.mkdir()
    place.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    os.truncate(place, 8 + len(header) + (1 << 31))
    with range_server(tmp_path) as state:
        found = process("inspect", f"{state.url}/large", "--json", cwd=tmp_path)
        assert state.sent < (1 << 31) / 1000
    here = ns.inspect(place.parent)
    fetched = {"url": f"{state.url}/large", "bytes": state.sent, "of": place.stat().st_size}
    told = {"name": f"{state.url}/large", "fetched": [fetched], "warnings": found.json["warnings"]}
    assert found.json == {**here, **told}
    assert f"fetched {state.sent / 1000:.1f} kB of 2.1 GB from {state.url}/large" in found.err


def test_one_file_and_an_index_are_named_by_themselves(server: RangeServer) -> None:
    file = ns.inspect(f"{server.url}/base/model.safetensors?signature=secret")
    assert file["model_type"] == "llama"
    assert file["name"] == f"{server.url}/base/model.safetensors"
    index = ns.inspect(f"{server.url}/tuned/model.safetensors.index.json")
    assert index["files"] == ns.inspect(server.folder / "tuned")["files"]


def test_lossless_patch_carries_side_files_that_a_server_does_not_list(
    server: RangeServer, tmp_path: Path
) -> None:
    for number, folder in enumerate((server.url, str(server.folder))):
        sides = (f"{folder}/base", f"{folder}/tuned")
        ns.extract(*sides, lossless=True, out=tmp_path / f"{number}")
    facts = [ns.inspect(tmp_path / f"{number}") for number in (0, 1)]
    carried = [[one["name"] for one in fact["side_files"]] for fact in facts]
    assert carried[0] == carried[1] == ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    state = ns.verify(f"{server.url}/tuned", tmp_path / "0").state
    assert state == "patched"


def test_refused_folder(server: RangeServer) -> None:
    server.fault = "403", 0, 20
    try:
        with pytest.raises(MachineError, match=r"refuses to send it \(HTTP 403\)"):
            ns.inspect(f"{server.url}/base")
    finally:
        server.fault = "", 0, 0


def test_a_file_that_gets_the_inode_of_a_stand_in_is_itself(server: RangeServer) -> None:
    folder = RemoteFolder(f"{server.url}/base")
    kept = dict(folder.files)  # as the traceback of an error keeps them
    with ExitStack() as stack:
        opened = [stack.enter_context(file.path.open("rb")) for file in kept.values()]  # the inodes stay
        assert any(remote_file(file.fileno()) for file in opened)
        del folder
        assert not any(file.path.exists() for file in kept.values())
        assert not any(remote_file(file.fileno()) for file in opened)


@pytest.mark.parametrize("out", ["s3://bucket/patch", "https://user:word@host/patch?signature=secret"])
def test_output_is_not_a_url(server: RangeServer, out: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an output is a local path") as raised:
        ns.diff(server.folder / "base", server.folder / "tuned").save(out)
    assert "secret" not in str(raised.value)
    assert "word" not in str(raised.value)


def test_what_cannot_be_done_behind_a_url(server: RangeServer, tmp_path: Path) -> None:
    patch = server.folder / "patch.safetensors"
    with pytest.raises(UsageError, match="cannot be changed in place"):
        ns.apply(f"{server.url}/base", patch, in_place=True)
    with pytest.raises(UsageError, match="needs the whole file, which is behind a URL\nfetch it"):
        ns.apply(f"{server.url}/base", patch, out=tmp_path / "patched")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="only checkpoints are read behind URLs"):
        ns.verify(server.folder / "base", f"{server.url}/patch.safetensors")
    with pytest.raises(UsageError, match="no checkpoint at this address"):
        ns.inspect(f"{server.url}/nothing")


def test_index_that_names_a_shard_that_is_not_there(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", {"a": np.ones((4, 4)), "b": np.ones((4, 4))}, shards=2)
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    with range_server(tmp_path) as state, pytest.raises(UsageError, match="no file at this address"):
        Checkpoint.open(f"{state.url}/m")


@pytest.mark.parametrize("shard", ["../../outside.safetensors", "/etc/outside", "a\0b"])
def test_hostile_index_points_outside(tmp_path: Path, shard: str) -> None:
    write_file(tmp_path / "outside.safetensors", {"a": np.ones((4, 4))})
    place = tmp_path / "m" / "model.safetensors.index.json"
    place.parent.mkdir()
    place.write_text(json.dumps({"weight_map": {"a": shard}}))
    with range_server(tmp_path) as state, pytest.raises(CorruptFileError, match="points outside"):
        Checkpoint.open(f"{state.url}/m")


def test_neighbouring_rows_are_one_request(server: RangeServer) -> None:
    checkpoint = Checkpoint.open(f"{server.url}/base")
    name = next(iter(checkpoint.tensors))
    rows = np.array([*range(100, 200), 202, 900])
    out, expected = np.empty((len(rows), WIDTH * 4), np.uint8), np.empty((len(rows), WIDTH * 4), np.uint8)
    server.start_count()
    checkpoint.read_rows(name, rows, out)
    assert sorted(size(asked) for _, asked, _ in server.requests) == [4 * WIDTH, 4 * WIDTH, 400 * WIDTH]
    Checkpoint.open(server.folder / "base").read_rows(name, rows, expected)
    assert np.array_equal(out, expected)


def test_ends_of_neighbouring_tensors_are_one_request(server: RangeServer) -> None:
    checkpoint = Checkpoint.open(f"{server.url}/tuned")
    server.start_count()
    assert fingerprint(checkpoint) == fingerprint(Checkpoint.open(server.folder / "tuned"))
    # Of three shards of two tensors each: the first's start, the last's end, and what is between them.
    assert sorted(size(asked) for _, asked, _ in server.requests) == [4096] * 6 + [8192] * 3


@pytest.mark.parametrize("mapped", [True, False])
def test_a_task_is_fetched_at_once(server: RangeServer, mapped: bool) -> None:
    """Not piece by piece; in a library too, which maps no files."""
    sides = [Checkpoint.open(f"{server.url}/{side}") for side in ("base", "tuned")]
    jobs = [Job(info, Layout.of(info.shape, (0,))) for info in sides[0].tensors.values()]
    server.start_count()
    list(stream(*sides, jobs, limits=Limits.of(1, mapped=mapped), sizes=CutSizes(piece=1 << 20)))
    assert max(size(asked) for _, asked, _ in server.requests) == 3 << 20


def size(asked: str) -> int:
    first, last = map(int, asked.removeprefix("bytes=").split("-"))
    return last - first + 1


def test_commands_tell_no_credentials(server: RangeServer, tmp_path: Path) -> None:
    url = server.url.replace("//", "//user:pass-word@") + "/base"
    query = "?X-Signature=a-secret"
    patch = server.folder / "patch.safetensors"
    wrong = process("verify", url + query, patch, "--expect", "patched", "--json", cwd=tmp_path)
    absent = process("inspect", f"{url}/nothing{query}", "-v", cwd=tmp_path)
    assert [wrong.code, absent.code] == [3, 2], (wrong, absent)
    for one in (wrong, absent):
        assert "pass-word" not in one.out + one.err
        assert "a-secret" not in one.out + one.err
    assert all(query in path for path, _, login in server.requests[-10:])
    assert all(login for *_, login in server.requests[-10:])
