"""The model: creates and loads it, computes losses and translations. Needs torch and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.selection.examples import END, IGNORED, PADDING, Codec, Example, batches_by_length, collate
from benchmarks.selection.options import Shape
from benchmarks.selection.text import SentencePair

BATCH = 100  # examples per batch of an evaluation


def initialize(shape: Shape, vocabulary: int, seed: int, device: str) -> Any:
    """A model with random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=PADDING,
        bos_token_id=None,
        eos_token_id=END,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(device)


def load(folder: Path, device: str) -> Any:
    """The model of a checkpoint."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in nats of every predicted token. The head computes only these tokens.

    Padding is on the right, where no real token attends to it, so no mask is needed.
    """
    hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    counts = labels != IGNORED
    return functional.cross_entropy(model.lm_head(hidden[counts]), labels[counts], reduction="none")


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Example]) -> list[tuple[float, int]]:
    """For each example, the sum of its tokens' losses and the number of tokens."""
    model.eval()
    found: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    for places, batch in batches_by_length(examples, BATCH):
        inputs = collate(batch, model.device)
        counts = [len(example.ids) - example.start for example in batch]
        parts = losses(model, inputs).double().split(counts)
        for place, part, count in zip(places, parts, counts, strict=True):
            found[place] = (part.sum().item(), count)
    return found


def mean_loss(model: Any, examples: Sequence[Example]) -> float:
    """The mean loss in nats per token."""
    found = evaluate(model, examples)
    return sum(loss for loss, _ in found) / sum(count for _, count in found)


@torch.no_grad()
def translate(model: Any, codec: Codec, pairs: Sequence[SentencePair], into: int, most: int) -> list[str]:
    """Greedy translations of the English sentences, of at most ``most`` tokens.

    Prompts of equal length form a batch, so there is no padding to mask.
    """
    model.eval()
    by_length: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for place, (english, _) in enumerate(pairs):
        prompt = codec.prompt(english, into)
        by_length.setdefault(len(prompt), []).append((place, prompt))
    found = [""] * len(pairs)
    for group in by_length.values():
        answers = _greedy(model, torch.tensor([prompt for _, prompt in group]), most)
        for (place, _), answer in zip(group, answers.tolist(), strict=True):
            found[place] = codec.decode(answer)
    return found


def _greedy(model: Any, prompts: Tensor, most: int) -> Tensor:
    cache, given = DynamicCache(config=model.config), prompts.to(model.device)
    ended = torch.zeros(len(given), dtype=torch.bool, device=given.device)
    answer: list[Tensor] = []
    while len(answer) < most and not bool(ended.all()):
        given = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:]
        given = given.argmax(-1)
        ended |= given[:, 0] == END
        answer.append(given)
    return torch.cat(answer, 1)


def parameters_of(model: Any) -> int:
    """The number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
