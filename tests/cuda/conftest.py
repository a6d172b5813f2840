"""The devices of these tests: the processor always, a CUDA device where there is one.

``NEFT_CUDA_DEVICE=cpu`` puts the processor in the place of the CUDA device, to try the tests marked ``cuda``
where there is none: ``make gpu DEVICE=cpu`` does.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def cuda() -> torch.device:
    """The CUDA device, or what stands in for it."""
    device = torch.device(os.environ.get("NEFT_CUDA_DEVICE", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return device


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The processor, and the CUDA device."""
    if request.param == "cuda":
        return request.getfixturevalue("cuda")
    return torch.device("cpu")
