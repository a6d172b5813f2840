"""Formatting of names and numbers."""

from __future__ import annotations

import pytest

from neftsurgery import text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.printable("a\x1b[2J\n\r"), r"a\x1b[2J\n\r"),
        (
            text.printable("\u202e\u200b\u2066\ufeff\x85\u2028\udcff"),
            r"\u202e\u200b\u2066\ufeff\x85\u2028\udcff",
        ),
        (text.printable("größe/神経"), "größe/神経"),
        (text.lines(["a\nb", "c"]), "a\\nb\nc"),
        (text.lines([]), ""),
        (text.tilde_hint("~/x"), "~ is expanded by the shell alone: write the whole path"),
        (text.tilde_hint("x~"), None),
        (text.label("a\nb"), "a\\nb"),
        (text.label(""), "(no name)"),
        (text.label("0123456789", 5), "01…89"),
        (text.size(999), "999 B"),
        (text.size(1_234_000_000), "1.2 GB"),
        (text.size(3e15), "3000.0 TB"),
        (text.commas(1_376_256), "1,376,256"),
        (text.plural(1, "tensor"), "1 tensor"),
        (text.plural(2000, "tensor"), "2,000 tensors"),
        (text.percent(float("nan")), "-"),
        (text.percent(0), "0%"),
        (text.percent(0.00001), "<0.01%"),
        (text.percent(0.0412), "4.12%"),
        (text.percent(0.412), "41.2%"),
        (text.percent(0.99999), ">99.99%"),
        (text.percent(1), "100%"),
        (text.four_digits(0.03125), "0.03125"),
        (text.four_digits(1.5e-7), "1.5\N{MULTIPLICATION SIGN}10⁻⁷"),
        (text.four_digits(float("nan")), "-"),
        (text.power_of_ten(-12), "10⁻¹²"),
        (text.correlation(-0.254), "\N{MINUS SIGN}0.25"),
        (text.correlation(-0.001), "0.00"),
        (text.correlation(float("nan")), "-"),
    ],
)
def test_formatting(shown, expected):
    assert shown == expected


def test_natural_order():
    names = ["h.10", "h.9", "h", "g.1"]
    assert sorted(names, key=text.natural_key) == ["g.1", "h", "h.9", "h.10"]
