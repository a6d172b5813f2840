"""Markdown for names and values from files, which may be hostile: code spans, links, tables and bars."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["code_span", "link", "table", "text_bar"]

#: Characters that could end a code span or a table cell, or begin a tag or a comment.
_SPECIAL = "`|<>"
_MAX_LENGTH = 100
_BAR_LENGTH = 12


def code_span(value: object, longest: int = _MAX_LENGTH) -> str:
    """``value`` as a code span that it cannot leave, in any renderer.

    Nothing in a code span is a link, a tag or a formula. Characters that could end the span, and those
    that do not print (line ends, marks that change the direction of writing), are escaped: ``\\x60``.
    """
    text = str(value)
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    safe = "".join(c if c.isprintable() and c not in _SPECIAL else _escaped(c) for c in text)
    return f"`{safe}`" if safe.strip() else "`(empty)`"


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def link(text: str, address: str) -> str:
    """A link; the caller knows that ``text`` and ``address`` are safe."""
    return f"[{text}]({address})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """A table; columns in ``right`` are aligned right. Cells are Markdown already."""
    rule = "|".join("--:" if column in right else "---" for column in range(len(head)))
    return "\n".join([_line(head), f"|{rule}|", *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def text_bar(value: float, largest: float) -> str:
    """A bar in characters; at least one for a value above 0."""
    return "█" * max(1, round(_BAR_LENGTH * value / largest)) if value > 0 else ""
