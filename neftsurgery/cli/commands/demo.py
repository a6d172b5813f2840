"""``neftsurgery demo``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ...errors import UsageError
from ..console import Console
from ..demo import files_round, lines
from ..demo.stage import Stage, can_draw
from ..options import common_options, dry_run_option

__all__ = ["command"]


@click.command("demo")
@click.argument("folder", required=False, metavar="[DIR]")
@click.option("--files-only", is_flag=True, help="The round over files alone: some seconds, and no torch.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of all that is drawn in training.")
@dry_run_option
@common_options
def command(console: Console, folder: str | None, files_only: bool, seed: int, dry_run: bool) -> int:
    """See the whole round on a small model made on the spot.

    Pre-trains a tiny transformer, fine-tunes it, finds the neurons that turned, trains these alone from
    the base, and cuts, applies, verifies and reverts the patch: within a minute, offline. Where torch
    and transformers are not installed, or with --files-only: diff, extract, apply, verify and revert on
    a made-up fine-tune whose neurons are known. With DIR the files stay there; otherwise they are removed.

    \b
    Example:
      neftsurgery demo
      neftsurgery demo try-it/
    """
    start = time.perf_counter()
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    trains = not files_only and not missing
    if dry_run:
        commands = [
            line
            for line in (lines.LINES if trains else files_round.LINES)
            if can_draw() or " report " not in line
        ]
        for line in commands:
            console.say(f"$ {line}")
        console.answer({"dry_run": True, "trains": trains, "commands": commands})
        return 0
    with _workplace(folder) as place:
        held, facts = _show(Stage(console, place), seed) if trains else _show_files(Stage(console, place))
    seconds = time.perf_counter() - start
    console.say()
    if all(held.values()):
        console.say(f"All of it held, in {seconds:.1f} s.{_kept(folder)}")
    else:
        console.note("neftsurgery: the demo did not hold: " + ", ".join(k for k, v in held.items() if not v))
    if missing and not files_only:
        console.say(
            "There is more: a model that is really trained. It needs: pip install 'neftsurgery[train]'"
        )
    ok = all(held.values())
    console.answer({**held, **facts, "ok": ok, "seconds": round(seconds, 3), "folder": folder})
    return 0 if ok else 1


def _show_files(stage: Stage) -> tuple[dict[str, bool], dict[str, Any]]:
    return files_round.show(stage), {"trained": None}


def _show(stage: Stage, seed: int) -> tuple[dict[str, bool], dict[str, Any]]:
    from ..demo.training_round import show

    held, rows = show(stage, seed)
    return held, {"trained": [asdict(row) for row in rows], "seed": seed}


def _kept(folder: str | None) -> str:
    """Where the files are, and how to look at them."""
    if folder is None:
        return " To keep the files and look at the report: neftsurgery demo DIR" if can_draw() else ""
    return f" The files are in {folder}." + (f" Open {folder}/report.html." if can_draw() else "")


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
