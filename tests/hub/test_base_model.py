"""The base model, from a patch's manifest and from `--base`."""

from __future__ import annotations

import pytest
from hub_support import patch_of

from neftsurgery.errors import MismatchError, UsageError
from neftsurgery.hub.base_model import BaseModel

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
    found = BaseModel.of(patch, named)
    assert found.argument == argument
    assert (found.name, found.fingerprint) == ("n", "f")
    assert (found.repo is None) == (found.hub_id is None) == (argument == "BASE")


@pytest.mark.parametrize("named", ["base/", "base", "org/base@", "org/base@../x", "org/base@a b", ""])
def test_a_base_must_be_a_hub_id(tmp_path, named):
    with pytest.raises(UsageError, match=r"^(\S.*: )?base is not a Hub id"):
        BaseModel.of(patch_of(tmp_path / "p.safetensors", {"w": 1}), named)


@pytest.mark.parametrize(
    ("named", "said"), [("org/other", "another base"), ("org/base@v7", "another revision of its base")]
)
def test_a_base_must_not_contradict_the_patch(tmp_path, named, said):
    with pytest.raises(MismatchError, match=said):
        BaseModel.of(patch_of(tmp_path / "p.safetensors", {"w": 1}, base=ORIGIN), named)
