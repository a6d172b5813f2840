"""The options are the same in Python and on the command line."""

from __future__ import annotations

import inspect

from neftsurgery.cli.commands.report import command
from neftsurgery.neuron_utilization.options import UtilizationOptions
from neftsurgery.neuron_utilization.utilization import plan_utilization


def test_the_verb_and_the_plan_take_the_same_options() -> None:
    parameters = inspect.signature(plan_utilization).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert keywords == set(UtilizationOptions.__annotations__)


def test_the_command_has_every_option_but_the_length() -> None:
    options = {parameter.name for parameter in command.params}
    assert set(UtilizationOptions.__annotations__) - options == {"length"}
