"""extract: what it refuses, what it says of where a patch came from, and what memory it takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import Result, patch_rows, patched_by_hand, raw_file, raw_folder, raw_read, snapshot, write_file

import neftsurgery as ns
from neftsurgery.surgery.extract import plan_extract

RNG = np.random.default_rng(0)
SHAPES = {"a.weight": (8, 6), "b.weight": (5, 9), "a.bias": (8,), "norm": (6,)}
BASE = {n: ("BF16", RNG.integers(0x3C00, 0x4000, shape, np.uint16)) for n, shape in SHAPES.items()}
TUNED = {n: (kind, bits ^ RNG.integers(0, 8, bits.shape, np.uint16)) for n, (kind, bits) in BASE.items()}


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    return raw_folder(tmp_path / "base", BASE, 3), raw_folder(tmp_path / "tuned", TUNED)


def refused(root: Path, error: type[ns.NeftError], call: Callable[[], object], *says: str) -> None:
    before = snapshot(root)
    with pytest.raises(error) as caught:
        call()
    for word in says:
        assert word in str(caught.value)
    assert snapshot(root) == before


def manifest(path: Path) -> dict:
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["neuron_patch"])


def test_outputs_that_make_no_sense(sides: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = sides
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder").mkdir()
    refused(
        tmp_path,
        ns.UsageError,
        lambda: ns.extract(*sides, changed=True, out=tmp_path / "taken"),
        "force=True",
    )
    for out in (base, tuned, base / "p", tuned / "p", tmp_path / "no" / "p", base / "config.json" / "p"):
        for force in (False, True):
            call = lambda out=out, force=force: ns.extract(*sides, changed=True, out=out, force=force)  # noqa: E731
            refused(tmp_path, ns.UsageError, call, str(out))
    single = tuned / "model.safetensors"
    call = lambda: ns.extract(base, single, changed=True, out=single, force=True)  # noqa: E731
    refused(tmp_path, ns.UsageError, call, "is the input")
    refused(tmp_path, ns.UsageError, lambda: ns.extract(*sides, changed=True, out=tmp_path / "folder"))


def test_options_that_do_not_go_together(sides: tuple[Path, Path], tmp_path: Path) -> None:
    scores = ns.diff(*sides)
    selection = scores.select(neurons=2)
    for positional, options in [
        ((selection,), {"neurons": 3}),
        ((selection,), {"scores": scores}),
        ((selection,), {"include": ["*"]}),
        ((), {"neurons": 3, "scores": scores, "anatomy": "ffn"}),
        ((), {}),
        ((), {"neurons": 3, "changed": True}),
        ((), {"neurons": 3, "score": "unheard of"}),
        ((), {"neurons": 3, "anatomy": "unheard of"}),
        ((), {"neurons": 3, "only": ["no.such.*"]}),
        ((), {"neurons": 3, "axis": {"a.weight": 2}}),
        ((), {"neurons": 3, "threads": 0}),
    ]:
        call = lambda p=positional, o=options: ns.extract(*sides, *p, out=tmp_path / "p", **o)  # noqa: E731
        refused(tmp_path, ns.UsageError, call)


def test_sides_that_do_not_fit(sides: tuple[Path, Path], tmp_path: Path) -> None:
    other = raw_folder(tmp_path / "other", {"x.weight": ("BF16", np.zeros((2, 3), "u2"))})
    cast = raw_folder(tmp_path / "cast", {n: ("F16", bits) for n, (_, bits) in BASE.items()})
    for tuned, says in ((other, "no tensor in common"), (cast, "expected BF16 [")):
        call = lambda tuned=tuned: ns.extract(sides[0], tuned, changed=True, out=tmp_path / "p")  # noqa: E731
        refused(tmp_path, ns.MismatchError, call, says, str(sides[0]), str(tuned))


def test_a_selection_for_another_model(sides: tuple[Path, Path], tmp_path: Path) -> None:
    selection = ns.diff(*sides).select(neurons=3)
    name = next(iter(selection.tensors))
    smaller = {n: (kind, bits[:-1] if n == name else bits) for n, (kind, bits) in BASE.items()}
    other = raw_folder(tmp_path / "other", smaller)
    for pair in ((other, sides[1]), (sides[0], other)):
        call = lambda pair=pair: ns.extract(*pair, selection, out=tmp_path / "p")  # noqa: E731
        refused(tmp_path, ns.MismatchError, call, str(other), name, "expected BF16", "found BF16")


def test_scores_of_another_pair(sides: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = sides
    scores = ns.diff(base, tuned)
    other = raw_folder(tmp_path / "other", {n: (k, bits ^ np.uint16(1)) for n, (k, bits) in BASE.items()})
    for pair, side in (((other, tuned), "base"), ((base, other), "tuned")):
        call = lambda pair=pair: ns.extract(*pair, scores=scores, neurons=3, out=tmp_path / "p")  # noqa: E731
        refused(tmp_path, ns.MismatchError, call, f"another {side}", str(other), "xxh3-128:")


def test_nothing_to_cut_out(sides: tuple[Path, Path], tmp_path: Path) -> None:
    call = lambda: ns.extract(sides[0], sides[0], changed=True, out=tmp_path / "p")  # noqa: E731
    refused(tmp_path, ns.MismatchError, call, "no neuron is chosen", "scored neurons may be equal (diff")
    call = lambda: ns.extract(*sides, threshold=5.0, out=tmp_path / "p")  # noqa: E731
    refused(tmp_path, ns.MismatchError, call, "threshold")


def test_no_such_side(sides: tuple[Path, Path], tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for pair in ((missing, sides[1]), (sides[0], missing)):
        call = lambda pair=pair: ns.extract(*pair, changed=True, out=tmp_path / "p")  # noqa: E731
        refused(tmp_path, ns.UsageError, call, str(missing))


def test_one_pass_equals_scores_and_selection(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """However one comes to the same choice, the patch is the same file."""
    options = {"score": "l2", "anatomy": "rows"}
    ns.extract(*sides, neurons="30%", out=tmp_path / "direct", **options).close()
    scores = ns.diff(*sides, out=tmp_path / "scores", **options)
    ns.extract(*sides, scores=scores, neurons="30%", out=tmp_path / "scored").close()
    selection = scores.select(neurons="30%")
    selection.save(tmp_path / "selection")
    ns.extract(*sides, selection, out=tmp_path / "selected").close()
    loaded = ns.Selection.load(tmp_path / "selection")
    ns.extract(*sides, loaded, out=tmp_path / "loaded", threads=1).close()
    files = [tmp_path / name for name in ("direct", "scored", "selected", "loaded")]
    assert len({path.read_bytes() for path in files}) == 1


def test_where_it_came_from(sides: tuple[Path, Path], tmp_path: Path) -> None:
    ns.extract(*sides, neurons=4, policy="random", seed=5, out=tmp_path / "p").close()
    found = manifest(tmp_path / "p")
    assert found["base"]["name"] == "base"
    assert found["selection"]["seed"] == 5
    assert found["selection"]["policy"] == "random"
    assert found["selection"]["score"] == "cosine"
    assert found["selection"]["budget"]["neurons"] in (4, "4")
    assert "tuned" not in found["selection"]
    assert str(tmp_path) not in json.dumps(found), "a patch tells no paths of the machine it was made on"


def test_captured_is_of_these_checkpoints_or_absent(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """The share of the squared change that is in the patch, by numpy in float64."""
    base, tuned = sides
    ns.extract(base, tuned, neurons="40%", out=tmp_path / "p").close()
    wide = [
        {n: (b.astype("u4") << 16).view("f4").astype("f8") for n, (_, b) in side.items()}
        for side in (BASE, patched_by_hand(BASE, tmp_path / "p"), TUNED)
    ]
    inside, whole = (
        sum(float(((side[n] - wide[0][n]) ** 2).sum()) for n in BASE) for side in (wide[1], wide[2])
    )
    assert manifest(tmp_path / "p")["selection"]["captured"] == pytest.approx(inside / whole, rel=1e-5)
    selection = ns.diff(base, tuned).select(neurons="40%")
    elsewhere = raw_folder(tmp_path / "elsewhere", {n: (k, b ^ np.uint16(3)) for n, (k, b) in TUNED.items()})
    ns.extract(base, elsewhere, selection, out=tmp_path / "q").close()
    assert "captured" not in manifest(tmp_path / "q")["selection"]


def test_a_hub_base_is_named_by_repository_and_commit(
    sides: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    sides[0].rename(tmp_path / commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(tmp_path / commit))
    ns.extract("some-org/some-model", sides[1], changed=True, out=tmp_path / "p").close()
    base = manifest(tmp_path / "p")["base"]
    assert (base["repo"], base["revision"]) == ("some-org/some-model", commit)
    assert base["fingerprint"].startswith("xxh3-128:")


def test_a_side_that_changes_meanwhile(sides: tuple[Path, Path], tmp_path: Path) -> None:
    @contextmanager
    def touching(what: str, total: int) -> Iterator[Callable[[int], None]]:
        if what == "cutting out":
            os.utime(sides[1] / "model.safetensors", ns=(1, 1))
        yield lambda done: None

    with pytest.raises(ns.MachineError, match="changed"):
        ns.extract(*sides, changed=True, out=tmp_path / "p", progress=touching)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_real_checkpoints_round_trip(shared_data: Path, tmp_path: Path) -> None:
    """A real pair, F32, with recurrent kernels that are [in, out]."""
    folder = shared_data / "checkpoints" / "textgenrnn"
    base, tuned = folder / "base.safetensors", folder / "hacker_news.safetensors"
    options = {"axis": {"*kernel": 1}, "reversible": True}
    for budget in ({"neurons": "3%"}, {"changed": True, "include": ["*"], "with_bias": True}):
        patch = ns.extract(base, tuned, out=tmp_path / "p", force=True, **options, **budget)
        ns.apply(base, patch, out=tmp_path / "out", force=True)
        assert ns.verify(tmp_path / "out", patch).state == "patched"
        ns.revert(tmp_path / "out", patch, out=tmp_path / "back", force=True)
        assert (tmp_path / "back").read_bytes() == base.read_bytes()
    found, wanted = load_file(tmp_path / "out"), load_file(tuned)
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
    third = folder / "reddit_apple_android.safetensors"
    with pytest.raises(ns.MismatchError, match="another base"):
        ns.apply(third, patch, out=tmp_path / "out", force=True)


def test_files_of_the_safetensors_package(tmp_path: Path) -> None:
    arrays = {"w.weight": RNG.standard_normal((40, 30)).astype("f4")}
    base = write_file(tmp_path / "base.safetensors", arrays)
    arrays["w.weight"][7] += 1
    tuned = write_file(tmp_path / "tuned.safetensors", arrays)
    patch = ns.extract(base, tuned, neurons=1, out=tmp_path / "p")
    assert patch.index("w.weight").tolist() == [7]
    ns.apply(base, patch, out=tmp_path / "out")
    np.testing.assert_array_equal(load_file(tmp_path / "out")["w.weight"], arrays["w.weight"])


# One tensor of 300 MB: nothing whole may ever be held.

SIDE = 12_288

MEMORY = """
import resource, sys
import neftsurgery as ns

