"""``python -m tests.architectures families``: makes the table of architectures from transformers.

Each type is described in a process of its own, with a time limit. What is known already is kept in
``--state``, so a run that was cut short goes on; ``--only`` describes some types anew. The difference to the
committed file is shown.

``python -m tests.architectures sweep`` reads the files of all these models with the table, andputs every
type through each verb: small, with weights, in a process of its own. Types that are done are kept in
``--state``; ``--only`` does some anew.

``python -m tests.architectures experts`` trains experts of mixtures end to end.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from neftsurgery.neurons.submodels import NO_PATTERN

from .children import in_children
from .experts import EXPERTS, train_experts
from .harvest import describe, gather
from .rows import DATA, OVERLAY, Record, load_overlay, make_data, text_of
from .sweep import PAGE, put_page, read_back
from .tiny_models import model_types
from .trial_page import put_trials, wrong
from .trials import try_type

STATE = Path(__file__).resolve().parents[2] / "build" / "architectures"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("command", choices=["families", "sweep", "experts"])
    parser.add_argument("--state", type=Path, default=STATE / f"transformers-{transformers.__version__}")
    parser.add_argument("--only", default="", help="model types to do anew, separated by commas")
    parser.add_argument("--keep", action="store_true", help="do nothing anew")
    parser.add_argument("--jobs", type=int, default=2, help="model types that are done at once")
    parser.add_argument("--overlay", type=Path, default=OVERLAY)
    parser.add_argument("--page", type=Path, default=PAGE, help="where `sweep` puts its table")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = [name for name in options.only.split(",") if name]
    if options.command == "experts":
        return experts(chosen or EXPERTS)
    names = chosen or ([] if options.keep else model_types())
    if options.command == "sweep":
        trials = options.state / "trials"
        _forget(chosen, trials)
        in_children(try_type, names, trials, jobs=options.jobs, seconds=300)
        failures = sweep(*gather(options.state, model_types()), options.page)
        return failures | try_page(trials, options.page)
    _forget(chosen, options.state)
    in_children(describe, names, options.state, jobs=options.jobs)
    found, failed = gather(options.state, model_types())
    overlay = load_overlay(options.overlay)
    built = {owner for told in found.values() for owner in told["records"]}
    gone = sorted({name for entry in overlay for name in entry["model_types"].split()} - built)
    if gone:
        print(f"overlay.json names model types that could not be built: {', '.join(gone)}", file=sys.stderr)
        return 1
    before = options.data.read_text(encoding="utf-8") if options.data.exists() else ""
    after = text_of(table(found, overlay))
    sys.stdout.writelines(difflib.unified_diff(*(text.splitlines(True) for text in (before, after)), n=0))
    options.data.write_text(after, encoding="utf-8")
    print(f"{len(found)} model types, {len(after.encode()):,} bytes; not built: {len(failed)}")
    for name, why in sorted(failed.items()):
        print(f"  {name}: {why}")
    return 0


def experts(names: list[str]) -> int:
    """Train the experts of some types, print what became of each; 1 if one is wrong."""
    transformers.utils.logging.disable_progress_bar()
    failures = 0
    for name in names:
        run = train_experts(name)
        failures |= int(not run.right)
        losses = " ".join(f"{loss:.3f}" for loss in run.losses)
        print(
            f"{name}: {'right' if run.right else 'wrong'}: {run.neurons} neurons of {run.tensors} tensors,"
            f" {run.moved} of them changed; loss {losses}; loaded logits {run.apart:.1e} apart",
            flush=True,
        )
    return failures


def _forget(names: list[str], folder: Path) -> None:
    for name in names:
        (folder / f"{name}.json").unlink(missing_ok=True)


def try_page(folder: Path, page: Path) -> int:
    """Put into ``page`` what the trials in ``folder`` found; 1 if something is wrong."""
    stored = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    put_trials(page, stored)
    found = wrong(stored)
    print("\n".join(found))
    print(f"{len(stored)} model types, {len(found)} wrong")
    return int(bool(found))


def sweep(found: dict[str, Any], failed: dict[str, str], page: Path) -> int:
    """Put into ``page`` what the table says of every model that was built, beside what is live."""
    by_hand = [
        pattern for entry in load_overlay() for pattern in " ".join(entry.get("weights", {}).values()).split()
    ]
    by_hand += [
        text
        for entry in load_overlay()
        for block in entry.get("blocks", ())
        for key, text in block.items()
        if key not in NO_PATTERN
    ]
    outcomes = {name: read_back(told["models"], by_hand) for name, told in found.items() if told["models"]}
    for name, outcome in outcomes.items():
        for said in ("wrong", "refused"):
            if outcome.tensors[said]:
                print(f"{name}: {outcome.tensors[said]} {said}, such as {outcome.examples[said]}")
    put_page(page, outcomes, failed)
    return int(any(outcome.tensors["wrong"] for outcome in outcomes.values()))


def table(found: dict[str, Any], overlay: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of ``architectures.json``, from what each type's models told.

    What a composite tells of a part's blocks counts where the part has no model class of its own.
    """
    records: dict[str, set[Record]] = {}
    parts: dict[str, dict[str, tuple[str, set[str]]]] = {}
    blocks: dict[str, list[dict[str, str]]] = {}
    guests: dict[str, set[Record]] = {}
    for model_type, told in found.items():
        for owner, known in told["records"].items():
            own = owner == model_type or owner not in found.get(owner, {"records": ()})["records"]
            place = records if own else guests
            place.setdefault(owner, set()).update((name, ndim, verdict) for name, ndim, verdict in known)
            if own:
                blocks.setdefault(owner, []).extend(told["blocks"].get(owner, ()))
        for whole, keys in told["parts"].items():
            for key, (kind, names) in keys.items():
                parts.setdefault(whole, {}).setdefault(key, (kind, set()))[1].update(names)
    heads = {name: tuple(told["head_counts"]) for name, told in found.items() if told["head_counts"]}
    return make_data(
        records, guests, blocks, parts, heads, overlay, f"transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    sys.exit(main())
