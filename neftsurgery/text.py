"""Formatting of names and numbers for people. Names come from files and may hold any character."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from os import PathLike

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def printable(text: str) -> str:
    """``text`` on one line: what a name from a file could steer a terminal with is escaped, newlines too."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def lines(texts: Iterable[str]) -> str:
    """Texts as lines, one each, whatever names are in them."""
    return "\n".join(map(printable, texts))


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts ``layers.2`` before ``layers.10``."""
    return tuple(
        (0, int(part), part) if part.isascii() and part.isdecimal() and len(part) < 19 else (1, 0, part)
        for part in re.split(r"([0-9]+)", name)
    )


def label(name: str, length: int = 60) -> str:
    """``name`` on one line: printable, shortened in the middle to ``length`` characters, never empty."""
    clean = printable(name)
    if len(clean) > length:
        half = (length - 1) // 2
        clean = f"{clean[: length - 1 - half]}…{clean[len(clean) - half :]}"
    return clean or "(no name)"


def tilde_hint(path: str | PathLike[str]) -> str | None:
    """What to do about a path that starts with ``~``, if it does."""
    return "~ is expanded by the shell alone: write the whole path" if str(path).startswith("~") else None


def size(nbytes: float) -> str:
    """A number of bytes: ``1.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def commas(count: int) -> str:
    """A whole number with commas between thousands: ``1,376,256``."""
    return f"{count:,}"


def plural(count: int, noun: str) -> str:
    """A count with its noun: ``1 tensor``, ``2 tensors``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first of many names, and how many more there are; each on one line, shortened."""
    more = len(names) - shown
    return ", ".join(label(name, 120) for name in names[:shown]) + (f" and {more:,} more" if more > 0 else "")


def percent(share: float) -> str:
    """A share as a percentage: ``4.1%``; ``-`` for NaN. Only exactly 0 and 1 print as 0% and 100%."""
    if share != share:
        return "-"
    if share in (0, 1):
        return f"{100 * share:.0f}%"
    if 0 < share < 0.0001:
        return "<0.01%"
    if 0.9999 < share < 1:
        return ">99.99%"
    return f"{100 * share:.3g}%" if share < 0.1 else f"{100 * share:.1f}%"


def four_digits(value: float) -> str:
    """A number to four significant digits: ``0.03125``, or times a power of ten; ``-`` for NaN."""
    if value != value:
        return "-"
    digits, e, exponent = f"{value:.4g}".partition("e")
    return f"{digits}\N{MULTIPLICATION SIGN}{power_of_ten(int(exponent))}" if e else digits


def power_of_ten(exponent: int) -> str:
    """A power of ten: ``10⁻⁵``."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def correlation(value: float) -> str:
    """A correlation to two decimals, with a true minus sign; a hyphen for NaN."""
    return "-" if value != value else f"{round(value, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")
