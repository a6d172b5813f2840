"""The state of a repository before a push, as huggingface_hub reports it."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest
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
