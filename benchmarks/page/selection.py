"""The tables of the selection suite, put between two markers of a page whose prose is written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.log import log
from benchmarks.page.files import machines, row, table
from benchmarks.page.paired import over_seeds, over_sentences
from benchmarks.page.study import OLD, Result, Study
from benchmarks.selection.arms import CONTROL_SIZES

BEGIN = "<!-- begin: made by python -m benchmarks render -->"
END = "<!-- end: made by python -m benchmarks render -->"
EMPTY = f"# Does choosing neurons help?\n\n{BEGIN}\n{END}\n"
ROLES = {"ours": "**{}**", "control": "{}", "rival": "*{}*"}

CAPTION = "Loss on the new task and on the old text, by share of trained parameters"
QUALITY = "| | trained, % | rate | dev loss | test loss |{} old text: loss added | seeds |"
PAIRS = "| | compared with | test loss | p | test loss, by sentences |{} old text: loss added |"
TRANSLATION = (" with another's English | BLEU | chrF |", " chrF, by sentences |")  # their columns
OLD_TEXT = "| loss added on | English | Chinese | Chinese-English | articles |"
COSTS = "| | trained | neurons | share of the change | choosing, s | step, ms | best step | peak, MB |"


def render_selection(folder: Path) -> None:
    """Puts the tables of all results in ``folder`` into the page ``folder.md``, and draws the figures."""
    page = folder.with_name(f"{folder.name}.md")
    text = page.read_text() if page.exists() else EMPTY
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = "\n\n".join(part for file in sorted(folder.glob("selection-*.jsonl")) for part in _section(file))
    page.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")
    log(f"wrote {page}")


def _section(file: Path) -> Iterator[str]:
    study = Study.load(file)
    setting, columns = study.setting["setting"], TRANSLATION if study.translates else ("", "")
    yield f"## {setting.get('task', 'translation').title()}, scale {setting['scale']}, on {_device(study)}"
    yield f"`{study.setting['command']}` made the [raw runs]({file.parent.name}/{file.name})."
    if picture := _picture(study, file.with_suffix(".svg")):
        yield f"![{CAPTION}]({file.parent.name}/{picture})"
    yield table(QUALITY.format(columns[0]), (quality_row(study, result) for result in study.results.values()))
    yield "### In pairs"
    yield table(PAIRS.format(columns[1]), filter(None, (pair_row(study, *pair) for pair in pairs(study))))
    yield "### Old text, by kind"
    yield table(OLD_TEXT, (old_row(study, result) for result in study.results.values()))
    yield "### Costs"
    yield table(COSTS, (cost_row(result) for result in study.results.values() if result.arm.kind != "base"))
    yield "### Settings"
    yield "\n".join(settings(study))


def _device(study: Study) -> str:
    return "a GPU" if study.setting["setting"]["device"] == "cuda" else "a processor"


def _picture(study: Study, file: Path) -> str | None:
    try:
        from benchmarks.page.selection_chart import draw
    except ImportError:
        log("no figure: matplotlib is not installed")
        return None
    draw(study, file)
    return file.name


def named(result: Result) -> str:
    """An arm's label and size, formatted by its role."""
    size = f", {result.arm.percent}%" if result.arm.percent else ""
    return ROLES[result.arm.role].format(f"{result.arm.label}{size}")


def quality_row(study: Study, result: Result) -> str:
    """A row of the main table."""
    first = next(iter(result.runs.values()))
    rate = f"{first['rate']:.2g}{' (bound)' * result.at_bound}" if "rate" in first else ""
    cells = [
        named(result),
        f"{study.share(result):.2f}",
        rate,
        f"{result.figure(lambda run: run['loss']):.3f}",
        f"{result.figure(lambda run: run['test']):.3f}",
        *(_of_translation(result) if study.translates else ()),
        f"{result.figure(study.forgotten):+.3f}".replace("± +", "± "),
        str(len(result.runs)),
    ]
    return row(*cells)


def _of_translation(result: Result) -> Iterator[str]:
    yield f"{result.figure(lambda run: run['astray'] - run['test']).mean:+.2f}"
    yield f"{result.figure(lambda run: run['bleu']):.2f}"
    yield f"{result.figure(lambda run: run['chrf']):.2f}"


def pairs(study: Study) -> Iterator[tuple[str, str]]:
    """The pairs of arms to compare: each arm with its random control, and pairs that isolate one question."""
    for result in study.results.values():
        if result.arm.random_control:
            yield result.arm.name, result.arm.random_control
    for size in CONTROL_SIZES:
        for name, other in (
            ("neft", "random-like"), ("neft", "least-like"), ("neft", "lora"), ("neft", "gradient"),
            ("neft", "fisher"), ("neft", "ffn"), ("neft", "units"), ("ffn", "ffn-random"),
            ("units", "units-random"), ("units", "units-gradient"), ("units", "units-fisher"),
            ("units-gradient", "units-random"), ("units-fisher", "units-random"), ("units", "lora"),
        ):  # fmt: skip
            yield f"{name}-{size}", f"{other}-{size}"
        yield f"neft-{size}", "full"
        yield f"units-{size}", "full"
        yield f"random-{size}", "full"


