"""How a fine-tune is stored, by tensor and by kind, against counts of bytes by numpy."""

from __future__ import annotations

import numpy as np
import pytest
from lossless_support import Tensors, folder, tensor, touched
from safetensors import safe_open

import neftsurgery as ns
from neftsurgery.patch.lossless import LosslessPatch, StoredWeights, form_shares

RNG = np.random.default_rng(0)
#: By kind: its tensors.
KINDS = {
    "self_attn.q_proj": [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3)],
    "mlp.experts.*.up_proj": [f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in range(4)],
    "mlp.up_proj.bias": ["model.layers.1.mlp.up_proj.bias"],
    "model.embed_tokens": ["model.embed_tokens.weight"],
    "model.norm": ["model.norm.weight"],
    "empty": ["empty"],
}  # fmt: skip


@pytest.fixture(scope="module")
def sides() -> tuple[Tensors, Tensors]:
    base = {name: tensor("BF16", (40, 30), RNG) for names in KINDS.values() for name in names}
    base["empty"] = tensor("F32", (0, 4), RNG)
    base["model.embed_tokens.weight"] = tensor("F32", (1 << 10, 1100), RNG)  # two blocks
    tuned = {name: touched(one, 0.1, RNG) if "layers" in name else one for name, one in base.items()}
    data = bytearray(base["model.embed_tokens.weight"][2])
    data[-4:] = b"\1\2\3\4"
    tuned["model.embed_tokens.weight"] = ("F32", (1 << 10, 1100), bytes(data))
    return base, tuned


@pytest.fixture(scope="module")
def patch(sides: tuple[Tensors, Tensors], tmp_path_factory: pytest.TempPathFactory) -> LosslessPatch:
    at = tmp_path_factory.mktemp("stored")
    base, tuned = (folder(at / name, side) for name, side in zip(("base", "tuned"), sides, strict=True))
    return ns.extract(base, tuned, lossless=True, out=at / "p.safetensors")


def counted(names: list[str], base: Tensors, tuned: Tensors) -> tuple[int, int, int]:
    """Elements, elements that changed, and bytes."""
    pairs = [(base[name][2], tuned[name][2], "u2" if base[name][0] == "BF16" else "u4") for name in names]
    arrays = [(np.frombuffer(a, kind), np.frombuffer(b, kind)) for a, b, kind in pairs]
    changed = sum(int((a != b).sum()) for a, b in arrays)
    return sum(len(a) for a, _ in arrays), changed, sum(a.nbytes for a, _ in arrays)


def test_kinds_are_sums_over_their_tensors(patch: LosslessPatch, sides: tuple[Tensors, Tensors]) -> None:
    found = patch.kinds()
    assert found.keys() == KINDS.keys()
    for kind, names in KINDS.items():
        one = found[kind]
        assert one.tensors == len(names)
        assert (one.elements, one.changed, one.tuned_bytes) == counted(names, *sides), kind
        assert sum(one.forms.values()) == one.tuned_bytes
    assert found["empty"].forms == {}
    assert found["model.norm"].forms == {"same": 2400}
    embedding = found["model.embed_tokens"]
    assert embedding.forms["same"] == 4 << 20
    assert embedding.changed == 1
    sizes = [one.code for one in found.values()]
    assert sizes == sorted(sizes, reverse=True)
    with safe_open(patch.path, "numpy") as file:
        assert sum(sizes) == file.get_slice("code").get_shape()[0]


def test_tensors_are_counted_one_by_one(patch: LosslessPatch, sides: tuple[Tensors, Tensors]) -> None:
    found = patch.weights()
    assert found.keys() == sides[1].keys()
    for name, one in found.items():
        assert (one.elements, one.changed, one.tuned_bytes) == counted([name], *sides)
    assert found["empty"] == StoredWeights(tensors=1)


def test_shares_of_forms_as_text() -> None:
    assert form_shares({"same": 25, "coded": 75}) == "coded 75.0%, same 25.0%"
    assert form_shares({"raw": 3}) == "raw 100%"
    assert form_shares({}) == "-"
