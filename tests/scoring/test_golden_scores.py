"""Scores files as they are written down: version 1 and 2 must read to the same numbers for ever."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

import neftsurgery as ns

#: Of the same two pairs of checkpoints: one with a bias, an included norm, a NaN and tensors of one side, and
#: one scored by whole units. Compressed by zlib. Never to be changed.
GOLDEN = {
    "rows, version 1": """
eNrNVj+P0zAUPwQIxMYXQBBGTGQ7jpMUxJ0QOomNnZ4qt3GugZ5TkpS706mCgYGRgQ/AyMjCgHTSISaQ+ASIgU/AiJBYeHaSo2nT
Hi0LHuL4veff+70/ecrPC2tmHVidzo7MRShy0elYrQNLyVGaqE7WS1KZWS3roG09lmkWJ6pttQhqW0YD722rl2SxglcQCiXyZGff
iNNkNzPCoUgFgMNtkDsBSLoi01cBU4HGWBci0EWx2pbpMI1VbhR7e33nOqF+y3d5iKNQUIqZlKTLGQ85DyVmQkZ+1G1bY7iej5QM
p7BL2SLw0I1C1xXS4w51upEnSUi7HuOC9Tzp+U4BnqjBfidWnZL/fZAMAHhrQlX5B52Su4UujKNIgs9tzcuQlCpLTDqAZt/GdtSz
d2W83c8LUdYXQ+PAQcwA5PvDIpTbm4SbSMr6iD2pYe5jbTYQ+zI1ZoBprB7GKjSCqGfO3VhklYF2Wpw1pb5N5tOgyK3T2HToX7Eg
DTQKb3SBM7qaM9rgSztTiYK6x7ksO3ekTO+GtfSXmQFBKkVmurxKF5osyJxy6I7oZI90g9vYdUng0cB3Kfc40xfkAL4ro8Y2oS6I
en0Brag50Dmhxao3GIXGJBKDTOpQBqqWswmqKkl3FlKtsviHKbUxdYjjUEyIh5njTzPFmPk+9VcgnKcjw3c3l/MIy73KGtWKfyJt
xw4CFxbhlEGSccBneFPGCMN8ijcbj8fQffUPrlUC65lnvMKs2+TMQgWnIo+WmYtJFGUyz3S4iLItg0SWgqKzUJQhhgss+o9QDCOX
b80EWKVmqQhdjnzcEOLJYA3EfIwCPhvjSlhQbUJoQ5RJvlSAAIKIw5tCXITUwAhQEHFpQ3zLArlAifuzsZUtPAl298T4uI9IQBvi
OxGtiVoAUxn7szGuAgZAiFYf0PHwXa1PAQe+RX8aa5WMAQyinsnY8ZhdkZQH2So6/g/SSpSg22E8z3REjY1DF4MAAIIhP9sJ81Ea
igYIyGmYVMuBwIhydLXGl/+Ppf99z9uXN/T+xjtr9tdXL+r92+GdKxvF3/HPJ/B49emH0X97d+freiH/WO7Veluc771cn7gHC9ft
Nj7Xz8++HMHz6a3Nw8l7Tw9fPDiqTE7XHR2fz5T7qam9vt6sT5+n7erne1P2w7n2p+NrN/V+7vuHG2uXnrfW1t4/Ofrl+Vr2G5ff
fkg=
""",
    "units, version 1": """
eNq9Vr9v00AYTVFBCCaEOoCEFIzU6Qj2+XKxIyTCUn4IBlib4F7ic2JIzsF2aKIoUlUkJhbUIiEhJJj4CxiohFqxMSExstAFFpCg
A50YuDunqC39cQ4SXj77++7ee/d8n33ZIxl59TXHadGYuCQmjqMV+xqjnTBgTlQLQhppRa1f1u7RMPIDVtaKBihrssLvy1otiHzG
b3mSMBIHrZ5Md5gfRzLbJiHh6Hw6L5iYZ6okEnM5KOOVZHiS40XPZ3UatkOfxbLS7TbMswa0irCQr2LDNsx8ldCqBV1CMa1VMSKG
lzdtt6wN+PS4w6i7HXyY3Bvd1aHr4qpp65B60PVqeVrAhufpyIZ5O0EPWLPn+MwZrmC6sim3wSyTru95lLPUhRSpi7IokBZwZa3A
pc1ck/S4KTk912q2c24wy5x2GNzOzVK/3oiTgVGDtCURAqaEjXvtZE1TJpQLGr4p0qUCe9oQoySwHLWVSE644zM3qW1mTZa3g646
iekeukyAlHTp6XT9Yd1VV6f9/1UNObkmIYoFjO8mPxYMOhA7XjaF3HyDAdet8pqLYic50V3RdFIub7YpjDSQLEaspQI02ZiB50U0
joRsAFFlZ/ztr2skfIgAsnYh2Or7SPDIAgVYUfSHj+CTUzIUILCxqkMjMdgYGFBX82gkAo4ODISUbQridPAIAQNbyh6lhccWMGyo
6E9acBsCaGBVa2oNwr/57maKK/t2gIF5j+mq9oxEgXgbY6Rm0UgEGAFoWao2iR92OnzLAqYBVT1Kjc+xgWliNYPSo/OTiIl1RXe2
7E8T7gONdWAWVI1JB82/bKaltmnSAVv8hCG+mYPs3xc/ImYntKMlHlc+0Z8XeJx79P6EeJ4bO3VIxtNvj4m4em7xg6hnntUPiOfM
/ITMl+bLv0R+5nuvKOtnTk7K5/H1qyKuLvWbMr/2ri9iNnxyUcSVyYOXJd/nj1UZvx2+Jsedv/R0mYfnx9duirjSfb0g49KNl8uy
fn1GxFL5RVvyzL96IOc/XHwsx61/WVgeT46/mX+NG9fYMB4YMV/S79v46w/71puMvdv9b5zKpDA=
""",
    "rows, version 2": """
