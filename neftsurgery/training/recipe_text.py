"""A recipe as text to start from: every key with its help; what the task does not need is commented out."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from ..errors import UsageError, spelled
from ..options import CutOptions, declared
from .recipe import SECTIONS, Recipe, as_key

_START: dict[str, Any] = {
    "model": "org/name", "out": "run", "data.train": "train.jsonl", "probe.by": "gradients",
    "select.neurons": "3%", "train.epochs": 3, "train.batch_size": 8, "train.learning_rate": "5.0e-5",
}  # fmt: skip
_STEADY: dict[str, Any] = {"train.scheduler": "cosine", "train.warmup": 0.03}
TASKS: dict[str, dict[str, Any]] = {
    "instructions": _STEADY | {
        "model": "Qwen/Qwen2.5-0.5B-Instruct", "data.train": "HuggingFaceH4/no_robots",
        "data.eval": "HuggingFaceH4/no_robots", "data.eval_split": "test", "data.max_length": 1024,
        "train.epochs": 2, "train.batch_size": 4, "train.accumulate": 8,
    },
    "maths": _STEADY | {
        "model": "Qwen/Qwen2.5-0.5B", "data.train": "openai/gsm8k", "data.subset": "main",
        "data.eval": "openai/gsm8k", "data.eval_split": "test", "train.batch_size": 16, "train.accumulate": 2,
        "data.prompt": "Question: {question}\nAnswer:", "data.completion": " {answer}",
        "data.max_length": 512,
    },
}  # fmt: skip
"""Recipes by task: what differs from the one without a task."""
_COLUMN, _WIDTH = 40, 120


def recipe_text(task: str | None = None) -> str:
    """The commented recipe of a task, in YAML; every key that it does not set stands behind a ``#``."""
    if task is not None and task not in TASKS:
        raise UsageError(f"there is no task {task!r}", hint=f"tasks are {', '.join(TASKS)}")
    given = _START | (TASKS[task] if task else {})
    text = ["# A recipe for `neftsurgery train`. A key behind # has its default, and may be left out."]
    options = declared(CutOptions)
    sections: dict[str, type[Any]] = {"": Recipe, **SECTIONS}
    for name, kind in sections.items():
        text += ["", *([f"{name}:"] if name else [])]
        hints = get_type_hints(kind)
        for one in dataclasses.fields(kind):
            key = f"{name}.{one.name}" if name else one.name
            if key not in SECTIONS:
                said = one.metadata.get("help") or spelled(options[one.name][1].help, as_key)
                text += _lines(key, given.get(key, one), said, hints[one.name])
    return "\n".join(text) + "\n"


def _lines(key: str, value: Any, text: str, hint: Any) -> Iterator[str]:
    """A key with its value, or behind a ``#`` with its default, and its help beside it."""
    section, _, name = key.rpartition(".")
    unset = isinstance(value, dataclasses.Field)
    if unset:
        value = value.default if value.default_factory is dataclasses.MISSING else value.default_factory()
    plain = isinstance(value, str) and re.fullmatch(r"[\w./-]+%?", value)
    shown = "" if value is None else value if plain else json.dumps(value)
    line = f"{'  ' if section else ''}{'# ' if unset else ''}{name}: {shown}".rstrip()
    choices = [
        str(each) for one in (hint, *get_args(hint)) for each in get_args(one) if isinstance(each, str)
    ]
    text += f" One of {', '.join(choices)}." if len(choices) > 1 else ""
    first, *rest = textwrap.wrap(text, _WIDTH - _COLUMN - 2)
    if len(line) >= _COLUMN:
        yield line
        line = ""
    yield f"{line:{_COLUMN}}# {first}"
    yield from (f"{'':{_COLUMN}}# {more}" for more in rest)
