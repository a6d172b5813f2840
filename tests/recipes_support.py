"""The tiny model of recipes/, as the tests use it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_TINY = runpy.run_path(str(RECIPES / "tiny_model.py"))


def tokenizer() -> Any:
    return _TINY["tokenizer"]()


def make(folder: Path, steps: int) -> None:
    _TINY["make"](folder, steps)
