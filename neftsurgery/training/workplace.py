"""Where an unfinished run lives: a folder beside OUT, with what it takes to go on, and nothing of the model.

OUT itself appears when the run is done, whole. The folder belongs to one recipe on one base and one set of
examples, by their hashes: another run does not go on in it.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..selection.selection import Selection
from ..storage.output import staged_file
from ..tuning.trainer import last_save

__all__ = ["Workplace", "clear", "kept_selection", "unfinished", "workplace"]

_RUN = "run.json"
_LOCK = "lock"


@dataclass(frozen=True, slots=True)
class Workplace:
    """An unfinished run's folder, locked.

    Attributes
    ----------
    folder:
        The folder.
    """

    folder: Path

    @property
    def saves(self) -> Path:
        """Where the Trainer saves."""
        return self.folder / "saves"

    @property
    def selection(self) -> Path:
        """The neurons, once they are chosen."""
        return self.folder / "selection.safetensors"

    @property
    def scores(self) -> Path:
        """Their scores, if the probe made some."""
        return self.folder / "scores.safetensors"

    @property
    def probe(self) -> Path:
        """Where a short full fine-tune lies until it is scored."""
        return self.folder / "probe"


def _folder(out: Path) -> Path:
    return out.with_name(out.name + ".unfinished")


def unfinished(out: Path, identity: Mapping[str, Any]) -> int | None:
    """The step that an unfinished run of the same identity would go on from; None if there is no such run.

    Raises
    ------
    UsageError
        If there is one of another identity.
    """
    folder = _folder(out)
    try:
        known = json.loads((folder / _RUN).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        known = {}
    differing = _differing(known, json.loads(json.dumps(identity)))
    save = last_save(folder / "saves")
    if differing and save is None:
        return None  # it was not worth much yet
    if differing:
        raise UsageError(
            f"an unfinished run of another recipe is there: {', '.join(differing[:3])} differ",
            file=folder,
            hint="finish that one first, or throw it away with --restart, or name another out",
        )
    return 0 if save is None else int(save.name.rpartition("-")[2])


def kept_selection(out: Path) -> Selection | None:
    """The neurons that an unfinished run has chosen, if it came so far."""
    path = Workplace(_folder(out)).selection
    return Selection.load(path) if path.exists() else None


def _differing(known: Any, identity: Any, name: str = "") -> list[str]:
    if not (isinstance(known, dict) and isinstance(identity, dict)):
        return [] if known == identity else [name or "all of it"]
    found = []
    for key in sorted(known.keys() | identity.keys()):
        found += _differing(known.get(key), identity.get(key), f"{name}.{key}" if name else key)
    return found


@contextmanager
def workplace(out: Path, identity: Mapping[str, Any], *, restart: bool) -> Iterator[Workplace]:
    """The folder of an unfinished run, begun or gone on with; no other process may use it meanwhile.

    Raises
    ------
    UsageError
        If another process trains there.
    """
    folder = _folder(out)
    folder.mkdir(exist_ok=True)
    with open(folder / _LOCK, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError("another process trains there", file=folder) from None
        place = Workplace(folder)
        if restart or unfinished(out, identity) is None:
            _empty(folder)
            with staged_file(folder / _RUN) as run:
                run.write_at(json.dumps(identity, indent=2).encode(), 0)
        try:
            yield place
        except BaseException:
            if not place.selection.exists():
                clear(place)
            raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def clear(place: Workplace) -> None:
    """Take the folder away: the run is done."""
    shutil.rmtree(place.folder, ignore_errors=True)
