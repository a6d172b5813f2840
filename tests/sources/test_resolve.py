"""What a name refers to: a local path, or a Hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import write_file

from neftsurgery.errors import UsageError
from neftsurgery.sources.resolve import Source, resolve, resolve_file

SHA, OLDER = "1f" * 20, "2e" * 20
TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"
SECRETS = f"Authorization: Bearer {TOKEN} https://cdn.example.com/x?X-Amz-Signature=c0ffee&token={TOKEN}"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids that the Hub is asked for; it has none of them."""
    asked: list[str] = []

    def refuse(repo: str, **options: object) -> str:
        asked.append(repo)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return asked


# Local paths.


@pytest.mark.parametrize("annexed", [True, False])
def test_a_broken_symlink_of_git_annex_says_how_to_fetch_it(here: Path, annexed: bool) -> None:
    key = "SHA256E-s99--00.safetensors"
    target = f".git/annex/objects/0f/{key}/{key}" if annexed else f"blobs/{key}"
    (here / "model.safetensors").symlink_to(target)
    with pytest.raises(UsageError, match="the symlink is broken") as error:
        resolve("model.safetensors")
    assert error.value.hint == ("fetch the content: `git annex get`" if annexed else None)


@pytest.mark.parametrize(
    "named", ["org/name", "org/name@main", "plain", "a b/ü.safetensors", "./org/name", "a/b/c/d"]
)
@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link"])
def test_an_existing_path_beats_a_hub_id(here: Path, no_hub: list[str], named: str, kind: str) -> None:
    path = here / named
    path.parent.mkdir(parents=True, exist_ok=True)
    match kind:
        case "file":
            path.touch()
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(here)
        case "dangling link":
            path.symlink_to("nowhere")
    if kind == "dangling link":
        with pytest.raises(UsageError, match="the symlink is broken"):
            resolve(named)
    else:
        assert resolve(named) == Source(Path(named), named, None, None)
        assert resolve(path) == Source(path, str(path), None, None)
    assert no_hub == []


def test_local_name(here: Path) -> None:
    (here / "model").mkdir()
    for named in ("model", "model/", "./model", str(here / "model")):
        assert resolve(named).local_name == "model"
    assert resolve(".").local_name == here.name
    assert resolve("model/..").local_name == here.name
    assert Source(here, "org/name@x", "org/name", SHA).local_name == "org/name"


NONSENSE = [
    "",
    " ",
    "/",
    "a/b/c",
    "/nonexistent/x",
    "nonexistent",
    "nonexistent.safetensors",
    "../nonexistent/x",
    "./nonexistent/x",
    "~/nonexistent",
    "a\0b",
    "org/na\0me",
    "\0",
    "org/name\n",
    "org/na\nme",
    "\norg/name",
    "org/na me",
    "org/",
    "/name",
    "org//name",
    "org/..",
    "org/.name",
    "-org/name",
    "org/name@",
    "org/name@@",
    "org/name@a b",
    "org/name@\n",
    "org/name@a@b",
    "\ud800/name",
    "org/\udcff",
    "x" * 300,
    "x" * 10_000,
    "org/" + "n" * 300,
    "a" * 300 + "/name",
    "ftp://huggingface.co/org/name",
    "hf:/org/name",
]


@pytest.mark.parametrize("named", [n for n in NONSENSE if n != "/"], ids=lambda n: repr(n)[:25])
def test_nonsense_is_a_usage_error_and_asks_no_hub(here: Path, no_hub: list[str], named: str) -> None:
    with pytest.raises(UsageError, match="no such file or folder") as error:
        resolve(named)
    assert error.value.file == named
    what_helps = "write the whole path" if named.startswith("~") else "org/name on the Hub"
    assert what_helps in str(error.value.hint)
    assert no_hub == []


def test_a_path_inside_a_file_is_nonsense(here: Path, no_hub: list[str]) -> None:
    (here / "file").touch()
    with pytest.raises(UsageError):
        resolve("file/name")
    assert no_hub == []


def test_a_path_object_is_never_a_hub_id(here: Path, no_hub: list[str]) -> None:
    with pytest.raises(UsageError):
        resolve(Path("org/name"))
    assert no_hub == []


@settings(max_examples=300, deadline=None, database=None)
@given(st.text(alphabet="ab/@.-_~ \0\n\\é\ud800", max_size=12))
def test_any_text_is_a_path_or_an_error_of_ours(named: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: "/cache/" + SHA)
        try:
            source = resolve(named)
        except UsageError:
            assert not named or not os.path.lexists(named.replace("\0", "x") if "\0" in named else named)
            return
    if source.repo is None:
        assert os.path.lexists(named)
    else:
        assert named.partition("@")[0] == source.repo
        assert named.count("/") >= 1
        assert not named.startswith(("/", ".", "~"))


# One file of a repository.


def test_one_file_of_a_repository(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def download(repo: str, filename: str, **options: Any) -> str:
        asked.append((repo, filename, options["revision"]))
        return f"/cache/models--org--name/snapshots/{SHA}/{filename}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    file = Path(f"/cache/models--org--name/snapshots/{SHA}/x.safetensors")
    for named, revision in (("org/name", None), ("org/name@v1", "v1")):
        assert resolve_file(named, "x.safetensors") == Source(file, named, "org/name", SHA)
        assert asked.pop() == ("org/name", "x.safetensors", revision)
    (here / "org").mkdir()
    (here / "org" / "name").touch()
    for named in ("org/name", "a/b/c", "nothing", "runs/x.safetensors", "", "a\0/b", "org/na me"):
        assert resolve_file(named, "x.safetensors") == Source(Path(named), named)
    assert resolve_file(Path("org/other"), "x.safetensors").repo is None
    assert asked == []


def test_a_file_named_in_full(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", {})
    assert resolve(path) == resolve(str(path)) == Source(path, str(path))