def pair_row(study: Study, name: str, other: str) -> str | None:
    """A row of the table of pairs; None if one of the two has not run."""
    ours, theirs = study.results.get(name), study.results.get(other)
    if ours is None or theirs is None or not (seeds := sorted(ours.runs.keys() & theirs.runs.keys())):
        return None
    tokens = study.base["tokens"]

    def figures(of: Any) -> tuple[list[float], list[float]]:
        return [of(ours.runs[seed]) for seed in seeds], [of(theirs.runs[seed]) for seed in seeds]

    def sentences(which: str, weights: list[int]) -> str:
        return f"{over_sentences(ours.sentences(which, seeds), theirs.sentences(which, seeds), weights):.3f}"

    loss, old = over_seeds(*figures(lambda run: run["test"])), over_seeds(*figures(study.forgotten))
    cells = [
        named(ours).strip("*"),
        named(theirs).strip("*"),
        f"{loss.mean if loss.interval is None else loss.interval:.3f}",
        "" if loss.p is None else "<0.001" if loss.p < 0.001 else f"{loss.p:.3f}",
        sentences("loss", tokens),
        *([sentences("chrf", [1] * len(tokens))] if study.translates else []),
        f"{old.mean if old.interval is None else old.interval:.3f}",
    ]
    return row(*cells)


def old_row(study: Study, result: Result) -> str:
    """A row of the table of forgetting. The base's row has losses, not differences."""
    if result.arm.kind == "base":
        cells = [f"({study.untuned['old'][kind]:.3f})" for kind in OLD]
    else:
        cells = [f"{result.figure(lambda run, kind=kind: _added(study, run, kind)):+.3f}" for kind in OLD]
    return row(named(result), *cells).replace("± +", "± ")


def _added(study: Study, run: Any, kind: str) -> float:
    return float(run["old"][kind] - study.untuned["old"][kind])


def cost_row(result: Result) -> str:
    """A row of the table of costs."""
    first = next(iter(result.runs.values()))
    selection = first.get("selection", {})
    captured = [run["selection"]["captured"] for run in result.runs.values() if "captured" in selection]
    neurons = selection.get("neurons")
    cells = [
        named(result),
        f"{result.figure(lambda run: run['trainable']).mean:,.0f}",
        f"rank {first['rank']}" if "rank" in first else "" if neurons is None else f"{neurons:,}",
        f"{100 * sum(captured) / len(captured):.1f}%" if captured else "",
        f"{result.figure(lambda run: run['choosing']).mean:.1f}" if neurons else "",
        f"{result.figure(lambda run: 1e3 * run['step']):.0f}",
        f"{result.figure(lambda run: run['best']).mean:.0f}",
        f"{result.figure(lambda run: run['peak'] / 1e6):.0f}",
    ]
    return row(*cells)


def settings(study: Study) -> Iterator[str]:
    """The settings of the experiment, as list items."""
    setting, counts = study.setting["setting"], study.setting["pairs"]
    shape, before, tune = setting["shape"], setting["pretrain"], setting["tune"]
    old = ", ".join(f"{kind} {study.untuned['old'][kind]:.3f}" for kind in OLD)
    yield (
        f"- Model: Llama, {shape['layers']} layers, hidden {shape['hidden']}, feed-forward {shape['ffn']}, "
        f"{shape['vocabulary']} tokens, tied embeddings; {study.base['parameters']:,} parameters, "
        "float32."
    )
    what = "pairs" if study.translates else f"pieces of {setting['piece']} tokens"
    yield (
        f"- {counts['pretrain']:,} pairs for pre-training; {counts['train']:,} {what} for fine-tuning, "
        f"{counts['dev']} for the dev loss, {counts['test']} for the test."
    )
    yield (
        f"- Pre-training: {before['steps']} steps of {before['batch']} sequences, rate "
        f"{setting['pretrain_rate']:g}, {study.base['seconds']:.0f} s. Its loss on held-out text, in nats "
        f"per token: {old}."
    )
    yield (
        f"- Fine-tuning: at most {tune['steps']} steps of {tune['batch']} sequences, dev loss every "
        f"{tune['look']} steps; {sum(len(result.tried) for result in study.results.values())} runs to find "
        f"learning rates, {sum(len(result.runs) for result in study.results.values())} runs that count."
    )
    yield from machines({"all": {"machine": study.setting["machine"], "date": study.untuned["date"]}})
