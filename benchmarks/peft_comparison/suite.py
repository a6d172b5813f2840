"""Puts the experiments into a checkout of PEFT, runs its code, and shows the results beside PEFT's."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.log import log
from benchmarks.peft_comparison import experiments, stand_ins
from benchmarks.peft_comparison.experiments import EXPERIMENTS, METHOD, Experiment

FOLDER = Path("method_comparison/MetaMathQA")
HERE = Path(__file__).resolve().parent
SHOWN = (
    "lora--llama-3.2-3B-rank32",
    "lora--llama-3.2-3B-rank10-target-mlp",
    "shira--*",
    "full-finetuning--*",
)
HEAD = "| experiment | trainable | test accuracy | forgetting | train, s | peak memory, GB | file, MB | on |"


@dataclass(frozen=True)
class Options:
    """``beside``: experiments of PEFT's that are run too. ``trial``: GSM8K texts of a run with stand-ins."""

    checkout: Path
    only: tuple[str, ...]
    selection: Path | None
    beside: tuple[str, ...]
    trial: Path | None
    write_only: bool

    @classmethod
    def of(cls, given: argparse.Namespace) -> Options:
        """The options of a parsed command line."""
        return cls(**{name: getattr(given, name) for name in cls.__dataclass_fields__})

    @property
    def folder(self) -> Path:
        """The comparison in the checkout."""
        return self.checkout.resolve() / FOLDER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    add = parser.add_argument
    add("checkout", type=Path, help="a git checkout of huggingface/peft")
    add("--only", type=_names, default=(), help=f"some of: {', '.join(EXPERIMENTS)}")
    add("--selection", type=Path, help="one more experiment: the neurons of this selection or patch")
    add("--beside", type=_names, default=(), help="run PEFT's too, such as lora/llama-3.2-3B-rank32")
    add("--write-only", action="store_true", help="write the experiments, and run nothing")
    add(
        "--trial",
        type=Path,
        metavar="GSM8K",
        help="try it on the processor, with a tiny model; GSM8K: a folder of train.jsonl and test.jsonl",
    )


def _names(given: str) -> tuple[str, ...]:
    return tuple(given.split(","))


def measure(options: Options) -> None:
    """Writes the experiments, runs them, and prints a table.

    The names are checked first: one that does not exist would be seen after hours.
    """
    if unknown := sorted({*options.only} - EXPERIMENTS.keys()):
        sys.exit(f"unknown experiment: {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    refuse_other_code(options)
    training = stand_ins.write(options.folder, options.trial) if options.trial else {}
    paths = [*write_experiments(options, training)]
    paths += [f"experiments/{name}" for name in options.beside]
    if options.write_only:
        return
    failed = [path for path in paths if not _run(path, options)]
    print(table_of_results(options.folder))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def refuse_other_code(options: Options) -> None:
    """Exits unless the checkout has the comparison, with its code as it is committed."""
    if not (options.folder / "run.py").is_file():
        sys.exit(f"{options.checkout}: expected a git checkout of huggingface/peft, with {FOLDER / 'run.py'}")
    command = ["git", "status", "--porcelain", "--untracked-files=no", "src", str(FOLDER)]
    done = subprocess.run(command, cwd=options.checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{options.checkout}: {done.stderr.strip()}")
    changed = [line for line in done.stdout.splitlines() if line.endswith(".py")]
    if changed:
        sys.exit(f"{options.checkout}: its code was changed: {', '.join(line[3:] for line in changed)}")


def write_experiments(options: Options, training: dict[str, Any]) -> Iterator[str]:
    """Writes the experiments. Yields their paths, as the comparison's ``run.py`` wants them."""
    chosen = {name: EXPERIMENTS[name] for name in options.only or EXPERIMENTS}
    if options.selection:
        chosen |= [experiments.of_selection(options.selection)]
    for name, one in chosen.items():
        config, path = dict(one.config), f"experiments/{METHOD}/{name}"
        if options.trial:  # under a name of its own: the comparison keeps results by it
            path = f"experiments/{METHOD}/trial-{name}"
            config |= {"params": "3%"} if "params" in config else {}
        Experiment(config, dict(one.training) | training).write(options.folder / path)
        yield path


def _run(path: str, options: Options) -> bool:
    """Runs one experiment with the code of the checkout."""
    script = HERE / ("stand_ins.py" if options.trial else "launch.py")
    places = [str(options.checkout.resolve() / "src"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    if options.trial:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(options.folder / "cache")}
    log(f"running {path}")
    command = [sys.executable, str(script), "run.py", "-v", "--clean", path]
    return subprocess.run(command, cwd=options.folder, env=environment, check=False).returncode == 0


def table_of_results(folder: Path) -> str:
    """Our results, and those of PEFT's that are nearest, as Markdown."""
    ours = sorted(folder.glob(f"*results/{METHOD}--*.json"), key=lambda file: file.stat().st_mtime)
    theirs = [file for pattern in SHOWN for file in sorted((folder / "results").glob(f"{pattern}.json"))]
    lines = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    return "\n".join([*lines, *(_row(json.loads(file.read_text())) for file in [*theirs, *ours])])


def _row(result: dict[str, Any]) -> str:
    run, train = result["run_info"], result["train_info"]
    last = (train["metrics"] or [{}])[-1]
    name = run["experiment_name"]
    cells: Sequence[object] = (
        f"**{name}**" if name.startswith(METHOD) else name,
        f"{train['num_trainable_params']:,}",
        f"{last['test accuracy']:.3f}" if "test accuracy" in last else train["status"],
        f"{last['forgetting']:.3f}" if "forgetting" in last else run["error_msg"],
        f"{train['train_time']:.0f}",
        f"{train['accelerator_memory_max'] / 1e9:.1f}",
        f"{train['file_size'] / 1e6:.1f}",
        result["meta_info"]["system_info"]["accelerator"],
    )
    return f"| {' | '.join(map(str, cells))} |"
