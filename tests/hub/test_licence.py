"""The licence of a base, from its card."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest
from card_support import KNOWN

from neftsurgery.errors import MachineError
from neftsurgery.hub.base_model import BaseModel
from neftsurgery.hub.licence import read_licence

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
    answer(monkeypatch, lambda self, repo, revision: SimpleNamespace(card_data=card))
    licence, warning = read_licence(KNOWN, required=True)
    assert licence == found
    assert warning == (None if found else "the card names no licence: the base, org/base, names none")


def test_an_unknown_base_has_no_licence_and_no_warning():
    assert read_licence(BaseModel(None), required=True) == ({}, None)


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
