"""The table as data, the experiments that make it, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from neftsurgery.neurons.families import SHARED, architectures, family_of
from tests.architectures.rows import DATA, load_overlay, make_data, short_blocks, text_of

ROOT = Path(__file__).resolve().parents[2]


def test_the_file_is_small_readable_and_every_row_is_one() -> None:
    assert DATA.stat().st_size < 1_000_000
    assert text_of(json.loads(DATA.read_text())) == DATA.read_text()
    for model_type in architectures().rows:
        assert family_of(model_type) is not None
    rows = json.loads(DATA.read_text())["rows"]
    types = [name for row in rows for name in row["model_types"].split()]
    assert len(types) == len(set(types)) > 700
    assert SHARED in types


def test_the_file_is_not_read_before_an_anatomy_is_asked_for() -> None:
    code = (
        "import contextlib, sys\nfrom neftsurgery.cli.main import run\n"
        "sys.argv = ['neftsurgery', 'diff', '--help']\n"
        "with contextlib.suppress(SystemExit):\n    run()\n"
        "module = sys.modules.get('neftsurgery.neurons.families')\n"
        "sys.exit(module is not None and module.architectures.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--anatomy" in done.stdout


def test_every_entry_of_the_overlay_has_a_reason_and_serves_types_of_the_table() -> None:
    for entry in load_overlay():
        assert len(entry["why"]) > 20
        assert set(entry["model_types"].split()) <= architectures().rows.keys()


@pytest.mark.slow
def test_the_command_makes_rows_shows_the_difference_and_refuses_types_that_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    overlay, data, chosen = tmp_path / "overlay.json", tmp_path / "data.json", "t5,gpt2,phi3,mixtral,clip"
    overlay.write_text('[{"model_types": "t5", "why": "test", "heads": "my_head"}]')
    places = ["--state", str(tmp_path), "--overlay", str(overlay), "--data", str(data)]
    command = [sys.executable, "-m", "tests.architectures", "families", "--only", chosen, *places]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert '+{"model_types": "gpt2"' in made.stdout
    rows = {name: row for row in json.loads(data.read_text())["rows"] for name in row["model_types"].split()}
    assert "my_head" in rows["t5"]["heads"].split()
    for model_type in chosen.split(","):  # the committed file says the same
        committed = architectures().rows[model_type].get("blocks", ())
        assert all(block in committed for block in rows[model_type].get("blocks", ()))
    assert {"up": "mlp.c_fc", "down": "mlp.c_proj", "order": "in out"} in rows["gpt2"]["blocks"]
    assert {"gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"} in rows["phi3"]["blocks"]
    experts = {"up": "w3", "gate": "w1", "down": "w2"}
    place = "block_sparse_moe.experts.*."
    assert {member: place + name for member, name in experts.items()} in rows["mixtral"]["blocks"]

    from tests.architectures.__main__ import main

    assert main(["families", "--keep", *places]) == 0
    assert "@@" not in capsys.readouterr().out
    overlay.write_text('[{"model_types": "llama no-such-model", "why": "test", "heads": "x"}]')
    before = data.read_text()
    assert main(["families", "--keep", *places]) == 1
    assert "could not be built: llama, no-such-model" in capsys.readouterr().err
    assert data.read_text() == before


def test_the_shortest_pattern_that_names_nothing_else_is_used() -> None:
    records = [
        ("layers.*.attn.c_proj.weight", 2, "out in"),
        ("layers.*.mlp.c_proj.weight", 2, "in out"),
        ("h.tables.weight", 2, "a parameter of no known layer"),
        ("layers.*.mlp.expert.kernel", 4, "out in"),
    ]
    data = make_data({"some": records}, {}, {}, {}, {"some": (8, None)}, [], "test")
    row = next(row for row in data["rows"] if row["model_types"] == "some")
    assert row["weights"] == {"in out": "mlp.c_proj", "out in": "kernel"}
    assert row["others"] == "tables"
    assert data["head_counts"] == [[8, None, "some"]]


def test_blocks_are_named_by_endings_that_only_their_members_have() -> None:
    block = {"up": "encoder.layer.*.intermediate.dense", "down": "encoder.layer.*.output.dense"}
    records = [(f"{name}.weight", 2, "out in") for name in block.values()]
    assert short_blocks([block], records) == [{"up": "intermediate.dense", "down": "output.dense"}]
    records.append(("encoder.layer.*.attention.output.dense.weight", 2, "out in"))
    (found,) = short_blocks([block], records)
    assert found == {"up": "layer.*.intermediate.dense", "down": "layer.*.output.dense"}
