"""One model type through every column of the table."""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import neftsurgery as ns
from neftsurgery.neurons.submodels import NO_PATTERN

from .file_columns import changed_column, diff_column, extract_column, units_column
from .live_columns import attach_column, lora_column
from .rows import load_overlay
from .runnable import runnable
from .tiny_checkpoints import TinyCheckpoints, Unusable
from .verdicts import Column, judged

__all__ = ["COLUMNS", "by_hand", "try_type"]

COLUMNS = ("diff", "units", "extract", "changed", "attach", "lora")


def by_hand() -> tuple[str, ...]:
    """Patterns of the overlay: what live models cannot tell."""
    found: dict[str, None] = {}
    for entry in load_overlay():
        found |= dict.fromkeys(" ".join(entry.get("weights", {}).values()).split())
        for block in entry.get("blocks", ()):
            found |= dict.fromkeys(text for key, text in block.items() if key not in NO_PATTERN)
    return tuple(found)


def try_type(model_type: str) -> dict[str, Any]:
    """Build the type, and fill its columns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _tried(model_type)


def _tried(model_type: str) -> dict[str, Any]:
    started = time.process_time()
    found = runnable(model_type)
    told: dict[str, Any] = {
        "class": type(found.model).__name__,
        "parameters": sum(one.numel() for one in found.model.parameters()),
        "inputs": sorted(found.inputs or ()),
        "not run": found.why,
    }
    folder = Path(tempfile.mkdtemp(prefix=f"{model_type}-"))
    try:
        case = TinyCheckpoints(found, folder)
        told["columns"] = {name: column.to_json() for name, column in _fill(case).items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    told["seconds"] = round(time.process_time() - started, 1)
    return told


def _fill(case: TinyCheckpoints) -> dict[str, Column]:
    columns = {name: Column() for name in COLUMNS}
    with judged(columns["diff"]) as column:
        scores = ns.diff(case.base, case.tuned, threads=1)
    if columns["diff"].verdict not in ("right", "part"):
        return columns
    columns["diff"] = Column()
    work: dict[str, Callable[[Column], None]] = {
        "diff": lambda column: diff_column(case, column, scores, by_hand()),
        "units": lambda column: units_column(case, column),
        "extract": lambda column: extract_column(case, column, scores),
        "changed": lambda column: changed_column(case, column),
        "attach": lambda column: attach_column(case, column, scores),
        "lora": lambda column: lora_column(case, column),
    }
    for name, fill in work.items():
        with judged(columns[name]) as column:
            try:
                fill(column)
            except Unusable as error:
                column.verdict, column.why = "not run", str(error)
    return columns
