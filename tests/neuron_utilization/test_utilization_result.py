"""Ranks, groups and buckets of made-up neurons, for which the answer is known; and the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import neftsurgery as ns
from neftsurgery.neuron_utilization.result import TensorUtilization, Utilization, with_ranks
from neftsurgery.neurons.layout import Layout
from neftsurgery.tensors.header import TensorInfo

NAN = float("nan")


def neurons(name: str, before: list[float], after: list[float], trained: list[int]) -> TensorUtilization:
    info = TensorInfo(name, "F32", (len(before), 4))
    parts = name.split(".")
    zeros = np.zeros(len(before), np.int32)
    return TensorUtilization(
        info, Layout.of(info.shape, (0,)), ".".join(parts[:2]), ".".join(parts[2:-1]),
        np.array(before), np.array(after), zeros, zeros, zeros.astype(np.int64), zeros.astype(np.int64),
        np.isin(np.arange(len(before)), trained),
    )  # fmt: skip


@pytest.fixture
def made_up() -> Utilization:
    """Ten up neurons in two layers, ranked together, one of them without a number; two of another kind."""
    tensors = [
        neurons("layers.10.up.weight", [0.4, 0.3, 0.2, 0.1, NAN], [0.4, 0.3, 0.99, 0.1, 0.5], [2]),
        neurons("layers.2.up.weight", [0.9, 0.8, 0.7, 0.6, 0.5], [0.01, 0.8, 0.7, 0.6, 0.45], [1]),
        neurons("layers.2.down.weight", [0.5, 0.4], [0.4, 0.5], []),
    ]
    return Utilization(with_ranks(tensors), {"strongly": 3})


def test_ranks_changes_and_groups(made_up: Utilization) -> None:
    ten, two = made_up.tensors["layers.10.up.weight"], made_up.tensors["layers.2.up.weight"]
    assert two.rank_before.tolist() == [1, 2, 3, 4, 5]
    assert ten.rank_before.tolist() == [6, 7, 8, 9, 0]
    assert two.rank_after.tolist() == [9, 2, 3, 4, 5]
    assert ten.rank_after.tolist() == [6, 7, 1, 8, 0]
    assert two.change.tolist() == [-8, 0, 0, 0, 0]
    assert ten.change.tolist() == [0, 0, 7, 1, 0]
    assert made_up.pools == {"down": 2, "up": 9}
    groups = made_up.groups()
    assert {name: group.neurons for name, group in groups.items()} == {
        "all": 11, "trained": 2, "untrained": 9, "strongly_affected": 2, "suppressed": 1,
        "indirectly_affected": 1,
    }  # fmt: skip
    assert groups["all"].mean_rank_change == pytest.approx((8 + 7 + 1 + 1 + 1) / 11)
    assert groups["all"].mean_share == pytest.approx((16 / 9 + 2 / 2) / 11)
    assert groups["trained"].mean_rank_change == 3.5
    assert groups["untrained"].mean_rank_change == pytest.approx((8 + 1 + 1 + 1) / 9)
    assert groups["strongly_affected"].mean_rank_change == 7.5
    assert groups["suppressed"].mean_rank_change == groups["indirectly_affected"].mean_rank_change == 8
    assert made_up.groups(layer="layers.10", kind="up")["all"].neurons == 4
    assert made_up.groups(layer="layers.10", kind="down")["all"].mean_rank_change is None
    assert made_up.layers == ("layers.2", "layers.10")


def test_the_limit_itself_is_not_exceeded(made_up: Utilization) -> None:
    assert Utilization(made_up.tensors, {"strongly": 7}).groups()["strongly_affected"].neurons == 1
    assert Utilization(made_up.tensors, {"strongly": 6}).groups()["strongly_affected"].neurons == 2


def test_buckets() -> None:
    before, after = np.linspace(1, 0, 200), np.linspace(1, 0, 200)
    after[[0, 1]] = after[[1, 0]]  # the top percent changes places, and so do two in the middle
    after[[100, 110]] = after[[110, 100]]
    use = Utilization(with_ranks([neurons("layers.0.up.weight", list(before), list(after), [])]), {})
    buckets = use.buckets()
    assert [bucket.neurons for bucket in buckets] == [2, 4, 14, 40, 40, 40, 40, 14, 4, 2]
    assert sum(bucket.neurons for bucket in buckets) == use.neurons
    changes = [bucket.mean_rank_change for bucket in buckets]
    assert changes == [1, 0, 0, 0, 0, pytest.approx(20 / 40), 0, 0, 0, 0]


def test_it_can_be_described_saved_and_loaded(made_up: Utilization, tmp_path: Path) -> None:
    path = tmp_path / "use.safetensors"
    made_up.save(path)
    loaded = Utilization.load(path)
    assert json.dumps(loaded.describe(), allow_nan=False) == json.dumps(made_up.describe(), allow_nan=False)
    for name, tensor in made_up.tensors.items():
        for part in ("before", "after", "state_after", "rank_before", "rank_after", "trained"):
            np.testing.assert_array_equal(getattr(loaded.tensors[name], part), getattr(tensor, part))
            assert getattr(loaded.tensors[name], part).dtype == getattr(tensor, part).dtype
    described = made_up.describe()
    assert described["layers"]["layers.10"]["kinds"]["up"]["trained"]["mean_rank_change"] == 7
    assert described["kinds"]["down"]["all"]["neurons"] == 2
    assert described["limits"] == {"down": 3, "up": 3}
    with pytest.raises(ns.UsageError, match="exists"):
        made_up.save(path)


def test_a_file_of_something_else(made_up: Utilization, tmp_path: Path) -> None:
    path = tmp_path / "use.safetensors"
    made_up.save(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'\\"kind\\":\\"up\\"', b'\\"kinf\\":\\"up\\"'))
    with pytest.raises(ns.CorruptFileError, match="layer or kind"):
        Utilization.load(path)
    path.write_bytes(content.replace(b":rank_after", b":rank_aftre"))
    with pytest.raises(ns.CorruptFileError, match="rank_after does not fit"):
        Utilization.load(path)
    path.write_bytes(content.replace(b"neuron_utilization", b"neuron_utilizatiom"))
    with pytest.raises(ns.CorruptFileError, match="not a utilization file"):
        Utilization.load(path)
    path.write_bytes(content.replace(b'\\"strongly\\":3', b'\\"strongly\\":0'))
    with pytest.raises(ns.CorruptFileError, match="strongly"):
        Utilization.load(path)
