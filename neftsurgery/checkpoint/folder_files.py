"""The files beside the weights in a checkpoint folder: which are copied, and which would be stale."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..sources.hub_client import OTHER_ENDINGS, OTHER_FOLDERS
from ..sources.resolve import is_index
from ..text import plural, some
from .adapter import AdaptedWeights
from .checkpoint import Checkpoint
from .ties import missing_tensors
from .unfinished import JOURNAL_NAME
from .weight_files import shard_count

_STALE_ENDINGS = (*OTHER_ENDINGS, ".safetensors")
_STALE_FOLDERS = (*OTHER_FOLDERS, ".git", ".cache")
_WEIGHT_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
_SAVE = re.compile(r"(checkpoint-|global_step)\d+")
#: Journals of single files, and what killed processes of this package left.
_OURS = re.compile(r"\..+\.neft-(journal|(old-)?[0-9a-f]{16})")


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """Paths relative to the checkpoint's folder."""

    along: tuple[Path, ...]  # files that are copied byte for byte
    left: tuple[Path, ...]  # not copied: mostly other forms of the weights, which would be stale


def folder_files(checkpoint: Checkpoint) -> FolderFiles:
    """Sort the files beside the weights of a checkpoint folder.

    Other weights in the top folder, and in those of its parts, are left behind; other subfolders are copied
    whole.
    """
    root = checkpoint.root
    own = {*(shard.name for shard in checkpoint.shards), *checkpoint.indexes}
    along = [Path(name) for name in checkpoint.indexes]
    left: list[Path] = []
    folders = [""]
    for folder in folders:  # grows by those of parts
        for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
            name = folder + entry.name
            if name in own or entry.name == JOURNAL_NAME or _OURS.fullmatch(entry.name):
                continue
            if entry.is_dir() and f"{name}/" in checkpoint.parts:
                folders.append(f"{name}/")
            elif entry.is_dir():
                if entry.name in _STALE_FOLDERS or entry.is_symlink():  # it may lead anywhere, also back here
                    left.append(Path(name))
                else:
                    along.extend(path for path in _tree(root, Path(name)) if path.as_posix() not in own)
            elif entry.is_file() and not (entry.name.endswith(_STALE_ENDINGS) or is_index(entry.name)):
                along.append(Path(name))
            else:  # stale, a pipe, or a link that leads nowhere
                left.append(Path(name))
    return FolderFiles(tuple(along), tuple(left))


def not_compared(*sides: Checkpoint) -> list[str]:
    """What may belong to checkpoints and is not among their tensors: other weight files, and names."""
    found = [name for side in sides for name in (*missing_tensors(side), *_unread_weights(side))]
    return list(dict.fromkeys(found))


def file_notes(side: Checkpoint) -> Iterator[str]:
    """What is wrong with the files of a checkpoint, short of an error."""
    if missing := missing_tensors(side):
        count = plural(len(missing), "tensor")
        yield f"{side.name}: the index lists {count} that no file has: {some(missing)}"
    counts = {None, *(shard_count(shard.name) for shard in side.shards)}
    beside = [name for name in _unread_weights(side) if _is_beside(name, side)]
    if stale := [name for name in beside if shard_count(name) not in counts]:
        yield f"{side.name}: the folder also holds shards of another save, which are not read: {some(stale)}"


def _unread_weights(side: Checkpoint) -> list[str]:
    """The weight files that seem to belong to a checkpoint, and whose tensors are not among its own.

    Not saves of a training below it (``checkpoint-500``), nor other formats beside the weights.
    """
    if isinstance(side, AdaptedWeights):
        return []
    if side.is_file:
        count = shard_count(side.shards[0].name) or 1
        return [f"the other {plural(count - 1, 'shard')} of {count}"] if count > 1 else []
    own, found = {shard.name for shard in side.shards}, list[str]()
    for path, folders, names in os.walk(side.root):  # what cannot be listed is passed over
        below = Path(path).relative_to(side.root)
        aside = {name for name in folders if not below.parts and _SAVE.fullmatch(name)}
        folders[:] = sorted({*folders} - {*_STALE_FOLDERS} - aside)
        paths = [(below / name).as_posix() for name in sorted(names)]
        found += [name for name in paths if name.endswith(".safetensors")]
        found += [n for n in paths if n.endswith(_WEIGHT_ENDINGS) and not _is_beside(n, side)]
    return [name for name in found if name not in own]


def _is_beside(name: str, side: Checkpoint) -> bool:
    """Whether a file is in the folder of a checkpoint, or of a part: there, it is beside the weights."""
    folder, slash, _ = name.rpartition("/")
    return not slash or folder + slash in side.parts


def _tree(root: Path, folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:  # by default os.walk skips what it cannot list
        raise error

    found: list[Path] = []
    for path, folders, names in os.walk(root / folder, onerror=fail, followlinks=False):
        folders.sort()
        found += [Path(path, name).relative_to(root) for name in sorted(names) if Path(path, name).is_file()]
    return found
