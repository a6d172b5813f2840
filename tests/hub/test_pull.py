"""What a pull fetches, and its errors about repositories and networks."""

from __future__ import annotations

import hashlib

import pytest
from hub_support import READER, WRITER, patch_of

from neftsurgery.hub.pull import PullPlan
from neftsurgery.sources.hub_client import HubFile
from neftsurgery.sources.hub_id import HubId

NAME = "neuron_patch.safetensors"
PULL = ("pull", "me/patch", "-o", "q.safetensors")


@pytest.fixture
def published(hub, patch_file):
    hub.make("me/patch", {NAME: patch_file.read_bytes(), "README.md": b"# A patch\n", "model.bin": b"no"})
    return hub


def nothing_is_left(tmp_path):
    """There is no output, no staged output, and no incomplete file in the cache."""
    assert not (tmp_path / "q.safetensors").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not list((tmp_path / "home").rglob("*.incomplete"))


def test_outputs_dry_runs_and_force(published, several, patch_file, tmp_path):
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    (dry,) = several([(*PULL, "--dry-run")])
    assert published.state["sent"] == {}
    taken, forced, inside = several(
        [
            ("pull", "me/patch", "-o", "there.safetensors"),
            ("pull", "me/patch", "-o", "there.safetensors", "--force"),
            ("pull", "me/patch", "-o", "nowhere/q.safetensors"),
        ]
    )
    assert (dry.code, taken.code, forced.code, inside.code) == (0, 2, 0, 2), (dry, taken, forced, inside)
    assert published.repos["me/patch"]["refs"]["main"] in dry.out
    assert "q.safetensors" in dry.out
    assert not (tmp_path / "q.safetensors").exists()
    assert "--force" in taken.err
    assert (tmp_path / "there.safetensors").read_bytes() == patch_file.read_bytes()


def test_a_plan_prints_what_it_would_fetch_and_write():
    hub_id, commit = HubId("me/x", "v2"), "1f" * 20
    plan = PullPlan(hub_id, "q.safetensors", False, HubFile(commit, 1234))
    assert str(plan) == f"fetch me/x@v2 (1.2 kB, commit {commit}) and write q.safetensors"
    assert (
        str(PullPlan(hub_id, None, False, None)) == "fetch me/x@v2 (from the cache) and keep it in the cache"
    )


def test_revisions(published, several, patch_file, tmp_path):
    older = published.repos["me/patch"]["refs"]["main"]
    newer = published.make("me/patch", {NAME: b"something else"})
    results = several(
        [
            ("pull", f"me/patch@{older}", "-o", "a.safetensors"),
            ("pull", "me/patch@main", "-o", "b.safetensors"),
            ("pull", "me/patch@v9", "-o", "c.safetensors"),
            ("pull", "me/patch@", "-o", "c.safetensors"),
        ]
    )
    assert [result.code for result in results] == [0, 4, 2, 2], results
    assert newer != older
    assert (tmp_path / "a.safetensors").read_bytes() == patch_file.read_bytes()
    assert "'v9'" in results[2].err


def test_repositories_that_do_not_exist_or_are_not_accessible(published, several, tmp_path):
    """Each case: token, command, exit code, and words of the message."""
    published.make("org/model", {"config.json": b"{}"})
    published.make("me/secret", {NAME: b"x"}, private=True)
    published.make("org/gated", {NAME: b"x"}, gated=True)
    (tmp_path / "local").mkdir()
    cases = [
        (WRITER, ("pull", "me/nothing"), 2, "check the spelling"),
        (WRITER, ("pull", "org/model"), 3, "has no file neuron_patch.safetensors"),
        (WRITER, ("pull", "org/model@main"), 3, "extract BASE ADAPTER"),
        (WRITER, ("pull", "me/patch@v9"), 2, "no revision"),
        (WRITER, ("pull", "me"), 2, "org/name"),
        (WRITER, ("pull", "local/file.safetensors/x"), 2, "org/name"),
        (READER, ("pull", "me/secret"), 2, "no such model"),
        (READER, ("pull", "org/gated"), 5, "accept the model's terms"),
        (None, ("pull", "me/secret"), 5, "hf auth login"),
        (None, ("pull", "org/gated"), 5, "gated"),
        ("hf_wrongwrongwrongwrong", ("pull", "me/patch"), 5, "HTTP 401"),
    ]
    for token in {token for token, *_ in cases}:
        these = [case for case in cases if case[0] == token]
        results = several([(*words, "-o", "q.safetensors") for _, words, *_ in these], token=token)
        for (_, words, code, said), result in zip(these, results, strict=True):
            assert result.code == code, (words, token, result)
            assert said in result.err, (words, token, result)
            assert 1 <= len(result.err.strip().splitlines()) <= 2, result
    nothing_is_left(tmp_path)


