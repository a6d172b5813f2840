"""Our experiments in PEFT's comparison of methods. A script stands in for its code, which is not here."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import pytest
from peft import PeftConfig

from benchmarks.peft_comparison.experiments import EXPERIMENTS, METHOD
from benchmarks.peft_comparison.suite import (
    FOLDER,
    Options,
    add_arguments,
    measure,
    refuse_other_code,
    table_of_results,
    write_experiments,
)
from neftsurgery.peft import NeftConfig

# As PEFT's: the config is loaded by PeftConfig, which fails for a method that nobody has registered.
SCRIPT = """
import json, sys
from pathlib import Path
from peft import PeftConfig
from neighbour import STATUS

path = sys.argv[-1]
assert sys.argv[1:-1] == ["-v", "--clean"] and __name__ == "__main__"
config = PeftConfig.from_pretrained(path)
result = {
    "run_info": {"experiment_name": path.removeprefix("experiments/"), "error_msg": ""},
    "train_info": {
        "num_trainable_params": config.params, "train_time": 2.0, "accelerator_memory_max": 3e9,
        "file_size": 4e6, "status": STATUS, "metrics": [{"test accuracy": 0.5, "forgetting": 0.25}],
    },
    "meta_info": {"system_info": {"accelerator": type(config).__name__}},
}
Path("results").mkdir(exist_ok=True)
Path("results", path.removeprefix("experiments/").replace("/", "--") + ".json").write_text(json.dumps(result))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "peft"
    (folder / FOLDER).mkdir(parents=True)
    (folder / "src").mkdir()
    (folder / FOLDER / "run.py").write_text(SCRIPT)
    (folder / FOLDER / "neighbour.py").write_text("STATUS = 'success'\n")
    own = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*own, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_an_experiment_runs_with_the_code_of_the_checkout(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    measure(Options.of(parser.parse_args([str(checkout), "--only", "llama-3.2-3B-random-9M"])))
    row = "| **neft/llama-3.2-3B-random-9M** | 9,175,040 | 0.500 | 0.250 | 2 | 3.0 | 4.0 | NeftConfig |"
    assert row in capsys.readouterr().out


def test_peft_reads_every_experiment(checkout: Path, tmp_path: Path) -> None:
    selection = tmp_path / "chosen.safetensors"
    options = Options(checkout, (), selection, (), None, True)
    paths = [*write_experiments(options, {})]
    assert paths == [f"experiments/{METHOD}/{name}" for name in [*EXPERIMENTS, "selection-chosen"]]
    for path in paths:
        config = PeftConfig.from_pretrained(str(checkout / FOLDER / path))
        assert type(config) is NeftConfig
        chosen = [config.selection, config.neurons, config.params]
        assert len([one for one in chosen if one is not None]) == 1
        training = json.loads((checkout / FOLDER / path / "training_params.json").read_text())
        assert training["optimizer_kwargs"]["weight_decay"] == 0
    assert config.selection == str(selection)


def test_what_is_refused(checkout: Path, tmp_path: Path) -> None:
    options = Options(checkout, (), None, (), None, True)
    with pytest.raises(SystemExit, match=r"expected a git checkout of huggingface/peft, with .*run.py"):
        refuse_other_code(Options(tmp_path, (), None, (), None, True))
    with pytest.raises(SystemExit, match="unknown experiment: nothing"):
        measure(Options(checkout, ("nothing",), None, (), None, True))
    refuse_other_code(options)
    (checkout / FOLDER / "run.py").write_text(SCRIPT + "\n")
    with pytest.raises(SystemExit, match=r"its code was changed: method_comparison/MetaMathQA/run.py"):
        refuse_other_code(options)


def test_a_run_that_left_no_accuracy_says_why(tmp_path: Path) -> None:
    (tmp_path / "cancelled_results").mkdir()
    train = {
        "num_trainable_params": 5, "train_time": 2.0, "accelerator_memory_max": 3e9, "file_size": 4e6,
        "status": "canceled", "metrics": [],
    }  # fmt: skip
    result = {
        "run_info": {"experiment_name": "neft/one", "error_msg": "out of memory"},
        "train_info": train,
        "meta_info": {"system_info": {"accelerator": "a GPU"}},
    }
    (tmp_path / "cancelled_results" / "neft--one.json").write_text(json.dumps(result))
    assert "| **neft/one** | 5 | canceled | out of memory | 2 | 3.0 | 4.0 | a GPU |" in table_of_results(
        tmp_path
    )
