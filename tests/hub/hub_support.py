"""A Hub for tests: the server as a process, and command lines against it in processes of their own."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import save_file
from support import Result

import neftsurgery as ns

WRITER, READER, PLAIN = "hf_writerwriterwriter", "hf_readerreaderreader", "plainsecretplainsecret"
SIGNATURE = "5ec2e75167a7u2e"
SERVER = Path(__file__).with_name("hub_server.py")
#: No output may contain one of these.
SECRETS = (WRITER, READER, PLAIN, SIGNATURE)


@dataclass
class Hub:
    """The server, by its address."""

    address: str
    variables: dict[str, str] = field(default_factory=dict)  # of processes that use it

    def ask(self, do: str, **what: Any) -> Any:
        body = json.dumps({"do": do, **what}).encode()
        with urllib.request.urlopen(f"{self.address}/_control", body, timeout=30) as answer:
            return json.load(answer)

    def make(self, name: str, files: dict[str, bytes] | None = None, **options: Any) -> str:
        """Create a repository, or add a commit to it; returns its head."""
        encoded = {path: base64.b64encode(data).decode() for path, data in (files or {}).items()}
        return self.ask("make", name=name, files=encoded, **options)

    def read(self, name: str, path: str, revision: str = "main") -> bytes:
        return base64.b64decode(self.ask("read", name=name, path=path, revision=revision))

    def fault(self, match: str, **what: Any) -> None:
        """Have the next calls that match ``METHOD /path`` fail or lie.

        They fail by status (with code and message), hold, cut_upload and cut_download (a share). They lie by
        corrupt, other (content of that hash), headers, fields (of JSON), body, endless (more MiB), drip
        (seconds for each byte) and no_commit.
        """
        self.ask("fault", match=match, **what)

    @property
    def state(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.address}/_state", timeout=30) as answer:
            return json.load(answer)

    @property
    def repos(self) -> dict[str, Any]:
        return self.state["repos"]

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """The environment of a process that uses this Hub, with its own cache in ``home``."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        found = kept | {"HF_ENDPOINT": self.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        found |= self.variables
        return found if token is None else found | {"HF_TOKEN": token}


@contextmanager
def hub_process() -> Iterator[Hub]:
    """Run the server while the context lasts."""
    with subprocess.Popen(
        [sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        try:
            yield Hub(child.stdout.readline().strip())
        finally:
            child.stdin.close()
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()


#: Runs several command lines in one process, to start it only once; prints [[code, out, err], …]. It waits
#: a moment only where huggingface_hub waits for seconds before it tries again.
_SEVERAL = """
import contextlib, io, json, sys, time
from neftsurgery.cli.main import run
time.sleep = lambda seconds, wait=time.sleep: wait(min(seconds, 0.05))
results = []
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(words)
        except SystemExit as left:
            code = left.code
    results.append([code or 0, out.getvalue(), err.getvalue()])
json.dump(results, sys.stdout)
"""


def run_several(
    hub: Hub, commands: list[tuple[object, ...]], cwd: Path, home: Path, token: str | None
) -> list[Result]:
    """As `run_against`, for many command lines."""
    done = subprocess.run(
        [sys.executable, "-c", _SEVERAL],
        input=json.dumps([[str(word) for word in words] for words in commands]),
        cwd=cwd,
        env=hub.environment(home, token),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for secret in SECRETS:
        assert secret not in done.stdout + done.stderr, secret
    return [Result(*found) for found in json.loads(done.stdout)]


def run_against(hub: Hub, words: tuple[object, ...], cwd: Path, home: Path, token: str | None) -> Result:
    """Run a command line as a process, and check that it prints no secret."""
    done = subprocess.run(
        [sys.executable, "-m", "neftsurgery", *map(str, words)],
        cwd=cwd,
        env=hub.environment(home, token),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    for secret in SECRETS:
        assert secret not in done.stdout + done.stderr, (words, secret)
    return Result(done.returncode, done.stdout, done.stderr)


def patch_of(path, counts, *, width=3, **manifest):
    """A patch file of ``{tensor: neurons}``, written as docs/patch-format.md says."""
    arrays, tensors = {}, {}
    for number, (name, count) in enumerate(counts.items()):
        value = np.full((count, width), number + 1, np.float32)
        index = np.arange(count, dtype=np.int32)

        def digests(rows):
            return np.array([list(xxhash.xxh3_128_digest(row.tobytes())) for row in rows], np.uint8).reshape(
                -1, 16
            )

        before, after = digests(np.zeros_like(value)), digests(value)
        arrays |= {f"{name}:index": index, f"{name}:value": value, f"{name}:base_digest": before}
        tensors[name] = {
            "shape": [count + 5, width],
            "dtype": "F32",
            "neuron_axes": [0],
            "base_hash": "xxh3-128:" + xxhash.xxh3_128_hexdigest(before.tobytes()),
            "patched_hash": "xxh3-128:" + xxhash.xxh3_128_hexdigest(after.tobytes()),
        }
    content = {"version": 1, "base": {}, "selection": {}, **manifest, "tensors": tensors}
    save_file(arrays, path, {"neuron_patch": json.dumps(content)})
    return ns.Patch.load(path)