ANSWERS = {401: "HTTP 401", 403: "HTTP 403", 429: "too many requests", 503: "Hub's side"}


def test_answers_of_the_hub(published, several, patch_file, tmp_path):
    commands = []
    for status in ANSWERS:
        published.make(f"me/patch{status}", {NAME: patch_file.read_bytes()})
        published.fault(f"HEAD /me/patch{status}/", status=status, times=99)
        commands.append(("pull", f"me/patch{status}", "-o", "q.safetensors"))
    results = several(
        [*commands, ("verify", "base", "me/patch403"), (*commands[0], "-v"), (*commands[0], "--json")]
    )
    for result, said in zip(results, [*ANSWERS.values(), "HTTP 403", "HTTP 401", "HTTP 401"], strict=True):
        assert result.code == 5, result
        assert said in result.err
    assert all(1 <= len(result.err.strip().splitlines()) <= 2 for result in results[: len(ANSWERS)])
    assert "Traceback" in results[-2].err
    assert results[-1].json["exit_code"] == 5
    nothing_is_left(tmp_path)


@pytest.mark.slow
def test_a_hub_that_is_down_is_retried_and_then_5(published, several, tmp_path):
    """If the cache is empty, huggingface_hub retries for half a minute."""
    published.fault("HEAD /me/patch/", status=500, times=99)
    (result,) = several([("apply", "base", "me/patch", "-o", "out")])
    assert result.code == 5, result
    assert "HTTP 500" in result.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_patch_is_4_and_not_written(hub, several, patch_file, tmp_path, neft):
    data = patch_file.read_bytes()
    assert neft("diff", "base", "tuned", "-o", "s.safetensors").code == 0
    contents = {
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "cut": data[:-9],
        "text": b"hello",
        "scores": (tmp_path / "s.safetensors").read_bytes(),
    }
    commands = []
    for kind, content in contents.items():
        hub.make(f"me/{kind}", {NAME: content})
        pull = ("pull", f"me/{kind}", "-o", "q.safetensors")
        commands += [pull, ("apply", "base", f"me/{kind}", "-o", "out"), pull]
    results = several(commands)
    for result, (_, *words) in zip(results, commands, strict=True):
        assert result.code == 4, (words, result)
        assert any(f"neftsurgery: me/{kind}" in result.err for kind in contents), result.err
        assert "blobs" not in result.err
        assert "snapshots" not in result.err
    assert not (tmp_path / "out").exists()
    nothing_is_left(tmp_path)
    sent = hub.state["sent"]
    for content in contents.values():  # fetching it again would not help
        assert sent[hashlib.sha256(content).hexdigest()] == len(content)


def test_a_damaged_cache_is_repaired(published, several, patch_file, tmp_path):
    """The Hub's file is right and the copy in the cache is not: the file is fetched once more."""
    assert several([("verify", "base", "me/patch")])[0].code == 0
    (blob,) = [path for path in (tmp_path / "home").rglob("blobs/*") if len(path.name) == 64]
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    damaged, pulled, after = several(
        [("verify", "base", "me/patch"), PULL, ("verify", "base", "me/patch", "--expect", "base")]
    )
    assert (damaged.code, pulled.code, after.code) == (4, 0, 0), (damaged, pulled, after)
    assert (tmp_path / "q.safetensors").read_bytes() == patch_file.read_bytes()


