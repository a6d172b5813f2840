"""The state of a repository before a push, and one commit: competing ones, kills and lost connections."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub_support import SECRETS
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from neftsurgery.errors import MachineError, MismatchError
from neftsurgery.hub.repository import Repository, read_repository

HEAD = "1f" * 20


@pytest.fixture
def model_info(monkeypatch):
    """Answers that the client gives to the next calls, one each; errors are raised."""
    answers = []

    def answer(self, repo, revision=None):
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_writerwriterwriter")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    return answers


def info(*names, private=False):
    return SimpleNamespace(
        sha=HEAD, private=private, siblings=[SimpleNamespace(rfilename=name) for name in names]
    )


def failure(kind, status):
    return kind("no", response=SimpleNamespace(status_code=status, headers={}, request=None))


def test_what_exists(model_info):
    model_info += [info("README.md", private=True)]
    found = read_repository("me/x", "v2")
    assert found == Repository("me/x", "v2", has_branch=True, head=HEAD, private=True, files=["README.md"])
    assert found.exists
    assert str(found.hub_id) == "me/x@v2"


def test_a_branch_that_does_not_exist_starts_at_main(model_info):
    model_info += [failure(RevisionNotFoundError, 404), info("a")]
    found = read_repository("me/x", "v2")
    assert (found.exists, found.has_branch, found.head, found.files) == (True, False, HEAD, ["a"])


def test_a_repository_that_does_not_exist(model_info):
    model_info += [failure(RepositoryNotFoundError, 404)]
    found = read_repository("me/x", "main")
    assert found == Repository("me/x", "main")
    assert not found.exists
    assert found.card() is None


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [(RepositoryNotFoundError, 401, "does not exist, or it is private"), (GatedRepoError, 403, "gated")],
)
def test_a_refusal_is_not_a_repository_that_does_not_exist(model_info, kind, status, said):
    model_info += [failure(kind, status)]
    with pytest.raises(MachineError, match=said):
        read_repository("me/x", "main")


def test_without_a_token_the_hub_is_not_asked(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(MachineError, match="not logged in to the Hub"):
        read_repository("me/x", "main")


def test_its_card(monkeypatch, tmp_path):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **options: str(readme))
    there = Repository("me/x", "main", has_branch=True, head=HEAD, files=["README.md"])
    readme.write_bytes(b"\xef\xbb\xbfMine.")
    assert there.card() == "Mine."
    readme.write_bytes(b"caf\xe9")
    with pytest.raises(MismatchError, match="the README on the Hub is not UTF-8"):
        there.card()


NAME = "neuron_patch.safetensors"


def test_a_competing_commit_is_kept_and_the_push_refused(furnished, on_hub, patch_file):
    """The repository gets a commit while the patch is sent: the Hub refuses ours."""
    furnished.fault("PUT /_storage/", hold=True)
    found = []
    push = threading.Thread(target=lambda: found.append(on_hub("push", "p.safetensors", "me/there")))
    push.start()
    wait_for(furnished, "PUT /_storage/me/there")
    theirs = furnished.make("me/there", {"notes.txt": b"theirs"})
    furnished.ask("release")
    push.join(60)
    assert found[0].code == 3, found
    assert "newer commit" in found[0].err
    assert furnished.repos["me/there"]["refs"]["main"] == theirs
    assert furnished.read("me/there", "notes.txt") == b"theirs"
    again = on_hub("push", "p.safetensors", "me/there", "--parent", theirs, "--json")
    assert (again.code, again.json["parent"]) == (0, theirs)


def wait_for(hub, call):
    deadline = time.monotonic() + 60
    while not any(one.startswith(call) for one in hub.state["calls"]):
        assert time.monotonic() < deadline, hub.state["calls"]
        time.sleep(0.05)


KILLED = [
    (signal.SIGKILL, "POST /api/validate-yaml"),
    (signal.SIGKILL, "PUT /_storage/me/there"),
    (signal.SIGKILL, "POST /me/there.git/info/lfs/verify"),
    (signal.SIGTERM, "PUT /_storage/me/there"),
    (signal.SIGINT, "PUT /_storage/me/there"),
]


@pytest.mark.parametrize(("number", "where"), KILLED, ids=str)
def test_a_push_killed_halfway_leaves_the_remote_as_it_was(furnished, patch_file, tmp_path, number, where):
    before = furnished.repos
    furnished.fault(where, hold=True)
    child = subprocess.Popen(
        [sys.executable, "-m", "neftsurgery", "push", "p.safetensors", "me/there"],
        cwd=tmp_path,
        env=furnished.environment(tmp_path / "home"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(furnished, where)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert not any(secret in out + err for secret in SECRETS)
    furnished.ask("release")  # the Hub continues with the call that it held
    time.sleep(0.3)
    assert furnished.repos == before


@pytest.mark.slow
def test_an_upload_that_fails_every_time(furnished, several, patch_file):
    before = furnished.repos
    furnished.fault("PUT /_storage/", cut_upload=True, times=99)
    (result,) = several([("push", "p.safetensors", "me/there", "-q")])
    assert result.code == 5, result
    assert "run the command again" in result.err
    assert furnished.repos == before


def test_an_upload_that_fails_once(hub, several, patch_file):
    """With -v huggingface_hub logs the signed address: it must not be shown."""
    hub.fault("PUT /_storage/", cut_upload=True, times=1)
    (result,) = several([("push", "p.safetensors", "me/patch", "-v")])
    assert result.code == 0, result
    assert hub.read("me/patch", NAME) == patch_file.read_bytes()


def test_an_error_names_a_repository_that_was_created_and_left_empty(hub, several, patch_file):
    hub.fault("POST /api/models/me/patch/commit", status=403)
    (result,) = several([("push", "p.safetensors", "me/patch")])
    assert result.code == 5, result
    assert "this push created the repository" in result.err
    (result,) = several([("push", "p.safetensors", "me/patch")])
    assert result.code == 0, result
