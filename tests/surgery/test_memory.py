"""Nothing whole is ever held: peak memory of real processes on checkpoints far larger than the bound."""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

LIMIT = 400e6
HIDDEN, FFN, LAYERS, VOCABULARY = 2048, 8192, 4, 128256


def _tensors() -> dict[str, list[int]]:
    """The shapes of a Llama of 0.5 billion parameters. Its embedding alone exceeds the limit."""
    shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN]}
    for layer in range(LAYERS):
        for name, rows, columns in (
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", 512, HIDDEN),
            ("self_attn.v_proj", 512, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", FFN, HIDDEN),
            ("mlp.up_proj", FFN, HIDDEN),
            ("mlp.down_proj", HIDDEN, FFN),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = [rows, columns]
    return shapes


def _write(folder: Path, seed: int) -> None:
    """A sparse BF16 checkpoint of 1 GB: every tensor is zeros but for a random stretch of 256 kB."""
    folder.mkdir()
    header, position = {}, 0
    for name, shape in _tensors().items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    base, tuned = np.random.default_rng(0), np.random.default_rng(seed)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
        for entry in header.values():
            file.seek(8 + len(text) + entry["data_offsets"][0])
            values = base.standard_normal(1 << 17, dtype=np.float32)
            if seed:
                values += 1e-2 * tuned.standard_normal(1 << 17, dtype=np.float32)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8})
    )


@pytest.fixture(scope="module")
def gigabytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and ``tuned``, 1 GB each by size, some 8 MB each on disk."""
    folder = tmp_path_factory.mktemp("gigabytes")
    _write(folder / "base", 0)
    _write(folder / "tuned", 1)
    return folder


def _peak(folder: Path, *words: str) -> int:
    """Peak resident bytes of a command, by the system's account of that program alone.

    Not ``ru_maxrss``: that one counts what the process was before it became the program.
    """
    code = (
        "import sys\n"
        "from neftsurgery.cli.main import run\n"
        "try:\n    run(sys.argv[1:])\n"
        "except SystemExit as left:\n    assert not left.code, left.code\n"
        "status = open('/proc/self/status').read().splitlines()\n"
        "print(next(line for line in status if line.startswith('VmHWM')), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "-q"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-2]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize(
    "words",
    [
        ("diff", "base", "tuned"),
        ("diff", "base", "tuned", "--anatomy", "ffn"),
        ("diff", "base", "tuned", "--anatomy", "units"),
        ("extract", "base", "tuned", "--neurons", "3%", "-o", "rows.safetensors"),
        ("extract", "base", "tuned", "--neurons", "3%", "--anatomy", "ffn", "-o", "ffn.safetensors"),
        (
            "extract",
            "base",
            "tuned",
            "--changed",
            "--anatomy",
            "ffn",
            "-o",
            "all.safetensors",
            "--reversible",
        ),
    ],
    ids=["diff", "diff-columns", "diff-units", "extract", "extract-columns", "extract-all-reversible"],
)
def test_a_pair_of_gigabytes_stays_under_400_mb(gigabytes, words):
    assert _peak(gigabytes, *words) < LIMIT
    for patch in gigabytes.glob("*.safetensors"):
        patch.unlink()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_a_whole_fine_tune_of_gigabytes_stays_under_400_mb(gigabytes):
    assert _peak(gigabytes, "extract", "base", "tuned", "--lossless", "-o", "whole.safetensors") < LIMIT
    try:
        assert _peak(gigabytes, "verify", "tuned", "whole.safetensors") < LIMIT
        assert _peak(gigabytes, "apply", "base", "whole.safetensors", "-o", "out") < LIMIT
        sides = (gigabytes / side / "model.safetensors" for side in ("out", "tuned"))
        assert filecmp.cmp(*sides, shallow=False)
    finally:
        shutil.rmtree(gigabytes / "out", ignore_errors=True)
        (gigabytes / "whole.safetensors").unlink()
