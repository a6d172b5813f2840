"""The commands on a real pair: what they write, what they print, and their JSON."""

from __future__ import annotations

import hashlib
import sys

import pytest
from safetensors.numpy import load_file

TIMED = {"bytes_read", "seconds", "wall_seconds", "neurons", "selected"}


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_the_whole_round(neft, pair, tmp_path):
    base, tuned = pair
    before = digest(base), digest(tuned)

    scored = neft("diff", base, tuned, "-o", "scores.safetensors", "--json")
    assert scored.code == 0, scored.err
    assert scored.json.keys() >= TIMED
    assert scored.json["neurons"] == 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert scored.json["bytes_read"] >= 2 * sum(
        a.nbytes for f in base.glob("*.safetensors") for a in load_file(f).values()
    )
    assert scored.json["related"] is True

    selected = neft(
        "select", "scores.safetensors", "--neurons", "3%", "-o", "selection.safetensors", "--json"
    )
    assert selected.code == 0, selected.err
    assert selected.json["selected"] == round(0.03 * scored.json["neurons"])

    direct = neft("extract", base, tuned, "--neurons", "3%", "-o", "direct.safetensors", "--json")
    assert direct.code == 0, direct.err
    assert direct.json.keys() >= TIMED | {"captured"}
    assert direct.json["whole_change"] is False
    by_selection = neft(
        "extract", base, tuned, "--selection", "selection.safetensors", "-o", "selected.safetensors"
    )
    by_scores = neft(
        "extract",
        base,
        tuned,
        "--scores",
        "scores.safetensors",
        "--neurons",
        "3%",
        "-o",
        "scored.safetensors",
    )
    assert by_selection.code == by_scores.code == 0
    assert "NOT the tuned model" in by_scores.out
    patches = [load_file(tmp_path / f"{name}.safetensors") for name in ("direct", "selected", "scored")]
    for other in patches[1:]:
        assert patches[0].keys() == other.keys()
        assert all((patches[0][name] == other[name]).all() for name in other)

    applied = neft("apply", base, "direct.safetensors", "-o", "patched", "--json")
    assert applied.code == 0, applied.err
    assert applied.json.keys() >= TIMED
    assert neft("verify", "patched", "direct.safetensors", "--expect", "patched").code == 0
    assert neft("verify", "patched", "direct.safetensors", "--expect", "base").code == 3
    assert neft("verify", base, "direct.safetensors", "--json").json["state"] == "base"

    reverted = neft("revert", "patched", "direct.safetensors", "--base", base, "-o", "back", "--json")
    assert reverted.code == 0, reverted.err
    assert digest(tmp_path / "back") == before[0]
    assert (digest(base), digest(tuned)) == before


def test_extract_says_that_a_lossless_patch_gives_the_tuned_model(neft, pair, tmp_path):
    base, tuned = pair
    result = neft("extract", base, tuned, "--changed", "--include", "*", "--with-bias", "-o", "p.safetensors")
    assert result.code == 0, result.err
    assert "the tuned model, bit for bit" in result.out
    assert neft("apply", base, "p.safetensors", "-o", "out").code == 0
    merged = {k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()}
    for file in tuned.glob("*.safetensors"):
        for name, array in load_file(file).items():
            assert (merged[name] == array).all()


def test_in_place_and_back(neft, pair):
    base, tuned = pair
    before = digest(base)
    assert neft("extract", base, tuned, "--neurons", "5%", "-o", "p.safetensors", "--reversible").code == 0
    assert neft("apply", base, "p.safetensors", "--in-place").code == 0
    assert digest(base) != before
    again = neft("apply", base, "p.safetensors", "--in-place")
    assert (again.code, "already" in again.out) == (0, True)
    assert neft("revert", base, "p.safetensors", "--in-place").code == 0
    assert digest(base) == before


