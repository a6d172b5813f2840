"""The base that several files' recipes train."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes_support import make


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of the recipes, hardly trained."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    make(folder, 5)
    return folder
