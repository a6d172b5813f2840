"""The table of `make architectures`: a row a model type, from what `trials` stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .trials import COLUMNS

__all__ = ["put_trials", "wrong"]

_START, _END = "<!-- made by `make architectures`: trials -->", "<!-- end of trials -->"
_VERDICTS = ("right", "part", "refused", "wrong", "not run")
_SIGNS = {"right": "✓", "part": "✓", "refused": "refused", "wrong": "**wrong**", "not run": "·"}
_MOST_NAMED = 12


def put_trials(page: Path, stored: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the part of ``page`` between the two marks."""
    built = {name: told for name, told in stored.items() if "columns" in told}
    parts = [_counts(built), _wrong(built), _refusals(built), _failed(stored), _rows(built)]
    lines = [_START, "", *(line for part in parts for line in part)]
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(_START)
    page.write_text(before + "\n".join(lines) + "\n" + _END + rest.partition(_END)[2], encoding="utf-8")


def wrong(stored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All that is wrong, a line each."""
    return [
        f"{name}, {column}: {found['why']}"
        for name, told in stored.items()
        for column, found in told.get("columns", {}).items()
        if found["verdict"] == "wrong"
    ]


def _counts(built: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for verdict in _VERDICTS:
        found = [Counter(told["columns"][column]["verdict"] for told in built.values()) for column in COLUMNS]
        lines.append(f"| {verdict} | " + " | ".join(str(one[verdict]) for one in found) + " |")
    runs = sum(not told["not run"] for told in built.values())
    offered = {
        key: sum(bool(told["columns"]["units"]["counts"].get(key)) for told in built.values())
        for key in ("ffn", "units")
    }
    return [
        *lines,
        "",
        f"{len(built)} model types were built with weights, and {runs} of them run on inputs made from their "
        f"configs. {offered['ffn']} offer `ffn` and {offered['units']} offer `units`.",
        "",
    ]


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(f"`{name}`" for name in names[:_MOST_NAMED]) + more


def _clean(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ").replace("<", "(").replace(">", ")")


def _wrong(built: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = wrong(built)
    return (
        ["Wrong:", "", *(f"- {_clean(line)}" for line in found), ""] if found else ["Nothing is wrong.", ""]
    )


def _refusals(built: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["Refused or left out by name, by sentence:", ""]
    for column in COLUMNS:
        types: dict[str, list[str]] = {}
        tensors: Counter[str] = Counter()
        for name, told in built.items():
            for sentence, (count, _) in told["columns"][column]["left"].items():
                types.setdefault(sentence, []).append(name)
                tensors[sentence] += count
        for sentence, names in sorted(types.items(), key=lambda item: -len(item[1])):
            lines.append(
                f"- {column}: {_clean(sentence)} ({tensors[sentence]} in {len(names)} types: {_named(names)})"
            )
    return [*lines, ""]


def _failed(stored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, told in stored.items():
        if "columns" not in told:
            reasons.setdefault(_clean(told["failed"]), []).append(name)
    lines = [f"- {why} ({len(names)}): {_named(names)}" for why, names in sorted(reasons.items(), key=_most)]
    unrun: dict[str, list[str]] = {}
    for name, told in stored.items():
        if told.get("not run"):
            unrun.setdefault(_clean(told["not run"])[:100], []).append(name)
    lines += [""] if lines else []
    told_why = [f"- {why} ({len(names)}): {_named(names)}" for why, names in sorted(unrun.items(), key=_most)]
    return [
        *(["Not built with weights:", "", *lines] if lines else []),
        *(["Built, but no inputs are known on which they run:", "", *told_why, ""] if told_why else []),
    ]


def _most(item: tuple[str, list[str]]) -> int:
    return -len(item[1])


def _rows(built: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "✓: right. ✓ -n: right, and n tensors are left out by name. ·: not run.",
        "",
        "| model type | class | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for name, told in sorted(built.items()):
        cells = []
        for column in COLUMNS:
            found = told["columns"][column]
            left = sum(count for count, _ in found["left"].values()) if found["verdict"] == "part" else 0
            cells.append(_SIGNS[found["verdict"]] + (f" -{left}" if left else ""))
        lines.append(f"| `{name}` | {told['class']} | " + " | ".join(cells) + " |")
    return lines