def peak():
    try:  # of this process only: ru_maxrss starts with what the parent had
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

root, axis = sys.argv[1] + "/", int(sys.argv[2])
options = dict(neurons="12%", score="random", axis={"*": axis}, reversible=True)
ns.extract(root + "base", root + "tuned", out=root + "p", **options)
ns.apply(root + "base", root + "p", out=root + "out")
assert ns.verify(root + "out", root + "p").state == "patched"
ns.revert(root + "out", root + "p", in_place=True)
assert ns.verify(root + "out", root + "p").state == "base"
ns.revert(root + "out", root + "p", base=root + "base", out=root + "back")
print(peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_memory_is_bounded_whatever_the_tensor(tmp_path: Path, axis: int) -> None:
    for number, name in enumerate(("base", "tuned")):
        size = 2 * SIDE * SIDE
        entry = {"w": {"dtype": "BF16", "shape": [SIDE, SIDE], "data_offsets": [0, size]}}
        text = json.dumps(entry).encode()
        with open(tmp_path / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
            row = np.arange(SIDE, dtype="u2") % 1000 + 0x3C00 + number
            for position in range(0, SIDE, 16):
                file.seek(8 + len(text) + 2 * SIDE * position)
                file.write((row + np.uint16(position % 7)).tobytes())
            if number and axis == 0:
                for position in range(1, SIDE, 16):
                    file.seek(8 + len(text) + 2 * SIDE * position)
                    file.write(row.tobytes())
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(axis)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400e6
    assert (tmp_path / "back").stat().st_size == (tmp_path / "base").stat().st_size
    patch = patch_rows(tmp_path / "p")
    assert patch["w:value"][1].nbytes > 30e6


def pair_of(tmp_path: Path, neurons: int) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path in paths:
        save_file({"x.weight": rng.standard_normal((neurons, 4)).astype(np.float32)}, path)
    return paths


def test_a_patch_larger_than_the_base_is_warned_of(tmp_path: Path) -> None:
    """A row of 16 bytes takes 36 in a patch: its values, its number and its digest."""
    sides = pair_of(tmp_path, 2000)

    def said(**options: Any) -> list[str]:
        return [text for text in plan_extract(*sides, **options).warnings if "larger" in text]

    (text,) = said(changed=True)
    assert re.fullmatch(
        r"the patch is larger than the base \(7[23]\.\d kB and 32\.0 kB\): "
        r"\[\[neurons=3%\]\] would make a small one",
        text,
    )
    assert said(neurons="40%") == []
    (text,) = said(neurons="80%", reversible=True)
    assert text.endswith("[[reversible]] doubles it")


@pytest.mark.parametrize(
    ("neurons", "amount", "warned"),
    [(1000, 3, True), (1000, 20, True), (1000, 21, False), (999, 3, False), (1000, "3%", False)],
)
def test_a_number_that_may_be_meant_as_a_percentage_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, neurons: int, amount: object, warned: bool
) -> None:
    sides = pair_of(tmp_path, neurons)
    ns.extract(*sides, neurons=amount).close()
    said = f"neurons={amount} chooses {amount} neurons of 1,000: {amount} percent is neurons='{amount}%'"
    assert [record.getMessage() for record in caplog.records if "percent" in record.getMessage()] == (
        [said] if warned else []
    )


# Whether base plus patch is the tuned model.

EVERYTHING = {"changed": True, "with_bias": True}


def remainder(base: Path, tuned: Path, **options: object) -> dict[str, object]:
    plan = plan_extract(base, tuned, **({"include": ["*"]} | EVERYTHING | options))
    return {key: plan.describe()[key] for key in ("whole_change", "left_out", "not_compared")}


WHOLE = {"whole_change": True, "left_out": [], "not_compared": []}


def test_the_whole_change(sides: tuple[Path, Path]) -> None:
    assert remainder(*sides) == WHOLE
    assert remainder(*sides, include=[]) == WHOLE | {"whole_change": False, "left_out": ["norm"]}
    left = ["a.bias", "a.weight", "norm"]
    assert remainder(*sides, include=[], exclude=["a.*"]) == WHOLE | {"whole_change": False, "left_out": left}


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "name",
    ["extra.safetensors", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "part/deep/x.pt"],
)
def test_a_file_of_weights_that_was_not_compared(sides: tuple[Path, Path], name: str, side: int) -> None:
    path = sides[side] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, {"x": np.ones(3, np.float32)})
    assert remainder(*sides) == {"whole_change": None, "left_out": [], "not_compared": [name]}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoint-5/model.safetensors", "optimizer.pt"])
