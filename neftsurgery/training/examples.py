"""Training examples: tokens, with the loss on those that are to be learned."""

from __future__ import annotations

import json
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

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


class Example(TypedDict):
    """One row of a batch."""

    input_ids: list[int]
    labels: list[int]  # of the same length: the token, or `IGNORED`
    position_ids: NotRequired[list[int]]  # of packed examples: each begins at 0
    preference: NotRequired[
        Mapping[str, Any]
    ]  # the row that DPO learns from; the tokens are the chosen answer


@dataclass(frozen=True)
class Examples:
    """The examples of a run."""

    # The examples to learn, and those that the dev loss is measured on, by set; there may be none.
    train: Sequence[Example]
    dev_sets: Mapping[str, Sequence[Example]]
    warnings: tuple[str, ...] = ()  # sentences for the user
    against: Sequence[Example] = ()  # what a probe compares those to learn with

    @property
    def dev(self) -> list[Example]:
        """The examples of all dev sets."""
        return [example for one in self.dev_sets.values() for example in one]

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
        digest, border = xxhash.xxh3_128(), Example(input_ids=[-1], labels=[-1])
        for example in (*self.train, border, *self.dev):
            for ids in (example["input_ids"], example["labels"]):
                digest.update(np.array([len(ids), *ids], np.int64).tobytes())
            if "preference" in example:
                digest.update(json.dumps(example["preference"]).encode())
        return digest.hexdigest()


def read_examples(recipe: Recipe, tokenizer: Any) -> Examples:
    """The examples of a recipe. Without ``data.eval``, a share of them is held back for the dev loss."""
    data, seed = recipe.data, recipe.train.seed
    splits = data.long == "split"
    encoder = Encoder(tokenizer, loss_on=data.loss_on, max_length=data.max_length, splits=splits)
    template = PromptTemplate.of(data.prompt, data.completion)
    kinds = ("preference",) if recipe.train.method == "dpo" else ("prompt", "messages", "text")
    read = partial(read_raw_examples, subset=data.subset, template=template, kinds=kinds)
    sets = {name: encoder.encode(read(name, data.split, limit=data.limit)) for name in data.names}
    others = recipe.probe.against
    against = [] if others is None else encoder.encode(read(others, data.split, limit=data.limit))
    dev = {name: encoder.encode(read(name, data.eval_split)) for name in data.eval_names}
    if not dev:
        halves = {name: _held_back(one, data.eval_share, seed) for name, one in sets.items()}
        sets = {name: rest for name, (rest, _) in halves.items()}
        dev = {name: held for name, (_, held) in halves.items() if held}
    train, warnings = _mixed(list(sets.values()), data.train, seed), []
    if (whole := sum(map(len, sets.values()))) > len(train):
        warnings.append(
            f"data.train mixes {len(train)} of {whole} examples, until the first set is exhausted"
        )
    if encoder.long:
        done = "split" if splits else "truncated"
        warnings.append(f"{encoder.long} examples are longer than data.max_length and were {done}")
    if encoder.dropped:
        warnings.append(f"{encoder.dropped} examples have no token to learn and were left out")
    if not dev and data.eval_share:
        warnings.append(
            "there are too few examples to hold any back: there is no dev loss, and no best patch"
        )
    stems = [Path(name).stem for name in dev]
    if len(set(stems)) == len(stems):
        dev = dict(zip(stems, dev.values(), strict=True))
    train = list(_packed(train, data.max_length)) if data.packing else train
    return Examples(train, dev, tuple(warnings), against)


