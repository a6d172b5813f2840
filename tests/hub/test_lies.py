"""A server that lies in names, lengths, hashes and speed: nothing is written outside the cache."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hub_support import patch_of

NAME = "neuron_patch.safetensors"
PULL = ("pull", "me/patch", "-o", "q.safetensors")
HEAD, GET = "HEAD /me/patch/resolve", "GET /_storage/me/patch/"


@pytest.fixture
def published(hub, patch_file, tmp_path):
    hub.make("me/patch", {NAME: patch_file.read_bytes()})
    hub.variables["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"
    return hub


def files_of(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def only_in_the_cache(left, tmp_path):
    assert all(path.is_relative_to(tmp_path / "home" / "hub") for path in left), left
    assert not [path for path in left if path.suffix == ".incomplete" or "evil" in path.name]
    assert not Path("/tmp/evil").exists()


NAMES = ["../../../../evil", '"../../../../evil"', 'W/"../evil"', "/tmp/evil", "..", ".", "a/b", "x" * 300]
HEADERS = ("X-Linked-Etag", "X-Repo-Commit")
LIES = {
    # what the server says wrong: the calls, the lie, the exit code and words of the message
    **{f"{key} {name[:20]}": (HEAD, {"headers": {key: name}}, 4, key) for key in HEADERS for name in NAMES},
    "an endless body": (GET, {"endless": 4000}, 4, "sends a body of more than"),
    "a body that HEAD announced shorter": (HEAD, {"headers": {"X-Linked-Size": "10"}}, 4, "more than 10 B"),
    "a body that HEAD announced longer": (HEAD, {"headers": {"X-Linked-Size": "9999999"}}, 5, "should be of"),
    "a compressed body": (GET, {"headers": {"Content-Encoding": "gzip"}}, 5, "compressed"),
    "a byte now and then": (GET, {"drip": 0.05}, 5, "too slowly"),
    "another hash": (HEAD, {"headers": {"X-Linked-Etag": "f" * 64}}, 4, "not the one that the Hub announced"),
    "no commit": (HEAD, {"headers": {"X-Repo-Commit": None}}, 5, "not a Hub's"),
    "no ETag": (HEAD, {"headers": {"X-Linked-Etag": None, "ETag": None}}, 5, "not a Hub's"),
}  # fmt: skip


def test_a_pull_writes_nothing_that_was_not_announced(published, several, tmp_path):
    before, commands = files_of(tmp_path), []
    data = (tmp_path / "p.safetensors").read_bytes()
    for number, (match, lie, _, _) in enumerate(LIES.values()):
        published.make(f"me/patch{number}", {NAME: data})
        published.fault(match.replace("me/patch", f"me/patch{number}"), times=99, **lie)
        commands.append(("pull", f"me/patch{number}", "-o", "q.safetensors"))
    for (what, (_, _, code, said)), result in zip(LIES.items(), several(commands), strict=True):
        assert result.code == code, (what, result)
        assert said in result.err, (what, result)
        assert 1 <= len(result.err.strip().splitlines()) <= 2, (what, result)
    only_in_the_cache(files_of(tmp_path) - before, tmp_path)
    assert published.state["sent"]["too much"] < 50 << 20


def test_another_patch_than_was_announced_is_refused(published, several, tmp_path):
    """It is a whole patch, and all of its own hashes match."""
    patch_of(tmp_path / "other.safetensors", {"w": 3}).close()
    other = (tmp_path / "other.safetensors").read_bytes()
    published.make("me/other", {NAME: other})
    published.fault(GET, times=2, other=hashlib.sha256(other).hexdigest())
    published.fault(HEAD, times=3, headers={"X-Linked-Size": str(len(other))})
    lied, again = several([PULL, PULL])
    assert (lied.code, again.code) == (4, 0), (lied, again)
    assert "not the one that the Hub announced" in lied.err
    assert (tmp_path / "q.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes()


INFO = "GET /api/models/org/model/revision"
ANSWERS = {
    "a commit with ..": (INFO, {"fields": {"sha": "../../../../evil"}}, 4, "is a path"),
    "an absolute commit": (INFO, {"fields": {"sha": "/tmp/evil"}}, 4, "is a path"),
    "the commit .": (INFO, {"fields": {"sha": "."}}, 2, "nothing at this address"),
    "endless": (INFO, {"endless": 4000}, 4, "more than 67.1 MB"),
    "a byte now and then": (INFO, {"drip": 0.05}, 5, "too slowly"),
    "another page": (INFO, {"body": "<html>log in to the hotel</html>"}, 5, "not a Hub's"),
    "no commit": (INFO, {"fields": {"sha": None}}, 5, "not a Hub's"),
    "a list": (INFO, {"body": "[1, 2]"}, 5, "not a Hub's"),
    "files outside": ("GET /api/models/org/model/tree", {"body": '[{"type": "file", "path": "../../../evil", '
                      '"oid": "1f", "size": 3}]'}, 3, "huggingface_hub cannot do this"),
}  # fmt: skip


def test_answers_of_the_api_that_lie(published, several, tmp_path, pair):
    base, _ = pair
    before, commands = files_of(tmp_path), []
    for number, (match, lie, _, _) in enumerate(ANSWERS.values()):
        published.make(f"org/model{number}", {file.name: file.read_bytes() for file in base.iterdir()})
        published.fault(match.replace("org/model", f"org/model{number}"), times=99, **lie)
        commands.append(("diff", "base", f"org/model{number}"))
    for (what, (_, _, code, said)), result in zip(ANSWERS.items(), several(commands), strict=True):
        assert result.code == code, (what, result)
        assert said in result.err, (what, result)
        assert 1 <= len(result.err.strip().splitlines()) <= 2, (what, result)
    only_in_the_cache(files_of(tmp_path) - before, tmp_path)
