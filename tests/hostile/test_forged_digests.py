"""XXH3 is no defence against people: a model can be forged that has every digest of the base.

The page on guarantees says so, and this shows it. XXH3 adds up two numbers per lane of 8 bytes in stripes of
64: the lane, and the product of its halves, once XORed with a constant. Five stripes reach any two sums:
three whose halves make the product, one whose product is 0 whatever its upper half, one whose product is 0
whatever its lower half.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from support import raw_file

import neftsurgery as ns

#: The start of XXH3's default secret.
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
)
HALF, WHOLE = 1 << 32, 1 << 64


def forged(row: bytes) -> bytes:
    """Other bytes with the same XXH3-128; for rows of more than 1 KiB."""
    lanes = np.frombuffer(row, "<u8").reshape(-1, 8).copy()
    for lane in range(8):
        keys = [int.from_bytes(SECRET[8 * (stripe + lane) :][:8], "little") for stripe in range(5)]
        old = [int(lanes[stripe, lane]) for stripe in range(5)]
        mixed = [value ^ key for value, key in zip(old, keys, strict=True)]
        product = sum((one % HALF) * (one >> 32) for one in mixed) % WHOLE
        first = min(product >> 31, HALF - 1)
        parts = [(1, product % (1 << 31)), (1 << 31, first), (1 << 31, (product >> 31) - first)]
        new = [(low | high << 32) ^ key for (low, high), key in zip(parts, keys, strict=False)]
        low = (
            sum(old) - sum(new) - keys[3] % HALF
        ) % HALF  # the upper half of stripe 3 is free, its product 0
        new.append(low ^ 0 | (keys[4] >> 32 << 32))  # stripe 4: its lower half is free
        rest = (sum(old) - sum(new)) % WHOLE
        assert rest % HALF == keys[3] % HALF
        new.insert(3, rest)
        lanes[:5, lane] = new
    return lanes.tobytes()


def test_a_forged_model_has_the_digests_of_the_base(tmp_path: Path, neft: Any) -> None:
    rng = np.random.default_rng(0)
    base = {"a.weight": ("F32", rng.integers(0, 1 << 30, (8, 1024), np.uint32))}
    tuned = {"a.weight": ("F32", base["a.weight"][1] ^ np.uint32(1))}
    rows = [forged(row.tobytes()) for row in base["a.weight"][1]]
    for row, original in zip(rows, base["a.weight"][1], strict=True):
        assert xxhash.xxh3_128_digest(row) == xxhash.xxh3_128_digest(original.tobytes())
        assert row != original.tobytes()
    model = {"a.weight": ("F32", np.frombuffer(b"".join(rows), np.uint32).reshape(8, 1024))}
    for name, tensors in (("base", base), ("tuned", tuned), ("forged", model)):
        raw_file(tmp_path / name, tensors)
    ns.extract(tmp_path / "base", tmp_path / "tuned", changed=True, out=tmp_path / "p").close()
    assert neft("verify", "forged", "p", "--expect", "base").code == 0
    sums = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("base", "forged")]
    assert sums[0] != sums[1]


def test_a_forged_patch_has_the_hashes_of_the_real_one_and_another_sha256(tmp_path: Path, neft: Any) -> None:
    rng = np.random.default_rng(1)
    base = {"a.weight": ("F32", rng.integers(0, 1 << 30, (8, 1024), np.uint32))}
    tuned = {"a.weight": ("F32", base["a.weight"][1] ^ np.uint32(1))}
    for name, tensors in (("base", base), ("tuned", tuned)):
        raw_file(tmp_path / name, tensors)
    patch = ns.extract(tmp_path / "base", tmp_path / "tuned", changed=True, out=tmp_path / "p")
    content, real = (tmp_path / "p").read_bytes(), patch.sha256()
    for row in patch.values("a.weight"):
        content = content.replace(row.tobytes(), forged(row.tobytes()))
    (tmp_path / "p").write_bytes(content)
    ns.Patch.load(tmp_path / "p").check()
    assert neft("apply", "base", "p", "-o", "out").code == 0
    assert neft("apply", "base", "p", "-o", "other", "--sha256", real).code == 4
    assert not (tmp_path / "other").exists()
