"""URLs: which are read, what is shown of them, and models on a Hub through hf://."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_support import SECRETS, Hub, hub_process, run_several
from support import write_folder

import neftsurgery as ns
from neftsurgery.errors import UsageError
from neftsurgery.sources.places import find_place, is_url, shown_url


def test_what_is_a_url() -> None:
    assert all(map(is_url, ["hf://a/b", "s3://b/k", "gs://b/k", "http://h/", "https://h/"]))
    assert not any(map(is_url, ["a/b", "./s3:/b", "ftp://h/x", "C:\\x", Path("x"), None]))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:word@host:8080/m?sig=secret#x", "https://host:8080/m"),
        ("https://host/m@v1/w.safetensors", "https://host/m@v1/w.safetensors"),
        ("hf://org/name@main/sub", "hf://org/name@main/sub"),
        ("s3://bucket/a b?x", "s3://bucket/a b"),
    ],
)
def test_shown_url(url: str, shown: str) -> None:
    assert shown_url(url) == shown


@pytest.mark.parametrize("url", ["hf://", "hf://name", "hf://org/na me", "hf://org/../x", "hf://org/name@"])
def test_not_a_model_on_the_hub(url: str) -> None:
    with pytest.raises(UsageError, match="not the address of a model on the Hub"):
        find_place(url)


def test_web_files_keep_the_query() -> None:
    place = find_place("https://host/a%20b/w%2B.safetensors?sig=1")
    assert (place.shown, place.single, place.names) == ("https://host/a%20b", "w+.safetensors", None)
    assert find_place("https://host/model/").shown == "https://host/model"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_process() as found:
        yield found


def test_hub(hub: Hub, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {f"model.layers.{n}.mlp.up_proj.weight": rng.random((256, 128), np.float32) for n in range(4)}
    tuned = {name: array + (rng.random((256, 1)) < 0.05) for name, array in base.items()}
    tuned = {name: array.astype(np.float32) for name, array in tuned.items()}
    config: dict[str, object] = {"model_type": "llama"}
    write_folder(tmp_path / "base", base, config=config)
    write_folder(tmp_path / "tuned", tuned, shards=2, config=config)
    patch = tmp_path / "patch.safetensors"
    ns.extract(tmp_path / "base", tmp_path / "tuned", changed=True, out=patch)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / side).iterdir()} for side in ("base", "tuned")
    ]
    first = hub.make("org/base", files[0])
    hub.make("org/tuned", {f"sub/{name}": data for name, data in files[1].items()}, private=True)
    hub.make("org/base", {"config.json": b"{}"})  # a later commit
    commands = [
        ("verify", f"hf://org/base@{first}", patch, "--json"),
        ("verify", "hf://org/tuned/sub", patch, "--json"),
        ("diff", f"hf://org/base@{first}", "hf://org/tuned/sub", "-o", "remote.safetensors", "--json"),
        ("diff", "base", "tuned", "-o", "local.safetensors"),
        ("inspect", "hf://org/base", "--json"),
        ("inspect", "hf://org/base/model.safetensors@x", "--json"),
        ("inspect", "hf://org/nothing", "--json"),
        ("inspect", "hf://org/base@nothing", "--json"),
    ]
    done = run_several(hub, commands, tmp_path, tmp_path / "home", SECRETS[0])
    assert [one.code for one in done] == [0, 0, 0, 0, 0, 2, 2, 2], done
    assert [one.json["state"] for one in done[:2]] == ["base", "patched"]
    scores = [ns.Scores.load(tmp_path / name) for name in ("remote.safetensors", "local.safetensors")]
    for name in base:
        assert np.array_equal(scores[0].values(name), scores[1].values(name))
    assert scores[0].facts["base"]["repo"] == "org/base"
    assert scores[0].facts["base"]["revision"] == first
    assert scores[0].facts["base"]["fingerprint"] == scores[1].facts["base"]["fingerprint"]
    assert done[4].json["revision"] != first
    (fetched,) = done[0].json["fetched"]
    assert fetched["of"] > 4 * 256 * 128 * 4 > 4 * fetched["bytes"]
    assert f"from hf://org/base@{first}" in done[0].err
    assert "a token was sent to the storage" not in hub.state["calls"]
