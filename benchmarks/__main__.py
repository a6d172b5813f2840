"""Measures a suite, then renders its page; ``render`` only renders."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.files import options as files
from benchmarks.files.suite import RESULTS, measure
from benchmarks.gpu import options as gpu
from benchmarks.gpu import suite as gpu_suite
from benchmarks.lossless import options as lossless
from benchmarks.page.files import render
from benchmarks.page.gpu import render_gpu
from benchmarks.page.lossless import render_lossless
from benchmarks.page.quantized import render_quantized
from benchmarks.page.training import render_training
from benchmarks.peft_comparison import suite as peft_comparison
from benchmarks.quantized import options as quantized
from benchmarks.quantized import suite as quantized_suite
from benchmarks.selection import options as selection
from benchmarks.selection.pretrained.options import PretrainedOptions
from benchmarks.switch import options as switch
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
    switches = commands.add_parser(
        "switch", help="measure switching between patches in a live model; then render"
    )
    switch.add_arguments(switches)
    device = commands.add_parser("gpu", help="tests marked for CUDA, training, switch; one page")
    gpu.add_arguments(device)
    comparison = commands.add_parser(
        "peft-comparison", help="our experiments in a checkout of PEFT's own comparison of methods"
    )
    peft_comparison.add_arguments(comparison)
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
            if given.schedules:
                from benchmarks.selection.pretrained.schedules import measure_schedules

                if given.model != "smollm2":
                    arms.error("--schedules needs --model smollm2")
                measure_schedules(PretrainedOptions.of(given))
            else:
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
    if given.command == "switch":
        if given.quick:
            switches.set_defaults(**switch.QUICK)
            given = parser.parse_args()
        from benchmarks.switch import suite as switch_suite

        switch_suite.measure(switch.Options.of(given))
    if given.command == "gpu":
        if given.quick:
            device.set_defaults(**gpu.QUICK)
            given = parser.parse_args()
        gpu_suite.measure(gpu.Options.of(given))
    if given.command == "peft-comparison":
        peft_comparison.measure(peft_comparison.Options.of(given))
        return
    _render(given)
    if given.command == "gpu" and gpu_suite.failed(given.out):
        sys.exit(1)


def _render(given: argparse.Namespace) -> None:
    """The pages of what was measured, or all."""
    if given.command in ("gpu", "switch"):
        (render_gpu if given.command == "gpu" else render_training)(given.out)
        return
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