def _held_back(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Those to train on, and a share of them that is held back."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    held = set(order[: round(share * len(order))])
    return [examples[n] for n in sorted(set(order) - held)], [examples[n] for n in sorted(held)]


def _packed(examples: Sequence[Example], most: int) -> Iterator[Example]:
    """Rows of at most ``most`` tokens: the longest examples first, each where it just fits."""
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each row, ascending
    for example in sorted(examples, key=lambda one: -len(one["input_ids"])):
        size = len(example["input_ids"])
        place = bisect_left(room, (size, 0))
        free, number = room.pop(place) if place < len(room) else (most, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(example)
        insort(room, (free - size, number))
    for row in rows:
        yield Example(
            input_ids=[token for one in row for token in one["input_ids"]],
            labels=[label for one in row for label in (IGNORED, *one["labels"][1:])],
            position_ids=[position for one in row for position in range(len(one["input_ids"]))],
        )


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
        self._learns_masks = loss_on == "assistant_masks"
        self._max_length = max_length
        self._splits = splits
        self.long = 0  # how many examples were longer than ``max_length``
        self.dropped = 0  # how many examples, or pieces, had no token to learn

    def encode(self, raw_examples: Sequence[RawExample]) -> list[Example]:
        """The examples that have a token to learn; a `UsageError` if none is left."""
        encoders = {
            "prompt": self._completion, "messages": self._chat, "text": self._text, "preference": self._chosen
        }  # fmt: skip
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
                piece = Example(input_ids=ids[start : start + most], labels=labels[start : start + most])
                if raw.kind == "preference":
                    piece["preference"] = raw.content
                if any(label != IGNORED for label in piece["labels"][1:]):  # nothing predicts the first token
                    examples.append(piece)
                else:
                    self.dropped += 1
        if not examples:
            what, hint = "no example has a token to learn", "data.max_length may be too small"
            raise UsageError(what, file=raw_examples[0].file, hint=hint)
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
            what = "messages need a chat template, and the tokenizer has none"
            raise UsageError(what, file=raw.file, hint="write prompt and completion instead")
        messages = raw.content["messages"]
        if self._learns_masks:
            return self._masked(raw)
        ids = self._template(raw, messages)
        learned = [False] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("weight") != 0 and not self._learns_all:
                before = self._template(raw, messages[:number], add_generation_prompt=True)
                after = self._template(raw, messages[: number + 1])
                if _common_prefix(after, ids) < len(after) - 1:
                    what = f"line {raw.line}: the chat template rewrites earlier answers"
                    hint = "set data.loss_on: all, or write one answer per example"
                    raise MismatchError(what, file=raw.file, hint=hint)
                start, stop = _common_prefix(before, ids), min(len(after), len(ids))
                learned[start:stop] = [True] * (stop - start)
        return ids, learned

    def _chosen(self, raw: RawExample) -> tuple[list[int], list[bool]]:
        """The chosen answer of a preference, as the example that it is."""
        prompt, chosen = raw.content.get("prompt"), raw.content["chosen"]
        if isinstance(chosen, str):
            return self._completion(replace(raw, content={"prompt": prompt, "completion": chosen}))
        return self._chat(replace(raw, content={**raw.content, "messages": [*(prompt or []), *chosen]}))

    def _masked(self, raw: RawExample) -> tuple[list[int], list[bool]]:
        """What lies in the chat template's ``{% generation %}`` blocks is learned."""
        tools = raw.content.get("tools") or None
        encoded = self._tokenizer.apply_chat_template(
            raw.content["messages"], tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        if not any(encoded["assistant_masks"]):
            what = "the chat template marks no answer, and data.loss_on is assistant_masks"
            hint = "give the template {% generation %} blocks, or set data.loss_on: completions"
            raise UsageError(what, file=raw.file, hint=hint)
        return list(encoded["input_ids"]), [bool(one) for one in encoded["assistant_masks"]]

    def _template(self, raw: RawExample, messages: Sequence[Any], **options: Any) -> list[int]:
        from jinja2 import TemplateError

        if not messages:
            return []
        try:
            options["tools"] = raw.content.get("tools") or None
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError as error:
            what = f"the chat template does not accept these messages: {first_line(error)}"
            raise raw.error(what) from error
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _common_prefix(some: Sequence[int], others: Sequence[int]) -> int:
    """The length of their common prefix."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(some), len(others)))


def collate(examples: Sequence[Example], padding: int) -> dict[str, Tensor]:
    """A batch of ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[examples, longest]``.

    Packed examples have ``position_ids`` in place of the mask: from them, transformers tells where one ends.
    """

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)

    batch = {
        "input_ids": padded([e["input_ids"] for e in examples], padding),
        "labels": padded([e["labels"] for e in examples], IGNORED),
    }
    if "position_ids" in examples[0]:
        return batch | {"position_ids": padded([e["position_ids"] for e in examples], 0)}
    return batch | {"attention_mask": padded([[1] * len(e["input_ids"]) for e in examples], 0)}


def collator(tokenizer: Any) -> Callable[[Any], dict[str, Tensor]]:
    """`collate` with the padding token of a tokenizer."""
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return partial(collate, padding=padding or 0)


def require_separate(model: Any, packed: Sequence[Example]) -> None:
    """Raise a `UsageError` unless a model reads packed examples as it reads each alone."""
    row = next((e for e in packed if e["position_ids"].count(0) > 1), None)
    if row is None:
        return
    border = row["position_ids"].index(0, 1)
    stop = border + max(row["position_ids"][border:]) + 1  # the second is the longest of the rest
    ids, positions = (torch.tensor([row[key]], device=model.device) for key in ("input_ids", "position_ids"))
    model.config.use_cache = False  # with a cache, transformers reads them as one
    model.eval()
    with torch.no_grad():
        alone = model(input_ids=ids[:, border:stop]).logits
        try:
            together = model(input_ids=ids[:, :stop], position_ids=positions[:, :stop]).logits[:, border:]
        except TypeError:  # it has no positions
            together = torch.zeros_like(alone)
    apart = float((together - alone).float().norm() / alone.float().norm())
    if apart > max(1e-3, 4 * torch.finfo(alone.dtype).eps):
        what, found = "this model reads packed examples as one text", f"answers that differ by {apart:.1%}"
        hint = "set data.packing: false, or another train.attn_implementation"
        raise UsageError(what, found=found, hint=hint)
