"""Unfinished changes in place: where their journals are, and the refusal of a checkpoint that has one.

While its journal exists, a change is not complete, and the weights are neither the old nor the new ones. A
command that reads refuses such a checkpoint. It never heals it, because a stranger may have made the journal.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from ..errors import MachineError, NeftError
from ..sources.resolve import Source
from .weight_files import weight_files

__all__ = ["JOURNAL_NAME", "find_journals", "journal_path", "refuse_unfinished"]

JOURNAL_NAME = ".neft-journal"
_DEEPEST = 4  # levels below a checkpoint's folder where its shards may be


def journal_path(source: Source) -> Path:
    """Where the journal of a checkpoint is: inside its folder, or beside its file."""
    path = source.path
    return path / JOURNAL_NAME if path.is_dir() else path.with_name(f".{path.name}{JOURNAL_NAME}")


def find_journals(source: Source) -> list[Source]:
    """The folders and files whose journals concern the checkpoint ``source``.

    A folder's weight files may have been changed one by one, and a file together with its folder.
    If a symlink was named, the journal is beside its target. A Hub model has none.
    """
    if source.repo is not None:
        return []
    path, named = source.path, source.named
    if path.is_symlink():
        path = Path(os.path.realpath(path))
        named = str(path)
    found = [Source(path, named)]
    if path.is_dir():
        for journal in sorted([*path.glob(f".*{JOURNAL_NAME}"), *path.glob(f"[!.]*/**/.*{JOURNAL_NAME}")]):
            file = journal.with_name(journal.name[1 : -len(JOURNAL_NAME)])
            if _belongs(file, path):
                found.append(Source(file, str(file)))
    above = () if path.is_dir() else path.parents[:_DEEPEST]
    above = [one for one in above if os.path.lexists(one / JOURNAL_NAME) and _belongs(path, one)]
    found += [Source(folder, str(folder)) for folder in above]
    return [one for one in found if os.path.lexists(journal_path(one))]


def refuse_unfinished(source: Source) -> None:
    """Raise a `MachineError` if a change in place of ``source`` is not complete."""
    for one in find_journals(source):
        raise MachineError(
            "a change in place was interrupted or is under way: its journal is here",
            file=journal_path(one),
            hint=f"show it and undo it: neftsurgery heal {shlex.quote(one.named)}",
        )


def _belongs(file: Path, folder: Path) -> bool:
    try:
        return file in [folder / name for name in weight_files(folder)[0]]
    except NeftError:
        return False
