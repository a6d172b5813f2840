"""What names mean: local paths, then the Hub's cache and the Hub; whatever it says, in our own words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import write_file, write_folder

import neftsurgery
from neftsurgery.errors import MachineError, MismatchError, NeftError, UsageError
from neftsurgery.sources.resolve import Source, resolve, resolve_file

SHA, OLDER = "1f" * 20, "2e" * 20
TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"
SECRETS = f"Authorization: Bearer {TOKEN} https://cdn.example.com/x?X-Amz-Signature=c0ffee&token={TOKEN}"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids asked of the Hub, which has none."""
    asked: list[str] = []

    def refuse(repo: str, **options: object) -> str:
        asked.append(repo)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return asked


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Local paths.


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
        with pytest.raises(UsageError, match="leads nowhere"):
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
    "https://huggingface.co/org/name",
    "hf://org/name",
]


@pytest.mark.parametrize("named", [n for n in NONSENSE if n != "/"], ids=lambda n: repr(n)[:25])
def test_nonsense_is_a_usage_error_and_asks_no_hub(here: Path, no_hub: list[str], named: str) -> None:
    with pytest.raises(UsageError, match="no such file or folder") as error:
        resolve(named)
    assert error.value.file == named
    assert "org/name of the Hub" in str(error.value.hint)
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


# The Hub, as huggingface_hub tells of it.


def test_what_is_asked_of_the_hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return f"/cache/models--org--name/snapshots/{SHA}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = Path(f"/cache/models--org--name/snapshots/{SHA}")
    assert resolve("org/name") == Source(folder, "org/name", "org/name", SHA)
    assert resolve("org/name@v1.0") == Source(folder, "org/name@v1.0", "org/name", SHA)
    assert resolve("org/name@refs/pr/3").revision == SHA
    assert [(repo, options["revision"]) for repo, options in asked] == [
        ("org/name", None),
        ("org/name", "v1.0"),
        ("org/name", "refs/pr/3"),
    ]
    from huggingface_hub.utils import filter_repo_objects

    files = {
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.model",
        "modeling_x.py",
    }
    left = {"pytorch_model.bin", "x.gguf", "original/consolidated.00.pth", "onnx/model.onnx", "tf_model.h5"}
    for _, options in asked:
        kept = filter_repo_objects(files | left, ignore_patterns=options["ignore_patterns"])
        assert set(kept) == files


def answer(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=SimpleNamespace(url="https://x"))


class ReadError(Exception):
    """As the HTTP client's own errors: no OSError."""


