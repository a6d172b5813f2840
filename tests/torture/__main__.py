"""``python -m tests.torture --times 1000``: tries faults for a long time and puts the counts into a page.

Each run stores its counts in a JSON file, beside those of other parts (``--only``). The table of
``docs/guarantees.md`` is made from that file. ``--times 0`` only makes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .table import put_table

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "guarantees" / "figures.json"
PAGE = ROOT / "docs" / "guarantees.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=100, help="trials of each fault; a thousand inputs each")
    parser.add_argument("--only", default="", help="tests whose names match, as pytest's -k takes it")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    code = 0
    if options.times:
        with tempfile.TemporaryDirectory() as folder:
            trials = Path(folder) / "trials.json"
            code = run(options.times, options.only, trials)
            if trials.exists():
                join(options.figures, json.loads(trials.read_text()))
    if options.figures.exists():
        put_table(options.page, json.loads(options.figures.read_text()))
    return code


def run(times: int, only: str, trials: Path) -> int:
    """Run the tests of this folder, with ``times`` trials of each fault. Returns pytest's exit code."""
    environment = {**os.environ, "NEFT_TORTURE": str(times), "NEFT_TORTURE_TRIALS": str(trials)}
    command = [sys.executable, "-m", "pytest", "-q", "tests/torture", *(["-k", only] if only else [])]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def join(figures: Path, rows: list[dict[str, Any]]) -> None:
    """Replace earlier rows of the same fault and work."""
    known = json.loads(figures.read_text())["rows"] if figures.exists() else []
    joined = {(row["fault"], row["work"]): row for row in [*known, *rows]}
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    content = {"machine": machine, "rows": [joined[key] for key in sorted(joined)]}
    figures.parent.mkdir(parents=True, exist_ok=True)
    figures.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