eNrNVT9v00AUD+LvyhdAxYwY6+58PjsB0QpVmbswNZV1sc+NIT0H2yGJoqgdGBgZ+ACMjF0YkCq1YgKJT4AY+gkYERIL7842jdO0
QCdOss/3e+/33u/ePdtH1xp6TA3f3xE5D3nOfd9oTQ0phmki/SxIUpEZLWPaMZ6LNIsT2TFaxOwY2gLPHSNIsljCI4Bc8jzZmWg4
TUaZBgc85RAc2IDbTUC6PFNUiCnBor0LCGxRLLdFOkhjmWvDeNyz72HitTyHhSgKOSGICoG7jLKQsVAgykXkRd2OMQN6PpQiXIhd
YucFD50odBwuXGYTuxu5Aoek61LGaeAK17OL4InsT/xY+qX+TUD6EHhrzlTlB5sUo8IWxlEkIOe20qXihCIL0niQQzVVTTZBbNbj
Ax3TNqnm5JNBof5RGzMtvjwSPhaahJRbn09Eqt16FtJeT2MZaiAK9Lob86xysKLAKtYzcz4nMZ16zrZN/iolXpJzMTS5WGiyJLLy
yYXMEt1K0997Gol4u6dOFJmFqhqINUhqGFHHIBMJDRHnonQaSt3UYS12WT8AUsEz3f5VUc35Yzvj0FSr+Nkz1fkWchzcdEnTcwhz
GdWN0IcXTpuRhYkDUNDj0KNh+ZYtq1Isg/4w1C4R72dCbaUvT/ZWlyqTdOdcqdWBnCglFiI2tm2CMHYRtb1FpQhRzyPeBQTn6VDr
HeXiLMFiXHmbtT76o2zbajYdGJgRCkVGTXZKN6EUU8QWdNPZbAZtW4VSnz+dBz57bUYNs1ABItwt09CfyCSKMpFnaoOmw7aAW+U5
m4zt02yHmZghzU/yf8oLNJNgnVo3bY1sk/PJQDShFIpcVmGe/rhGXyYbuCZpQvLZyv8x1D/shrWypuZ996qe3965qebjg/Xba8Vf
7scu3N58+q7tx+/Xv64W+Mdyrsa7Yr3xenWOBwMt+O2fsd5YwAfFeu1zHX/x5RDuew/bB/N59g5ePTmsXC7Hdx+o+fq3D/cbt162
Go2j3cOfrqdtlQ9cV+C6VF6NhXn++RcNayvh
""",
    "units, version 2": """
eNq9Vc9rE0EUTksVwZNIDwpCXaGnNe7ObjbZIBgv9Qd6UPDUjdvZzGyyms6uuxubEAIlgicvYgVBBD35F3iwIC3ePAkevdiLXhRs
D/bkwTcvqU1qNe3FgfDNfO997719O2+zPpHB1VZcd56nlNGUuq5SbCuCN+JQuEkljHmiFJW2o9zlcRKEwlGKRHUUtMDeUSphEgjY
AkkFTcP5FtINEaQJshGNKUQHORgMCxiPJlILQQVYeu49Dox+IKo8juJApGhpNmvGaZ0UiiSf8yzd1o2cR7lXIIxyi1c8y6S6nzNs
5igdkKcNwdnO4H3y39GZRhizPMPWCPcJ8ys5nrd039dMm+TsXvRQ1FtuINz+E8yWB7itzEiywPc5ZKnKUqSS8aQSB1EKLZR9mIX6
khqNMIqpGqhJW1Gv4BmDYLX910CbHDW69KrTFo/Raz5kvJ7Fc5LVUHA7EKxnq0dZFi4IN4rDW7L2wXyGau4pn7a/fFWa8v+ZrxFt
ZZO6lIskxDvW3inNDnUju8CDak2+fk3d1fP3c2x76rt79ivY9iPyVYtQwDULUt5P0RA4LXgrOx3oDQ6Am9yRk4ZNgQmbsUxF7bUM
OmGXVQWnMfT9hKeJbI6aJ2XQQhHA71OcJ6pumigP030pQaYS3ZJSOdKD2kujtKBTSaEgtdiBocQGGSEuFFSDYM2VGoWpZYPyG6Pk
IFUNSyt3OlN/LPjkTU0qh0uAq5/4j3OAiw/fH5PnxbETBxFPvj0ice3M0gdpzzyrjstzpjuJfKnr/JT83PdWEe2njk/jeWLzssS1
5XYd+Y13bYlT8ZPzElenD1zEfJ8/eojfDl1Bv7MXnq4APD+6cV3iavP1I8Tlay9X0H51TmLJeRFhnu6r+6h/sPQY/Ta/oD+usT6O
Z4bXXvmSds+2vq7bN99k7L/t5V/HqN8vpBXi9w==
""",
}
PAIRS = ("rows", "units")
SUMS = ("base_sq", "delta_sq", "dot", "changed")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    for name, text in GOLDEN.items():
        (folder / name).write_bytes(zlib.decompress(base64.b64decode(text)))
    return folder


def stored(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The document and the entries, read by the safetensors package alone."""
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["neuron_scores"]), load_file(path)


