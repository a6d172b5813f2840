"""Hub ids: their parts, and which of them are well-formed."""

from __future__ import annotations

import subprocess

import pytest

from neftsurgery.sources.hub_id import HubId, is_repo, is_revision


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@v1", "org/name", "v1"),
        ("o/n@refs/pr/3", "o/n", "refs/pr/3"),
    ],
)
def test_a_hub_id_is_split_and_put_together_again(text: str, repo: str, revision: str | None) -> None:
    assert HubId.parse(text) == HubId(repo, revision)
    assert str(HubId(repo, revision)) == text


@pytest.mark.parametrize(
    "text", ["o/n@a@b", "o/n@", "@v1", "o/n@../x", "o/n@a b", "name", "o/n/x", "", "o/n\n"]
)
def test_what_is_not_a_hub_id(text: str) -> None:
    assert HubId.parse(text) is None


@pytest.mark.parametrize("text", ["org/name", "a/b", "Org-1/na.me_2"])
def test_repositories(text: str) -> None:
    assert is_repo(text)


@pytest.mark.parametrize(
    "text", ["", "name", "a/b/c", "org/", "/name", ".org/x", "org/-x", "ö/x", "o/nä", "o/n@v1", "o/n\n", 3]
)
def test_what_is_not_a_repository(text: object) -> None:
    assert not is_repo(text)


@pytest.mark.parametrize("text", ["main", "v1.0", "refs/pr/3", "1f" * 20, "a.b/c-d_e", "x.locked", "lock"])
def test_revisions(text: str) -> None:
    assert is_revision(text)
    assert allowed_by_git(text)


@pytest.mark.parametrize("text", ["x" * 201, "ä", "a+b", "@", None])
def test_what_is_not_a_revision_here(text: object) -> None:
    assert not is_revision(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "-x", "a b", "../x", "a..b", "a/../b", "/a", "a/", "a//b", ".a", "a/.b", "a.", "a/b.", "a.lock",
        "a.lock/b", "a~1", "a^", "a:b", "a?", "a*", "a[b", "a\\b", "a@{0}", "a\n", "a\x7f",
    ],
)  # fmt: skip
def test_what_git_refuses_is_not_a_revision(text: str) -> None:
    assert not allowed_by_git(text)
    assert not is_revision(text)


def allowed_by_git(name: str) -> bool:
    command = ["git", "check-ref-format", "--branch", name]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
