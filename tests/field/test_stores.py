"""Checkpoints in a bucket: moto's S3 server on loopback, read through the real s3fs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import process, write_folder

import neftsurgery as ns

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


def test_object_replaced_in_the_middle(served: tuple[Path, Any]) -> None:
    folder, client = served
    data = (folder / "base" / "model.safetensors").read_bytes()
    client.put_object(Bucket="models", Key="changing/model.safetensors", Body=data)
    checkpoint = ns.Checkpoint.open("s3://models/changing")
    client.put_object(Bucket="models", Key="changing/model.safetensors", Body=data[:-1] + b"x")
    with pytest.raises(ns.MachineError, match="replaced while it was read"):
        checkpoint.read_into(next(iter(checkpoint.tensors)), 0, memoryview(bytearray(100)))
