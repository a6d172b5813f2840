"""YAML for recipes: PyYAML's safe loader, reduced to what recipes need, and errors with a line number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError, naming

__all__ = ["load_yaml", "parse_yaml"]

_MAX_BYTES = 100_000
_MAX_DEPTH = 50


def load_yaml(file: Path) -> Any:
    """The content of a recipe file.

    Raises UsageError if it is too large to be a recipe, or not YAML in UTF-8.
    """
    with naming(file), open(file, "rb") as stream:
        raw = stream.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise UsageError(f"this is not a recipe: it is larger than {_MAX_BYTES:,} bytes", file=file)
    try:
        return parse_yaml(raw.decode("utf-8"), file)
    except UnicodeDecodeError as error:
        raise UsageError("this is not a recipe: it is not UTF-8 text", file=file) from error


def parse_yaml(text: str, file: str | Path) -> Any:
    """The value of a YAML text; ``file`` is named in errors. Raises UsageError if it is not valid YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise UsageError("not valid YAML: it is nested too deeply", file=file) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise UsageError(f"not valid YAML{where}: {problem}", file=file) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML raises these for `!!timestamp x` and the like.
        raise UsageError("not valid YAML: a value does not match its tag", file=file) from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """The safe loader, which also refuses duplicate keys, aliases and deep nesting.

    A few lines of aliases to aliases expand to a document of any size. The time PyYAML takes for nested
    brackets is quadratic in their depth.
    """

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        if self.flow_level >= _MAX_DEPTH:
            raise yaml.scanner.ScannerError(None, None, "it is nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"*{event.anchor}: recipes have no anchors and aliases", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if (value := str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{value!r} is given twice", key.start_mark
                )
            seen.add(value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping
