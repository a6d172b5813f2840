"""Each contestant encodes and decodes each pair on one core; the entropy of the differences is the limit."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import machine
from benchmarks.harness.log import log
from benchmarks.lossless import pairs as made

RESULTS = "lossless.json"
PACKAGES = ("neftsurgery", "numpy", "numba", "zstandard", "zipnn", "torch")
Coder = Callable[[Path, Path], tuple[int, Callable[[], object]]]


@dataclass(frozen=True)
class Options:
    """What is measured: training steps and rate of the SFT, rounds, where the results go."""

    out: Path
    steps: int = 12
    rate: float = 2e-5
    rounds: int = 3


def measure(options: Options) -> dict[str, Any]:
    """Make the pairs, measure every contestant, store and return the results."""
    with tempfile.TemporaryDirectory(prefix="neft-bench-") as work:
        found = made.make(Path(work), options.steps, options.rate)
        results: dict[str, Any] = {"machine": machine.describe(Path(work), PACKAGES), "pairs": {}}
        for name, (base, tuned) in found.items():
            log(name)
            results["pairs"][name] = {
                "bytes": tuned.stat().st_size,
                **entropy(base, tuned),
                "contestants": {
                    label: _measured(label, coder, base, tuned, options.rounds)
                    for label, coder in contestants(Path(work)).items()
                },
            }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    return results


def _measured(label: str, coder: Coder, base: Path, tuned: Path, rounds: int) -> dict[str, Any]:
    coder(base, tuned)[1]()  # compiled, and in the page cache
    encode, decode, size = list[float](), list[float](), 0
    for _ in range(rounds):
        start = time.process_time()
        size, back = coder(base, tuned)
        encode.append(time.process_time() - start)
        start = time.process_time()
        back()
        decode.append(time.process_time() - start)
    nbytes = tuned.stat().st_size
    log(
        f"    {100 * size / nbytes:7.3f}%  {nbytes / min(encode) / 1e6:7.0f} MB/s in "
        f"{nbytes / min(decode) / 1e6:7.0f} MB/s out  {label}"
    )
    return {"bytes": size, "encode": encode, "decode": decode}


def entropy(base: Path, tuned: Path) -> dict[str, float]:
    """Bytes that the differences need at least, given the base's exponent, by kind of tensor."""
    from safetensors.numpy import load_file  # bf16 is read as its bits

    bits, changed, total = 0.0, 0, 0
    kinds: dict[tuple[str, int], list[np.ndarray]] = {}
    for name, (a, b) in _tensors(base, tuned, load_file).items():
        exponents, differences, moved = _symbols(a, b)
        changed, total = changed + moved, total + a.size
        for exponent in np.unique(exponents):
            key = (re.sub(r"\d+", "*", name), int(exponent))
            kinds.setdefault(key, []).append(differences[exponents == exponent])
    for parts in kinds.values():
        counts = np.unique(np.concatenate(parts), return_counts=True)[1]
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    return {"entropy": bits / 8, "changed": changed / total}


