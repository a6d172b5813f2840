"""The pair of the golden lossless patches, and what wrote those: `python -m lossless_golden` in ``tests``.

The pair is made of integers alone, from hashes, so that every version of every library makes the same. A
patch that was released is never written again: another one is added.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from lossless_support import Tensors, contents, folder

FOLDER = Path(__file__).parent / "patch" / "golden"
EXPECTED = FOLDER / "lossless-expected.json"
SIDE = {"config.json": b'{"model_type": "golden"}', "tokenizer.json": b'{"tokens": ["a", "b"]}\n' * 9}


def noise(name: str, count: int) -> np.ndarray:
    """Bytes that follow from a name."""
    return np.frombuffer(hashlib.shake_128(name.encode()).digest(count), np.uint8)


def weights(name: str, count: int) -> np.ndarray:
    """Bits of bfloat16 as weights have them: each lower exponent comes half as often."""
    bits = noise(name, 4 * count).view("<u4")
    upper = (bits >> 16).astype("i8") | 1 << 14
    lower = np.searchsorted(1 << np.arange(15), upper & -upper)
    return ((bits & 0x807F) | ((121 - lower) << 7)).astype("<u2")


def moved(name: str, base: np.ndarray, most: int) -> np.ndarray:
    """What small steps make of it: the lower the exponent, the likelier and the farther."""
    lower = 121 - ((base >> 7) & 0xFF)
    random = noise(name, 2 * len(base)).view("<u2")
    step = np.where((random >> 1) % (2 << most) < (1 << np.minimum(lower, most)), 1 + (random & 1) * lower, 0)
    return (base + step).astype("<u2")


def tensor(dtype: str, bits: np.ndarray, *shape: int) -> tuple[str, tuple[int, ...], bytes]:
    return dtype, shape or (len(bits),), bits.tobytes()


def pair() -> tuple[Tensors, Tensors]:
    """A base and a tuned checkpoint whose blocks take every form."""
    sparse, dense, wide = weights("sparse", 30_000), weights("dense", 15_000), weights("wide", 2_000)
    table = weights("table", 40 * 64)
    single = (wide.astype("<u4") << 16) | noise("fraction", 2 * len(wide)).view("<u2")
    zeros = np.where(np.arange(5_000) % 9 == 0, 0, weights("zeros", 5_000)).astype("<u2")
    long, one = noise("long", 800).view("<u8"), noise("one", 3_000)
    base = {
        "changed": tensor("U8", one),
        "dense": tensor("BF16", dense, 150, 100),
        "dropped": tensor("F16", noise("dropped", 40).view("<u2")),
        "grown": tensor("BF16", table, 40, 64),
        "integers": tensor("I64", long),
        "same": tensor("F8_E4M3", noise("same", 500)),
        "single": tensor("F32", single),
        "sparse": tensor("BF16", sparse, 100, 300),
        "zeros": tensor("BF16", zeros),
    }
    flipped = one.copy()
    flipped[[7, 2_900]] ^= 1
    grown = np.append(moved("table", table, 4), weights("rows", 7 * 64))
    tuned = {
        "added.raw": tensor("I8", noise("raw", 100)),
        "added.zstd": tensor("U8", np.tile(noise("word", 50), 80)),
        "changed": tensor("U8", flipped),
        "dense": tensor("BF16", moved("dense", dense, 1), 150, 100),
        "grown": tensor("BF16", grown.astype("<u2"), 47, 64),
        "integers": tensor("I64", long + noise("more", 100) % 3),
        "same": base["same"],
        "single": tensor("F32", single + (noise("far", 2 * len(wide)).view("<u2") % 9_000).astype("<u4")),
        "sparse": tensor("BF16", moved("sparse", sparse, 9), 100, 300),
        "zeros": tensor("BF16", np.where(zeros == 0, 0x3586, moved("zeros", zeros, 6)).astype("<u2")),
    }
    return base, tuned


def make(path: Path) -> tuple[Path, Path]:
    """The base, one file and its configuration, and the tuned checkpoint, two shards."""
    base, tuned = pair()
    first = folder(path / "base", base, files={**SIDE, "config.json": b"{}"})
    return first, folder(path / "tuned", tuned, 2, files=SIDE, metadata={"format": "pt"})


def main() -> None:
    import tempfile

    import neftsurgery as ns

    FOLDER.mkdir(exist_ok=True)
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        base, tuned = make(Path(work))
        for name, options in (("small", {"reversible": True}), ("fast", {"fast": True})):
            out = FOLDER / f"lossless-{name}.safetensors"
            if out.exists():
                sys.exit(f"{out} is there: golden patches stay as they are")
            ns.extract(base, tuned, lossless=True, out=out, **options).close()
        expected["base"], expected["tuned"] = contents(base), contents(tuned)
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
