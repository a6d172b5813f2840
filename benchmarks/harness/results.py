"""The results file: raw runs by part. One part can be measured again; the page is made from all parts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

ONE_LINE = ("runs", "sweep", "machine")  # objects under these keys are written on one line


def load(file: Path) -> dict[str, Any]:
    """The parts measured so far, by name."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def store(file: Path, part: str, result: dict[str, Any]) -> None:
    """Replaces a part's result in the file, atomically: an interrupted run loses one part only."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(_dumps(load(file) | {part: result}))
    os.replace(fresh, file)


def _dumps(parts: dict[str, Any]) -> str:
    """JSON with one line for each run and each row of a sweep: readable, with useful diffs."""
    lines: list[str] = []

    def fold(value: Any, name: str = "") -> Any:
        if isinstance(value, dict) and name in ONE_LINE:
            lines.append(json.dumps(value))
            return f"@{len(lines) - 1}@"
        if isinstance(value, dict):
            return {key: fold(inner, key) for key, inner in value.items()}
        return [fold(inner, name) for inner in value] if isinstance(value, list) else value

    text = json.dumps(fold(parts), indent=1)
    return re.sub(r'"@(\d+)@"', lambda match: lines[int(match[1])], text) + "\n"
