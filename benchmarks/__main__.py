"""Measures a suite, then renders its page; ``render`` only renders."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.files import options as files
from benchmarks.files.suite import RESULTS, measure
from benchmarks.lossless import options as lossless
from benchmarks.page.files import render
from benchmarks.page.lossless import render_lossless
from benchmarks.page.quantized import render_quantized
from benchmarks.page.training import render_training
from benchmarks.quantized import options as quantized
from benchmarks.quantized import suite as quantized_suite
from benchmarks.selection import options as selection
from benchmarks.selection.pretrained.options import PretrainedOptions
from benchmarks.training import options as training
from benchmarks.training import suite as training_suite


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    suite = commands.add_parser("files", help="measure diff, extract, apply, in place; then render")
    files.add_arguments(suite)
    steps = commands.add_parser("training", help="measure training steps; then render")
    training.add_arguments(steps)
    arms = commands.add_parser(
        "selection", help="does choosing neurons help, or only freezing: NeFT's main table in miniature"
    )
    selection.add_arguments(arms)
    whole = commands.add_parser("lossless", help="size and speed of lossless patches; then render")
    lossless.add_arguments(whole)
    codes = commands.add_parser("quantized", help="measure diff of FP8 and MXFP4 pairs; then render")
    quantized.add_arguments(codes)
    page = commands.add_parser("render", help="make the pages and the charts from stored results")
    page.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="where the results are")
    given = parser.parse_args()
    if given.command == "files":
        if given.quick:
            suite.set_defaults(**files.QUICK)
            given = parser.parse_args()
        measure(files.Options.of(given))
    if given.command == "training":
        if given.quick:
            steps.set_defaults(**training.QUICK)
            given = parser.parse_args()
        training_suite.measure(training.Options.of(given))
    if given.command == "selection":
        if given.model is not None:
            from benchmarks.selection.pretrained import suite as pretrained_suite

            pretrained_suite.measure(PretrainedOptions.of(given))
            _render(given)
            return
        from benchmarks.selection import suite as selection_suite

        selection_suite.measure(selection.Options.of(given))
    if given.command == "lossless":
        from benchmarks.lossless import suite as lossless_suite

        lossless_suite.measure(lossless.Options.of(given))
    if given.command == "quantized":
        if given.quick:
            codes.set_defaults(**quantized.QUICK)
            given = parser.parse_args()
        quantized_suite.measure(quantized.Options.of(given))
    _render(given)


def _render(given: argparse.Namespace) -> None:
    """The pages of what was measured, or all."""
    pages = {
        "files": (RESULTS, render),
        "training": (training_suite.RESULTS, render_training),
        "lossless": (lossless.RESULTS, render_lossless),
        "quantized": (quantized.RESULTS, render_quantized),
    }
    for command, (file, make) in pages.items():
        if given.command in (command, "render") and (given.out / file).exists():
            make(given.out)
    of_selection = given.out if given.command == "selection" else given.out.with_name("results")
    if given.command in ("selection", "render") and any(of_selection.glob("selection-*.jsonl")):
        # Imported late: it is large, and the memory of this process counts in that of the measured ones.
        from benchmarks.page.selection import render_selection

        render_selection(of_selection)
    if given.command in ("selection", "render") and any(of_selection.glob("pretrained-*.jsonl")):
        from benchmarks.page.pretrained import render_pretrained

        render_pretrained(of_selection)


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("the benchmarks need Linux: they read peak memory, written bytes and the page cache from it")
    main()
