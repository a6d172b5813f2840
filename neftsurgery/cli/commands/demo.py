"""``neftsurgery demo``."""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np

from ...demo.planted import PLANTED, make_base, make_tuned, planted
from ...errors import UsageError
from ...patch.patch import Patch
from ...text import plural
from ...version import install_command
from ..console import Console
from ..options import WholeNumber, common_options, dry_run_option

SHARE = "9%"
_DIFF = "diff base tuned -o scores.safetensors"
_APPLY_VERIFY_REVERT = (
    "apply base neuron_patch.safetensors -o patched",
    "verify patched neuron_patch.safetensors --expect patched",
    "revert patched neuron_patch.safetensors --base base -o restored",
)
FILES_LINES = (
    _DIFF,
    f"extract base tuned --neurons {PLANTED} -o neuron_patch.safetensors",
    *_APPLY_VERIFY_REVERT,
    f"report scores.safetensors --neurons {PLANTED} -o report.html",
)
TRAINING_LINES = (
    _DIFF,
    f"select scores.safetensors --neurons {SHARE} -o selection.safetensors",
    f"select scores.safetensors --neurons {SHARE} --policy random -o control.safetensors",
    *_APPLY_VERIFY_REVERT,
    f"report scores.safetensors control_patch.safetensors --neurons {SHARE} -o report.html",
)


class DemoSession:
    """The console that shows a demo, and the folder that its commands run in."""

    def __init__(self, console: Console, folder: Path) -> None:
        self.console = console
        self.folder = folder

    def heading(self, text: str) -> None:
        """Begin a part of the demo."""
        self.console.say("", f"== {text}")

    def run_command(self, line: str) -> None:
        """Show a command and run it."""
        from ..main import cli

        self.console.say(f"$ neftsurgery {line}")
        words = shlex.split(line)
        if self.console.quiet or self.console.as_json:
            words.append("--quiet")
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            cli.main(words, prog_name="neftsurgery", standalone_mode=False)
        finally:
            os.chdir(before)

    def check(self, text: str, passed: bool) -> bool:
        """Show whether a check passed; returns ``passed``."""
        self.console.say(f"  -> {text}: {'yes' if passed else 'NO'}")
        return passed

    def check_restored(self) -> bool:
        """Check that reverting the patch restored the base, and that the patch had changed it."""
        base, patched, restored = (
            {path.name: path.read_bytes() for path in sorted((self.folder / name).iterdir())}
            for name in ("base", "patched", "restored")
        )
        same = base == restored != patched
        return self.check("every file in restored/ equals the one in base/, bit for bit", same)

    def draw_report(self, line: str) -> None:
        """Run the command of the report, if its packages are installed."""
        if can_draw():
            self.heading("Draw a report")
            self.run_command(line)


def can_draw() -> bool:
    """Whether the packages that a report needs are installed."""
    return all(find_spec(name) is not None for name in ("jinja2", "matplotlib"))


@click.command("demo")
@click.argument("folder", required=False, metavar="[DIR]")
@click.option(
    "--files-only", is_flag=True, help="Only the demo on files: it takes seconds and needs no torch."
)
@click.option("--seed", type=WholeNumber(min=0), default=0, metavar="N", help="The seed of training.")
@dry_run_option
@common_options
def command(console: Console, folder: str | None, files_only: bool, seed: int, dry_run: bool) -> int:
    """Show all steps on a tiny model, offline, in about a minute.

    The demo pre-trains a tiny transformer, fine-tunes it, and finds the neurons that turned. It then
    trains only these from the base, and applies, verifies and reverts their patch. Without torch and
    transformers, or with --files-only, it shows diff, extract, apply, verify and revert on a synthetic
    fine-tune whose changed neurons are known. With DIR, the files are kept there. Otherwise they are
    removed.

    \b
    Example:
      neftsurgery demo
      neftsurgery demo try-it/
    """
    start, facts = time.perf_counter(), dict[str, Any]()
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    trains = not files_only and not missing
    if dry_run:
        commands = [
            f"neftsurgery {line}"
            for line in (TRAINING_LINES if trains else FILES_LINES)
            if can_draw() or not line.startswith("report ")
        ]
        for line in commands:
            console.say(f"$ {line}")
        console.answer({"dry_run": True, "trains": trains, "commands": commands})
        return 0
    with _working_folder(folder) as path:
        if trains:
            from ..training_demo import TrainingDemo

            demo = TrainingDemo(console, path, seed)
            passed = demo.run()
            facts = {"trained": [asdict(model) for model in demo.trained], "seed": seed}
        else:
            passed, facts = _show_files(DemoSession(console, path)), {"trained": None}
    seconds = time.perf_counter() - start
    console.say()
    ok = all(passed.values())
    if ok:
        console.say(f"All checks passed, in {seconds:.1f} s.{_kept(folder)}")
    else:
        failed = ", ".join(name for name, good in passed.items() if not good)
        console.note(f"neftsurgery: checks of the demo failed: {failed}")
    if missing and not files_only:
        console.say(f"The demo with training needs torch; {install_command('train')}")
    console.answer({**passed, **facts, "ok": ok, "seconds": round(seconds, 3), "folder": folder})
    return 0 if ok else 1


def _show_files(session: DemoSession) -> dict[str, bool]:
    """Find the known neurons of a fine-tune, extract them, apply them and revert them."""
    diff, extract, apply, verify, revert, report = FILES_LINES
    base = session.folder / "base"
    session.heading(f"A small Llama, and a fine-tune of it that changed {PLANTED} neurons")
    make_tuned(session.folder / "tuned", make_base(base))
    shards = plural(len(list(base.glob("*.safetensors"))), "shard")
    session.console.say(f"  base/ and tuned/: {shards} each")

    session.heading("Where did it change?")
    session.run_command(diff)

    session.heading(f"Extract the {PLANTED} most sensitive neurons")
    session.run_command(extract)
    found = session.check(f"these are exactly the {PLANTED} changed neurons", _found(session))

    session.heading("Apply them to the base, and verify the result")
    session.run_command(apply)
    session.run_command(verify)

    session.heading("Revert them")
    session.run_command(revert)
    same = session.check_restored()
    session.draw_report(report)
    return {"found_exactly_the_planted_neurons": found, "restored_bit_for_bit": same}


def _found(session: DemoSession) -> bool:
    expected = planted()
    with Patch.load(session.folder / "neuron_patch.safetensors") as patch:
        return patch.tensors.keys() == expected.keys() and all(
            np.array_equal(patch.index(name), index) for name, index in expected.items()
        )


def _kept(folder: str | None) -> str:
    """Where the files and the report are."""
    if folder is None:
        return " To keep the files and look at the report: neftsurgery demo DIR" if can_draw() else ""
    return f" The files are in {folder}." + (f" Open {folder}/report.html." if can_draw() else "")


@contextmanager
def _working_folder(folder: str | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="neft-demo-") as temporary:
            yield Path(temporary)
        return
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError("the output exists already", file=folder, hint="name a new folder, or an empty one")
    path.mkdir(parents=True, exist_ok=True)
    yield path
