"""The run directory: the folder of an unfinished run, beside OUT.

It holds what resuming needs, and no weights of the model. OUT itself appears when the run has finished. A run
directory belongs to one recipe, one base and one set of examples. Another run does not resume from it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CorruptFileError, UsageError, naming
from ..selection.selection import Selection
from ..storage.output import staged_file
from ..tensors.document import read_object
from ..tuning.trainer import last_save
from .loss_curve import CURVE_NAME

_IDENTITY = "run.json"
_LOCK = "lock"


@dataclass(frozen=True)
class RunIdentity:
    """What must be equal for a run to resume: plain JSON values."""

    recipe: Mapping[str, Any]  # the recipe's keys, without ``out``
    base: str | None  # the fingerprint of the base
    examples: str | None  # the digest of the examples

    def to_json(self) -> dict[str, object]:
        """The content of ``run.json``."""
        described: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return described


def _differences(known: Any, wanted: Any, name: str = "") -> list[str]:
    """The dotted names of what differs, as ``recipe.train.seed``; ``known`` may be damaged, or lack some."""
    if known == wanted or not isinstance(wanted, dict):
        return [] if known == wanted else [name]
    known, found = known if isinstance(known, dict) else {}, list[str]()
    for key in sorted(known.keys() | wanted.keys()):
        found += _differences(known.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    return found or [name]


class RunDirectory:
    """The run directory of one OUT; it need not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saves = path / "saves"  # the Trainer saves into this folder
        self.selection = path / "selection.safetensors"  # the chosen neurons, once they are chosen
        self.scores = path / "scores.safetensors"  # their scores, if the probe scored any
        self.losses = path / CURVE_NAME  # written as they are measured
        self.probe = path / "probe"  # the probe's full fine-tune, until it is scored
        self.control = path / "control"  # what training a random control has left, once it has finished
        self.probed = path / "probe.safetensors"  # the sums of a gradient probe that was stopped

    @classmethod
    def beside(cls, out: Path) -> RunDirectory:
        """The run directory of ``out``."""
        return cls(out.with_name(out.name + ".unfinished"))

    @property
    def last_step(self) -> int:
        """The step of the last complete save; 0 if there is none."""
        save = last_save(self.saves)
        return 0 if save is None else int(save.name.rpartition("-")[2])

    def resumable_step(self, identity: RunIdentity) -> int | None:
        """The step where a run of this identity resumes, or None; a `UsageError` if another saved."""
        try:
            known = read_object(self.path / _IDENTITY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except CorruptFileError:
            known = {}
        differences = _differences(known, identity.to_json())
        if differences and not (self.last_step or self.has_probed):
            return None  # nothing of the other run is worth keeping
        if differences:
            what = f"there is an unfinished run of another recipe: {', '.join(differences[:3])} differ"
            hint = "finish that run, discard it with [[restart=True]], or name another folder: [[out=...]]"
            raise UsageError(what, file=self.path, hint=hint)
        return self.last_step

    @property
    def has_probed(self) -> bool:
        """Whether a probe was stopped, and goes on where it was."""
        return self.probed.exists() or any(self.probe.glob("trainer/checkpoint-*/trainer_state.json"))

    def load_selection(self) -> Selection | None:
        """The neurons that the unfinished run has chosen; None if it has not chosen yet."""
        return Selection.load(self.selection) if self.selection.exists() else None

    @contextmanager
    def opened(self, identity: RunIdentity, *, restart: bool) -> Iterator[None]:
        """Lock the folder for this process alone, and empty it unless the run resumes."""
        self.path.mkdir(exist_ok=True)
        with naming(self.path), open(self.path / _LOCK, "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError("another process is training here", file=self.path) from None
            if restart or self.resumable_step(identity) is None:
                self._empty()
                with staged_file(self.path / _IDENTITY) as file:
                    file.write_at(json.dumps(identity.to_json(), indent=2).encode(), 0)
            try:
                yield
            except BaseException:
                if not (self.selection.exists() or self.has_probed):
                    self.remove()
                raise

    def _empty(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