@pytest.mark.parametrize("pair", PAIRS)
def test_version_1_reads_as_it_is_written(golden: Path, pair: str) -> None:
    told, entries = stored(golden / f"{pair}, version 1")
    with ns.Scores.load(golden / f"{pair}, version 1") as scores:
        assert told["version"] == 1
        assert list(scores.tensors) == sorted(told["tensors"])
        for name in scores.tensors:
            np.testing.assert_array_equal(scores.values(name), entries.pop(name), strict=True)
        for entry, values in entries.items():
            np.testing.assert_array_equal(scores.sums(*entry.rsplit(":", 1)), values, strict=True)
        assert scores.facts["tensors"] == told["tensors"]


@pytest.mark.parametrize("pair", PAIRS)
def test_version_2_holds_the_numbers_of_version_1(golden: Path, pair: str) -> None:
    """Array by array: the tensors in order of names, then biases and norms."""
    old, entries = stored(golden / f"{pair}, version 1")
    new, arrays = stored(golden / f"{pair}, version 2")
    names = sorted(old["tensors"])
    elements = sorted(entry.split(":")[0] for entry in entries if entry.endswith(":changed"))
    elements = [name for name in elements if name not in names]
    for kind, array in arrays.items():
        suffix = "" if kind == "score" else f":{kind}"
        of = names + elements if kind in ("delta_sq", "changed") else names
        np.testing.assert_array_equal(array, np.concatenate([entries[f"{name}{suffix}"] for name in of]))
    assert arrays.keys() == {"score", *SUMS, *(["unit"] if pair == "units" else [])}
    assert {n: new["descriptions"][number] for n, number in new["tensors"].items()} == old["tensors"]
    left = ("version", "tensors", "descriptions")
    assert {k: v for k, v in new.items() if k not in left} == {k: v for k, v in old.items() if k not in left}


@pytest.mark.parametrize("pair", PAIRS)
def test_both_versions_read_alike(golden: Path, pair: str) -> None:
    first, second = (ns.Scores.load(golden / f"{pair}, version {version}") for version in (1, 2))
    assert dict(second.facts) == {**first.facts, "version": 2}
    assert second.tensors == first.tensors
    assert second.companion_biases == first.companion_biases
    for name in (*first.tensors, *first.companion_biases):
        for kind in (*SUMS, "unit"):
            np.testing.assert_array_equal(second.sums(name, kind), first.sums(name, kind), strict=True)
    for name in first.tensors:
        np.testing.assert_array_equal(second.values(name), first.values(name), strict=True)
    for budget in (
        {"neurons": 2},
        {"params": "60%"},
        {"changed": True},
        {"neurons": 1, "policy": "reversed"},
    ):
        one, two = (scores.select(**budget, with_bias=pair == "rows") for scores in (first, second))
        assert {n: c.index.tolist() for n, c in one.tensors.items()} == {
            n: c.index.tolist() for n, c in two.tensors.items()
        }
        assert dict(one.facts) == dict(two.facts)
    plain = [ns.inspect(golden / f"{pair}, version {version}") for version in (1, 2)]
    assert {**plain[0], "name": ""} == {**plain[1], "name": ""}


def test_what_the_golden_scores_say(golden: Path) -> None:
    with ns.Scores.load(golden / "rows, version 2") as scores:
        assert list(scores.tensors) == ["h.0.fc.weight", "h.10.fc.weight", "h.2.fc.weight"]
        assert list(scores.companion_biases) == ["h.0.fc.bias", "ln.weight"]
        assert (scores.neurons, scores.nonfinite, scores.by_unit) == (7, 1, False)
    with ns.Scores.load(golden / "units, version 2") as scores:
        assert (scores.neurons, scores.units, scores.by_unit) == (9, 3, True)
