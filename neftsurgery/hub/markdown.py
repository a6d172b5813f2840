"""Markdown of names and values that come from files, which may be hostile, and tables of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["bar", "code", "link", "table"]

#: What could end a code span or a table's cell, or begin a tag or comment.
_MARKS = "`|<>"
_CLIP = 100
_BAR = 12


def code(value: object, clip: int = _CLIP) -> str:
    """``value`` as a code span that it cannot leave, in any renderer.

    In a code span nothing is a link, a tag or a formula. What could end it, and whatever does not
    print (line ends, marks that turn the direction of writing), is written out as ``\\x60``.
    """
    text = str(value)
    if len(text) > clip:
        text = text[: clip - 1] + "…"
    safe = "".join(
        c
        if c.isprintable() and c not in _MARKS
        else f"\\x{ord(c):02x}"
        if ord(c) < 256
        else f"\\u{ord(c):04x}"
        for c in text
    )
    return f"`{safe}`" if safe.strip() else "`(nothing)`"


def link(text: str, address: str) -> str:
    """A link; both must be known to be harmless."""
    return f"[{text}]({address})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> Iterator[str]:
    """Lines of a table; columns in ``right`` are flush right. Cells must be Markdown already."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("--:" if column in right else "---" for column in range(len(head))) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def bar(value: float, most: float) -> str:
    """A bar of text, at least one mark for what is not nothing."""
    return "█" * max(1, round(_BAR * value / most)) if value > 0 else ""
