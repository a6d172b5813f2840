"""``neftsurgery demo``."""

from __future__ import annotations

import hashlib
import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

from ...errors import UsageError
from ...patch.patch import Patch
from ..console import Console, plural
from ..demo_model import PLANTED, make_base, make_tuned, planted
from ..options import common_options, dry_run_option

__all__ = ["command"]

_DIFF = "diff base tuned"
_EXTRACT = f"extract base tuned --neurons {PLANTED} -o neuron_patch.safetensors"
_APPLY = "apply base neuron_patch.safetensors -o patched"
_VERIFY = "verify patched neuron_patch.safetensors --expect patched"
_REVERT = "revert patched neuron_patch.safetensors --base base -o restored"
_LINES = (_DIFF, _EXTRACT, _APPLY, _VERIFY, _REVERT)


@click.command("demo")
@click.argument("folder", required=False, metavar="[DIR]")
@dry_run_option
@common_options
def command(console: Console, folder: str | None, dry_run: bool) -> int:
    """See the whole round on a small checkpoint made on the spot.

    Makes a small sharded transformer checkpoint, fine-tunes known neurons of it, and then does what
    you would do: diff, extract, apply, verify, revert. Works offline, in seconds, and needs no torch.
    With DIR the files stay there; otherwise they are removed.

    \b
    Example:
      neftsurgery demo
      neftsurgery demo try-it/
    """
    start = time.perf_counter()
    if dry_run:
        for line in _LINES:
            console.say(f"$ neftsurgery {line}")
        console.answer({"dry_run": True, "commands": [f"neftsurgery {line}" for line in _LINES]})
        return 0
    with _workplace(folder) as place:
        result = _Demo(console, place).run()
    seconds = time.perf_counter() - start
    console.say()
    if all(result.values()):
        console.say(
            f"All of it held, in {seconds:.1f} s." + (f" The files are in {folder}." if folder else "")
        )
    else:
        console.note(
            "neftsurgery: the demo did not hold: " + ", ".join(k for k, v in result.items() if not v)
        )
    console.answer({**result, "ok": all(result.values()), "seconds": round(seconds, 3), "folder": folder})
    return 0 if all(result.values()) else 1


@contextmanager
def _workplace(folder: str | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="neft-demo-") as temporary:
            yield Path(temporary)
        return
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UsageError("it exists already", file=folder, hint="name a new folder, or an empty one")
    place.mkdir(parents=True, exist_ok=True)
    yield place


class _Demo:
    """The steps of the demo, each with the command a user would type."""

    def __init__(self, console: Console, place: Path) -> None:
        self._console = console
        self._place = place

    def run(self) -> dict[str, bool]:
        """Do all steps; returns which claims held."""
        base, tuned, patched, restored = (
            self._place / name for name in ("base", "tuned", "patched", "restored")
        )
        self._title(f"A small Llama, and a fine-tune of it that really moved {PLANTED} neurons")
        weights = make_base(base)
        make_tuned(tuned, weights)
        self._console.say(
            f"  {base.name}/ and {tuned.name}/: {plural(len(list(base.glob('*.safetensors'))), 'shard')} each"
        )

        self._title("Where did it change?")
        self._type(_DIFF)

        self._title(f"Cut the {PLANTED} most sensitive neurons out")
        self._type(_EXTRACT)
        found = self._found()
        self._console.say(f"  -> exactly the {PLANTED} neurons that were moved: {_yes(found)}")

        self._title("Put them into the base, and make sure")
        self._type(_APPLY)
        self._type(_VERIFY)

        self._title("Take them out again")
        self._type(_REVERT)
        same = _digests(base) == _digests(restored) != _digests(patched)
        self._console.say(f"  -> every file of restored/ equals the one of base/, bit for bit: {_yes(same)}")
        return {"found_exactly_the_planted_neurons": found, "restored_bit_for_bit": same}

    def _title(self, text: str) -> None:
        self._console.say(f"\n== {text}")

    def _type(self, line: str) -> None:
        """Show a command, and do what it does."""
        from ..main import cli

        self._console.say(f"$ neftsurgery {line}")
        words = shlex.split(line)
        if self._console.quiet or self._console.as_json:
            words.append("--quiet")
        before = Path.cwd()
        os.chdir(self._place)
        try:
            cli.main(words, prog_name="neftsurgery", standalone_mode=False)
        finally:
            os.chdir(before)

    def _found(self) -> bool:
        expected = planted()
        with Patch.load(self._place / "neuron_patch.safetensors") as patch:
            return patch.tensors.keys() == expected.keys() and all(
                np.array_equal(patch.index(name), index) for name, index in expected.items()
            )


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _yes(held: bool) -> str:
    return "yes" if held else "NO"
