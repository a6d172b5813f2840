"""Text as token ids: a tokenizer trained on the spot, and the examples of every task."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.selection.text import SentencePair, Text

PADDING, END, ENGLISH, CHINESE = range(4)
SPECIAL_TOKENS = ["<pad>", "<end>", "<en>", "<zh>"]
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Token ids; those from ``start`` on are to be predicted."""

    ids: tuple[int, ...]
    start: int


class Codec:
    """Turns sentences into examples and token ids into text. Made by `train` or `load`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, text: Text, vocabulary: int) -> Codec:
        """Trains byte pairs within words, each Chinese character on its own, on the pre-training pairs."""
        tokenizer = Tokenizer(models.BPE())
        apart = pre_tokenizers.Split(Regex(r"[\u3400-\u9fff]"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [apart, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        sides = (side for english, chinese in text.pretrain for side in (f" {english}", chinese))
        tokenizer.train_from_iterator(sides, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, file: Path) -> Codec:
        """Reads a saved tokenizer."""
        return cls(Tokenizer.from_file(str(file)))

    def save(self, file: Path) -> None:
        """Writes the tokenizer as a JSON file of the tokenizers library."""
        self._tokenizer.save(str(file))

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        return int(self._tokenizer.get_vocab_size())

    def sentence(self, sentence: str, language: int) -> Example:
        """A sentence alone; all of it is to be predicted."""
        return Example((language, *self._encode(sentence, language), END), 1)

    def translation(self, source: str, target: str, into: int) -> Example:
        """A sentence and its translation into the language ``into``, which is to be predicted."""
        prompt = self.prompt(source, into)
        return Example((*prompt, *self._encode(target, into), END), len(prompt))

    def prompt(self, source: str, into: int) -> tuple[int, ...]:
        """The prompt that asks for a translation of ``source``."""
        other = ENGLISH if into == CHINESE else CHINESE
        return (other, *self._encode(source, other), into)

    def forward(self, pairs: Iterable[SentencePair]) -> list[Example]:
        """Translation from English into Chinese: the task of fine-tuning."""
        return [self.translation(english, chinese, CHINESE) for english, chinese in pairs]

    def backward(self, pairs: Iterable[SentencePair]) -> list[Example]:
        """Translation from Chinese into English: a task of pre-training."""
        return [self.translation(chinese, english, ENGLISH) for english, chinese in pairs]

    def english(self, pairs: Iterable[SentencePair]) -> list[Example]:
        """The English sentences alone."""
        return [self.sentence(english, ENGLISH) for english, _ in pairs]

    def chinese(self, pairs: Iterable[SentencePair]) -> list[Example]:
        """The Chinese sentences alone."""
        return [self.sentence(chinese, CHINESE) for _, chinese in pairs]

    def pieces(self, paragraphs: Iterable[str], length: int) -> list[Example]:
        """Paragraphs in pieces of ``length`` tokens, without an end token."""
        found: list[Example] = []
        for paragraph in paragraphs:
            ids = self._encode(paragraph, ENGLISH)
            starts = range(0, len(ids) - length + 2, length - 1)
            found += [Example((ENGLISH, *ids[start : start + length - 1]), 1) for start in starts]
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the end token; broken characters become U+FFFD."""
        kept: list[int] = []
        for one in ids:
            if one == END:
                break
            kept.append(int(one))
        return str(self._tokenizer.decode(kept)).strip()

    def _encode(self, sentence: str, language: int) -> list[int]:
        if language == ENGLISH:
            sentence = f" {sentence}"  # so that the first word has the same token as elsewhere
        return list(self._tokenizer.encode(sentence, add_special_tokens=False).ids)


def shuffled_batches(examples: Sequence[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Endless batches: all examples in random order, again and again; a batch has similar lengths."""
    while True:
        order = rng.sample(range(len(examples)), len(examples))
        for start in range(0, len(order), 8 * size):
            near = sorted(order[start : start + 8 * size], key=lambda n: len(examples[n].ids))
            cut = [near[at : at + size] for at in range(0, len(near), size)]
            rng.shuffle(cut)
            yield from ([examples[n] for n in batch] for batch in cut if len(batch) == min(size, len(order)))


def batches_by_length(examples: Sequence[Example], size: int) -> Iterator[tuple[list[int], list[Example]]]:
    """All examples sorted by length, in batches, with their positions."""
    order = sorted(range(len(examples)), key=lambda n: len(examples[n].ids))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        yield places, [examples[n] for n in places]


def collate(examples: Sequence[Example], device: Any = "cpu") -> dict[str, Any]:
    """``input_ids`` and ``labels``, ``[batch, longest]``; labels that are not predicted are `IGNORED`."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), PADDING)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, example in enumerate(examples):
        own = torch.tensor(example.ids)
        ids[row, : len(own)] = own
        labels[row, example.start : len(own)] = own[example.start :]
    return {"input_ids": ids.to(device), "labels": labels.to(device)}
