"""The results file: raw runs by part, so that a part can be run again alone, and the page made from all."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

ONE_LINE = ("runs", "sweep", "machine")  # what is kept together


def load(file: Path) -> dict[str, Any]:
    """The parts measured so far, by name."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def store(file: Path, part: str, result: dict[str, Any]) -> None:
    """Puts a part's result in the place of its last one; at once: an interrupted run loses one part only."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(_dumps(load(file) | {part: result}))
    os.replace(fresh, file)


def _dumps(parts: dict[str, Any]) -> str:
    """JSON with a line for every run and every row of a sweep: for people to read, and diffs that tell."""
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