def _tensors(
    base: Path, tuned: Path, load: Callable[[Path], Any]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from neftsurgery.tensors.reader import TensorFile

    found = {}
    with TensorFile.open(base) as first, TensorFile.open(tuned) as second:
        for name, info in second.tensors.items():
            kind = f"u{info.type.itemsize}"
            found[name] = tuple(side.array_bytes(name).reshape(-1).view(kind) for side in (first, second))
    return found


def _symbols(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    width = 8 * a.itemsize
    if width not in (16, 32):
        return np.zeros(a.size, np.int64), (b != a).astype(np.int64), int((a != b).sum())
    top, full = 1 << (width - 1), (1 << width) - 1
    ordered = [np.where(x & top, full - x.astype(np.int64), x.astype(np.int64) | top) for x in (a, b)]
    return (
        (a.astype(np.int64) >> (7 if width == 16 else 23)) & 255,
        ordered[1] - ordered[0],
        int((a != b).sum()),
    )


def contestants(work: Path) -> Mapping[str, Coder]:
    """Every contestant that is installed, by name."""
    found: dict[str, Coder] = {
        "neftsurgery": lambda base, tuned: _ours(work, base, tuned, fast=False),
        "neftsurgery --fast": lambda base, tuned: _ours(work, base, tuned, fast=True),
        "zstd -3 --patch-from": lambda base, tuned: _zstd(base, tuned, 3),
        "zstd -3": lambda base, tuned: _zstd(None, tuned, 3),
        "zstd -1": lambda base, tuned: _zstd(None, tuned, 1),
        "copy": _copy,
    }
    if find_spec("zipnn") is not None:
        found["ZipNN on XOR"] = _zipnn
    else:
        log("ZipNN is not installed: skipped")
    return found


def _ours(work: Path, base: Path, tuned: Path, *, fast: bool) -> tuple[int, Callable[[], object]]:
    from neftsurgery.storage.threads import DEFAULT_MEMORY, Limits
    from neftsurgery.surgery.apply import plan_apply
    from neftsurgery.surgery.lossless import plan_lossless

    limits = Limits(1, DEFAULT_MEMORY)
    patch = plan_lossless(base, tuned, fast=fast, out=work / "patch", force=True).run(limits=limits)
    return patch.nbytes, lambda: plan_apply(base, [patch], out=work / "out", force=True).run(limits=limits)


def _zstd(base: Path | None, tuned: Path, level: int) -> tuple[int, Callable[[], object]]:
    import zstandard

    content = tuned.read_bytes()
    known = None
    window = max(20, (2 * len(content)).bit_length())
    options: dict[str, Any] = {}
    if base is not None:
        known = zstandard.ZstdCompressionDict(base.read_bytes(), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        options = {"window_log": window, "enable_ldm": True}
    settings = zstandard.ZstdCompressionParameters.from_level(level, **options)
    packed = zstandard.ZstdCompressor(dict_data=known, compression_params=settings).compress(content)
    reader = zstandard.ZstdDecompressor(dict_data=known, max_window_size=1 << window)
    return len(packed), lambda: reader.decompress(packed)


def _zipnn(base: Path, tuned: Path) -> tuple[int, Callable[[], object]]:
    import zipnn

    first, second = (np.frombuffer(path.read_bytes(), np.uint8) for path in (base, tuned))
    coder = zipnn.ZipNN(bytearray_dtype="bfloat16" if "bf16" in tuned.parent.name else "float32", threads=1)
    packed = coder.compress((first ^ second).tobytes())
    return len(packed), lambda: np.frombuffer(coder.decompress(packed), np.uint8) ^ first


def _copy(base: Path, tuned: Path) -> tuple[int, Callable[[], object]]:
    content = np.frombuffer(tuned.read_bytes(), np.uint8)
    return content.nbytes, content.copy


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# A whole fine-tune, to the bit", "", PREFACE, ""]
    for name, pair in results["pairs"].items():
        nbytes = pair["bytes"]
        lines += [
            f"## {name}",
            "",
            f"{nbytes / 1e6:.1f} MB; {100 * pair['changed']:.2f}% of the elements changed; entropy "
            f"{100 * pair['entropy'] / nbytes:.3f}%.",
            "",
            "| | % of the tuned file | encode, MB/s | decode, MB/s |",
            "|---|---|---|---|",
        ]
        for label, one in pair["contestants"].items():
            speeds = [" ".join(_speed(nbytes, one[key])) for key in ("encode", "decode")]
            lines.append(f"| {label} | {100 * one['bytes'] / nbytes:.3f} | {speeds[0]} | {speeds[1]} |")
        lines.append("")
    return "\n".join(lines)


def _speed(nbytes: int, seconds: list[float]) -> tuple[str, str]:
    speeds = [nbytes / 1e6 / max(one, 1e-9) for one in seconds]
    return f"{statistics.median(speeds):.0f}", f"({min(speeds):.0f}-{max(speeds):.0f})"


PREFACE = """Made by `python -m benchmarks lossless`: fine-tunes of all-MiniLM-L6-v2 (22.7M parameters,
rounded to bf16 before), on one core, in one run. Speeds are bytes of the tuned file per second
of processor time: the median of the rounds and their range. "SFT" is AdamW at 2e-5 in float32
on this project's documentation, "RL" a single step at 1e-6. The entropy is that of the
differences given the exponent of the base's element, by kind of tensor: what no code of this
kind can go below."""
