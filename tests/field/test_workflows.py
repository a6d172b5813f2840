"""The workflows of continuous integration fit GitHub's schema, and pass an audit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pages_support import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow(file):
    for words in (
        [BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", file],
        [BIN / "zizmor", "--offline", "--no-progress", "--min-severity", "medium", file],
    ):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_finds_what_is_wrong(tmp_path):
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "runs-at:"))
    done = subprocess.run(
        [BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", wrong],
        capture_output=True,
        check=False,
    )
    assert done.returncode != 0