def test_other_forms_and_other_saves_are_not_the_model(sides: tuple[Path, Path], name: str) -> None:
    (sides[1] / name).parent.mkdir(exist_ok=True)
    (sides[1] / name).write_bytes(b"other")
    assert remainder(*sides) == WHOLE


def test_one_shard_is_not_the_model(sides: tuple[Path, Path]) -> None:
    shard = sides[0] / "model-00002-of-00003.safetensors"
    assert remainder(shard, shard_of(sides[1], shard))["not_compared"] == ["the other 2 shards of 3"]


def shard_of(folder: Path, like: Path) -> Path:
    """The tuned tensors of a shard, in a file of their own."""
    kept = raw_read(like).keys()
    return raw_file(folder / "part.safetensors", {name: TUNED[name] for name in kept})


def test_a_tensor_of_one_side_and_one_of_another_shape_are_left_out(tmp_path: Path) -> None:
    base = raw_folder(tmp_path / "base", BASE | {"old": BASE["norm"], "odd": BASE["norm"]})
    tuned = raw_folder(tmp_path / "tuned", TUNED | {"new": BASE["norm"], "odd": BASE["a.bias"]})
    assert remainder(base, tuned) == WHOLE | {"whole_change": False, "left_out": ["new", "odd", "old"]}
    chosen = ns.diff(base, tuned).select(changed=True)
    plan = plan_extract(base, tuned, chosen)  # nothing was compared, but that much is known
    assert plan.describe()["whole_change"] is False
    assert plan.describe()["left_out"] == ["old", "new"]


