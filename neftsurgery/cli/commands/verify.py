"""``neftsurgery verify``."""

from __future__ import annotations

from dataclasses import asdict

import click

from ...options import SpreadOptions
from ...surgery.verify import JOURNAL_HINT, TensorState, plan_verify
from ...text import natural_key
from ..console import Console
from ..options import common_options, options_of

_SHOWN = 20


@click.command("verify")
@click.argument("checkpoint")
@click.argument("patch")
@click.option("--expect", type=click.Choice(["base", "patched"]), help="Succeed only in this state.")
@options_of(SpreadOptions)
@common_options
def command(console: Console, checkpoint: str, patch: str, expect: str | None) -> int:
    """Tell whether CHECKPOINT is base, patched, mixed or neither.

    Every neuron that PATCH touches is compared. The exit code is 0 if all of them are as in the base or all
    are patched (with --expect: as expected), and 3 otherwise. Of a lossless patch, every block is compared,
    and decoded if it is the base's.

    \b
    Example:
      neftsurgery verify patched/ neuron_patch.safetensors --expect patched
    """
    plan = plan_verify(checkpoint, patch)
    console.warn(plan.warnings)
    found = plan.run(**console.running)
    good = found.holds(expect)
    console.say(str(found).partition("\n")[0])
    if found.state in ("mixed", "neither"):
        tensors = sorted(found.tensors.items(), key=lambda item: natural_key(item[0]))
        odd = [[name[:120], tensor.state, _counts(tensor)] for name, tensor in tensors]
        console.say_table(odd, shown=_SHOWN, rest="more; see them with --json")
    if any(tensor.neither for tensor in found.tensors.values()):
        console.note(f"note: {JOURNAL_HINT}")
    if found.remark is not None:
        console.note(f"note: {found.remark}")
    if not good:
        wanted = expect or "base or patched"
        console.note(f"neftsurgery: {checkpoint}: expected {wanted}, found {found.state}")
    console.answer(
        {
            "state": found.state,
            "expected": expect,
            "ok": good,
            "same_base": found.same_base,
            "remark": found.remark,
            "neurons": found.neurons,
            "warnings": list(plan.warnings),
            "tensors": {name: {"state": t.state, **asdict(t)} for name, t in found.tensors.items()},
        },
        found.timing,
    )
    return 0 if good else 3


def _counts(tensor: TensorState) -> str:
    return ", ".join(f"{count} {state}" for state, count in asdict(tensor).items() if count)
