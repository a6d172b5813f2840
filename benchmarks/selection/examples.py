"""Text as token ids: a tokenizer made on the spot, and the examples of every task."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.selection.text import Pair, Text

PADDING, END, ENGLISH, CHINESE = range(4)
SIGNS = ["<pad>", "<end>", "<en>", "<zh>"]
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Token ids, and from where on they are to be foretold."""

    ids: tuple[int, ...]
    start: int


class Codec:
    """Sentences to examples and back. Made by `made` or `loaded`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def made(cls, text: Text, vocabulary: int) -> Codec:
        """Byte pairs within words, and each Chinese character apart, from what is learnt first."""
        tokenizer = Tokenizer(models.BPE())
        apart = pre_tokenizers.Split(Regex(r"[\u3400-\u9fff]"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [apart, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=SIGNS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        sides = (side for english, chinese in text.pretrain for side in (f" {english}", chinese))
        tokenizer.train_from_iterator(sides, trainer)
        return cls(tokenizer)

    @classmethod
    def loaded(cls, file: Path) -> Codec:
        """What was saved."""
        return cls(Tokenizer.from_file(str(file)))

    def save(self, file: Path) -> None:
        """As a tokenizers file."""
        self._tokenizer.save(str(file))

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return int(self._tokenizer.get_vocab_size())

    def sentence(self, sentence: str, language: int) -> Example:
        """A sentence alone, of which all is to be foretold."""
        return Example((language, *self._encode(sentence, language), END), 1)

    def translation(self, source: str, target: str, into: int) -> Example:
        """A sentence, and what it is in the language ``into``, which is to be foretold."""
        prompt = self.prompt(source, into)
        return Example((*prompt, *self._encode(target, into), END), len(prompt))

    def prompt(self, source: str, into: int) -> tuple[int, ...]:
        """What a translation follows."""
        other = ENGLISH if into == CHINESE else CHINESE
        return (other, *self._encode(source, other), into)

    def forward(self, pairs: Iterable[Pair]) -> list[Example]:
        """English into Chinese: what is tuned for."""
        return [self.translation(english, chinese, CHINESE) for english, chinese in pairs]

    def backward(self, pairs: Iterable[Pair]) -> list[Example]:
        """Chinese into English: what the base knows."""
        return [self.translation(chinese, english, ENGLISH) for english, chinese in pairs]

    def english(self, pairs: Iterable[Pair]) -> list[Example]:
        """The English sides."""
        return [self.sentence(english, ENGLISH) for english, _ in pairs]

    def chinese(self, pairs: Iterable[Pair]) -> list[Example]:
        """The Chinese sides."""
        return [self.sentence(chinese, CHINESE) for _, chinese in pairs]

    def pieces(self, paragraphs: Iterable[str], length: int) -> list[Example]:
        """Articles in pieces of ``length`` tokens, without an end."""
        found: list[Example] = []
        for paragraph in paragraphs:
            ids = self._encode(paragraph, ENGLISH)
            starts = range(0, len(ids) - length + 2, length - 1)
            found += [Example((ENGLISH, *ids[start : start + length - 1]), 1) for start in starts]
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Up to the end sign; broken characters become U+FFFD."""
        kept: list[int] = []
        for one in ids:
            if one == END:
                break
            kept.append(int(one))
        return str(self._tokenizer.decode(kept)).strip()

    def _encode(self, sentence: str, language: int) -> list[int]:
        if language == ENGLISH:
            sentence = f" {sentence}"  # its first word is the same token as anywhere else
        return list(self._tokenizer.encode(sentence, add_special_tokens=False).ids)


def shuffled(examples: Sequence[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Batches without end: all examples in random order, again and again; alike in length within a batch."""
    while True:
        order = rng.sample(range(len(examples)), len(examples))
        for start in range(0, len(order), 8 * size):
            near = sorted(order[start : start + 8 * size], key=lambda n: len(examples[n].ids))
            cut = [near[at : at + size] for at in range(0, len(near), size)]
            rng.shuffle(cut)
            yield from ([examples[n] for n in batch] for batch in cut if len(batch) == min(size, len(order)))


def in_order(examples: Sequence[Example], size: int) -> Iterator[tuple[list[int], list[Example]]]:
    """All examples by length, in batches, with their places."""
    order = sorted(range(len(examples)), key=lambda n: len(examples[n].ids))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        yield places, [examples[n] for n in places]


def collate(examples: Sequence[Example], device: Any = "cpu") -> dict[str, Any]:
    """``input_ids`` and ``labels``, ``[batch, longest]``; what is not to be foretold is ignored."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), PADDING)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, example in enumerate(examples):
        own = torch.tensor(example.ids)
        ids[row, : len(own)] = own
        labels[row, example.start : len(own)] = own[example.start :]
    return {"input_ids": ids.to(device), "labels": labels.to(device)}
