"""Checkpoints in buckets: moto's S3 server, and a few calls of Google's API, read through s3fs and gcsfs."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import numpy as np
import pytest
from pages_support import ROOT, steps
from safetensors.numpy import load_file
from support import process, write_folder

import neftsurgery as ns

# Else gcsfs asks Google, by gRPC, how the bucket is laid out, before it asks the server of the test.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
boto3 = pytest.importorskip("boto3", reason="the S3 server of moto is not installed: make test-field has it")
pytest.importorskip("s3fs", reason="the driver s3fs is not installed: make test-field has it")
moto_server = pytest.importorskip("moto.server", reason="moto is not installed: make test-field has it")

KEYS = {"AWS_ACCESS_KEY_ID": "an-access-key-id", "AWS_SECRET_ACCESS_KEY": "a-secret-access-key"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found = {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    before = dict(os.environ)
    os.environ.update(found)
    yield found
    os.environ.clear()
    os.environ.update(before)
    server.stop()


@pytest.fixture(scope="module")
def served(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder with what the bucket ``models`` holds, and a client of the server."""
    folder, rng = tmp_path_factory.mktemp("served"), np.random.default_rng(0)
    base = {f"model.layers.{n}.mlp.up_proj.weight": rng.random((2048, 256), np.float32) for n in range(4)}
    tuned = {name: (array + rng.random((2048, 1)) ** 8).astype(np.float32) for name, array in base.items()}
    write_folder(folder / "base", base, config={"model_type": "llama"})
    write_folder(folder / "tuned", tuned, shards=3, config={"model_type": "llama"})
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    for side in ("base", "tuned"):
        for path in (folder / side).iterdir():
            client.put_object(Bucket="models", Key=f"run/{side}/{path.name}", Body=path.read_bytes())
    return folder, client