@pytest.mark.parametrize(
    "words",
    [
        ("diff", "base", "tuned", "-o", "new"),
        ("select", "s.safetensors", "--neurons", "3%", "-o", "new"),
        ("extract", "base", "tuned", "--neurons", "3%", "-o", "new"),
        ("report", "s.safetensors", "p.safetensors", "-o", "new"),
        ("apply", "base", "p.safetensors", "-o", "new"),
        ("apply", "base", "p.safetensors", "--in-place"),
        ("revert", "tuned", "p.safetensors", "-o", "new", "--base", "base"),
        ("revert", "tuned", "p.safetensors", "--in-place", "--base", "base"),
    ],
)
def test_a_dry_run_writes_nothing(neft, pair, tmp_path, words):
    assert neft("diff", "base", "tuned", "-o", "s.safetensors").code == 0
    assert neft("extract", "base", "tuned", "--neurons", "3%", "-o", "p.safetensors").code == 0
    before = {folder.name: digest(folder) for folder in pair}
    names = sorted(p.name for p in tmp_path.rglob("*"))
    result = neft(*words, "--dry-run", "--json")
    assert result.code == 0, result.err
    assert result.json["dry_run"] is True
    assert sorted(p.name for p in tmp_path.rglob("*")) == names
    assert {folder.name: digest(folder) for folder in pair} == before


def test_a_dry_run_still_refuses(neft, pair):
    assert neft("extract", "base", "tuned", "--neurons", "3%", "-o", "p.safetensors").code == 0
    assert neft("extract", "base", "tuned", "--neurons", "3%", "-o", "p.safetensors", "--dry-run").code == 2
    assert neft("apply", "base", "p.safetensors", "-o", "tuned", "--dry-run").code == 2


@pytest.mark.parametrize("kind", ["base", "s.safetensors", "selection.safetensors", "p.safetensors"])
def test_inspect_recognises_every_kind_of_file(neft, pair, kind):
    neft("diff", "base", "tuned", "-o", "s.safetensors")
    neft("select", "s.safetensors", "--neurons", "3%", "-o", "selection.safetensors")
    neft("extract", "base", "tuned", "--neurons", "3%", "-o", "p.safetensors")
    expected = {"base": "checkpoint", "s.safetensors": "scores", "p.safetensors": "patch"}.get(
        kind, "selection"
    )
    assert neft("inspect", kind, "--json").json["kind"] == expected
    shown = neft("inspect", kind)
    assert shown.code == 0
    assert expected in shown.out
    assert "model.layers.0" in shown.out


@pytest.mark.parametrize("anatomy", ["rows", "ffn", "units"])
def test_every_anatomy_works_in_every_command(neft, pair, anatomy):
    result = neft(
        "extract", "base", "tuned", "--anatomy", anatomy, "--neurons", "10%", "-o", "p.safetensors", "--json"
    )
    assert result.code == 0, result.err
    assert result.json["selected"] > 0
    assert neft("apply", "base", "p.safetensors", "-o", "out").code == 0
    assert neft("verify", "out", "p.safetensors", "--expect", "patched").code == 0
    assert neft("verify", "tuned", "p.safetensors", "--expect", "patched").code == 0


def test_quiet_prints_nothing(neft, pair):
    for words in (
        ("diff", "base", "tuned"),
        ("extract", "base", "tuned", "--neurons", "3", "-o", "p.safetensors"),
    ):
        result = neft(*words, "-q")
        assert (result.code, result.out, result.err) == (0, "", "")


def test_unrelated_models_are_reported_as_unrelated(neft, pair, llama_arrays, tmp_path):
    from support import LLAMA_CONFIG, write_folder

    write_folder(tmp_path / "other", llama_arrays(seed=9), 1, LLAMA_CONFIG)
    result = neft("diff", "base", "other")
    assert result.code == 0
    assert "NOT look related" in result.out
    assert neft("diff", "base", "other", "--json").json["related"] is False


def test_identical_models_are_reported_as_identical(neft, pair):
    assert "identical in every scored neuron" in neft("diff", "base", "base").out


def test_what_differs_beside_identical_neurons_is_named(neft, pair, llama_arrays, tmp_path):
    from support import LLAMA_CONFIG, write_folder

    arrays = llama_arrays()
    write_folder(tmp_path / "same", arrays, 1, LLAMA_CONFIG)
    arrays["model.norm.weight"] = arrays["model.norm.weight"] + 1
    write_folder(tmp_path / "other", arrays, 1, LLAMA_CONFIG)
    result = neft("diff", "same", "other")
    assert "identical" not in result.out
    assert "not scored, and different: model.norm.weight\n" in result.out
    assert neft("diff", "same", "other", "--json").json["unscored_changed"] == ["model.norm.weight"]
    assert neft("diff", "same", "same", "--json").json["unscored_changed"] == []


def test_a_closed_pipe_is_not_an_error(pair, tmp_path):
    import subprocess

    done = subprocess.run(
        f"{sys.executable} -m neftsurgery inspect base --all | head -n 1",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "checkpoint" in done.stdout
    assert "Traceback" not in done.stderr
