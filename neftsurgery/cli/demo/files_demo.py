"""The demo on files: find the known neurons of a fine-tune, extract them, apply them and revert them."""

from __future__ import annotations

import numpy as np

from ...demo.planted import PLANTED, make_base, make_tuned, planted
from ...patch.patch import Patch
from ...text import plural
from .session import APPLY, DIFF, EXTRACT, FILES_REPORT, REVERT, VERIFY, DemoSession

__all__ = ["show"]


def show(session: DemoSession) -> dict[str, bool]:
    """Run the demo; returns whether each check passed."""
    base = session.folder / "base"
    session.heading(f"A small Llama, and a fine-tune of it that changed {PLANTED} neurons")
    make_tuned(session.folder / "tuned", make_base(base))
    shards = plural(len(list(base.glob("*.safetensors"))), "shard")
    session.console.say(f"  base/ and tuned/: {shards} each")

    session.heading("Where did it change?")
    session.run_command(DIFF)

    session.heading(f"Extract the {PLANTED} most sensitive neurons")
    session.run_command(EXTRACT)
    found = session.check(f"these are exactly the {PLANTED} changed neurons", _found(session))

    session.heading("Apply them to the base, and verify the result")
    session.run_command(APPLY)
    session.run_command(VERIFY)

    session.heading("Revert them")
    session.run_command(REVERT)
    same = session.check_restored()
    session.draw_report(FILES_REPORT)
    return {"found_exactly_the_planted_neurons": found, "restored_bit_for_bit": same}


def _found(session: DemoSession) -> bool:
    expected = planted()
    with Patch.load(session.folder / "neuron_patch.safetensors") as patch:
        return patch.tensors.keys() == expected.keys() and all(
            np.array_equal(patch.index(name), index) for name, index in expected.items()
        )
