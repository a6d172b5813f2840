"""The text: sentence pairs and articles, split so that no sentence is in two parts."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PAIRS = "tatoeba_en_zh/cmn.txt"  # English, tab, Chinese, tab, attribution
PLAYS = "tinyshakespeare.txt"  # speeches, with empty lines between them
ARTICLES = ("wikitext2/valid.txt", "wikitext2/test.txt")  # for training, for evaluation

SentencePair = tuple[str, str]  # English, Chinese


class TextError(Exception):
    """The folder of text lacks a file, or has too little text."""


@dataclass(frozen=True)
class Sizes:
    """How many pairs are for fine-tuning, for the dev loss and for the test; the rest is for pre-training.

    A pair has at most ``words`` of English and ``characters`` of Chinese.
    """

    train: int
    dev: int
    test: int
    words: int
    characters: int


@dataclass(frozen=True)
class Text:
    """All text of an experiment."""

    # Pairs, English in lower case. A sentence of one part, English or Chinese, is in no other part, whatever
    # its case and punctuation. No two pairs of dev and test share a sentence.
    pretrain: tuple[SentencePair, ...]
    train: tuple[SentencePair, ...]
    dev: tuple[SentencePair, ...]
    test: tuple[SentencePair, ...]
    # Paragraphs of English articles, for training and for evaluation.
    articles: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def pairs(self) -> dict[str, int]:
        """The number of pairs in each part."""
        parts = {"pretrain": self.pretrain, "train": self.train, "dev": self.dev, "test": self.test}
        return {name: len(part) for name, part in parts.items()}

    @property
    def digest(self) -> str:
        """Identifies this text and its split. It depends on the names of the class and its fields."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def read(folder: Path, sizes: Sizes, seed: int = 0) -> Text:
    """The text of ``folder``, split by ``seed``. Raises TextError."""
    parts = split(short(_pairs(folder / PAIRS), sizes), sizes, seed)
    articles, unseen = (tuple(_paragraphs(folder / name)) for name in ARTICLES)
    return Text(**parts, articles=articles, unseen=unseen)


def read_plays(folder: Path) -> tuple[str, ...]:
    """The speeches of the plays of ``folder``, each with its speaker, in lower case. Raises TextError."""
    speeches = _read(folder / PLAYS).lower().split("\n\n")
    return tuple(" ".join(speech.split()) for speech in speeches if speech.strip())


def short(pairs: Iterable[SentencePair], sizes: Sizes) -> list[SentencePair]:
    """The pairs within the limits whose Chinese is in simplified characters, without duplicates.

    The English does not tell which script a translator used, so two scripts would only add noise.
    """
    return list(
        dict.fromkeys(
            (english, chinese)
            for english, chinese in pairs
            if len(re.findall(r"\w+|[^\w\s]", english)) <= sizes.words
            and len(chinese) <= sizes.characters
            and _simplified(chinese)
        )
    )


def split(pairs: Sequence[SentencePair], sizes: Sizes, seed: int) -> dict[str, tuple[SentencePair, ...]]:
    """Splits pairs into the four parts. Pairs that share a sentence go to the same part.

    Raises TextError if there are too few pairs.
    """
    groups = list(_connected(pairs))
    random.Random(seed).shuffle(groups)
    parts: dict[str, tuple[SentencePair, ...]] = {}
    for part, count in (("test", sizes.test), ("dev", sizes.dev)):
        taken, groups = groups[:count], groups[count:]
        parts[part] = tuple(group[0] for group in taken)
    train: list[SentencePair] = []
    while groups and len(train) < sizes.train:
        train += groups.pop()
    parts["train"] = tuple(train[: sizes.train])
    parts["pretrain"] = tuple(pair for group in groups for pair in group)
    if not parts["pretrain"]:
        asked = sizes.train + sizes.dev + sizes.test
        raise TextError(
            f"{len(pairs)} short pairs are too few: {asked} are needed, and more for pre-training"
        )
    return parts


def _connected(pairs: Sequence[SentencePair]) -> Iterator[list[SentencePair]]:
    """Groups of pairs that share a sentence, directly or through others."""
    above: dict[tuple[int, str], tuple[int, str]] = {}

    def head(key: tuple[int, str]) -> tuple[int, str]:
        while (up := above.setdefault(key, key)) != key:
            above[key] = above[up]
            key = up
        return key

    for english, chinese in pairs:
        above[head((0, _plain(english)))] = head((1, _plain(chinese)))
    groups: dict[tuple[int, str], list[SentencePair]] = {}
    for pair in pairs:
        groups.setdefault(head((0, _plain(pair[0]))), []).append(pair)
    yield from groups.values()


def _plain(sentence: str) -> str:
    """The sentence without case and punctuation, unless nothing would be left."""
    return re.sub(r"[\W_]+", "", sentence.casefold()) or sentence


def _simplified(sentence: str) -> bool:
    """Whether all characters are in GB 2312, which has no traditional form of a simplified character."""
    try:
        sentence.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True


def _pairs(file: Path) -> Iterator[SentencePair]:
    for line in _read(file).splitlines():
        columns = line.split("\t")
        if len(columns) >= 2:
            yield columns[0].strip().lower(), columns[1].strip()


def _paragraphs(file: Path) -> Iterator[str]:
    """Paragraphs without the headings."""
    lines = (line.strip().lower() for line in _read(file).splitlines())
    return (line for line in lines if line and not line.startswith("="))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TextError(
            f"there is no {file}; --text must name a folder with {PAIRS}, "
            f"{' and '.join(ARTICLES)}, and for the plays {PLAYS}"
        ) from None
