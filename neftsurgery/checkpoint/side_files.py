"""The files beside the weights that belong to a model: which they are, and how one is replaced."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..errors import UsageError, naming
from ..sources.resolve import is_index
from ..storage.output import fsync_folder, remove_stale, staged_file
from .checkpoint import Checkpoint
from .parts import MODULES_NAME, PIPELINE_NAME, is_plain_path

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


@dataclass(frozen=True, slots=True)
class SideChange:
    """A file beside the weights that is replaced, added (``old`` is None) or removed (``new`` is None)."""

    name: str  # its path below the folder
    old: str | None  # XXH3-128 of its content
    new: str | None
    mode: int | None  # its permission bits; None: those under the umask
    content: Callable[[], bytes] | None = None  # what it becomes

    def put(self, root: Path) -> None:
        """Make the change in the folder ``root``, atomically."""
        put_side(root / self.name, None if self.content is None else self.content(), self.mode)


def is_side(name: str) -> bool:
    """Whether a lossless patch carries files of this name: of the fixed list, in the folder or in a part."""
    return (name.rpartition("/")[2] in _SIDE_NAMES or is_index(name)) and is_plain_path(name)


def side_files(checkpoint: Checkpoint) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The files beside the weights that a lossless patch carries, by their paths below the folder.

    And those of the files that it does not carry.
    """
    if checkpoint.is_file:
        return {}, ()
    own = {*(shard.name for shard in checkpoint.shards), *checkpoint.parts}
    carried, others = dict[str, Path](), list[str]()
    for part in dict.fromkeys(("", *checkpoint.parts)):
        folder = checkpoint.root / part
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = part + path.name
            if name in own or f"{name}/" in own or path.name.startswith("."):
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
    with naming(path):
        return path.read_bytes()


def side_digest(path: Path) -> tuple[str | None, int | None]:
    """XXH3-128 of the content of a file, and its permission bits; None if there is no file.

    Raises a `UsageError` if it is a link or in one, or not a file.
    """
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
