"""What each arm trains, and which selectors compete to become one."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.selection.arms import GRADIENT_SCORES, Arm, Kind, Role

SIZE = "3"  # percent of all parameters; LoRA and SHiRA get the nearest rank
SWEEP = ("0.4", "12")  # other sizes of the best selector, on the first task
BEST = 4  # how many of the candidates become arms
CHANGE_SCORES = ("cosine", "l2")  # of a full fine-tune
WEIGHT_SCORES = ("magnitude", "lowrank", "norm")
ANATOMIES = ("rows", "units")


def chosen(anatomy: str, score: str, policy: str = "sensitive", percent: str = SIZE) -> Arm:
    """The arm of neurons that a score chooses."""
    what = score if policy == "sensitive" else policy
    name = f"{anatomy}-{what}{f'-{percent}' * (percent != SIZE)}"
    label = {"random": f"random {anatomy}", "reversed": f"least sensitive {anatomy}"}.get(
        what, f"{anatomy} by {score}"
    )
    role: Role = "ours" if policy == "sensitive" and score != "random" else "control"
    return Arm(name, "neurons", role, label, percent, anatomy, score, policy)


def _fixed() -> Iterator[Arm]:
    plain: tuple[tuple[str, Kind, Role, str, str | None], ...] = (
        ("full", "full", "rival", "full fine-tune", None),
        ("lora", "lora", "rival", "LoRA", SIZE),
        ("shira", "shira", "rival", "SHiRA, random mask", SIZE),
        ("bitfit", "bitfit", "rival", "BitFit", None),
    )
    for arm in plain:
        yield Arm(*arm)
    yield from (chosen(anatomy, "random") for anatomy in ANATOMIES)
    yield chosen("rows", "cosine", "reversed")
    yield chosen("rows", "cosine")  # the paper's


FIXED = {arm.name: arm for arm in _fixed()}
"""Arms that need no screening; the full fine-tune first, as its change is a score."""
CANDIDATES = {
    arm.name: arm
    for anatomy in ANATOMIES
    for score in (*CHANGE_SCORES, *GRADIENT_SCORES, *WEIGHT_SCORES)
    for arm in [chosen(anatomy, score)]
}
"""Selectors that are tried on one task's dev set."""
SWEPT = {
    arm.name: arm
    for one in CANDIDATES.values()
    for percent in SWEEP
    for arm in [chosen(one.anatomy, one.score, percent=percent)]
}
ARMS = FIXED | CANDIDATES | SWEPT


def control_of(arm: Arm) -> str:
    """The random control of an arm."""
    return f"{arm.anatomy}-random"
