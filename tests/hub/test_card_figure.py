"""The figure of a card."""

from __future__ import annotations

import pytest
from card_support import KNOWN

from neftsurgery.hub.card import write_card
from neftsurgery.hub.card_figure import card_figure


def test_a_figure_needs_matplotlib(llama, monkeypatch):
    pytest.importorskip("matplotlib")
    png = card_figure(llama)
    assert png.startswith(b"\x89PNG")
    assert card_figure(llama) == png  # otherwise every push would find a change
    monkeypatch.setattr("neftsurgery.hub.card_figure.find_spec", lambda name: None)
    assert card_figure(llama) is None
    assert "![" not in write_card(llama, "me/x", KNOWN, {})
