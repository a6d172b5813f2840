"""The texts of the utilization tests."""

from __future__ import annotations

LINES = ["the cat sat", "a dog", "copy word: word", "Some longer line of letters than the others", "x"]
