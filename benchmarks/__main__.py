"""``python -m benchmarks files`` measures and renders; ``python -m benchmarks render`` only renders."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.files import options as files
from benchmarks.files.suite import measure
from benchmarks.page.markdown import render


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    suite = commands.add_parser("files", help="measure diff, extract, apply, in place; then render")
    files.add_arguments(suite)
    page = commands.add_parser("render", help="make the page and the charts of what was measured")
    page.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="where the results are")
    given = parser.parse_args()
    if given.command == "files":
        if given.quick:
            suite.set_defaults(**files.QUICK)
            given = parser.parse_args()
        measure(files.Options.of(given))
    render(given.out)


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("the benchmarks ask Linux for peak memory, written bytes and the page cache")
    main()
