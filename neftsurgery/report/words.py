"""Names and numbers as people read them; names come from files, and may be anything."""

from __future__ import annotations

__all__ = ["count", "label", "number", "share"]

_LONGEST = 60


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
    if 0 < value < 0.0001:
        return "<0.01%"
    if 0.9999 < value < 1:
        return ">99.99%"
    return f"{100 * value:.3g}%" if value < 0.1 else f"{100 * value:.1f}%"


def count(value: int) -> str:
    """A whole number: ``1,376,256``."""
    return f"{value:,}"


def number(value: float) -> str:
    """A measured number, to four digits; ``-`` for one that is not known."""
    return "-" if value != value else f"{value:.4g}"
