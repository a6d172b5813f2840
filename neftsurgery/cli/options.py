"""The options that commands share, as decorators."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import click

from ..surgery.pairing import Scope
from .console import Console

__all__ = [
    "budget_options",
    "common_options",
    "dry_run_option",
    "force_option",
    "output_option",
    "scope_options",
    "stack",
    "take_budget",
    "take_scope",
]

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


def common_options(command: Command) -> Command:
    """Those that all commands have; the command gets a `Console` for them, as first argument."""

    @functools.wraps(command)
    def wrapped(
        *args: Any,
        as_json: bool,
        quiet: bool,
        verbose: bool,
        threads: int | None,
        memory: int | None,
        **options: Any,
    ) -> Any:
        from ..storage.threads import Limits

        console = Console(as_json=as_json, quiet=quiet, limits=Limits.of(threads, memory, mapped=True))
        return command(console, *args, **options)

    wrapped.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
    return stack(
        click.option(
            "--threads",
            type=click.IntRange(min=1, max=256),
            metavar="N",
            help="Reading and computing threads. Default: two a processor. Results do not depend on it.",
        ),
        click.option(
            "--memory",
            callback=_size,
            metavar="SIZE",
            help="Memory for buffers and mapped files, such as 100MB or 1GiB. Default: 192MiB. "
            "Results do not depend on it.",
        ),
        click.option(
            "--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on stdout."
        ),
        click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
        click.option("-v", "--verbose", is_flag=True, help="Print details, and a traceback with an error."),
    )(wrapped)


dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Check and plan everything, say what would be written, write nothing."
)

force_option = click.option("--force", is_flag=True, help="Replace the output if it exists, all at once.")


def output_option(metavar: str, *, required: bool = False, text: str) -> Callable[[Command], Command]:
    """``-o``."""
    return click.option("-o", "--out", "out", metavar=metavar, required=required, help=text)


_BUDGET = (
    "neurons",
    "params",
    "threshold",
    "changed",
    "per",
    "max_per_tensor",
    "policy",
    "like",
    "with_bias",
)

budget_options = stack(
    click.option(
        "--neurons", metavar="N|P%", help="So many neurons, or a share of the scored ones: 50000, 3%."
    ),
    click.option("--params", metavar="N|P%", help="So many parameters, or a share of the model's: 200M, 3%."),
    click.option("--threshold", type=float, metavar="X", help="Every neuron that scores above X."),
    click.option(
        "--changed", is_flag=True, help="Every neuron with any differing bit: lossless where it reaches."
    ),
    click.option(
        "--like", metavar="SELECTION", help="As many per tensor as in another selection, for controls."
    ),
    click.option(
        "--per",
        type=click.Choice(["model", "layer", "tensor"]),
        help="Choose from one pool (model), or from each layer's or tensor's. Default: model.",
    ),
    click.option("--max-per-tensor", type=int, metavar="N", help="At most so many neurons of any tensor."),
    click.option(
        "--policy",
        type=click.Choice(["sensitive", "reversed", "random"]),
        help="The most sensitive first, the least sensitive first, or any. Default: sensitive.",
    ),
    click.option("--with-bias", is_flag=True, help="Take the bias elements of the chosen neurons as well."),
)

seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="For --policy random and --score random.",
)


def take_budget(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the budget options from ``options``; only those that were given."""
    taken = {name: options.pop(name) for name in _BUDGET}
    return {name: value for name, value in taken.items() if value is not None and value is not False}


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


_SCOPE = ("anatomy", "axis", "include", "exclude", "only")

scope_options = stack(
    click.option(
        "--anatomy",
        type=click.Choice(["rows", "ffn", "units"]),
        default="rows",
        show_default=True,
        help="What a neuron is: an output unit of a linear or convolution weight (rows); an up row or "
        "down column of a feed-forward block (ffn); all weights of a feed-forward or attention unit (units).",
    ),
    click.option(
        "--include", multiple=True, metavar="GLOB", help="Score these too: embeddings, head, norms, routers."
    ),
    click.option(
        "--exclude", multiple=True, metavar="GLOB", help="Leave these out, whatever --include says."
    ),
    click.option("--only", multiple=True, metavar="GLOB", help="Score nothing but these."),
    click.option(
        "--axis",
        multiple=True,
        callback=_axis,
        metavar="GLOB=N[,M]",
        help="The neuron axes of tensors that no config explains, such as '*.kernel=1'. The last match wins.",
    ),
)

score_option = click.option(
    "--score",
    type=click.Choice(["cosine", "l2", "relative", "changed", "random", "norm"]),
    default="cosine",
    show_default=True,
    help="How sensitivity is measured; random and norm are controls.",
)


def take_scope(options: dict[str, Any]) -> Scope:
    """Remove the options of `scope_options` from ``options`` and make them one value."""
    return Scope(**{name: options.pop(name) for name in _SCOPE})