FAILURES: dict[str, tuple[Callable[[], Exception], type[NeftError], str]] = {
    "404": (
        lambda: RepositoryNotFoundError(f"404 {SECRETS}\nTraceback", response=answer(404)),
        UsageError,
        "no such model on the Hub",
    ),
    "401": (
        lambda: RepositoryNotFoundError(f"401 {SECRETS}\nTraceback", response=answer(401)),
        MachineError,
        "HTTP 401",
    ),
    "gated, 403": (
        lambda: GatedRepoError(f"{SECRETS}\nTraceback", response=answer(403)),
        MachineError,
        "gated",
    ),
    "gated, 401": (
        lambda: GatedRepoError(f"{SECRETS}\nTraceback", response=answer(401)),
        MachineError,
        "gated",
    ),
    "no revision": (
        lambda: RevisionNotFoundError(f"{SECRETS}\nTraceback", response=answer(404)),
        UsageError,
        "no revision 'main'",
    ),
    "500": (lambda: HfHubHTTPError(f"{SECRETS}\nTraceback", response=answer(500)), MachineError, "HTTP 500"),
    "403": (lambda: HfHubHTTPError(f"{SECRETS}\nTraceback", response=answer(403)), MachineError, "HTTP 403"),
    "not cached": (
        lambda: LocalEntryNotFoundError(f"{SECRETS}\nTraceback"),
        MachineError,
        "cannot be reached",
    ),
    "disk full": (lambda: OSError(28, "No space left on device"), MachineError, "No space left on device"),
    "other": (lambda: OSError(f"broken {SECRETS}\nTraceback"), MachineError, "broken"),
    "no text": (ConnectionResetError, MachineError, "ConnectionResetError"),
    "connection lost": (lambda: ReadError(f"{SECRETS}\nTraceback"), MachineError, "ReadError"),
    "bad id": (lambda: HFValidationError(f"Repo id {SECRETS}\nTraceback"), UsageError, "not a usable Hub id"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_in_our_own_words(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    make, kind, words = FAILURES[name]

    def fail(repo: str, **options: object) -> str:
        raise make()

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=words) as error:
        resolve("org/name@main")
    assert type(error.value) is kind
    text = str(error.value)
    assert "org/name" in text
    assert TOKEN not in text
    assert "c0ffee" not in text
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 2
    assert capfd.readouterr() == ("", "")


def test_interrupts_pass(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(repo: str, **options: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve("org/name")


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


FILE_FAILURES: dict[str, tuple[Callable[[], Exception], type[NeftError], str]] = {
    **{name: case for name, case in FAILURES.items() if name != "not cached"},
    "no such file": (
        lambda: RemoteEntryNotFoundError(f"{SECRETS}\nTraceback", response=answer(404)),
        MismatchError,
        "holds no x.safetensors",
    ),
    "429": (lambda: HfHubHTTPError(SECRETS, response=answer(429)), MachineError, "fewer requests"),
    "409": (lambda: HfHubHTTPError(SECRETS, response=answer(409)), MachineError, "HTTP 409"),
    "412": (lambda: HfHubHTTPError(SECRETS, response=answer(412)), MismatchError, "newer commit"),
    "503 behind the cache": (lambda: behind(answer(503)), MachineError, "HTTP 503"),
    "behind the upload": (lambda: wrapped(answer(403)), MachineError, "HTTP 403"),
}


def behind(response: Any) -> Exception:
    error = LocalEntryNotFoundError("not cached")
    error.__cause__ = HfHubHTTPError(SECRETS, response=response)
    return error


def wrapped(response: Any) -> Exception:
    error = RuntimeError(f"Error while uploading {SECRETS}")
    error.__cause__ = HfHubHTTPError(SECRETS, response=response)
    return error


@pytest.mark.parametrize("name", FILE_FAILURES)
def test_failures_of_one_file_in_our_own_words(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    make, kind, words = FILE_FAILURES[name]

    def fail(repo: str, filename: str, **options: object) -> str:
        raise make()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(kind, match=words) as error:
        resolve_file("org/name@main", "x.safetensors")
    assert type(error.value) is kind
    text = str(error.value)
    assert "org/name" in text
    assert TOKEN not in text
    assert "c0ffee" not in text
    assert len(text.splitlines()) <= 2
    assert capfd.readouterr() == ("", "")


# The real huggingface_hub over a cache laid out as it does, with the network off.


def cached(cache: Path, repo: str, revisions: dict[str, str], arrays: dict[str, Any]) -> None:
    top = cache / f"models--{repo.replace('/', '--')}"
    blobs = write_folder(top / "blobs", arrays, config={"model_type": "llama"})
    for revision, commit in revisions.items():
        ref = top / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        snapshot = top / "snapshots" / commit
        if snapshot.exists():
            continue
        snapshot.mkdir(parents=True)
        for blob in blobs.iterdir():
            (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")


ASK = """
import json, sys
from neftsurgery.checkpoint.opening import open_checkpoint
from neftsurgery.errors import NeftError
assert not any(name in sys.modules for name in ("torch", "huggingface_hub"))
for named in json.loads(sys.argv[1]):
    try:
        found = open_checkpoint(named)
    except NeftError as error:
        print(json.dumps([type(error).__name__, str(error)]))
    else:
        source = found.source
        print(json.dumps([str(source.path), source.named, source.repo, source.revision, list(found.tensors)]))
"""


def test_the_hub_cache_without_a_network(tmp_path: Path) -> None:
    cache, work = tmp_path / "cache", tmp_path / "work"
    work.mkdir()
    arrays = {"w": np.ones((2, 2), np.float32)}
    cached(cache, "org/name", {"main": SHA, "v1": OLDER, "refs/pr/1": OLDER}, arrays)
    cached(cache, "org/local", {"main": SHA}, arrays)
    (work / "org2").mkdir()
    write_folder(work / "org" / "local", {"mine": np.ones((2, 2), np.float32)})
    (work / "org" / "local").rename(work / "org2" / "local")
    (work / "org").rmdir()
    cached(cache, "org2/local", {"main": SHA}, arrays)
    questions = {
        "org/name": SHA,
        "org/name@main": SHA,
        "org/name@v1": OLDER,
        "org/name@refs/pr/1": OLDER,
        f"org/name@{OLDER}": OLDER,
        "org/local": SHA,
    }
    failing = {
        "org/absent": "MachineError",
        "org/name@absent": "MachineError",
        f"org/name@{'3d' * 20}": "MachineError",
        "org/na--me": "UsageError",
        "org/name.git": "UsageError",
        "örg/näme": "UsageError",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ASK, json.dumps([*questions, *failing, "org2/local"])],
        cwd=work,
        env=os.environ
        | {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(cache),
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "PYTHONPATH": str(Path(neftsurgery.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (named, commit), found in zip(questions.items(), answers, strict=False):
        repo = named.partition("@")[0]
        folder = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
        assert found == [str(folder), named, repo, commit, ["w"]]
    for (named, kind), found in zip(failing.items(), answers[len(questions) :], strict=False):
        assert found[0] == kind, found
        assert named.partition("@")[0] in found[1]
        assert TOKEN not in found[1]
        assert len(found[1].splitlines()) <= 2
    assert answers[-1] == ["org2/local", "org2/local", None, None, ["mine"]]
    assert TOKEN not in done.stderr


def test_a_file_named_in_full(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", {})
    assert resolve(path) == resolve(str(path)) == Source(path, str(path))
