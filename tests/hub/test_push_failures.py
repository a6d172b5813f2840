"""What a push says where the Hub refuses, where it changed something before that, and where the Hub lies."""

from __future__ import annotations

import pytest
from hub_support import READER, WRITER

NAME = "neuron_patch.safetensors"


def test_a_branch_that_a_push_creates_is_told_even_if_it_needs_no_commit(hub, several, patch_file):
    """Its start is main's head, which may have the same files."""
    results = several(
        [
            ("push", "p.safetensors", "me/patch"),
            ("push", "p.safetensors", "me/patch", "--revision", "v9", "--dry-run"),
            ("push", "p.safetensors", "me/patch", "--revision", "v9"),
            ("push", "p.safetensors", "me/patch", "--revision", "v9"),
            ("push", "p.safetensors", "me/patch", "--revision", "v8", "--json"),
        ]
    )
    assert [result.code for result in results] == [0] * 5, results
    assert "created me/patch" in results[0].out
    assert "me/patch (v9, a new branch)" in results[1].err
    made = results[2].out.splitlines()
    assert made[0] == "created branch v9"
    assert made[1] == "no commit was needed: me/patch has this patch and this card already"
    assert results[3].out.startswith("nothing to push: me/patch has this patch and this card already")
    assert (results[4].json["created_branch"], results[4].json["changed"]) == (True, False)
    refs = hub.repos["me/patch"]["refs"]
    assert refs["v9"] == refs["v8"] == refs["main"]


BRANCHES = [
    "",
    " ",
    "a b",
    "a..b",
    "../x",
    "/x",
    "x/",
    "a//b",
    ".x",
    "a/.b",
    "x.lock",
    "x.",
    "-x",
    "HEAD",
    "a~1",
    "é",
]


def test_names_that_git_refuses_are_not_sent(hub, several, patch_file):
    hub.make("me/there", {"notes.txt": b"mine"})
    before, calls = hub.repos, len(hub.state["calls"])
    results = several([("push", "p.safetensors", "me/there", f"--revision={name}") for name in BRANCHES])
    for name, result in zip(BRANCHES, results, strict=True):
        assert result.code == 2, (name, result)
        assert "--revision is not the name of a branch" in result.err, (name, result)
    assert hub.repos == before
    assert len(hub.state["calls"]) == calls


COMMIT = "POST /api/models/{}/commit"


@pytest.mark.parametrize("status", [412, 403])
def test_what_a_refused_push_has_created_is_told(hub, several, patch_file, status):
    hub.make("me/there", {"notes.txt": b"mine"})
    for name in ("me/there", "me/new", "me/both"):
        hub.fault(COMMIT.format(name), status=status)
    branch, new, both, old = several(
        [
            ("push", "p.safetensors", "me/there", "--revision", "v2"),
            ("push", "p.safetensors", "me/new"),
            ("push", "p.safetensors", "me/both", "--revision", "v2"),
            ("push", "p.safetensors", "me/nothing", "--parent", "1f" * 20),
        ]
    )
    code = 3 if status == 412 else 5
    assert (branch.code, new.code, both.code, old.code) == (code, code, code, 3)
    assert "this push created the branch v2\n" in branch.err
    assert "this push created the repository\n" in new.err
    assert "this push created the repository and the branch v2\n" in both.err
    for result in (branch, new, both):
        assert "nothing was changed" not in result.err
        assert "empty" not in result.err
        assert f"HTTP {status}" in result.err
    assert set(hub.repos["me/there"]["refs"]) == {"main", "v2"}


def test_somebody_elses_commit_in_a_repository_that_this_push_created(hub, on_hub, several, patch_file):
    """It is not empty then."""
    hub.fault(COMMIT.format("me/new"), status=412)
    (result,) = several([("push", "p.safetensors", "me/new")])
    theirs = hub.make("me/new", {"notes.txt": b"theirs"})
    assert result.code == 3
    assert "newer commit" in result.err
    assert "empty" not in result.err
    assert hub.repos["me/new"]["refs"]["main"] == theirs


