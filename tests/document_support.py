"""Files that carry a JSON document in their header."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support import write_file

from neftsurgery.tensors.reader import TensorFile


def carrying(folder: Path, text: str | None) -> TensorFile:
    metadata = {"format": "pt"} | ({} if text is None else {"neuron_patch": text})
    return TensorFile.open(write_file(folder / "p.safetensors", {"a": np.ones(2, np.float32)}, metadata))
