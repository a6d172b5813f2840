"""`neftsurgery demo`, with all modules of `neftsurgery.cli.demo`, as a user runs it."""

from __future__ import annotations

import pytest
from support import process


def test_demo(neft, tmp_path):
    result = neft("demo", "kept", "--files-only")
    assert result.code == 0, result.err
    assert result.out.count(": yes") == 2
    assert (tmp_path / "kept" / "neuron_patch.safetensors").is_file()
    assert (tmp_path / "kept" / "report.html").is_file()
    assert "Open kept/report.html" in result.out
    assert neft("demo", "kept").code == 2
    assert neft("demo", "--files-only", "--json").json["ok"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept"]


def test_demo_as_a_process(tmp_path):
    result = process("demo", "--files-only", cwd=tmp_path)
    assert result.code == 0, result.err
    assert not list(tmp_path.iterdir())


def test_demo_without_matplotlib_draws_nothing(neft, tmp_path, monkeypatch):
    from neftsurgery.cli.commands import demo

    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    result = neft("demo", "kept", "--files-only")
    assert result.code == 0, result.err
    assert "report" not in result.out
    assert not (tmp_path / "kept" / "report.html").exists()
    assert not any("report" in line for line in neft("demo", "--dry-run", "--json").json["commands"])


def test_demo_without_torch_says_what_more_there_is(neft, tmp_path, monkeypatch):
    from neftsurgery.cli.commands import demo

    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    result = neft("demo")
    assert result.code == 0, result.err
    assert result.out.count(": yes") == 2
    assert "pip install '.[train]'" in result.out
    assert "pip install" not in neft("demo", "--files-only").out


def test_a_dry_run_of_the_demo_shows_its_commands(neft, tmp_path):
    told = neft("demo", "kept", "--dry-run", "--json").json
    assert told["trains"] is True
    assert any("select" in line for line in told["commands"])
    assert neft("demo", "--files-only", "--dry-run", "--json").json["trains"] is False
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_demo_trains(tmp_path):
    result = process("demo", "kept", "--json", cwd=tmp_path)
    assert result.code == 0, result.err
    told = result.json
    assert told["patched_files_give_the_trained_logits"] is told["restored_bit_for_bit"] is True
    base, tuned, chosen, control = told["trained"]
    assert base["losses"]["old"] < 0.1 < base["losses"]["new"]
    assert tuned["losses"]["new"] < 0.1
    assert chosen["trained"] < 0.1 * base["trained"]
    assert chosen["losses"]["new"] < base["losses"]["new"]
    assert control["losses"]["new"] < base["losses"]["new"]
    assert chosen["nbytes"] == (tmp_path / "kept" / "neuron_patch.safetensors").stat().st_size
    assert (tmp_path / "kept" / "report.html").is_file()
