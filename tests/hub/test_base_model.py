"""The base model, from a patch's manifest and from `--base`, and its licence, from its card."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest
from card_support import KNOWN
from hub_support import patch_of

from neftsurgery.errors import MachineError, MismatchError, UsageError
from neftsurgery.hub.card import base_of, read_licence

COMMIT = "1f" * 20
ORIGIN = {"repo": "org/base", "revision": COMMIT}


@pytest.mark.parametrize(
    ("origin", "named", "argument"),
    [
        ({}, None, "BASE"),
        ({"repo": "base/"}, None, "BASE"),
        ({"repo": 3, "revision": COMMIT}, None, "BASE"),
        (ORIGIN, None, f"org/base@{COMMIT}"),
        ({"repo": "org/base", "revision": "a; rm -r b"}, None, "org/base"),
        ({"repo": "org/base", "revision": "../x"}, None, "org/base"),
        ({}, "org/base", "org/base"),
        ({}, "org/base@v1", "org/base@v1"),
        (ORIGIN, "org/base", f"org/base@{COMMIT}"),
        (ORIGIN, f"org/base@{COMMIT}", f"org/base@{COMMIT}"),
        ({"repo": "org/base"}, "org/base@v1", "org/base@v1"),
    ],
)
def test_what_to_type_for_a_base(tmp_path, origin, named, argument):
    patch = patch_of(tmp_path / "p.safetensors", {"w": 1}, base=origin | {"name": "n", "fingerprint": "f"})
    assert str(base_of(patch, named) or "BASE") == argument


@pytest.mark.parametrize("named", ["base/", "base", "org/base@", "org/base@../x", "org/base@a b", ""])
def test_a_base_must_be_a_hub_id(tmp_path, named):
    with pytest.raises(UsageError, match=r"^(\S.*: )?base is not a Hub id"):
        base_of(patch_of(tmp_path / "p.safetensors", {"w": 1}), named)


@pytest.mark.parametrize(
    ("named", "said"), [("org/other", "another base"), ("org/base@v7", "another revision of its base")]
)
def test_a_base_must_not_contradict_the_patch(tmp_path, named, said):
    with pytest.raises(MismatchError, match=said):
        base_of(patch_of(tmp_path / "p.safetensors", {"w": 1}, base=ORIGIN), named)


LINK = "https://huggingface.co/org/base/blob/main/LICENSE"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({"license": "mit", "tags": ["x"]}, {"license": "mit"}),
        (
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
            {"license": "other", "license_name": "mine", "license_link": LINK},
        ),
        ({"license": "mit", "license_link": LINK}, {"license": "mit", "license_link": LINK}),
        ({"license": "<b>"}, {}),
        ({"license": ["mit"]}, {}),
        ({"license_link": LINK}, {}),
        (None, {}),
    ],
)
def test_the_fields_of_a_card(monkeypatch, data, found):
    card = None if data is None else SimpleNamespace(to_dict=lambda: data)
    answer(monkeypatch, lambda self, repo, revision: SimpleNamespace(card_data=card, siblings=None))
    licence, warning = read_licence(KNOWN, required=True)
    assert licence == found
    assert warning == (None if found else "the card names no licence: the base, org/base, names none")


FRONT = b"---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n"
READMES = [
    (FRONT, {"license": "apache-2.0"}),
    (b"\xef\xbb\xbf" + FRONT, {"license": "apache-2.0"}),
    (b"# Base\n", {}),
    (b"---\n- a list\n---\n", {}),
    (b"---\n{: [\n---\n", {}),
    (b"---\nlicense: caf\xe9\n---\n", {}),
    (b"---\nlicense: " + b"[" * 100_000 + b"\n---\n", {}),
    (FRONT + bytes(2 << 20), {}),
    (None, {}),
]


@pytest.mark.parametrize(("readme", "found"), READMES, ids=range(len(READMES)))
def test_without_card_data_the_readme_is_read(monkeypatch, tmp_path, readme, found):
    """Not every Hub sends the front matter with the rest of what it knows of a model."""
    names = [] if readme is None else [SimpleNamespace(rfilename="README.md")]
    info = SimpleNamespace(card_data=None, siblings=names, sha="2e" * 20)
    (tmp_path / "README.md").write_bytes(readme or b"")
    asked = []

    def download(repo, name, *, revision, force_download):
        asked.append((repo, name, revision))
        return str(tmp_path / name)

    answer(monkeypatch, lambda self, repo, revision: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    licence, warning = read_licence(KNOWN, required=True)
    assert licence == found
    assert (warning is None) == bool(found)
    assert asked == ([] if readme is None else [("org/base", "README.md", "2e" * 20)])


def test_an_unknown_base_has_no_licence_and_no_warning():
    assert read_licence(None, required=True) == ({}, None)


def test_a_base_that_cannot_be_read_is_a_warning_unless_required(monkeypatch):
    def fail(self, repo, revision):
        raise OSError("no route")

    answer(monkeypatch, fail)
    licence, warning = read_licence(KNOWN, required=False)
    assert licence == {}
    assert warning.startswith(
        "the card names no licence: fetching from the Hub failed: no route (org/base@1f"
    )
    with pytest.raises(MachineError, match="no route"):
        read_licence(KNOWN, required=True)


def answer(monkeypatch, model_info):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
