"""The tables of the two published models, put between markers of their own into the page of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.harness import json_lines
from benchmarks.harness.log import log
from benchmarks.page.files import machines, row, table
from benchmarks.page.paired import OverSeeds, over_seeds
from benchmarks.page.selection import ROLES
from benchmarks.page.study import Mean
from benchmarks.selection.arms import Arm
from benchmarks.selection.pretrained.arms import ARMS, SIZE, SWEPT, control_of

BEGIN = "<!-- begin: published models, made by python -m benchmarks render -->"
END = "<!-- end: published models, made by python -m benchmarks render -->"
TITLES = {"minilm": "MiniLM, 22.7M, sentences to classify", "smollm2": "SmolLM2-135M, grade-school problems"}
SURE = 0.05  # of a corrected p

Line = dict[str, Any]
Cell = tuple[str, int]  # a task and the seed


@dataclass(frozen=True)
class PretrainedStudy:
    """The content of a results file, for one number of training examples."""

    setting: Line
    examples: int
    runs: dict[str, dict[Cell, Line]]  # by arm
    tried: list[Line]
    screened: list[Line]

    @classmethod
    def load(cls, file: Path) -> list[PretrainedStudy]:
        """One for each size that has runs, the larger first."""
        lines = json_lines.load(file)
        by_kind = {kind: [line for line in lines if line["kind"] == kind] for kind in ("tuning", "screen")}
        runs = [line for line in lines if line["kind"] == "run"]
        found = []
        for examples in sorted({line["examples"] for line in runs}, reverse=True):
            arms: dict[str, dict[Cell, Line]] = {}
            for line in runs:
                if line["examples"] == examples:
                    arms.setdefault(line["arm"], {})[line["task"], line["seed"]] = line
            found.append(cls(lines[0], examples, arms, by_kind["tuning"], by_kind["screen"]))
        return found

    @property
    def arms(self) -> list[Arm]:
        """Those that have run, in the order of the experiment; without other sizes of the best one."""
        return [arm for name, arm in ARMS.items() if name in self.runs and name not in SWEPT]

    @property
    def tasks(self) -> list[str]:
        """The tasks that any arm has run."""
        arms = {name: cells for name, cells in self.runs.items() if name != "start"}
        return list(dict.fromkeys(task for cells in arms.values() for task, _ in cells))

    def figure(self, name: str, task: str, of: Callable[[Line], float]) -> Mean | None:
        """A figure of an arm on a task: its mean over the seeds."""
        found = [of(line) for (own, _), line in self.runs.get(name, {}).items() if own == task]
        return Mean.of(found) if found else None

    def pair(self, ours: str, theirs: str, of: Callable[[Line], float]) -> OverSeeds | None:
        """The difference of two arms over all runs of the same task and seed; None if there are none."""
        mine, others = self.runs.get(ours, {}), self.runs.get(theirs, {})
        both = sorted(mine.keys() & others.keys())
        return over_seeds([of(mine[k]) for k in both], [of(others[k]) for k in both]) if both else None


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values, corrected for their number by Holm's step-down procedure."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, highest = [0.0] * len(ps), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[i]))
        corrected[i] = highest
    return corrected


def test_loss(line: Line) -> float:
    """The test loss of a run."""
    return float(line["test"]["loss"])


def comparisons(study: PretrainedStudy) -> list[tuple[Arm, Arm, OverSeeds, float | None]]:
    """Every arm against LoRA, and every choice against its random control, with p corrected for them all."""
    pairs = [(arm, ARMS["lora"]) for arm in study.arms if arm.name != "lora"]
    chosen = [arm for arm in study.arms if arm.kind == "neurons" and arm.name != control_of(arm)]
    pairs += [(arm, ARMS[control_of(arm)]) for arm in chosen]
    pairs += [(arm, ARMS["full"]) for arm in chosen]
    found = [(a, b, study.pair(a.name, b.name, test_loss)) for a, b in pairs]
    known = [(a, b, one) for a, b, one in found if one is not None]
    ps = [one.p for _, _, one in known if one.p is not None]
    corrected = iter(holm(ps))
    return [(a, b, one, None if one.p is None else next(corrected)) for a, b, one in known]


def render_pretrained(folder: Path) -> None:
    """Put the tables of both models into the page ``folder.md``, which has the markers."""
    page = folder.with_name(f"{folder.name}.md")
    text = page.read_text() if page.exists() else ""
    if BEGIN not in text:
        text += f"\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    parts = [part for model in TITLES for part in _model(folder / f"pretrained-{model}.jsonl", model)]
    parts += _schedules(folder / "schedules-smollm2.jsonl")
    page.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}")
    log(f"wrote {page}")


def _model(file: Path, model: str) -> Iterator[str]:
    if not file.exists() or not (studies := PretrainedStudy.load(file)):
        return
    setting = studies[0].setting
    yield f"## {TITLES[model]}"
    yield f"`{setting['command']}` made the [raw runs]({file.parent.name}/{file.name})."
    for study in studies:
        if study.arms:
            yield from _study(study)
    if studies[0].screened:
        yield "### Selectors that were tried on one task"
        yield "Dev loss with one seed, each at the rate of its random control; the best four became arms."
        yield table(
            "| | dev loss |", map(_screened, sorted(studies[0].screened, key=lambda one: one["loss"]))
        )
    yield "### The paper's claims, here"
    yield table("| claim | measured | |", claims(studies[0]))
    yield "### How it was run"
    yield "\n".join(_settings(studies))


def _schedules(file: Path) -> Iterator[str]:
    """The schedules of a recipe, beside the fixed choice."""
    lines = json_lines.load(file)
    setting = next((line for line in lines if line["kind"] == "setting"), None)
    if setting is None:
        return
    flops = {line["schedule"]: line["flops"] for line in lines if line["kind"] == "flops"}
    runs: dict[str, dict[int, Line]] = {}
    for line in lines:
        if line["kind"] == "run":
            runs.setdefault(line["schedule"], {})[line["seed"]] = line

    def of_fixed(name: str, key: str) -> str:
        both = sorted(runs[name].keys() & runs["fixed"].keys())
        found = [runs[name][seed][key] / runs["fixed"][seed][key] for seed in both]
        return f"{Mean.of(found):.2f}" if found else ""

    yield "## Schedules of a recipe: SmolLM2-135M, grade-school problems"
    yield (
        f"`{setting['command']}` made the [raw runs]({file.parent.name}/{file.name}): "
        f"{setting['steps']} steps of 2 examples, 3% of the parameters in units by `magnitude`, "
        f"{setting['dev']} problems for the dev loss. Times are of the processor, as ratios to those of the "
        "fixed choice with the same seed; FLOPs are those that torch counts in one step."
    )
    rows = []
    for name, options in setting["schedules"].items():
        if name in runs:
            shown = ", ".join(f"`{key}: {value}`" for key, value in options.items()) or "the fixed choice"
            losses = [Mean.of([line[key] for line in runs[name].values()]) for key in ("before", "loss")]
            steps = [of_fixed(name, key) for key in ("step", "mean")]
            counted = f"{flops[name] / flops['fixed']:.2f}" if name in flops else ""
            rows.append(
                row(shown, *(f"{loss:.3f}" for loss in losses), *steps, counted, str(len(runs[name])))
            )
    head = "| | dev loss before | after | median step | mean step, with regrowths | FLOPs | runs |"
    yield table(head, rows)
    yield from machines({"all": {"machine": setting["machine"], "date": setting["date"]}})


def _study(study: PretrainedStudy) -> Iterator[str]:
    yield f"### {study.examples} examples"
    columns, articles = " | ".join(study.tasks), "wikitext" in _any(study)
    columns += " | articles" * articles
    of_articles = ", and the loss on articles, which shows forgetting" * articles
    accuracy = " and accuracy" * ("accuracy" in _any(study)["test"])
    yield f"Test loss{accuracy}{of_articles}: mean and deviation over seeds."
    head = f"| | trained, % | {columns} | runs |"
    yield table(head, (quality_row(study, name) for name in ["start", *(a.name for a in study.arms)]))
    looks = [str(step) for step in study.setting["setting"]["looks"]]
    yield "Dev loss above that of random rows after so many steps, mean over tasks and seeds."
    yield table(f"| | {' | '.join(looks)} |", (early_row(study, arm, looks) for arm in study.arms))
    yield (
        "Difference of the test loss over all runs of the same task and seed, with its 95% interval, p of a "
        "paired t-test, and p corrected for all comparisons of this table (Holm)."
    )
    yield table("| | compared with | test loss | p | corrected |", map(pair_row, comparisons(study)))
    yield table(
        "| | neurons | choosing, s | step, ms | peak, MB | file, MB |",
        (cost_row(study, arm) for arm in study.arms),
    )


def _any(study: PretrainedStudy) -> Line:
    return next(iter(next(iter(study.runs.values())).values()))


def named(arm: Arm) -> str:
    """An arm's label, formatted by its role."""
    size = f", {arm.percent}%" if arm.percent not in (None, SIZE) else ""
    return ROLES[arm.role].format(arm.label + size)


