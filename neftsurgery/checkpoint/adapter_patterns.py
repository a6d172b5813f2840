"""Which modules the config of a LoRA adapter targets, at which rank and alpha: patterns as PEFT reads them.

Most are regular expressions, and a stranger's can run for ever: they are matched in a process of their own,
which is stopped when it takes too long.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CorruptFileError, MismatchError

_MOST_PATTERNS, _MOST_MATCHES, _MOST_TEXT, _MOST_PARENTS = 10_000, 2_000_000, 1_000_000, 100
#: What the process runs. It stops by itself too, should this one be killed.
_MATCHER = """
import json, re, signal, sys
seconds, questions, paths = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_REAL, seconds)
answers = []
for method, patterns in questions:
    matches = [getattr(re.compile(pattern), method) for pattern in patterns]
    answers.append([next((i for i, match in enumerate(matches) if match(path)), -1) for path in paths])
json.dump(answers, sys.stdout)
"""


def unreadable(file: Path | None, what: str, hint: str | None = None) -> MismatchError:
    """The refusal of an adapter of a kind that cannot be read here."""
    return MismatchError(
        f"this adapter cannot be scored without merging: {what}",
        file=file,
        hint=hint or "merge it with PEFT (merge_and_unload), save the model, and diff that",
    )


def ranks_and_alphas(
    config: Mapping[str, Any], paths: Sequence[str], file: Path
) -> dict[str, tuple[object, object]]:
    """The rank and alpha of the modules at ``paths`` that the config targets; raises as `read_factors`."""
    ranks, alphas = (_setting(config, key, file, dict) or {} for key in ("rank_pattern", "alpha_pattern"))
    targets = _setting(config, "target_modules", file, str, list)
    excluded = _setting(config, "exclude_modules", file, str, list)
    questions = [("match", [rf"(.*\.)?({pattern})$" for pattern in table]) for table in (ranks, alphas)]
    questions += [("fullmatch", [one] if isinstance(one, str) and one else []) for one in (targets, excluded)]
    by_rank = [*ranks.values(), config.get("r", 8)]
    by_alpha = [*alphas.values(), config.get("lora_alpha", 8)]
    listed, barred = (frozenset(one if isinstance(one, list) else ()) for one in (targets, excluded))
    in_layer = _layer_test(config, targets, file)
    found = {}
    answers = first_matches(questions, paths, file)
    for path, rank, alpha, target, exclusion in zip(paths, *answers, strict=True):
        parts = path.split(".")
        endings = {".".join(parts[start:]) for start in range(len(parts))}
        # PEFT does not look at the layer of a module that is listed by its whole path.
        named = target >= 0 or path in listed or (not listed.isdisjoint(endings) and in_layer(path))
        if named and exclusion < 0 and barred.isdisjoint(endings):
            found[path] = by_rank[rank], by_alpha[alpha]
    return found


def first_matches(
    questions: Sequence[tuple[str, Sequence[str]]], paths: Sequence[str], file: Path, seconds: float = 30
) -> list[list[int]]:
    """By question (a method of `re`, and patterns) and path, the first pattern that matches; -1 for none."""
    patterns = [pattern for _, several in questions for pattern in several]
    if not patterns:
        return [[-1] * len(paths) for _ in questions]
    count, text = len(patterns), sum(map(len, patterns))
    if count > _MOST_PATTERNS or count * len(paths) > _MOST_MATCHES or text > _MOST_TEXT:
        raise unreadable(file, f"it has too many patterns ({count} for {len(paths)} modules)")
    command = [sys.executable, "-I", "-S", "-c", _MATCHER]
    asked = json.dumps([seconds, questions, paths])
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=seconds, check=True
        )
    except subprocess.SubprocessError as error:
        stopped = getattr(error, "returncode", -1) < 0
        what = f"takes more than {seconds:g} s to match" if stopped else "is not a regular expression"
        raise unreadable(file, f"one of its patterns {what}") from error
    answers: list[list[int]] = json.loads(done.stdout)
    return answers


def _layer_test(config: Mapping[str, Any], targets: object, file: Path) -> Callable[[str], bool]:
    """Whether a module is in one of ``layers_to_transform``."""
    layers = _setting(config, "layers_to_transform", file, int, list)
    names = _setting(config, "layers_pattern", file, str, list)
    if (names and layers is None) or (isinstance(targets, str) and not (layers is names is None)):
        raise unreadable(file, "its layers_to_transform and layers_pattern do not go with its target_modules")
    wanted = {layers} if isinstance(layers, int) else set(layers or ())
    parents = names if isinstance(names, list) else [names] if names else []
    if len(parents) > _MOST_PARENTS or not all(re.fullmatch(r"\w+", parent) for parent in parents):
        raise unreadable(file, "its layers_pattern is a regular expression, or has too many names")
    forms = [rf"(?:^|.*?\.){parent}\.(\d+)\." for parent in parents] or [r".*?\.[^.]*\.(\d+)\."]

    def in_layer(path: str) -> bool:
        found = next(filter(None, (re.match(form, path) for form in forms)), None)
        return not wanted or (found is not None and int(found[1][:18]) in wanted)

    return in_layer


def _setting(config: Mapping[str, Any], key: str, file: Path, *types: type) -> Any:
    """A setting: None or of one of ``types``. The items of a list are of the first of them."""
    value = config.get(key)
    items = value if isinstance(value, list) else ()
    if value is None or (isinstance(value, types) and all(isinstance(item, types[0]) for item in items)):
        return value
    raise CorruptFileError(f"{key} is not what PEFT writes", file=file, found=str(value)[:40])
