"""Help, start-up and documentation of the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import process

from neftsurgery.cli.main import _COMMANDS, cli

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_command_has_help_with_an_example_of_itself(neft, name):
    result = neft(name, "--help")
    assert result.code == 0
    example = result.out.partition("Example:")[2]
    assert f"neftsurgery {name}" in example
    for option in ("--json", "--quiet", "--verbose", "--threads", "--memory"):
        assert option in result.out


@pytest.mark.parametrize(
    "name",
    [
        "demo",
        "diff",
        "select",
        "extract",
        "merge",
        "apply",
        "revert",
        "export",
        "report",
        "train",
        "push",
        "pull",
    ],
)
def test_commands_that_write_have_a_dry_run(neft, name):
    assert "--dry-run" in neft(name, "--help").out


@pytest.mark.parametrize("name", _COMMANDS)
def test_the_short_help_is_the_commands_own(neft, name):
    """`neftsurgery --help` must not load the commands, so it keeps the first sentence of each one's help."""
    listed = " ".join(neft("--help").out.partition("\nCommands:\n")[2].split())
    assert f" {name} {_COMMANDS[name]} " in f" {listed} "
    own = " ".join(cli.get_command(None, name).help.split())
    assert f"{own} ".startswith(f"{_COMMANDS[name]} ")
    assert re.fullmatch(r"[A-Z][^.]*\.", _COMMANDS[name])


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_command_is_in_the_readme(name):
    assert f"`neftsurgery {name} " in README


def test_help_loads_no_heavy_module(tmp_path):
    """`--help` must stay far below 0.3 s, so it imports no slow module."""
    code = (
        "import sys\n"
        "from neftsurgery.cli.main import run\n"
        "try:\n    run(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'numba', 'torch', 'huggingface_hub', 'rich', 'safetensors', 'transformers'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "Usage: neftsurgery" in done.stdout
    assert done.stdout.endswith("LOADED []\n")


def test_importing_the_package_loads_no_heavy_module(tmp_path):
    code = (
        "import sys, neftsurgery\n"
        "assert neftsurgery.__version__ and 'diff' in dir(neftsurgery)\n"
        "print(sorted({'numpy', 'numba', 'torch', 'click', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_every_public_name_resolves():
    import neftsurgery

    for name in neftsurgery.__all__:
        assert getattr(neftsurgery, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(neftsurgery, "nothing")  # noqa: B009


def test_no_module_has_the_name_of_a_verb():
    """On its first import, Python binds a module to its name in the package, over a verb of that name."""
    import neftsurgery

    folder = Path(neftsurgery.__file__).parent
    assert not {path.stem for path in folder.iterdir()} & set(neftsurgery.__all__)


def test_the_whole_round_loads_no_torch(tmp_path):
    """The core must not load torch, even where it is installed."""
    code = (
        "import sys\n"
        "from neftsurgery.cli.main import run\n"
        "try:\n    run(['demo', '--files-only', '-q'])\n"
        "except SystemExit as left:\n    assert not left.code, left.code\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_version(tmp_path):
    result = process("--version", cwd=tmp_path)
    assert (result.code, result.out.split()[0]) == (0, "neftsurgery")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("neftsurgery ex", ["plain,extract", "plain,export"]),
        ("neftsurgery diff --anatomy ", ["plain,rows", "plain,ffn", "plain,units"]),
        ("neftsurgery diff --add", ["plain,--add-prefix"]),
        ("neftsurgery apply ba", ["file,ba"]),
    ],
)
def test_the_shell_completes(tmp_path, typed, offered):
    asked = {"_NEFTSURGERY_COMPLETE": "bash_complete", "COMP_WORDS": typed}
    code = "import sys; sys.argv[0] = 'neftsurgery'; from neftsurgery.cli.main import run; run([])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **asked, "COMP_CWORD": str(len(typed.split(" ")) - 1)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == offered