def quality_row(study: PretrainedStudy, name: str) -> str:
    """A row of the main table; ``start`` is the fitted head alone."""
    cells, runs = [], study.runs.get(name, {})
    for task in study.tasks:
        loss = study.figure(name, task, test_loss)
        cells.append("" if loss is None else f"{loss:.3f}")
        if loss is not None and "accuracy" in _any(study)["test"]:
            right = study.figure(name, task, lambda line: 100 * line["test"]["accuracy"])
            cells[-1] += f" / {right:.1f}"
    if "wikitext" in _any(study):
        cells.append(f"{Mean.of([line['wikitext'] for line in runs.values()]):.3f}")
    share = "0"
    if name != "start":
        share = f"{100 * mean(line['trainable'] for line in runs.values()) / study.setting['parameters']:.2f}"
    return row("*before training*" if name == "start" else named(ARMS[name]), share, *cells, str(len(runs)))


def early_row(study: PretrainedStudy, arm: Arm, looks: Sequence[str]) -> str:
    """Dev losses along the runs, minus those of random rows."""
    cells = []
    for step in looks:
        found = study.pair(arm.name, "rows-random", lambda line, step=step: line["dev"][step]["loss"])
        cells.append("" if found is None else f"{found.mean:+.3f}")
    return row(named(arm), *cells)