def test_quantized_scales_that_differ_are_left_out(tmp_path: Path) -> None:
    codes = {"q.weight": ("F8_E4M3", np.ones((4, 4), "u1")), "q.weight_scale": ("F32", np.ones(1, "u4"))}
    base = raw_folder(tmp_path / "base", BASE | codes)
    scale = codes | {"q.weight_scale": ("F32", np.full(1, 2, "u4"))}
    tuned = raw_folder(tmp_path / "tuned", TUNED | scale)
    found = remainder(base, tuned)
    assert found == WHOLE | {"whole_change": False, "left_out": ["q.weight_scale"]}


def test_scores_that_do_not_cover_a_tensor(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """As a stranger may make them."""
    scores = ns.diff(*sides, include=["*"])
    facts = dict(scores.facts) | {"version": 1, "unscored": {}}
    del facts["tensors"]["b.weight"]
    name = "a.weight"
    arrays = {name: scores.values(name), f"{name}:changed": scores.sums(name, "changed")}
    save_file(arrays, tmp_path / "s.safetensors", {"neuron_scores": json.dumps(facts)})
    plan = plan_extract(*sides, scores=ns.Scores.load(tmp_path / "s.safetensors"), changed=True)
    found = plan.describe()
    assert found["whole_change"] is None
    assert sorted(found["not_compared"]) == ["a.bias", "b.weight", AGED, "norm"]


AGED = "changes since the scores were made"


def test_what_changed_since_the_scores_were_made(sides: tuple[Path, Path]) -> None:
    """Fingerprints take in the ends of a tensor only."""
    big = {"w.weight": ("F32", np.zeros((64, 512), "u4"))}
    base, tuned = (raw_folder(path.parent / f"big {path.name}", big) for path in sides)
    scores = ns.diff(base, tuned)
    late = {"w.weight": ("F32", np.zeros((64, 512), "u4"))}
    late["w.weight"][1][32] = 7
    raw_file(tuned / "model.safetensors", late, {"format": "pt"})
    plan = plan_extract(base, tuned, scores=scores, neurons=1)
    assert plan.describe()["whole_change"] is None
    assert plan.describe()["not_compared"] == [AGED]


def test_the_command_says_what_was_not_compared(
    sides: tuple[Path, Path], neft: Callable[..., Result]
) -> None:
    every = ("--changed", "--include", "*", "--with-bias", "-o")
    assert "bit for bit\n" in neft("extract", *sides, *every, "p").out
    said = neft("extract", *sides, "--changed", "-o", "q").out
    assert "NOT the tuned model" in said
    assert "still different: a.bias, norm\n" in said
    write_file(sides[1] / "extra.safetensors", {"x": np.ones(3, np.float32)})
    said = neft("extract", *sides, *every, "r").out
    assert "bit for bit, in all that was compared\nnot compared: extra.safetensors\n" in said
