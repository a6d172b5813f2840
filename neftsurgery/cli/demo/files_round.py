"""The round over files: known neurons of a fine-tune are found, cut out, put in and taken out again."""

from __future__ import annotations

import numpy as np

from ...demo.planted import PLANTED, make_base, make_tuned, planted
from ...patch.patch import Patch
from ...text import plural
from .stage import Stage, can_draw, digests

__all__ = ["LINES", "show"]

_DIFF = "diff base tuned -o scores.safetensors"
_EXTRACT = f"extract base tuned --neurons {PLANTED} -o neuron_patch.safetensors"
_APPLY = "apply base neuron_patch.safetensors -o patched"
_VERIFY = "verify patched neuron_patch.safetensors --expect patched"
_REVERT = "revert patched neuron_patch.safetensors --base base -o restored"
_REPORT = f"report scores.safetensors --neurons {PLANTED} -o report.html"
LINES = tuple(f"neftsurgery {line}" for line in (_DIFF, _EXTRACT, _APPLY, _VERIFY, _REVERT, _REPORT))


def show(stage: Stage) -> dict[str, bool]:
    """Do all steps; returns which claims held."""
    base, patched, restored = (stage.place / name for name in ("base", "patched", "restored"))
    stage.title(f"A small Llama, and a fine-tune of it that really moved {PLANTED} neurons")
    make_tuned(stage.place / "tuned", make_base(base))
    shards = plural(len(list(base.glob("*.safetensors"))), "shard")
    stage.console.say(f"  base/ and tuned/: {shards} each")

    stage.title("Where did it change?")
    stage.type(_DIFF)

    stage.title(f"Cut the {PLANTED} most sensitive neurons out")
    stage.type(_EXTRACT)
    found = stage.claim(f"exactly the {PLANTED} neurons that were moved", _found(stage))

    stage.title("Put them into the base, and make sure")
    stage.type(_APPLY)
    stage.type(_VERIFY)

    stage.title("Take them out again")
    stage.type(_REVERT)
    same = stage.claim(
        "every file of restored/ equals the one of base/, bit for bit",
        digests(base) == digests(restored) != digests(patched),
    )
    if can_draw():
        stage.title("See it")
        stage.type(_REPORT)
    return {"found_exactly_the_planted_neurons": found, "restored_bit_for_bit": same}


def _found(stage: Stage) -> bool:
    expected = planted()
    with Patch.load(stage.place / "neuron_patch.safetensors") as patch:
        return patch.tensors.keys() == expected.keys() and all(
            np.array_equal(patch.index(name), index) for name, index in expected.items()
        )