def pair_row(one: tuple[Arm, Arm, OverSeeds, float | None]) -> str:
    """A row of the table of comparisons."""
    ours, theirs, found, corrected = one
    shown = f"{found.mean:+.3f}" if found.interval is None else f"{found.interval:.3f}"
    ps = ["" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}" for p in (found.p, corrected)]
    return row(named(ours).strip("*"), named(theirs).strip("*"), shown, *ps)


def cost_row(study: PretrainedStudy, arm: Arm) -> str:
    """A row of the table of costs."""
    runs = study.runs[arm.name].values()

    def of(key: str, factor: float, digits: int) -> str:
        found = [factor * line[key] for line in runs if key in line]
        return f"{mean(found):,.{digits}f}" if found else ""

    return row(
        named(arm), of("neurons", 1, 0), of("choosing", 1, 1), of("step", 1e3, 0), of("peak", 1e-6, 0),
        of("bytes", 1e-6, 2),
    )  # fmt: skip


def _screened(line: Line) -> str:
    return row(named(ARMS[line["arm"]]), f"{line['loss']:.3f}")


def claims(study: PretrainedStudy) -> Iterator[str]:
    """The paper's claims, what was measured of each, and whether it holds, by a p corrected for them all."""
    asked = (
        ("NeFT beats full fine-tuning", "rows-cosine", "full"),
        ("NeFT beats LoRA", "rows-cosine", "lora"),
        ("sensitive neurons beat the least sensitive", "rows-cosine", "rows-reversed"),
        ("sensitive neurons beat random ones (not in the paper)", "rows-cosine", "rows-random"),
    )
    found = [study.pair(ours, theirs, test_loss) for _, ours, theirs in asked]
    corrected = iter(holm([one.p for one in found if one is not None and one.p is not None]))
    for (claim, *_), one in zip(asked, found, strict=True):
        known = one is not None and one.p is not None
        yield row(claim, *_verdict(one, next(corrected) if known else 1.0))
    yield row("a few percent suffice", *_sizes(study))
    yield row("neurons of other examples are much the same", *_overlaps(study))


def _verdict(found: OverSeeds | None, p: float) -> tuple[str, str]:
    if found is None or found.interval is None or found.p is None:
        return "not run yet", ""
    shown = f"test loss {found.interval:.3f}, p {found.p:.3f}, corrected {p:.3f}, {found.seeds} pairs"
    if p > SURE:
        return shown, "cannot be told"
    return shown, "holds" if found.mean < 0 else "does not hold"


def _sizes(study: PretrainedStudy) -> tuple[str, str]:
    """The best selector at several sizes, beside the full fine-tune, on the task where all of them ran."""
    swept = [arm for name, arm in SWEPT.items() if name in study.runs]
    if not swept or "full" not in study.runs:
        return "not run yet", ""
    task = next(iter(study.runs[swept[0].name]))[0]
    same = [arm for arm in study.arms if (arm.anatomy, arm.score) == (swept[0].anatomy, swept[0].score)]
    sizes = sorted([*swept, *same], key=lambda arm: float(arm.percent or 0))
    shown = [f"{arm.percent}%: {study.figure(arm.name, task, test_loss):.3f}" for arm in sizes]
    full = study.figure("full", task, test_loss)
    return (
        f"{named(sizes[0]).strip('*').partition(',')[0]} on {task}: {', '.join(shown)}; full: {full:.3f}",
        "",
    )


def _overlaps(study: PretrainedStudy) -> tuple[str, str]:
    """The share of neurons that runs of two seeds, so of other examples, have in common."""
    found = []
    for arm in study.arms:
        shares = [line["overlap"] for line in study.runs[arm.name].values() if "overlap" in line]
        if shares:
            found.append(f"{named(arm).strip('*')} {100 * mean(shares):.0f}%")
    return ("; ".join(found), "") if found else ("not run yet", "")


def _settings(studies: Sequence[PretrainedStudy]) -> Iterator[str]:
    one, setting = studies[0], studies[0].setting["setting"]
    runs = sum(len(cells) for study in studies for name, cells in study.runs.items() if name != "start")
    yield (
        f"- {one.setting['parameters']:,} parameters in float32, products in {setting['precision']}; batches "
        f"of {setting['batch']}, at most {setting['length']} tokens; {setting['dev']} examples for the dev "
        f"loss, {setting['test']} to test."
    )
    yield f"- {len(one.tried)} runs to find rates, {len(one.screened)} to screen, {runs} that count."
    yield from machines({"all": {"machine": one.setting["machine"], "date": one.setting["date"]}})