def test_an_interrupted_download_is_resumed(hub, several, tmp_path):
    """It resumes at a multiple of 10 MB, which huggingface_hub has kept."""
    patch_of(tmp_path / "p.safetensors", {"w": 1600}, width=4096).close()
    data = (tmp_path / "p.safetensors").read_bytes()
    hub.make("me/patch", {NAME: data})
    hub.fault("GET /_storage/", cut_download=0.9)
    (result,) = several([PULL])
    assert result.code == 0, result
    assert (tmp_path / "q.safetensors").read_bytes() == data
    assert (
        len(data) < hub.state["sent"][hashlib.sha256(data).hexdigest()] < 1.5 * len(data)
    )  # not all of it again


@pytest.mark.slow
def test_a_download_that_always_fails_is_5(published, several, tmp_path):
    published.fault("GET /_storage/", cut_download=0.0, times=99)
    (result,) = several([PULL])
    assert result.code == 5, result
    assert "run the command again" in result.err
    nothing_is_left(tmp_path)


def test_content_that_is_changed_in_transit_is_4(published, several, tmp_path):
    published.fault("GET /_storage/", corrupt=True, times=2)
    (result,) = several([PULL])
    assert result.code == 4, result
    nothing_is_left(tmp_path)
    (result,) = several([PULL])  # the third download is complete
    assert result.code == 0, result


def test_without_a_network_the_cache_is_used(published, several, patch_file, tmp_path, monkeypatch):
    assert several([("verify", "base", "me/patch")])[0].code == 0
    monkeypatch.setattr(type(published), "environment", offline(type(published).environment))
    calls = len(published.state["calls"])
    pulled, applied, missing, pushed = several(
        [
            PULL,
            ("apply", "base", "me/patch", "-o", "out"),
            ("apply", "base", "me/other", "-o", "out2"),
            ("push", "p.safetensors", "me/other"),
        ]
    )
    assert (pulled.code, applied.code, missing.code, pushed.code) == (0, 0, 5, 5), (pulled, missing, pushed)
    assert "HF_HUB_OFFLINE" in missing.err
    assert "HF_HUB_OFFLINE" in pushed.err
    assert len(published.state["calls"]) == calls
    assert (tmp_path / "q.safetensors").read_bytes() == patch_file.read_bytes()


def offline(environment):
    return lambda *words: environment(*words) | {"HF_HUB_OFFLINE": "1"}


def test_a_hub_that_cannot_be_reached_is_5(published, several, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "address", "http://127.0.0.1:9")
    pulled, pushed = several([PULL, ("push", "p.safetensors", "me/patch")])
    assert (pulled.code, pushed.code) == (5, 5), (pulled, pushed)
    assert all(1 <= len(result.err.strip().splitlines()) <= 2 for result in (pulled, pushed))
    nothing_is_left(tmp_path)


def test_the_sha256_that_push_shows_is_what_pull_and_apply_check(hub, several, patch_file, tmp_path):
    content = patch_file.read_bytes()
    expected, other = hashlib.sha256(content).hexdigest(), hashlib.sha256(content[:-1]).hexdigest()
    dry, shown = several(
        [("push", "p.safetensors", "me/patch", "--dry-run"), ("push", "p.safetensors", "me/patch")]
    )
    for said in (dry.err, shown.out):
        assert f"SHA-256 of {NAME}: {expected}" in said, said
    pinned = f"me/patch@{hub.repos['me/patch']['refs']['main']}"
    again, good, bad, applied, refused, dry = several(
        [
            ("push", "p.safetensors", "me/patch", "--json"),
            (*PULL, "--sha256", expected.upper()),
            ("pull", "me/patch", "-o", "r.safetensors", "--sha256", other),
            ("apply", "base", "me/patch", "-o", "patched", "--sha256", expected),
            ("apply", "base", pinned, "-o", "no", "--sha256", other),
            ("pull", "me/patch", "-o", "r.safetensors", "--sha256", other, "--dry-run"),
        ]
    )
    assert (again.json["sha256"], again.json["changed"]) == (expected, False)
    assert (good.code, bad.code, applied.code, refused.code) == (0, 4, 0, 4), (good, bad, applied, refused)
    assert (tmp_path / "q.safetensors").read_bytes() == content
    assert f"me/patch: this is not the file whose --sha256 was given (expected {other}" in bad.err
    assert f"found {expected})" in refused.err
    assert (dry.code, dry.out, dry.err) == (bad.code, "", bad.err)
    assert not (tmp_path / "r.safetensors").exists()
    assert not (tmp_path / "no").exists()