def test_all_reading_verbs(served: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = served
    sides = {
        "s3": ("s3://models/run/base", "s3://models/run/tuned/"),
        "here": (folder / "base", folder / "tuned"),
    }
    for name, (base, tuned) in sides.items():
        scores = ns.diff(base, tuned)
        scores.save(tmp_path / f"{name}.scores")
        ns.extract(base, tuned, scores.select(neurons="3%"), out=tmp_path / f"{name}.patch")
        ns.extract(base, tuned, lossless=True, out=tmp_path / f"{name}.lossless")
    patch = tmp_path / "here.patch"
    for kind in ("scores", "patch", "lossless"):
        assert (tmp_path / f"s3.{kind}").read_bytes() == (tmp_path / f"here.{kind}").read_bytes(), kind
    assert ns.verify("s3://models/run/base", patch).state == "base"
    assert ns.verify("s3://models/run/tuned", tmp_path / "here.lossless").state == "patched"
    ns.apply(folder / "base", patch, out=tmp_path / "patched")
    ns.revert(tmp_path / "patched", patch, base="s3://models/run/base", out=tmp_path / "back")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (folder / "base" / name).read_bytes()
    index = ns.inspect("s3://models/run/tuned/model.safetensors.index.json")
    assert index["parameters"] == ns.inspect(folder / "tuned")["parameters"]


def test_command(served: tuple[Path, Any], environment: dict[str, str], tmp_path: Path) -> None:
    folder, _ = served
    ns.extract(folder / "base", folder / "tuned", neurons="3%", out=tmp_path / "patch")
    found = process("verify", "s3://models/run/base", "patch", "--json", cwd=tmp_path, **environment)
    (fetched,) = found.json["fetched"]
    assert fetched["url"] == "s3://models/run/base"
    assert 20 * fetched["bytes"] < fetched["of"]
    wrong = {**environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    cases = [
        ("s3://models/nothing", environment, 2, "no file or folder at this address"),
        ("s3://nothing/at/all", environment, 2, "no file or folder at this address"),
        ("s3://models/run/base", wrong, 5, "reading failed"),
    ]
    for url, variables, code, words in cases:
        told = process("inspect", url, cwd=tmp_path, **variables)
        assert told.code == code, told
        assert words in told.err
        assert not any(key in told.err + told.out for key in KEYS.values())


def test_the_page(
    served: tuple[Path, Any], environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/scale.md from two checkpoints in a bucket to scores, a patch and a verified local copy."""
    folder, client = served
    for side in ("base", "tuned"):
        for path in (folder / side).iterdir():
            client.put_object(Bucket="models", Key=f"{side}/{path.name}", Body=path.read_bytes())
    monkeypatch.chdir(tmp_path)
    page, ran = (ROOT / "docs" / "scale.md").read_text(), list[str]()
    page = page[: page.index("### What is fetched")]
    for step in steps(page):
        if step.words[:4] == ["aws", "s3", "cp", "--recursive"]:  # the tool of the store
            fsspec.filesystem("s3").get("models/base", "base", recursive=True)
        elif "hf://" not in step.printed:
            told = process(*step.words[1:], cwd=tmp_path, **environment)
            assert told.code == 0, told
            ran.append(step.words[1])
    assert ran == ["diff", "select", "extract", "verify", "apply", "verify"]
    ns.diff(folder / "base", folder / "tuned", out=tmp_path / "here")
    assert (tmp_path / "scores.safetensors").read_bytes() == (tmp_path / "here").read_bytes()
    selection = ns.Scores.load(tmp_path / "here").select(neurons="3%")
    tuned = {}
    for shard in (folder / "tuned").glob("*.safetensors"):
        tuned |= load_file(shard)
    written, base = (load_file(at / "model.safetensors") for at in (tmp_path / "patched", folder / "base"))
    assert len(selection) == 246
    for name, array in written.items():
        rows = selection.tensors[name].index if name in selection.tensors else []
        base[name][rows] = tuned[name][rows]
        assert np.array_equal(array, base[name]), name


def test_object_replaced_in_the_middle(served: tuple[Path, Any]) -> None:
    folder, client = served
    data = (folder / "base" / "model.safetensors").read_bytes()
    client.put_object(Bucket="models", Key="changing/model.safetensors", Body=data)
    checkpoint = ns.Checkpoint.open("s3://models/changing")
    client.put_object(Bucket="models", Key="changing/model.safetensors", Body=data[:-1] + b"x")
    with pytest.raises(ns.MachineError, match="replaced while it was read"):
        checkpoint.read_into(next(iter(checkpoint.tensors)), 0, memoryview(bytearray(100)))


class _Google(BaseHTTPRequestHandler):
    """The part of the JSON API of Google's storage that reads: objects, their list, their bytes by range."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]  # of the bucket ``models``, by name
    generation = 7

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client asks in parallel, and leaves when one answer suffices
            self.close_connection = True

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {key: value[0] for key, value in parse_qs(parts.query).items()}
        _, _, name = parts.path.partition("/b/models/o")
        name = unquote(name.lstrip("/"))
        if "/b/models" not in parts.path:
            return self.answer(404, {"error": {"code": 404, "message": "no such bucket"}})
        if not name:
            found = [self.item(one) for one in self.objects if one.startswith(query.get("prefix", ""))]
            return self.answer(200, {"kind": "storage#objects", "items": found})
        if name not in self.objects or query.get("generation", f"{self.generation}") != f"{self.generation}":
            return self.answer(404, {"error": {"code": 404, "message": "no such object"}})
        if query.get("alt") != "media":
            return self.answer(200, self.item(name))
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        body = self.objects[name][first : last + 1]
        said = f"bytes {first}-{first + len(body) - 1}/{len(self.objects[name])}"
        return self.answer(206, body, {"Content-Range": said})

    def item(self, name: str) -> dict[str, str]:
        facts = {"name": name, "bucket": "models", "size": str(len(self.objects[name])), "etag": "x"}
        return {**facts, "kind": "storage#object", "generation": str(self.generation)}

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for key, text in {"Content-Length": f"{len(body)}", "Content-Type": kind, **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(body)


def test_google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gcsfs", reason="the driver gcsfs is not installed: make test-field has it")
    weights = {"w": np.random.default_rng(0).random((512, 512), np.float32)}
    write_folder(tmp_path / "m", weights, config={"model_type": "llama"})
    objects = {f"run/m/{path.name}": path.read_bytes() for path in (tmp_path / "m").iterdir()}
    handler = type("Google", (_Google,), {"objects": objects})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    try:
        checkpoint, found = ns.Checkpoint.open("gs://models/run/m"), np.empty_like(weights["w"])
        checkpoint.read_into("w", 0, found.data.cast("B"))
        assert np.array_equal(found, weights["w"])
        file = ns.inspect("gs://models/run/m/model.safetensors")
        assert (file["name"], file["model_type"]) == ("gs://models/run/m/model.safetensors", "llama")
        with pytest.raises(ns.UsageError, match="no file or folder at this address"):
            ns.inspect("gs://models/nothing")
        handler.generation = 8
        with pytest.raises(ns.MachineError, match="replaced while it was read"):
            checkpoint.read_into("w", 0, found.data.cast("B"))
    finally:
        server.shutdown()
        server.server_close()
