"""Training examples: tokens, with the loss on those that are to be learned."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import MismatchError, UsageError
from .raw_examples import PromptTemplate, RawExample, first_line, read_raw_examples
from .recipe import Recipe

IGNORED = -100
"""The label of a token without loss, as torch expects it."""

Example: TypeAlias = dict[str, list[int]]
"""``input_ids``, and ``labels`` of the same length: the token, or `IGNORED`."""


@dataclass(frozen=True)
class Examples:
    """The examples of a run."""

    # The examples to learn, and those that the dev loss is measured on. ``dev`` may be empty.
    train: Sequence[Example]
    dev: Sequence[Example]
    warnings: tuple[str, ...] = ()  # sentences for the user

    @property
    def tokens(self) -> int:
        """Tokens of the training examples."""
        return sum(len(example["input_ids"]) for example in self.train)

    @property
    def learned(self) -> int:
        """Tokens of the training examples that have a loss."""
        return sum(label >= 0 for example in self.train for label in example["labels"])

    def digest(self) -> str:
        """A hash of all tokens and labels."""
        digest = xxhash.xxh3_128()
        for example in (*self.train, {"input_ids": [-1], "labels": [-1]}, *self.dev):
            for ids in (example["input_ids"], example["labels"]):
                digest.update(np.array([len(ids), *ids], np.int64).tobytes())
        return digest.hexdigest()


def read_examples(recipe: Recipe, tokenizer: Any) -> Examples:
    """The examples of a recipe. Without ``data.eval``, a share of them is held back for the dev loss."""
    data = recipe.data
    splits = data.long == "split"
    encoder = Encoder(tokenizer, loss_on=data.loss_on, max_length=data.max_length, splits=splits)
    template = PromptTemplate.of(data.prompt, data.completion)
    read = partial(read_raw_examples, subset=data.subset, template=template)
    sets = [encoder.encode(read(name, data.split, limit=data.limit)) for name in data.names]
    train, warnings = _mixed(sets, data.train, recipe.train.seed), []
    if (whole := sum(map(len, sets))) > len(train):
        warnings.append(
            f"data.train mixes {len(train)} of {whole} examples, until the first set is exhausted"
        )
    dev: list[Example] = []
    if data.eval is not None:
        dev = encoder.encode(read(data.eval, data.eval_split))
    elif held := round(data.eval_share * len(train)):
        order = list(range(len(train)))
        random.Random(recipe.train.seed).shuffle(order)
        dev = [train[n] for n in sorted(order[:held])]
        train = [train[n] for n in sorted(order[held:])]
    if encoder.long:
        done = "split" if splits else "truncated"
        warnings.append(f"{encoder.long} examples are longer than data.max_length and were {done}")
    if encoder.dropped:
        warnings.append(f"{encoder.dropped} examples have no token to learn and were left out")
    if not dev and data.eval_share:
        warnings.append(
            "there are too few examples to hold any back: there is no dev loss, and no best patch"
        )
    return Examples(train, dev, tuple(warnings))


def _mixed(sets: Sequence[list[Example]], weights: object, seed: int) -> list[Example]:
    """One set of several: by weight until the first is exhausted; without weights, one after another."""
    if not isinstance(weights, dict):
        return [example for one in sets for example in one]
    from datasets import Dataset, interleave_datasets

    parts, total = [Dataset.from_list(one) for one in sets], sum(weights.values())
    return list(interleave_datasets(parts, [w / total for w in weights.values()], seed=seed))


class Encoder:
    """Turns raw examples into tokens and labels."""

    def __init__(self, tokenizer: Any, *, loss_on: str, max_length: int, splits: bool = False) -> None:
        self._tokenizer = tokenizer
        self._learns_all = loss_on == "all"
        self._max_length = max_length
        self._splits = splits
        self.long = 0  # how many examples were longer than ``max_length``
        self.dropped = 0  # how many examples, or pieces, had no token to learn

    def encode(self, raw_examples: Sequence[RawExample]) -> list[Example]:
        """The examples that have a token to learn; a `UsageError` if none is left."""
        encoders = {"prompt": self._completion, "messages": self._chat, "text": self._text}
        examples = []
        for raw in raw_examples:
            ids, learned = encoders[raw.kind](raw)
            labels = [
                token if self._learns_all or keep else IGNORED
                for token, keep in zip(ids, learned, strict=True)
            ]
            most = self._max_length
            self.long += len(ids) > most
            for start in range(0, len(ids), most) if self._splits else (0,):
                piece = {"input_ids": ids[start : start + most], "labels": labels[start : start + most]}
                if any(label != IGNORED for label in piece["labels"][1:]):  # nothing predicts the first token
                    examples.append(piece)
                else:
                    self.dropped += 1
        if not examples:
            raise UsageError(
                "no example has a token to learn",
                file=raw_examples[0].file,
                hint="data.max_length may be too small",
            )
        return examples

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def _text(self, raw: RawExample) -> tuple[list[int], list[bool]]:
        ids = self._ended(self._ids(raw.content["text"]))
        return ids, [True] * len(ids)

    def _completion(self, raw: RawExample) -> tuple[list[int], list[bool]]:
        prompt, completion = raw.content["prompt"], raw.content["completion"]
        # Tokenized together, as the model will see them. A token across the border belongs to the completion.
        ids = self._ended(self._ids(prompt + completion))
        known = _common_prefix(self._ids(prompt), ids)
        return ids, [n >= known for n in range(len(ids))]

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _chat(self, raw: RawExample) -> tuple[list[int], list[bool]]:
        if not self._tokenizer.chat_template:
            raise UsageError(
                "messages need a chat template, and the tokenizer has none",
                file=raw.file,
                hint="write prompt and completion instead",
            )
        messages = raw.content["messages"]
        ids = self._template(raw, messages)
        learned = [False] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("weight") != 0 and not self._learns_all:
                before = self._template(raw, messages[:number], add_generation_prompt=True)
                after = self._template(raw, messages[: number + 1])
                if _common_prefix(after, ids) < len(after) - 1:
                    raise MismatchError(
                        f"line {raw.line}: the chat template rewrites earlier answers",
                        file=raw.file,
                        hint="set data.loss_on: all, or write one answer per example",
                    )
                start, stop = _common_prefix(before, ids), min(len(after), len(ids))
                learned[start:stop] = [True] * (stop - start)
        return ids, learned

    def _template(self, raw: RawExample, messages: Sequence[Any], **options: Any) -> list[int]:
        from jinja2 import TemplateError

        if not messages:
            return []
        try:
            options["tools"] = raw.content.get("tools") or None
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError as error:
            raise raw.error(
                f"the chat template does not accept these messages: {first_line(error)}"
            ) from error
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _common_prefix(some: Sequence[int], others: Sequence[int]) -> int:
    """The length of their common prefix."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(some), len(others)))


def collate(examples: Sequence[Example], padding: int) -> dict[str, Tensor]:
    """A batch of ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[examples, longest]``."""

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)

    return {
        "input_ids": padded([e["input_ids"] for e in examples], padding),
        "attention_mask": padded([[1] * len(e["input_ids"]) for e in examples], 0),
        "labels": padded([e["labels"] for e in examples], IGNORED),
    }


def collator(tokenizer: Any) -> Callable[[Any], dict[str, Tensor]]:
    """`collate` with the padding token of a tokenizer."""
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return partial(collate, padding=padding or 0)
