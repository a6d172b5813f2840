"""The text whose hidden states are looked at: its lines as pieces of tokens, each with its weight."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..errors import CorruptFileError, UsageError

__all__ = ["Piece", "Text", "batches", "read_text"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that go through the model together.

    Attributes
    ----------
    ids:
        Token ids, at least one.
    weight:
        Of each of them in the mean: 1 / (tokens of its text x texts), so that every text counts the same.
    """

    ids: Sequence[int]
    weight: float


@dataclass(frozen=True)
class Text:
    """A text file, as tokens.

    Attributes
    ----------
    name:
        The file's name, without its folder.
    digest:
        XXH3-128 of its bytes, hex.
    pieces:
        In the order of the file.
    texts, tokens:
        How many lines and tokens of it are used.
    cut:
        Whether the file has more.
    """

    name: str
    digest: str
    pieces: tuple[Piece, ...]
    texts: int
    tokens: int
    cut: bool

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "xxh3_128": self.digest,
            "texts": self.texts,
            "tokens": self.tokens,
            "cut": self.cut,
        }


def read_text(path: str | os.PathLike[str], tokenizer: Any, *, tokens: int, length: int) -> Text:
    """Every line that is not blank is a text; long ones become several pieces.

    Parameters
    ----------
    tokenizer:
        Of transformers; the special tokens that it adds to a text count as others do.
    tokens:
        So many at most, from the beginning of the file; the text that would exceed it is cut.
    length:
        Tokens of a piece, at most.

    Raises
    ------
    UsageError
        If there is no such file, or no token in it.
    CorruptFileError
        If it is not UTF-8.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError("there is no such text file", file=file, hint="name a file with a text on each line")
    content = file.read_bytes()
    try:
        lines = [line for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"the text is not UTF-8: {error.reason}", file=file) from error
    encoded, left, taken = [], tokens, 0
    for line in lines:
        if left == 0:
            break
        ids = tokenizer(line, verbose=False)["input_ids"]
        cut, ids = len(ids) > left, ids[:left]
        taken += not cut
        left -= len(ids)
        if ids:
            encoded.append(ids)
    if not encoded:
        raise UsageError("there is no text in it", file=file, hint="name a file with a text on each line")
    pieces = [
        Piece(ids[start : start + length], 1 / (len(ids) * len(encoded)))
        for ids in encoded
        for start in range(0, len(ids), length)
    ]
    digest = xxhash.xxh3_128_hexdigest(content)
    return Text(file.name, digest, tuple(pieces), len(encoded), tokens - left, taken < len(lines))


def batches(text: Text, size: int) -> Iterator[list[Piece]]:
    """Pieces that go through the model together: up to ``size`` tokens with their padding, or one piece.

    The longest come first: neighbours are of like length, so little is padded.
    """
    pieces = sorted(text.pieces, key=lambda piece: -len(piece.ids))
    start = 0
    while start < len(pieces):
        stop = start + max(1, size // len(pieces[start].ids))
        yield pieces[start:stop]
        start = stop
