from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attach_support import ModelOnDisk


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def on_disk(tmp_path: Path, request: pytest.FixtureRequest) -> ModelOnDisk:
    return ModelOnDisk(tmp_path, request.param)
