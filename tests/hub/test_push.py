"""What a push does and refuses, and the state of the Hub afterwards."""

from __future__ import annotations

import pytest
from hub_support import PLAIN, READER, WRITER
from huggingface_hub import ModelCard
from support import process, with_facts

import neftsurgery as ns
from neftsurgery.hub.push import PushPlan, PushResult
from neftsurgery.hub.repository import Repository
from neftsurgery.sources.hub_id import HubId

NAME = "neuron_patch.safetensors"
WRITES = ("POST /api/repos", "POST /api/models", "PUT /", "POST /me")


def writes(hub):
    """The calls that change something, or prepare a change."""
    return [call for call in hub.state["calls"] if call.startswith(WRITES)]


def test_a_corrupt_patch_is_4_and_the_hub_is_not_asked(hub, several, patch_file, tmp_path):
    data = patch_file.read_bytes()
    (tmp_path / "flipped.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (tmp_path / "cut.safetensors").write_bytes(data[:-9])
    (tmp_path / "text.safetensors").write_text("hello")
    results = several([("push", f"{name}.safetensors", "me/x") for name in ("flipped", "cut", "text")])
    assert [result.code for result in results] == [4, 4, 4], results
    assert "do not match" in results[0].err
    assert not any("/me/x" in call for call in hub.state["calls"])


def test_dry_run_shows_the_card_and_writes_nothing(hub, several, patch_file):
    hub.make("org/base", {"README.md": b"---\nlicense: llama3.2\nlicense_link: LICENSE\n---\nBase.\n"})
    before = hub.repos
    shown, as_json = several(
        [
            ("push", "p.safetensors", "me/patch", "--base", "org/base", "--dry-run"),
            ("push", "p.safetensors", "me/patch", "--base", "org/base", "--dry-run", "--json"),
        ]
    )
    assert (shown.code, as_json.code) == (0, 0), (shown, as_json)
    assert shown.out == as_json.json["card"]  # alone, as it may go into a file
    assert "would push 20 neurons" in shown.err
    assert (as_json.json["commit"], as_json.json["changed"], as_json.json["created"]) == (None, False, False)
    assert hub.repos == before
    assert writes(hub) == []
    card = ModelCard(as_json.json["card"])
    assert card.data.license == "llama3.2"
    assert card.data.license_link == f"{hub.address}/org/base/blob/main/LICENSE"


def test_a_dry_run_shows_the_card_to_anybody(patch_file, tmp_path, monkeypatch):
    """Without a token or a network it is the card of a new repository, with a warning."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    shown = process("push", patch_file, "me/new", "--dry-run", "--json", cwd=tmp_path, HF_HOME=str(tmp_path))
    assert shown.code == 0, shown.err
    assert "neuron patch" in shown.json["card"]
    assert any("not logged in to the Hub" in warning for warning in shown.json["warnings"])
    assert process("push", patch_file, "me/new", cwd=tmp_path, HF_HOME=str(tmp_path)).code == 5


def test_a_plan_prints_what_it_would_push_where(llama):
    plan = PushPlan(llama, None, Repository("me/x", "v2"), None, "Add it", "# Card", b"PNG", ())
    assert str(plan).splitlines() == [
        "push 15 neurons of 6 tensors to me/x (v2, a new repository)",
        "base: unknown",
        "files: neuron_patch.safetensors, README.md, neurons.png",
        f"SHA-256 of neuron_patch.safetensors: {llama.sha256()}",
        "commit message: Add it",
    ]
    there = Repository("me/x", "main", has_branch=True, head="1f" * 20)
    plan = PushPlan(llama, HubId("org/base", "v1"), there, None, "Add it", "# Card", None, ())
    assert str(plan).splitlines() == [
        "push 15 neurons of 6 tensors to me/x (main)",
        "base: org/base@v1",
        "files: neuron_patch.safetensors, README.md",
        f"SHA-256 of neuron_patch.safetensors: {llama.sha256()}",
        "commit message: Add it",
    ]
    assert "# Card" not in repr(plan)


@pytest.mark.parametrize(
    ("created", "changed", "lines"),
    [
        (True, True, ["created me/x", "pushed 1 neuron of 2 tensors to https://hub/me/x"]),
        (False, True, ["pushed 1 neuron of 2 tensors to https://hub/me/x"]),
        (False, False, ["nothing to push: me/x has this patch and this card already"]),
    ],
)
def test_a_result_prints_what_was_pushed_where(created, changed, lines):
    where, holds = ("me/x", "main", "1f" * 20, "https://hub/me/x"), "1 neuron of 2 tensors"
    done = PushResult(*where, created, changed, "# Card", 1, 2, "ab" * 32, holds)
    assert str(done).splitlines() == [
        *lines,
        f"branch main, commit {'1f' * 20}",
        f"SHA-256 of neuron_patch.safetensors: {'ab' * 32}",
    ]
    assert "# Card" not in repr(done)


REFUSED = {
    # what: (arguments, token, exit, words)
    "no token": (("me/patch",), None, 5, "hf auth login"),
    "a token that the Hub does not know": (("me/patch",), "hf_wrongwrongwrongwrong", 5, "HTTP 401"),
    "a token that may not write": (("me/there",), READER, 5, "HTTP 403"),
    "a token that may not create": (("me/patch",), READER, 5, "HTTP 403"),
    "no name": (("patch",), WRITER, 2, "org/name"),
    "a name that the Hub does not allow": (("me/pa--tch",), WRITER, 2, "Hub id"),
    "a revision in the name": (("me/there@main",), WRITER, 2, "org/name"),
    "the base itself": (("org/base", "--base", "org/base"), WRITER, 2, "the base itself"),
    "a base that is not there": (("me/patch", "--base", "org/nobase"), WRITER, 2, "no such model"),
    "a base without that revision": (("me/patch", "--base", "org/base@v7"), WRITER, 2, "no revision 'v7'"),
    "a base that is not an id": (("me/patch", "--base", "base/"), WRITER, 2, "--base is not a Hub id"),
    "public, asked for private": (("me/there", "--private"), WRITER, 2, "public"),
    "an older parent": (("me/there", "--parent", "1f" * 20), WRITER, 3, "--parent"),
    "a parent of nothing": (("me/patch", "--parent", "1f" * 20), WRITER, 3, "no repository"),
    "an empty message": (("me/there", "-m", " "), WRITER, 2, "message"),
    "a card that is not YAML": (("me/badcard",), WRITER, 3, "--replace-card"),
    "a card without an end mark": (("me/lostmark",), WRITER, 3, "the marks around the generated part"),
    "a card that is not text": (("me/binary",), WRITER, 3, "not UTF-8"),
    "a card that the Hub refuses": (("me/badlicence",), WRITER, 3, '"license" must be one of a list'),
}


def test_refusals_say_why_and_change_nothing(furnished, several, patch_file):
    before = furnished.repos
    for token in {token for _, token, _, _ in REFUSED.values()}:
        these = {what: case for what, case in REFUSED.items() if case[1] == token}
        results = several([("push", "p.safetensors", *words) for words, *_ in these.values()], token=token)
        for (what, (_, _, code, said)), result in zip(these.items(), results, strict=True):
            assert result.code == code, (what, result)
            assert said in result.err, (what, result)
            lines = [line for line in result.err.splitlines() if not line.startswith("warning:")]
            assert 1 <= len(lines) <= 2, (what, result)
            assert "Traceback" not in result.err
    assert furnished.repos == before


ANSWERS = [
    # a call of a push, the HTTP status it gets, the exit code and words of the message
    ("GET /api/models/{}", 503, 5, "HTTP 503"),
    ("POST /api/models/{}/preupload", 403, 5, "HTTP 403"),
    ("POST /{}.git/info/lfs/objects/batch", 401, 5, "HTTP 401"),
    ("PUT /_storage/{}", 403, 5, "HTTP 403"),
    ("POST /api/models/{}/commit", 403, 5, "HTTP 403"),
    ("POST /api/models/{}/commit", 409, 5, "HTTP 409"),
    ("POST /api/models/{}/commit", 412, 3, "newer commit"),
    ("POST /api/models/{}/commit", 429, 5, "too many requests"),
    ("POST /api/models/{}/commit", 500, 5, "on the Hub's side"),
]


@pytest.mark.parametrize("verbose", [False, True])
def test_what_the_hub_answers_becomes_an_exit_code(hub, several, patch_file, verbose):
    """The server repeats the token in its message; PLAIN does not even look like a token."""
    names = [f"me/there{number}" for number in range(len(ANSWERS))]
    for name, (call, status, *_) in zip(names, ANSWERS, strict=True):
        hub.make(name, {"notes.txt": b"mine"})
        hub.fault(call.format(name), status=status, times=1)
    before = hub.repos
    results = several(
        [("push", "p.safetensors", name, "-v" if verbose else "-q") for name in names],
        token=PLAIN if verbose else WRITER,
    )
    for (call, status, code, said), result in zip(ANSWERS, results, strict=True):
        assert result.code == code, (call, status, result)
        assert said in result.err
        assert ("Traceback" in result.err) == verbose
        assert verbose or 1 <= len(result.err.strip().splitlines()) <= 2, result.err
    assert hub.repos == before


def test_private_branches_and_messages(hub, several, patch_file):
    hub.make("me/there", {"notes.txt": b"mine"})
    main = hub.repos["me/there"]["refs"]["main"]
    results = several(
        [
            ("push", "p.safetensors", "me/secret", "--private", "--json"),
            ("push", "p.safetensors", "me/secret", "--private", "--json", "-m", "again", "--replace-card"),
            ("push", "p.safetensors", "me/there", "--revision", "v2", "--json"),
            ("push", "p.safetensors", "me/new", "--revision", "v2", "--json"),
        ]
    )
    assert [result.code for result in results] == [0] * 4, results
    repos = hub.repos
    assert repos["me/secret"]["private"]
    assert not repos["me/there"]["private"]
    assert repos["me/there"]["refs"]["main"] == main
    assert repos["me/there"]["refs"]["v2"] == results[2].json["commit"]
    assert set(repos["me/there"]["files"]["v2"]) == {
        ".gitattributes",
        "notes.txt",
        NAME,
        "README.md",
        "neurons.png",
    }
    assert NAME not in repos["me/new"]["files"]["main"]
    assert NAME in repos["me/new"]["files"]["v2"]


OWNED = """---
license: cc-by-4.0
tags: [my-tag]
x-mine: [1, {a: b}]
---

# My French model

I wrote this.
"""


def test_the_owners_text_is_kept_and_our_part_is_updated(hub, several, patch_file, tmp_path):
    hub.make("org/base", {"README.md": b"---\nlicense: mit\n---\n"})
    hub.make("me/french", {"README.md": OWNED.encode()})
    push = ("push", "p.safetensors", "me/french", "--base", "org/base")
    assert several([push])[0].code == 0
    first = hub.read("me/french", "README.md").decode()
    assert first.count("I wrote this.") == 1
    assert first.index("I wrote this.") < first.index("20 neurons of")
    data = ModelCard(first).data.to_dict()
    assert (data["license"], data["x-mine"]) == ("cc-by-4.0", [1, {"a": "b"}])
    assert data["tags"][0] == "my-tag"
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "adapter")
    hub.make("me/french", {"README.md": (first + "\n## Thanks\n\nTo all.\n").encode()})
    ns.extract(tmp_path / "base", tmp_path / "tuned", neurons=9, out=tmp_path / "p2.safetensors").close()
    assert several([("push", "p2.safetensors", "me/french", "--base", "org/base")])[0].code == 0
    second = hub.read("me/french", "README.md").decode()
    assert "20 neurons of" not in second
    assert second.count("9 neurons of") == 1
    assert second.index("I wrote this.") < second.index("9 neurons of") < second.index("To all.")
    assert several([(*push, "--replace-card")])[0].code == 0
    assert "I wrote this." not in hub.read("me/french", "README.md").decode()


def test_a_base_that_cannot_be_read_is_a_warning_unless_it_was_named(hub, several, pair, tmp_path):
    base, tuned = pair
    patch = ns.extract(base, tuned, neurons=5, out=tmp_path / "plain.safetensors")
    rewritten(patch, tmp_path / "p.safetensors", repo="org/gone", revision="1f" * 20)
    hub.make("org/other")
    gone, other, revision = several(
        [
            ("push", "p.safetensors", "me/patch", "--json"),
            ("push", "p.safetensors", "me/patch", "--base", "org/other"),
            ("push", "p.safetensors", "me/patch", "--base", "org/gone@v2"),
        ]
    )
    assert gone.code == 0, gone
    assert "no licence" in gone.err
    assert "org/gone" in gone.err
    card = ModelCard(gone.json["card"])
    assert (card.data.base_model, card.data.license) == ("org/gone", None)
    assert f"org/gone@{'1f' * 20} me/patch -o patched" in card.text
    assert (other.code, revision.code) == (3, 3)
    assert "another base" in other.err
    assert "another revision" in revision.err


def rewritten(patch, out, **base):
    """Write the same patch with a manifest that says more about its base."""
    with_facts(patch.path, out, base=dict(patch.base) | base)
