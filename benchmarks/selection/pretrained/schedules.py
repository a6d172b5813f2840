"""Recipes with a schedule beside the fixed choice of the same budget: loss, step time, FLOPs. Needs torch."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import json_lines, machine
from benchmarks.harness.log import log
from benchmarks.harness.process import QUIET
from benchmarks.selection.pretrained.options import SCHEDULES, PretrainedOptions
from benchmarks.selection.pretrained.subjects import ChatModel
from neftsurgery.training.train_plan import plan_train

PACKAGES = ("neftsurgery", "torch", "transformers")
EXAMPLES, DEV = 160, 32
FIGURES = ("before", "loss", "step", "mean", "parameters")


def measure_schedules(options: PretrainedOptions) -> None:
    """Makes the missing runs, turn by turn, with a line for each; the same command resumes."""
    os.environ.update(QUIET)
    torch.set_num_threads(options.threads)
    file = options.schedule_results
    work = options.work / "schedules"
    work.mkdir(parents=True, exist_ok=True)
    known = [(line["kind"], line.get("schedule"), line.get("seed")) for line in json_lines.load(file)]
    if not known:
        setting: dict[str, Any] = {"steps": options.schedule_steps, "examples": EXAMPLES, "dev": DEV}
        setting |= {"machine": machine.describe(options.out, PACKAGES), "command": options.schedule_command}
        setting |= {"date": datetime.now(UTC).date().isoformat(), "schedules": SCHEDULES}
        json_lines.append(file, {"kind": "setting", **setting})
    model = ChatModel(options.setting, options.text, work, options.device).folder
    _write_examples(options, work)
    for schedule in ("fixed", "backward"):
        if ("flops", schedule, None) not in known:
            with FlopCounterMode(display=False) as counter:
                _run(options, model, work, schedule, seed=0, steps=1, dev=False)
            line = {"kind": "flops", "schedule": schedule, "flops": counter.get_total_flops()}
            json_lines.append(file, line)
    for seed in range(1, options.seeds + 1):
        for schedule in SCHEDULES:
            if ("run", schedule, seed) not in known:
                found = _run(options, model, work, schedule, seed, options.schedule_steps, dev=True)
                json_lines.append(file, {"kind": "run", "schedule": schedule, "seed": seed, **found})
                log(f"    {schedule:10} {seed}  " + "  ".join(f"{key} {found[key]:.4g}" for key in FIGURES))


def _write_examples(options: PretrainedOptions, work: Path) -> None:
    """Short problems, as examples of a recipe."""
    lines = map(json.loads, (options.text / "gsm8k" / "train.jsonl").read_text().splitlines())
    short = [one for one in lines if len(one["question"]) + len(one["answer"]) < 380]
    drawn = random.Random(0).sample(short, min(EXAMPLES + DEV, len(short)))
    for name, part in (("train", drawn[DEV:]), ("dev", drawn[:DEV])):
        made = ({"prompt": f"{one['question']}\n", "completion": one["answer"]} for one in part)
        (work / f"{name}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in made))


def _run(
    options: PretrainedOptions, model: Path, work: Path, schedule: str, seed: int, steps: int, dev: bool
) -> dict[str, Any]:
    """One run of a recipe; times are of the processor: the median step, and the mean with all between."""
    out = work / f"{schedule}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    data = {"train": str(work / "train.jsonl"), "max_length": 128}
    data |= {"eval": str(work / "dev.jsonl")} if dev else {"eval_share": 0}
    plan = plan_train(
        {
            "model": str(model), "out": str(out), "data": data, "schedule": SCHEDULES[schedule],
            "probe": {"by": "weights"}, "select": {"params": "3%", "score": "magnitude", "anatomy": "units"},
            "train": {
                "steps": steps, "batch_size": 2, "learning_rate": 1e-3, "save_every": steps, "seed": seed,
                "dtype": "float32", "device": options.device if options.device == "cpu" else "auto",
            },
        },
        force=True,
    )  # fmt: skip
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    ends: list[float] = []
    handle: Any = register_optimizer_step_post_hook(lambda *_: ends.append(clock()))
    try:
        result = plan.run()
    finally:
        handle.remove()
        shutil.rmtree(out, ignore_errors=True)
    times = [after - before for before, after in pairwise(ends)]
    return {
        "before": result.base_dev_loss, "loss": result.dev_loss, "parameters": result.selection.parameters,
        "step": round(median(times), 4) if times else None,
        "mean": round((ends[-1] - ends[0]) / len(times), 4) if times else None,
    }  # fmt: skip
