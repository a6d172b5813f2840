"""Markdown that text from hostile files cannot break out of."""

from __future__ import annotations

import re

from card_support import RENDER
from hypothesis import given, settings
from hypothesis import strategies as st

from neftsurgery.hub.card_text import code_span, link, table, text_bar


@settings(max_examples=60)
@given(st.text(max_size=30))
def test_text_cannot_leave_a_code_span(text):
    (paragraph,) = re.findall(r"<p>(.*?)</p>", RENDER.render(f"a {code_span(text)} b"), re.DOTALL)
    assert re.fullmatch(r"a <code>[^<]*</code> b", paragraph)
    cells = RENDER.render(f"|x|y|\n|---|---|\n| {code_span(text)} | b |").count("<td>")
    assert cells == 2


def test_bars():
    assert [len(text_bar(value, 100)) for value in (0, 0.1, 50, 100)] == [0, 1, 6, 12]


def test_code_spans() -> None:
    assert code_span("a`b|c\n\u202e") == "`a\\x60b\\x7cc\\x0a\\u202e`"
    assert code_span("x" * 101) == f"`{'x' * 99}…`"
    assert code_span(" ") == "`(empty)`"


def test_tables() -> None:
    rows = [["a", "1"], [link("b", "https://b"), "2"]]
    assert table(["name", "n"], rows, right=[1]).splitlines() == [
        "| name | n |",
        "|---|--:|",
        "| a | 1 |",
        "| [b](https://b) | 2 |",
    ]
