"""What base plus patch lacks of the tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.folder_files import not_compared
from ..checkpoint.provenance import same_tensor
from ..checkpoint.ties import Joined
from ..scoring.scores import Scores
from ..selection.selection import Selection


@dataclass(frozen=True, slots=True)
class Remainder:
    """What base plus patch may lack of the tuned model."""

    left: Sequence[str]  # tensors that differ from it
    not_compared: Sequence[str]  # files, and tensors, of which nothing is known

    @property
    def is_whole(self) -> bool | None:
        """Whether base plus patch is the tuned model bit for bit; None if nothing says that it is not."""
        return False if self.left else None if self.not_compared else True


def remainder(
    base: Checkpoint, joined: Joined, selection: Selection, scores: Scores, *, again: bool
) -> Remainder:
    """Compare what changed with what was chosen, tensor by tensor; ``again``: long after it was scored."""
    chosen, tuned = selection.tensors, joined.tuned
    left, unknown = {*joined.only_base, *joined.only_tuned}, not_compared(base, tuned)
    unknown += ["changes since the scores were made"] if again else []
    unknown += ["codes that stand for the same numbers"] if base.quantized else []
    for name, info in base.tensors.items():
        if name in left or name in joined.copies or info.name != name:
            continue
        entry = scores.unscored.get(name)
        changed = scores.sums(name, "changed") if name in scores.tensors or name in chosen else None
        if not same_tensor(info, tuned.tensors.get(name)):
            left.add(name)
        elif changed is not None:
            kept = np.delete(changed, chosen[name].index) if name in chosen else changed
            left |= {name} if kept.any() else set()
        elif entry is None:
            unknown.append(name)
        elif entry.changed:
            left.add(name)
    return Remainder(sorted(left), unknown)
