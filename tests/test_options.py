"""Options are declared once: values, flags and keywords come from that declaration, or agree with it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import click
import pytest

import neftsurgery as ns
from neftsurgery.cli.console import flag
from neftsurgery.cli.options import take
from neftsurgery.errors import keyword, spelled
from neftsurgery.options import (
    BudgetOptions,
    CutOptions,
    DiffOptions,
    InspectOptions,
    PrefixOptions,
    RunOptions,
    Scope,
    ScopeOptions,
    ScoreOptions,
    SeedOptions,
    SelectOptions,
    SpreadOptions,
    declared,
    split,
)
from neftsurgery.selection.budget import Budget
from neftsurgery.storage.threads import DEFAULT_MEMORY, Limits


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_the_values_have_the_declared_options() -> None:
    assert names(Scope) == declared(ScopeOptions).keys()
    assert names(Budget) == declared(SelectOptions).keys()
    assert declared(RunOptions).keys() <= names(Limits)
    (options,) = inspect.signature(Budget.of).parameters.values()
    assert options.annotation == "Unpack[SelectOptions]"
    with pytest.raises(TypeError, match="unexpected keyword argument 'neuron'"):
        Budget.of(neuron="3%")


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("diff", (PrefixOptions, ScopeOptions, ScoreOptions, SeedOptions, RunOptions, SpreadOptions)),
        ("extract", (PrefixOptions, ScopeOptions, ScoreOptions, SelectOptions, RunOptions, SpreadOptions)),
        ("verify", (RunOptions, SpreadOptions)),
        ("select", (SelectOptions, RunOptions)),
        ("report", (SelectOptions, RunOptions)),
        ("inspect", (InspectOptions, RunOptions)),
    ],
)
def test_the_flags_are_the_declared_options(command: str, groups: tuple[type, ...]) -> None:
    found: click.Command = importlib.import_module(f"neftsurgery.cli.commands.{command}").command
    flags = {parameter.name: parameter for parameter in found.params if isinstance(parameter, click.Option)}
    for group in groups:
        for name, (_, option) in declared(group).items():
            assert flags[name].opts == ["--dask" if name == "executor" else f"--{name.replace('_', '-')}"]
            assert flags[name].help == spelled(option.help, flag)
            if option.choices:
                assert isinstance(flags[name].type, click.Choice)
                assert tuple(flags[name].type.choices) == option.choices


def test_the_keywords_of_a_verb_are_the_declared_options() -> None:
    assert declared(DiffOptions).keys() == {
        *declared(PrefixOptions), *declared(ScopeOptions), *declared(ScoreOptions), *declared(SeedOptions),
        *declared(RunOptions), *declared(SpreadOptions),
    }  # fmt: skip
    assert declared(CutOptions).keys() == {*declared(DiffOptions), *declared(BudgetOptions)}
    for verb, wrong, near in ((ns.diff, "anatomi", "anatomy"), (ns.extract, "neuron", "neurons")):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}': did you mean '{near}'"):
            verb("base", "tuned", **{wrong: 1})


def test_the_help_says_how_much_memory_is_used_by_default() -> None:
    _, option = declared(RunOptions)["memory"]
    assert f"Default: {DEFAULT_MEMORY >> 20}MiB." in option.help


def test_options_are_sorted_by_group() -> None:
    scope, run = split("diff", {"threads": 2, "only": ["a"]}, ScopeOptions, RunOptions)
    assert (scope, run) == ({"only": ["a"]}, {"threads": 2})


def test_an_option_that_is_zero_is_given() -> None:
    options = {"threshold": 0.0, "changed": False, "neurons": None, "only": (), "other": 1}
    assert take(options, BudgetOptions) == {"threshold": 0.0}
    assert options == {"only": (), "other": 1}


@pytest.mark.parametrize(
    ("text", "on_the_command_line", "in_python"),
    [
        ("[[max_per_tensor]]", "--max-per-tensor", "max_per_tensor"),
        ("[[policy=random]]", "--policy random", "policy='random'"),
        ("[[rank=8]]", "--rank 8", "rank=8"),
        ("[[force=True]]", "--force", "force=True"),
        ("[[out=...]]", "-o OUT", "out=..."),
        ("[[base=...]]", "--base BASE", "base=..."),
        ("[[executor]]", "--dask", "executor"),
        ("[[0, 2]] and [[5]] stay", "[[0, 2]] and [[5]] stay", "[[0, 2]] and [[5]] stay"),
    ],
)
def test_each_surface_spells_an_option_its_own_way(
    text: str, on_the_command_line: str, in_python: str
) -> None:
    assert spelled(text, flag) == on_the_command_line
    assert spelled(text, keyword) == in_python


def test_a_value_from_a_file_is_quoted_for_the_shell_that_it_will_be_pasted_into() -> None:
    """A message may show a prefix that a stranger's checkpoint has."""
    assert flag("strip_prefix", "model.") == "--strip-prefix model."
    assert flag("strip_prefix", "$(touch x).") == "--strip-prefix '$(touch x).'"
    assert flag("neurons", "3%") == "--neurons 3%"
    assert flag("base", "...") == "--base BASE"
