"""A text file as chunks of tokens, each with its weight in the mean hidden state."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..errors import CorruptFileError, UsageError, naming

_TEXT_HINT = "name a file with a text on each line"


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Consecutive tokens of one text that the model sees together."""

    ids: Sequence[int]  # the token ids, at least one
    weight: float  # of each token in the mean: 1 / (tokens of its text x texts): all texts count equally


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of a text file."""

    name: str  # the file's name without its folder
    digest: str  # XXH3-128 of its bytes, hex
    chunks: tuple[TokenChunk, ...]  # in the order of the file
    texts: int  # how many are used: lines
    tokens: int
    truncated: bool  # whether the file has more texts or tokens

    def describe(self) -> dict[str, object]:
        """The text as JSON, without its tokens."""
        return {
            "name": self.name,
            "xxh3_128": self.digest,
            "texts": self.texts,
            "tokens": self.tokens,
            "cut": self.truncated,
        }


def tokenize_file(path: str | os.PathLike[str], tokenizer: Any, *, tokens: int, length: int) -> TokenizedText:
    """Tokenize the lines of a text file, up to ``tokens`` tokens, in chunks of at most ``length``."""
    file = Path(path)
    if not file.is_file():
        raise UsageError("there is no such text file", file=file, hint=_TEXT_HINT)
    with naming(file):
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
        taken += len(ids) <= left
        encoded.append(ids[:left])
        left -= len(encoded[-1])
    encoded = [ids for ids in encoded if ids]
    if not encoded:
        raise UsageError("there is no text in this file", file=file, hint=_TEXT_HINT)
    chunks = [
        TokenChunk(ids[start : start + length], 1 / (len(ids) * len(encoded)))
        for ids in encoded
        for start in range(0, len(ids), length)
    ]
    digest = xxhash.xxh3_128_hexdigest(content)
    return TokenizedText(file.name, digest, tuple(chunks), len(encoded), tokens - left, taken < len(lines))


def token_batches(text: TokenizedText, size: int) -> Iterator[list[TokenChunk]]:
    """Batches of chunks, the longest first: up to ``size`` tokens with padding, or one chunk."""
    chunks = sorted(text.chunks, key=lambda chunk: -len(chunk.ids))
    start = 0
    while start < len(chunks):
        stop = start + max(1, size // len(chunks[start].ids))
        yield chunks[start:stop]
        start = stop
