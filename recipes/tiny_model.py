"""Make tiny-model/, the base of the small recipes: a Llama with 150,000 parameters that copies words.

$ python recipes/tiny_model.py
"""

from __future__ import annotations

import random
import string
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, which takes any text, with three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    letters = Tokenizer(models.BPE(vocabulary, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )


def words(count: int, letters: str, seed: int) -> list[str]:
    """``count`` random words of four letters."""
    draw = random.Random(seed)
    return ["".join(draw.choices(letters, k=4)) for _ in range(count)]


def make(folder: Path, steps: int = 300) -> None:
    """Train the model and save it in bfloat16."""
    torch.manual_seed(0)
    letters = tokenizer()
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=64, intermediate_size=176, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        drawn = [
            *words(32, string.ascii_lowercase, 2 * step),
            *words(32, string.ascii_uppercase, 2 * step + 1),
        ]
        lines = [f"copy {word}: {word}</s>" for word in drawn]
        ids = letters(lines, return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, :10] = -100  # "copy word:" is not learned
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", file=sys.stderr)
    model.to(torch.bfloat16).save_pretrained(folder)
    letters.save_pretrained(folder)


if __name__ == "__main__":
    make(Path(__file__).with_name("tiny-model"))
