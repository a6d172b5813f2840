"""What the site adds to the pages: references made from the code, and links that fit."""

from __future__ import annotations

import re
import runpy

import click
import pytest
from pages_support import ROOT

import neftsurgery
from neftsurgery.cli.main import cli
from neftsurgery.options import declared

HOOKS = runpy.run_path(str(ROOT / "docs" / "site" / "hooks.py"))
HOME = HOOKS["HOME"]


def test_the_reference_has_every_command_and_option():
    page = HOOKS["command_reference"]()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    context = click.Context(cli, info_name="neftsurgery")
    assert list(sections) == cli.list_commands(context)
    for name, text in sections.items():
        assert f"$ neftsurgery {name}" in text
        flags = [flag for one in cli.get_command(context, name).params for flag in one.opts if flag[0] == "-"]
        assert len(flags) > 5
        for flag in flags:
            assert re.search(rf"^\| `[^`]*(?<![\w-]){flag}\b", text, re.MULTILINE), (name, flag)


def test_the_reference_has_every_public_name_and_shared_keyword():
    page = HOOKS["python_reference"]()
    named = {line.rpartition(".")[2] for line in re.findall(r"^::: (.*)$", page, re.MULTILINE)}
    assert named == {*neftsurgery.__all__, "NeftConfig"} - {"__version__"}
    for group in HOOKS["GROUPS"].values():
        for keyword in declared(group):
            assert f"| `{keyword}: " in page


@pytest.mark.parametrize(
    ("written", "linked"),
    [
        ("lossless.md#in-place", "lossless.md#in-place"),
        ("https://example.org/docs/a.md", "https://example.org/docs/a.md"),
        ("../README.md#install", "index.md#install"),
        ("docs/lora.md", "lora.md"),
        ("CONTRIBUTING.md", "contributing.md"),
        (f"{HOME}blob/main/docs/glossary.md", "glossary.md"),
        (f"{HOME}blob/main/CHANGELOG.md", "changelog.md"),
        ("../recipes", f"{HOME}tree/main/recipes"),
        ("../recipes/quickstart.yaml", f"{HOME}blob/main/recipes/quickstart.yaml"),
        ("https://raw.githubusercontent.com/neftsurgery/neftsurgery/main/docs/picture.svg", "picture.svg"),
    ],
)
def test_links_fit_the_site(written, linked):
    assert HOOKS["site_links"](f"See [it]({written}).") == f"See [it]({linked})."


def test_a_link_to_a_file_that_is_not_there_stops_the_build():
    with pytest.raises(FileNotFoundError, match=r"recipes/nothing\.yaml"):
        HOOKS["site_links"]("[it](../recipes/nothing.yaml)")


def test_lists_get_the_empty_line_that_they_need():
    page = "So:\n- one\n  more\n- two\n\n```\na\n- b\n```\n\n1. x\n2. y\n"
    assert HOOKS["loosened_lists"](page) == page.replace("So:\n", "So:\n\n")
