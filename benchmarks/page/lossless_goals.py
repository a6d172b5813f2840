"""The goals of lossless patches, and whether the measurements meet them: all pairs of a goal must."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.page.metrics import Entry, Group, Spread, ratio, spread
from benchmarks.page.requirements import Check, Requirement

Parts = dict[str, Any]
OURS, FAST = "neftsurgery", "neftsurgery --fast"


@dataclass(frozen=True)
class _Measured:
    words: str
    group: Group

    def over(self, name: str, other: str) -> Spread | None:
        """The size of one contestant over another's; the entropy counts as one."""
        one, two = (self._size(contestant) for contestant in (name, other))
        return Spread.of([one / two]) if one and two else None

    def faster(self, name: str, other: str, way: str) -> Spread | None:
        """How many times the speed of another's a contestant's is, within each turn."""
        return ratio(self._entry(other), self._entry(name), lambda run: run[way])

    def _size(self, name: str) -> float | None:
        if name == "entropy":
            return float(self.group["entropy"])
        entry = self._entry(name)
        return None if entry is None else float(entry["size"])

    def _entry(self, name: str) -> Entry | None:
        entries = self.group["contestants"]
        return next((entry for entry in entries if entry["name"] == name and entry["runs"]), None)


def goals(parts: Parts) -> Iterator[Requirement]:
    """All goals, in the page's order."""
    bf16, f32 = list(_groups(parts, "bf16")), list(_groups(parts, "f32"))
    sft = [one for one in bf16 if one.group["kind"] == "sft"]
    rl = [one for one in bf16 if one.group["kind"] == "rl"]
    longer = [one for one in bf16 if one.group["kind"] != "rl"]

    def entropy(one: _Measured) -> Spread | None:
        return one.over(OURS, "entropy")

    yield _all("bf16, SFT and LoRA: within 2% of the entropy", longer, entropy, lambda x: x <= 1.02, ".3f")
    yield _all(
        "bf16, a single RL-like step: within 10% of the entropy", rl, entropy, lambda x: x <= 1.1, ".3f"
    )
    for statement, other, least in (
        ("bf16, SFT: at least 15 times smaller than zstd -3 --patch-from", "zstd -3 --patch-from", 15),
        ("bf16, SFT: at least 4 times smaller than ZipNN of the XOR", "ZipNN of the XOR with the base", 4),
    ):
        yield _all(statement, sft, lambda one, o=other: one.over(o, OURS), lambda x, n=least: x >= n, ".1f")
    yield _all(
        "float32: at most 0.9 of the size of ZipNN of the XOR",
        f32,
        lambda one: one.over(OURS, "ZipNN of the XOR with the base"),
        lambda x: x <= 0.9,
        ".3f",
    )
    for where, place in (("files", ""), ("in memory", ", in memory")):
        yield _all(
            f"bf16, {where}: encodes at or above the speed of zstd -3's compression",
            bf16,
            lambda one, p=place: one.faster(OURS + p, "zstd -3" + p, "encode"),
            lambda x: x >= 1,
        )
        yield _all(
            f"bf16, {where}: decodes at half the speed of zstd -1's decompression, or more",
            bf16,
            lambda one, p=place: one.faster(OURS + p, "zstd -1" + p, "decode"),
            lambda x: x >= 0.5,
        )
        copy = "memcpy" if place else "cp"
        yield _all(
            f"bf16, a single RL-like step, --fast, {where}: decodes at half the speed of {copy}, or more",
            rl,
            lambda one, p=place, c=copy: one.faster(FAST + p, c, "decode"),
            lambda x: x >= 0.5,
        )
    yield from _threads(parts.get("threads", {}))


def _threads(part: dict[str, Any]) -> Iterator[Requirement]:
    statement = "Two threads reach 0.9 of the throughput of two processes"
    for verb in part.get("verbs", [{"name": "", "runs": []}]):
        found = spread(verb, lambda run: run["processes"] / (2 * run["threads"]))
        yield Requirement.of(statement, verb["name"], found, lambda x: x >= 0.9)


def _groups(parts: Parts, dtype: str) -> Iterator[_Measured]:
    for name, model in (("minilm", "MiniLM"), ("smollm2", "SmolLM2"), ("textgenrnn", "textgenrnn")):
        for group in parts.get(name, {}).get("groups", []):
            if group["dtype"] == dtype:
                kind = {"sft": "SFT", "lora": "LoRA", "rl": "RL"}.get(group["kind"], group["label"])
                yield _Measured(f"{model} {kind}", group)


def _all(
    statement: str,
    measured: Iterable[_Measured],
    of: Callable[[_Measured], Spread | None],
    met: Check,
    spec: str = ".2f",
) -> Requirement:
    """A goal that is met if every pair meets it, by the median; those that do not are marked."""
    found = [(one.words, figure) for one in measured if (figure := of(one)) is not None]
    if not found:
        return Requirement(statement, "not measured", None)
    words = (
        f"{words} {figure:{spec}}" if met(figure.median) else f"**{words} {figure:{spec}}**"
        for words, figure in found
    )
    return Requirement(statement, "; ".join(words), all(met(figure.median) for _, figure in found))