def test_a_repository_that_is_there_and_not_shown(hub, several, patch_file):
    """The API says 404 to those who may not see it, and 409 to those who would create it."""
    for name in ("me/hidden", "me/other"):
        hub.make(name, {"notes.txt": b"theirs"})
        hub.fault(f"GET /api/models/{name}", status=404, code="RepoNotFound", times=9)
    hub.fault("POST /api/repos/create", status=409, code="RepoExists", times=1)
    for result in several([("push", "p.safetensors", name) for name in ("me/hidden", "me/other")]):
        assert result.code == 2, result
        assert "exists already (HTTP 409), and the Hub does not show it to you" in result.err
        assert "run the command again" not in result.err


def test_advice_fits_who_asks(hub, several, patch_file):
    hub.make("me/there", {"notes.txt": b"mine"})
    push = ("push", "p.safetensors", "me/there")
    (forbidden,) = several([push], token=READER)
    assert forbidden.code == 5
    assert "you are logged in, but not allowed to do this" in forbidden.err
    assert "log in with" not in forbidden.err
    assert "terms" not in forbidden.err
    hub.fault("GET /api/models/me/there", status=404, times=9)
    hub.fault("HEAD /me/there", status=404, times=9)
    for result in several(
        [push, ("pull", "me/there", "-o", "q.safetensors"), ("apply", "base", "me/there", "-o", "x")]
    ):
        assert result.code == 2, result
        assert "the Hub has nothing at this address (HTTP 404)" in result.err
        assert "log in" not in result.err


def test_a_commit_that_the_client_does_not_take_is_told_as_that(hub, several, patch_file):
    """Other Hubs name commits by 64 digits; as a parent, huggingface_hub takes 40 at most."""
    hub.make("me/there", {"notes.txt": b"mine"})
    hub.fault("GET /api/models/me/there/revision", fields={"sha": "2e" * 32}, times=9)
    before = hub.repos
    (result,) = several([("push", "p.safetensors", "me/there")])
    assert result.code == 3, result
    assert "huggingface_hub cannot do this here: `parent_commit` is not a valid commit OID" in result.err
    assert "network" not in result.err
    assert hub.repos == before


@pytest.mark.parametrize("name", ["\x1b[2J", "../../x", None, 3])
def test_a_commit_that_cannot_be_one_is_refused(hub, several, patch_file, name):
    hub.make("me/there", {"notes.txt": b"mine"})
    hub.make("me/then", {"notes.txt": b"mine"})
    before = hub.repos
    hub.fault("GET /api/models/me/there/revision", fields={"sha": name}, times=9)
    (result,) = several([("push", "p.safetensors", "me/there")])
    assert result.code == 4, result
    assert f"the Hub names a commit that cannot be one (found {name!r})" in result.err
    assert hub.repos == before
    hub.fault(COMMIT.format("me/then"), fields={"commitOid": name})
    (result,) = several([("push", "p.safetensors", "me/then")])
    assert result.code in (4, 5), result
    assert "\x1b" not in result.out + result.err


def test_an_unchanged_commit_is_no_proof(hub, several, patch_file):
    hub.make("me/empty", {"notes.txt": b"mine"})
    hub.make("me/older", {NAME: b"an older patch"})
    for name in ("me/empty", "me/older"):
        hub.fault(COMMIT.format(name), no_commit=True)
    empty, older = several([("push", "p.safetensors", "me/empty"), ("push", "p.safetensors", "me/older")])
    assert (empty.code, older.code) == (5, 5), (empty, older)
    for result in (empty, older):
        assert f"the Hub made no commit, but its {NAME} is not the one that was sent" in result.err
        assert "nothing to push" not in result.out
    again, once_more = several([("push", "p.safetensors", "me/empty")] * 2)
    assert (again.code, once_more.code) == (0, 0)
    assert "nothing to push" in once_more.out


def test_a_licence_that_only_the_readme_names(hub, several, patch_file):
    hub.make("org/base", {"README.md": b"---\nlicense: apache-2.0\n---\n# Base\n"})
    hub.fault("GET /api/models/org/base", fields={"cardData": None}, times=9)
    (result,) = several([("push", "p.safetensors", "me/patch", "--base", "org/base", "--json")], token=WRITER)
    assert result.code == 0, result
    assert result.json["warnings"] == []
    assert "license: apache-2.0" in result.json["card"]
