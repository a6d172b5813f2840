"""The options that commands share, as decorators."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_origin

import click

from ..errors import spelled
from ..options import AxisOption, Option, RunOptions, declared
from ..text import size
from .console import Console, flag

Command = Callable[..., Any]


def stack(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator that stands for several, listed in help in this order."""

    def apply(command: Command) -> Command:
        return functools.reduce(lambda wrapped, decorate: decorate(wrapped), reversed(decorators), command)

    return apply


_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", value.strip().lower())
    if match is None:
        raise click.BadParameter(
            f"{value!r} is not a size, as in 100MB or 1GiB", param=parameter, ctx=context
        )
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _UNITS[unit])


#: What is printed. These options may also stand before the command.
console_options = stack(
    click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on stdout."
    ),
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
    click.option("-v", "--verbose", is_flag=True, help="Print details, and a traceback with an error."),
)


def common_options(command: Command) -> Command:
    """The options of all commands; the command gets a `Console` made of them as its first argument."""

    @functools.wraps(command)
    def wrapped(*args: Any, threads: int | None, memory: int | None, **options: Any) -> Any:
        from ..sources.remote import FETCHED
        from ..storage.threads import Limits, dask_executor

        before = click.get_current_context().find_root().params  # `neftsurgery --json diff …`
        as_json, quiet, _ = (options.pop(one) or before[one] for one in ("as_json", "quiet", "verbose"))
        FETCHED.clear()
        with dask_executor(options.pop("executor", None)) as executor:
            limits = replace(Limits.of(threads, memory, mapped=True), executor=executor)
            console = Console(as_json=as_json, quiet=quiet, limits=limits)
            result = command(console, *args, **options)
        for one in FETCHED:
            console.note(f"fetched {size(one.nbytes)} of {size(one.of)} from {one.url}")
        return result

    wrapped.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
    return stack(options_of(RunOptions), console_options)(wrapped)


dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Check and plan everything, and say what would be written; write nothing."
)


def writing(*, force: str) -> Callable[[Command], Command]:
    """The last options of a command that writes an output; ``force``: the help of ``--force``."""
    return stack(click.option("--force", is_flag=True, help=force), dry_run_option, common_options)


writing_options = writing(force="Replace an existing output atomically.")

base_option = click.option(
    "--base",
    metavar="BASE",
    help="The checkpoint that the patch was made from. A reversible patch needs none.",
)


def output_option(metavar: str, *, required: bool = False, text: str) -> Callable[[Command], Command]:
    """``-o``, the output of the command."""
    return click.option("-o", "--out", "out", metavar=metavar, required=required, help=text)


def options_of(*groups: type) -> Callable[[Command], Command]:
    """The flags of the options that groups of `neftsurgery.options` declare."""
    return stack(
        *(
            _declared_flag(name, kind, option)
            for group in groups
            for name, (kind, option) in declared(group).items()
        )
    )


def _declared_flag(name: str, kind: Any, option: Option) -> Callable[[Command], Command]:
    settings: dict[str, Any] = {"help": spelled(option.help, flag), "metavar": option.metavar}
    if option.default is not None:
        settings |= {"default": option.default, "show_default": True}
    if option.alone is not None:
        settings |= {"is_flag": False, "flag_value": option.alone}
    flags = flag(name, None)
    if kind is bool:
        settings["is_flag"] = True
    elif kind == bool | None:  # by default, as the inputs are
        flags += f"/--no-{flags[2:]}"
        settings |= {"default": None}
    elif option.choices:
        settings["type"] = click.Choice(option.choices)
    elif kind == AxisOption:
        settings |= {"multiple": True, "callback": _axis}
    elif get_origin(kind) is Sequence:
        settings["multiple"] = True
    elif name == "memory":
        settings["callback"] = _size
    elif name in _RANGES:
        settings["type"] = WholeNumber(**_RANGES[name])
    elif kind in (int, float):
        settings["type"] = kind
    return click.option(flags, name, **settings)


class WholeNumber(click.IntRange):
    """An ``IntRange`` with another name in messages."""

    name = "whole number"


_RANGES: dict[str, dict[str, Any]] = {
    "threads": {"min": 1, "max": 256}, "seed": {"min": 0}, "tokens": {"min": 1}, "batch": {"min": 1},
    "rank": {"min": 1},
}  # fmt: skip


def _axis(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, Any]]:
    pairs = []
    for value in values:
        glob, equals, axes = value.rpartition("=")
        try:
            if not (glob and equals):
                raise ValueError
            pairs.append((glob, tuple(int(axis) for axis in axes.split(","))))
        except ValueError:
            raise click.BadParameter(
                f"{value!r} is not GLOB=N or GLOB=N,M, as in '*.kernel=1'", param=parameter, ctx=context
            ) from None
    return pairs


def take(options: dict[str, Any], group: type) -> dict[str, Any]:
    """Remove a group's options from ``options``, and return those that were given."""
    taken = {name: options.pop(name) for name in declared(group) if name in options}
    if (context := click.get_current_context(silent=True)) is not None:
        default = click.core.ParameterSource.DEFAULT
        taken = {k: v for k, v in taken.items() if context.get_parameter_source(k) is not default}
    return {name: v for name, v in taken.items() if v is not None and v is not False and v != ()}


def take_budget(options: dict[str, Any], group: type) -> tuple[dict[str, Any], list[str]]:
    """As `take`, with the selection ``like`` loaded; and the file that it was loaded from, if any."""
    from ..selection.selection import Selection

    budget = take(options, group)
    if "like" not in budget:
        return budget, []
    like = budget["like"]
    return budget | {"like": Selection.load(like)}, [like]
