"""Names and numbers as people read them; names come from files, and may be anything."""

from __future__ import annotations

__all__ = ["amount", "label", "number", "percent", "plural", "power", "printable", "signed", "size"]

_LONGEST = 60
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def printable(text: str) -> str:
    """``text`` with control characters written out: names in files must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def label(name: str, longest: int = _LONGEST) -> str:
    """``name`` fit to be shown on one line: nothing unprintable, shortened in the middle, never empty."""
    clean = printable(name.replace("\n", "\\n"))
    if len(clean) > longest:
        half = (longest - 1) // 2
        clean = f"{clean[: longest - 1 - half]}…{clean[len(clean) - half :]}"
    return clean or "(no name)"


def size(nbytes: float) -> str:
    """Bytes: ``1.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def amount(count: int) -> str:
    """A whole number: ``1,376,256``."""
    return f"{count:,}"


def plural(count: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def percent(share: float) -> str:
    """A share: ``4.1%``; ``-`` for one that is not known, never 0% or 100% for what is not quite."""
    if share != share:
        return "-"
    if share in (0, 1):
        return f"{100 * share:.0f}%"
    if 0 < share < 0.0001:
        return "<0.01%"
    if 0.9999 < share < 1:
        return ">99.99%"
    return f"{100 * share:.3g}%" if share < 0.1 else f"{100 * share:.1f}%"


def number(value: float) -> str:
    """A measured number, to four digits: ``0.03125``, or times a power of ten; ``-`` if not known."""
    if value != value:
        return "-"
    digits, e, exponent = f"{value:.4g}".partition("e")
    return f"{digits}\N{MULTIPLICATION SIGN}{power(int(exponent))}" if e else digits


def power(exponent: int) -> str:
    """A power of ten: ``10⁻⁵``."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def signed(value: float) -> str:
    """A correlation, to two digits, with a proper minus sign; ``-`` for one that is not known."""
    return "-" if value != value else f"{round(value, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")
