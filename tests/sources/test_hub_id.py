"""Hub ids: their parts, and which of them are well-formed."""

from __future__ import annotations

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
    assert HubId.split(text) == HubId(repo, revision)
    assert str(HubId(repo, revision)) == text


def test_only_the_first_sign_splits() -> None:
    assert HubId.split("o/n@a@b") == HubId("o/n", "a@b")
    assert HubId.split("o/n@") == HubId("o/n")


@pytest.mark.parametrize("text", ["org/name", "a/b", "Org-1/na.me_2"])
def test_repositories(text: str) -> None:
    assert is_repo(text)


@pytest.mark.parametrize(
    "text", ["", "name", "a/b/c", "org/", "/name", ".org/x", "org/-x", "ö/x", "o/nä", "o/n@v1", "o/n\n", 3]
)
def test_what_is_not_a_repository(text: object) -> None:
    assert not is_repo(text)


@pytest.mark.parametrize("text", ["main", "v1.0", "refs/pr/3", "1f" * 20])
def test_revisions(text: str) -> None:
    assert is_revision(text)


@pytest.mark.parametrize("text", ["", "-x", "a b", "../x", "a..b", "x" * 201, "ä", None])
def test_what_is_not_a_revision(text: object) -> None:
    assert not is_revision(text)
