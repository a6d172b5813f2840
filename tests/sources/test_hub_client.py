"""What is asked of the Hub, and the real huggingface_hub over a cache with the network off."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from support import write_folder

import neftsurgery
from neftsurgery.sources.hub_client import HubFile
from neftsurgery.sources.resolve import Source, resolve

SHA, OLDER = "1f" * 20, "2e" * 20
TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"


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


SHA256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # of hello: sha256sum
GIT_SHA1 = "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"  # of hello: git hash-object


@pytest.mark.parametrize(
    ("nbytes", "etag", "content", "same"),
    [
        (5, SHA256, b"hello", True),
        (5, SHA256, b"hallo", False),
        (5, GIT_SHA1, b"hello", True),
        (5, GIT_SHA1, b"hallo", False),
        (6, SHA256, b"hello", False),
        (None, SHA256, b"hello", True),
        (5, None, b"hello", True),
        (4, None, b"hello", False),
        (5, "5d41402abc4b2a76b9719d911017c592-2", b"hallo", True),  # of an object store: it is no such hash
    ],
)
def test_content_is_compared_with_what_the_hub_announced(
    nbytes: int | None, etag: str | None, content: bytes, same: bool
) -> None:
    file = io.BytesIO(content)
    file.seek(3)
    assert HubFile(SHA, nbytes, etag).is_content(file) == same


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
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.errors import NeftError
assert not any(name in sys.modules for name in ("torch", "huggingface_hub"))
for named in json.loads(sys.argv[1]):
    try:
        found = Checkpoint.open(named)
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
