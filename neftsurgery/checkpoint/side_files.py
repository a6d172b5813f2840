"""The files beside the weights that belong to a model: which they are, and how one is replaced."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..errors import UsageError, naming
from ..storage.output import fsync_folder, remove_stale, staged_file
from .checkpoint import Checkpoint
from .weight_files import INDEX_NAME, SINGLE_NAME

__all__ = [
    "MOST_SIDE_BYTES",
    "SIDE_NAMES",
    "SideChange",
    "put_side",
    "read_side",
    "side_digest",
    "side_files",
]

#: Files beside the weights that belong to a model and that a lossless patch carries. Never code.
SIDE_NAMES = frozenset(
    {
        INDEX_NAME, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
        "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.json", "chat_template.jinja",
    }
)  # fmt: skip
MOST_SIDE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class SideChange:
    """A file beside the weights that is replaced, added (``old`` is None) or removed (``new`` is None)."""

    name: str
    old: str | None  # XXH3-128 of its content
    new: str | None
    mode: int | None  # its permission bits; None: those under the umask
    content: Callable[[], bytes] | None = None  # what it becomes

    def put(self, root: Path) -> None:
        """Make the change in the folder ``root``, atomically."""
        put_side(root / self.name, None if self.content is None else self.content(), self.mode)


def side_files(checkpoint: Checkpoint) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files beside the weights that a lossless patch carries, and the names of those that it does not."""
    if checkpoint.is_file:
        return (), ()
    weights = {shard.path.name for shard in checkpoint.shards}
    carried, others = list[Path](), list[str]()
    for path in sorted(checkpoint.root.iterdir()):
        if path.name in weights or path.name.startswith("."):
            continue
        small = path.is_file() and path.stat().st_size <= MOST_SIDE_BYTES
        stale = path.name == INDEX_NAME and weights == {SINGLE_NAME}
        if path.name in SIDE_NAMES and small and not stale:
            carried.append(path)
        else:
            others.append(path.name)
    return tuple(carried), tuple(others)


def read_side(path: Path) -> bytes:
    """The content of a file; an ``OSError`` names it."""
    with naming(path):
        return path.read_bytes()


def side_digest(path: Path) -> tuple[str | None, int | None]:
    """XXH3-128 of the content of a file, and its permission bits; None if there is no file.

    Raises a `UsageError` if it is a link, or not a file.
    """
    try:
        mode = path.lstat().st_mode
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
