"""A Hub that lies at random in names, lengths, hashes, commits, answers and speed, while commands use it.

A command ends, with success or an exit code for errors. It writes into the cache and OUT only, and success
means that OUT, or what the Hub holds then, is right. ``NEFT_TORTURE=1000`` makes a thousand trials of each.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_support import WRITER, Hub, hub_process, patch_of, run_several
from support import Result, snapshot, write_folder
from torture.trials import Trials, times

import neftsurgery as ns

pytestmark = pytest.mark.slow

NAME = "neuron_patch.safetensors"
RUNS = times(8)
BATCH = 8  # commands in one process, and one cache
COMMANDS = ("apply", "diff", "pull", "push")


class Liar:
    """Draws lies: which calls of a repository get them, and what is wrong."""

    def __init__(self, seed: int, other: str) -> None:
        self.random = random.Random(seed)
        self.other = other  # the hash of another whole patch

    def lie(self, repo: str) -> dict[str, Any]:
        """For `Hub.fault`."""
        kind = self.pick([self._head, self._body, self._api, self._api, self._refusal])
        return {"times": self.pick([1, 99]), **kind(repo)}

    def pick(self, values: Sequence[Any]) -> Any:
        return self.random.choice(values)

    def _name(self) -> str:
        up = "../" * self.random.randint(1, 6)
        plain = self.pick(["it", "1f" * 20, "2e" * 32, "a" * 300, "", "x\\y", "a b", "%2e%2e%2fevil"])
        return self.pick([up + "evil", "/tmp/evil", "..", ".", plain, f'"{up}evil"', f'W/"{up}evil"'])

    def _number(self) -> str:
        return self.pick(["0", "1", "-1", "9" * 20, "NaN", "1e3", str(self.random.randrange(1 << 16))])

    def _head(self, repo: str) -> dict[str, Any]:
        places = [
            "file:///etc/passwd",
            "/x/../../evil",
            "http://127.0.0.1:9/x",
            "",
            "//",
            "http://[::1",
            None,
        ]
        headers = {
            self.pick(["X-Linked-Etag", "ETag", "X-Repo-Commit"]): self._name(),
            "X-Linked-Size": self._number(),
            "Location": self.pick(places),
        }
        chosen = self.random.sample(sorted(headers), self.random.randint(1, 2))
        return {"match": f"HEAD /{repo}/resolve", "headers": {key: headers[key] for key in chosen}}

    def _body(self, repo: str) -> dict[str, Any]:
        lies: list[dict[str, Any]] = [
            {"endless": 200},
            {"drip": 0.02},
            {"corrupt": True},
            {"other": self.other},
            {"cut_download": 0.5, "times": 1},
            {"headers": {"Content-Encoding": self.pick(["gzip", "br", "identity", "zstd"])}},
            {"body": ""},
            {"body": "<html>"},
        ]
        return {"match": rf"GET /(_storage/)?{repo}/", **self.pick(lies)}

    def _api(self, repo: str) -> dict[str, Any]:
        value = self.pick([None, 3, [], {}, "text", self._name(), [{}], [{"rfilename": self._name()}]])
        key = self.pick(["sha", "siblings", "cardData", "id", "private", "commitOid", "files", "objects"])
        lies: list[dict[str, Any]] = [
            {"fields": {key: value}},
            {"fields": {"sha": self._name()}},
            {"body": self.pick(["", "{}", "[]", "null", "[[", "<html>", '[{"path": "../x"}]'])},
            {"endless": 200},
            {"drip": 0.02},
            {"no_commit": True},
        ]
        return {"match": rf"(GET|POST) /(api/(models|repos)|{repo}\.git)", **self.pick(lies)}

    def _refusal(self, repo: str) -> dict[str, Any]:
        codes = [
            "RepoNotFound",
            "RevisionNotFound",
            "EntryNotFound",
            "GatedRepo",
            "RepoExists",
            "x" * 50,
            None,
        ]
        status = self.pick([300, 400, 401, 403, 404, 409, 410, 412, 413, 416, 418, 451])
        said = self.pick([None, "no", "\x1b[2J", "x" * 1000])
        return {"match": repo, "status": status, "code": self.pick(codes), "message": said}


@dataclass(frozen=True)
class Setting:
    """A Hub, files, and what comes out if nobody lies."""

    hub: Hub
    root: Path
    base: dict[str, bytes]
    patch: bytes
    other: str
    patched: Any

    def content(self, command: str) -> dict[str, bytes]:
        """Of a repository that a command is used on."""
        if command == "push":
            return {}
        return self.base if command == "diff" else {NAME: self.patch}

    def tree(self) -> Any:
        """All files but those of the caches."""
        homes = self.root / "homes"
        files = [path for path in self.root.rglob("*") if path.is_file()]
        return {
            path: path.read_bytes() for path in files if not path.is_relative_to(homes) or "evil" in path.name
        }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    root = tmp_path_factory.mktemp("lies")
    rng = np.random.default_rng(0)
    base = {f"layers.{n}.up_proj.weight": rng.normal(size=(16, 8)).astype(np.float32) for n in range(3)}
    tuned = {
        name: value + rng.normal(scale=0.1, size=(16, 8)).astype(np.float32) for name, value in base.items()
    }
    for side, arrays in (("base", base), ("tuned", tuned)):
        write_folder(root / side, arrays, config={"model_type": "llama"})
    with ns.extract(root / "base", root / "tuned", neurons=20, out=root / "p.safetensors") as patch:
        ns.apply(root / "base", patch, out=root / "expected")
    patch_of(root / "other.safetensors", {"w": 3}).close()
    with hub_process() as hub:
        hub.variables["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"
        hub.make("org/other", {NAME: (root / "other.safetensors").read_bytes()})
        other = hub.repos["org/other"]["files"]["main"][NAME]
        files = {path.name: path.read_bytes() for path in (root / "base").iterdir()}
        patch_bytes = (root / "p.safetensors").read_bytes()
        yield Setting(hub, root, files, patch_bytes, other, snapshot(root / "expected"))


def words(command: str, repo: str, out: str) -> tuple[object, ...]:
    return {
        "apply": ("apply", "base", repo, "-o", out),
        "diff": ("diff", "base", repo, "-o", out),
        "pull": ("pull", repo, "-o", out),
        "push": ("push", "p.safetensors", repo),
    }[command]


def check(place: Setting, command: str, repo: str, out: Path, result: Result) -> None:
    assert result.code in (0, 2, 3, 4, 5), result
    assert "Traceback" not in result.err, result
    assert "internal error" not in result.err, result
    assert "\x1b" not in result.out + result.err, result
    if result.code:
        assert not out.exists(), result
    elif command == "pull":
        assert out.read_bytes() == place.patch
    elif command == "apply":
        assert snapshot(out) == place.patched
    elif command == "push":
        held = place.hub.repos[repo]["files"]["main"]
        assert held.get(NAME) == hashlib.sha256(place.patch).hexdigest()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_server_that_lies(place: Setting, trials: Trials, command: str) -> None:
    liar = Liar(COMMANDS.index(command), place.other)
    before = place.tree()
    for first in range(0, RUNS, BATCH):
        repos = {f"out{n}": f"{command}/repo{n}x" for n in range(first, min(RUNS, first + BATCH))}
        for repo in repos.values():
            if command != "push" or liar.random.random() < 0.7:
                place.hub.make(repo, place.content(command))
            for _ in range(liar.random.randint(1, 2)):
                place.hub.fault(**liar.lie(repo))
        lines = [words(command, repo, out) for out, repo in repos.items()]
        home = place.root / "homes" / f"{command}{first}"
        results = run_several(place.hub, lines, place.root, home, WRITER)
        for (out, repo), result in zip(repos.items(), results, strict=True):
            with trials.trial("lying server", command) as entry:
                kind = "refused" if result.code else "done"
                entry.notes[kind] = entry.notes.get(kind, 0) + 1
                check(place, command, repo, place.root / out, result)
        for out in repos:
            remove(place.root / out)
        assert place.tree() == before
        assert not Path("/tmp/evil").exists()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
