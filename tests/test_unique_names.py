"""The package's own words: no name for two things, and no message that spells an option as a flag."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click

import neftsurgery
from neftsurgery.cli.main import cli

COMMAND = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
PACKAGE = Path(neftsurgery.__file__).parent
MODULES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def named_types(module: ast.Module) -> Iterator[str]:
    """The classes and type aliases that a module defines."""
    for node in ast.walk(module):
        for statement in getattr(node, "body", ()) if isinstance(node, (ast.Module, ast.If)) else ():
            match statement:
                case ast.ClassDef(name=name) if not name.startswith("_"):
                    yield name
                case ast.AnnAssign(target=ast.Name(id=name), annotation=ast.Name(id="TypeAlias")):
                    yield name
                case ast.Assign(targets=[ast.Name(id=name)]) if re.fullmatch(
                    r"([A-Z][a-z]+)+[a-zA-Z]*|[A-Z]\d+", name
                ):
                    yield name


def strings(module: ast.Module) -> Iterator[tuple[int, str]]:
    """The string literals of a module besides its docstrings; what f-strings compute reads {}."""
    inner = {
        id(part)
        for node in ast.walk(module)
        if isinstance(node, (ast.JoinedStr, ast.Expr))
        for part in (node.values if isinstance(node, ast.JoinedStr) else [node.value])
    }
    for node in ast.walk(module):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.lineno, node.value


def test_no_two_modules_give_types_the_same_name():
    homes = defaultdict(list)
    for path, module in MODULES.items():
        for name in set(named_types(module)):
            homes[name].append(path)
    assert len(homes) > 150
    assert {name: sorted(paths) for name, paths in homes.items() if len(paths) > 1} == {}


def test_outside_the_command_line_no_message_spells_an_option_as_a_flag():
    """The rooms below name options as ``[[name]]``: see `neftsurgery.errors`. Commands stand in backticks."""
    commands = [cli.get_command(click.Context(cli), name) for name in cli.list_commands(click.Context(cli))]
    flags = {flag for command in commands for option in command.params for flag in option.opts}
    flags = {flag for flag in flags if flag.startswith("-")}
    assert {"--force", "--max-per-tensor", "-o", "--set", "--replace-card"} <= flags
    spelled = [
        (f"{path}:{line}", text)
        for path, module in MODULES.items()
        if not path.startswith("cli/")
        for line, text in strings(module)
        if flags & set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", COMMAND.sub("", text)))
    ]
    assert spelled == []
