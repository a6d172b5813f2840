"""The data of the tests' Hub: repositories with commits and branches, and the content of files by hash."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, str]  # path: name of its blob


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)  # uploaded large files, committed or not

    def commit_of(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass
class Hub:
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)
    generation: int = 0  # incremented by every reset, so that calls from before it are dropped

    def make(self, name: str, *, private: bool = False, gated: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private, gated)
        self.add(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return repo

    def add(self, repo: Repo, branch: str, files: dict[str, bytes], title: str) -> Commit:
        named = {}
        for path, content in files.items():
            name = blob_name(path, content)
            self.blobs[name] = content
            named[path] = name
        return self.commit(repo, branch, named, title)

    def commit(self, repo: Repo, branch: str, named: dict[str, str], title: str) -> Commit:
        parent = repo.refs.get(branch)
        files = {**(repo.commits[parent].files if parent else {}), **named}
        oid = hashlib.sha1(
            f"{len(repo.commits)} {parent} {title} {sorted(files.items())}".encode()
        ).hexdigest()
        repo.commits[oid] = Commit(oid, parent, title, files)
        repo.refs[branch] = oid
        return repo.commits[oid]

    def state(self) -> dict[str, Any]:
        repos = {
            name: {
                "private": repo.private,
                "refs": repo.refs,
                "files": {ref: repo.commits[oid].files for ref, oid in repo.refs.items()},
                "titles": [commit.title for commit in repo.commits.values()],
            }
            for name, repo in self.repos.items()
        }
        return {"repos": repos, "calls": self.calls, "sent": self.sent, "blobs": sorted(self.blobs)}


def blob_name(path: str, content: bytes) -> str:
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def card_data(readme: str) -> object:
    """The front matter; None if there is none, as on the Hub."""
    match = re.match(r"\s*---\n(.*?)\n---\n", readme, re.DOTALL)
    try:
        return yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
