"""The files beside the weights in a checkpoint folder: those that are copied, stale, or part of a model."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..errors import UsageError, naming
from ..sources.hub_client import OTHER_ENDINGS, OTHER_FOLDERS
from ..sources.remote import remote_file
from ..sources.resolve import is_index
from ..storage.output import fsync_folder, remove_stale, staged_file
from ..text import plural, some
from .adapter import AdaptedWeights
from .checkpoint import Checkpoint
from .ties import missing_tensors
from .unfinished import JOURNAL_NAME
from .weight_files import MODULES_NAME, PIPELINE_NAME, is_plain_path, shard_count

#: Files beside the weights that belong to a model and that a lossless patch carries, and indexes. Never code.
_SIDE_NAMES = frozenset(
    {
        PIPELINE_NAME, MODULES_NAME, "scheduler_config.json", "config_sentence_transformers.json",
        "sentence_bert_config.json", "router_config.json", "processor_config.json",
        "preprocessor_config.json", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
        "chat_template.json", "chat_template.jinja",
    }
)  # fmt: skip
MOST_SIDE_BYTES = 64 << 20
_STALE_ENDINGS = (*OTHER_ENDINGS, ".safetensors")
_STALE_FOLDERS = (*OTHER_FOLDERS, ".git", ".cache")
_WEIGHT_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
_SAVE = re.compile(r"(checkpoint-|global_step)\d+")
#: Journals of single files, and what killed processes of this package left.
_OURS = re.compile(r"\..+\.neft-(journal|(old-)?[0-9a-f]{16})")


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """Paths relative to the checkpoint's folder."""

    along: tuple[Path, ...] = ()  # files that are copied byte for byte
    left: tuple[Path, ...] = ()  # not copied: mostly other forms of the weights, which would be stale


def folder_files(checkpoint: Checkpoint) -> FolderFiles:
    """Sort the files beside a folder's weights: other weights stay behind, other subfolders are whole."""
    if checkpoint.is_file:
        return FolderFiles()
    root, along, left = checkpoint.root, [Path(name) for name in checkpoint.indexes], list[Path]()
    own = {*(shard.name for shard in checkpoint.shards), *checkpoint.indexes}
    for name, path in _beside(checkpoint):
        if name in own or path.name == JOURNAL_NAME or _OURS.fullmatch(path.name):
            continue
        if path.is_dir():
            if path.name in _STALE_FOLDERS or path.is_symlink():  # it may lead anywhere, also back here
                left.append(Path(name))
            else:
                along.extend(file for file in _tree(root, Path(name)) if file.as_posix() not in own)
        elif path.is_file() and not (path.name.endswith(_STALE_ENDINGS) or is_index(path.name)):
            along.append(Path(name))
        else:  # stale, a pipe, or a link that leads nowhere
            left.append(Path(name))
    return FolderFiles(tuple(along), tuple(left))


def _beside(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """What is in a checkpoint's folder, and in those of its parts, by its name below the folder; no parts."""
    for part in dict.fromkeys(("", *checkpoint.parts)):
        folder = checkpoint.root / part
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if f"{part}{path.name}/" not in checkpoint.parts:
                yield part + path.name, path


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
    """Weight files that seem to belong to a checkpoint and are not its own; no saves, no other formats."""
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


@dataclass(frozen=True, slots=True)
class SideChange:
    """A file beside the weights that is replaced, added (``old`` is None) or removed (``new`` is None)."""

    name: str  # its path below the folder
    old: str | None  # XXH3-128 of its content
    new: str | None
    mode: int | None  # its permission bits; None: those under the umask
    content: Callable[[], bytes] | None = None  # what it becomes


def is_side(name: str) -> bool:
    """Whether a lossless patch carries files of this name: of the fixed list, in the folder or in a part."""
    return (name.rpartition("/")[2] in _SIDE_NAMES or is_index(name)) and is_plain_path(name)


def side_files(checkpoint: Checkpoint) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The files beside the weights that a lossless patch carries, by name; and those it does not carry."""
    if checkpoint.is_file:
        return {}, ()
    if checkpoint.source.remote is not None:
        checkpoint.source.remote.look_for(_SIDE_NAMES)
    own = {shard.name for shard in checkpoint.shards}
    carried, others = dict[str, Path](), list[str]()
    for name, path in _beside(checkpoint):
        if name in own or path.name.startswith("."):
            continue
        small = path.is_file() and path.stat().st_size <= MOST_SIDE_BYTES
        stale = is_index(name) and name not in checkpoint.indexes
        if is_side(name) and small and not stale:
            carried[name] = path
        else:
            others.append(name)
    return carried, tuple(others)


def read_side(path: Path) -> bytes:
    """The content of a file; an ``OSError`` names it."""
    remote_file(path)  # which is fetched by that
    with naming(path):
        return path.read_bytes()


def side_digest(path: Path) -> tuple[str | None, int | None]:
    """XXH3-128 of a file and its permission bits, if it is there; a `UsageError` if it is not regular."""
    try:
        mode = path.parent.lstat().st_mode if path.parent.is_symlink() else path.lstat().st_mode
    except FileNotFoundError:
        return None, None
    if not stat.S_ISREG(mode):
        raise UsageError(
            "only a regular file can be replaced in place",
            file=path,
            hint="write a new checkpoint with [[out=...]]",
        )
    return xxhash.xxh3_128_hexdigest(read_side(path)), mode & 0o777


def put_side(path: Path, content: bytes | None, mode: int | None) -> None:
    """Replace a file atomically, or remove it if there is no ``content``; synced."""
    if content is None:
        remove_stale(path)
        path.unlink(missing_ok=True)
        fsync_folder(path.parent)
        return
    with staged_file(path, force=True, mode=mode) as staged:
        staged.write_at(content, 0)
