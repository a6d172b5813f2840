"""Fields of classes, in the Python reference, with the comments that say what they hold."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Takes the comment behind a field, or the ``#:`` lines above it, as its docstring."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """See `griffe.Extension`."""
        declared = isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Fact(")
        if attr.docstring or not (declared or isinstance(node, ast.AnnAssign)):
            return
        lines = attr.lines_collection[attr.filepath]
        behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
        above = list[str]()
        while (line := lines[node.lineno - 2 - len(above)].strip()).startswith("#:"):
            above.insert(0, line.removeprefix("#:").strip())
        text = " ".join(above) or behind.removeprefix("#").partition("# noqa")[0].strip()
        if text:
            attr.docstring = griffe.Docstring(text[0].upper() + text[1:], parent=attr)
