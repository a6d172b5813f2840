"""Names and numbers as people read them; names come from files, and may be anything."""

from __future__ import annotations

__all__ = ["count", "label", "number", "power", "share", "signed"]

_LONGEST = 60
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def label(name: str, longest: int = _LONGEST) -> str:
    """``name`` fit to be shown: nothing unprintable, shortened in the middle, never empty."""
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    if len(clean) > longest:
        half = (longest - 1) // 2
        clean = f"{clean[: longest - 1 - half]}…{clean[len(clean) - half :]}"
    return clean or "(no name)"


def share(value: float) -> str:
    """A share: ``4.1%``; ``-`` for one that is not known, never 0% or 100% for what is not quite."""
    if value != value:
        return "-"
    if value in (0, 1):
        return f"{100 * value:.0f}%"
    if 0 < value < 0.0001:
        return "<0.01%"
    if 0.9999 < value < 1:
        return ">99.99%"
    return f"{100 * value:.3g}%" if value < 0.1 else f"{100 * value:.1f}%"


def count(value: int) -> str:
    """A whole number: ``1,376,256``."""
    return f"{value:,}"


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
