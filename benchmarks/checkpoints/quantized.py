"""Writes a quantized pair: tuned is base plus a little noise, and each side is quantized by itself.

As a fine-tune moves the largest number of a block, scales move too. The codes of one matrix are written again
and again, from another row on: readers cannot tell, and writing is much faster.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.checkpoints.write import CHANGE, SPREAD

Layout = Literal["fp8", "mxfp4"]
Codes = NDArray[np.uint8]
Parts = dict[str, tuple[str, NDArray[Any]]]  # by the end of the name: dtype, rows
WIDTHS = {"fp8": 4096, "mxfp4": 2880}  # of rows; of MXFP4 as in gpt-oss
ROWS = 4096 + 128  # of the matrix
STEP = 128 * 5  # rows from one weight's start to the next one's: whole blocks
EXPERTS = 4
CONFIGS: dict[str, dict[str, Any]] = {
    "fp8": {
        "model_type": "llama",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "mxfp4": {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
}


def write_quantized_pair(folder: Path, layout: Layout, nbytes: int, width: int | None = None) -> None:
    """Writes ``folder/base`` and ``folder/tuned``, of about ``nbytes`` each, synced to the disk.

    ``width`` is that of rows, a multiple of 128 (default: as in models).
    """
    generator = np.random.default_rng(0)
    shape = ROWS, width or WIDTHS[layout]
    numbers = SPREAD * generator.standard_normal(shape, np.float32)
    tuned = numbers + CHANGE * generator.standard_normal(shape, np.float32)
    for side, values in (("base", numbers), ("tuned", tuned)):
        (folder / side).mkdir(parents=True)
        (folder / side / "config.json").write_text(json.dumps(CONFIGS[layout], indent=1))
        _write(folder / side / "model.safetensors", layout, nbytes, QUANTIZE[layout](values))


def _fp8(values: NDArray[np.float32]) -> Parts:
    """E4M3 with a scale per 128 x 128, as DeepSeek does it."""
    blocks = values.reshape(ROWS // 128, 128, -1, 128)
    scales = np.abs(blocks).max(axis=(1, 3)) / 448
    size = np.abs(blocks / scales[:, None, :, None]).reshape(values.shape)
    exponent = np.maximum(np.frexp(size)[1] - 1, -6)
    steps = np.rint(np.ldexp(size, 3 - exponent)).astype(np.int32)  # of which a power of two has eight
    codes = steps + 8 * (exponent + 6)  # a fraction that rounds up carries into the exponent
    return {
        ".weight": ("F8_E4M3", codes.astype(np.uint8) | (np.signbit(values).astype(np.uint8) << 7)),
        ".weight_scale_inv": ("F32", scales.astype(np.float32)),
    }


def _mxfp4(values: NDArray[np.float32]) -> Parts:
    """E2M1 with a power of two per 32 of a row, as gpt-oss has it."""
    groups = values.reshape(ROWS, -1, 32)
    exponent = np.frexp(np.abs(groups).max(axis=2))[1] - 3
    size = np.abs(np.ldexp(groups, -exponent[..., None]))
    codes = np.digitize(size, [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]) | np.signbit(groups) << 3
    return {
        "_blocks": ("U8", (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)),
        "_scales": ("U8", (exponent + 127).astype(np.uint8)),
    }


QUANTIZE = {"fp8": _fp8, "mxfp4": _mxfp4}


def _names(layout: Layout) -> Iterator[str]:
    """Of weights, without end."""
    number = 0
    while True:
        stem = f"model.layers.{number}"
        if layout == "mxfp4":
            yield f"{stem}.mlp.experts.gate_up_proj"
        else:
            yield from (f"{stem}.self_attn.{kind}_proj" for kind in "qkvo")
            yield from (f"{stem}.mlp.{kind}_proj" for kind in ("gate", "up", "down"))
        number += 1


def _write(file: Path, layout: Layout, nbytes: int, parts: Parts) -> None:
    experts = EXPERTS if layout == "mxfp4" else 1
    height = ROWS - 128
    pieces: dict[str, tuple[str, list[int], NDArray[Any], int]] = {}
    position, size = 0, sum(rows.nbytes for _, rows in parts.values()) * experts
    for number, name in zip(range(max(1, round(nbytes / size))), _names(layout), strict=False):
        for end, (dtype, rows) in parts.items():
            share = ROWS // len(rows)
            shape = [height // share, *rows.shape[1:]]
            pieces[name + end] = dtype, [experts, *shape] if experts > 1 else shape, rows, number
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, rows, _) in pieces.items():
        stop = position + math.prod(shape) * rows.itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, _, rows, number in pieces.values():
            share = ROWS // len(rows)
            for expert in range(experts):
                turned = np.roll(rows, -STEP * (number + expert) // share, axis=0)
                stream.write(turned[: height // share].tobytes())
        stream.flush()
        os.fsync(stream.fileno())
