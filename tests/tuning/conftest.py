from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from attach_support import ModelOnDisk

# Else torch starts as many processes as there are cores to compile with, and each imports torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def on_disk(tmp_path: Path, request: pytest.FixtureRequest) -> ModelOnDisk:
    return ModelOnDisk(tmp_path, request.param)
