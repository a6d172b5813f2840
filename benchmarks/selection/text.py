"""The text: sentence pairs and articles, dealt out so that no sentence is on two sides."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PAIRS = "tatoeba_en_zh/cmn.txt"  # English, tab, Chinese, tab, attribution
PLAYS = "tinyshakespeare.txt"  # speeches, with empty lines between them
ARTICLES = ("wikitext2/valid.txt", "wikitext2/test.txt")  # to learn from, to examine on

Pair = tuple[str, str]  # English, Chinese


class TextError(Exception):
    """The folder of text lacks something, or has too little of it."""


@dataclass(frozen=True)
class Sizes:
    """How many pairs to tune on, for the dev loss, and to examine on; the rest is learnt before that.

    ``words`` of English and ``characters`` of Chinese are the most that a pair may have.
    """

    train: int
    dev: int
    test: int
    words: int
    characters: int


@dataclass(frozen=True)
class Text:
    """What there is to read.

    Attributes
    ----------
    pretrain, train, dev, test:
        Pairs, English in lower case; a sentence of one of them, English or Chinese, is in no other, whatever
        its case and punctuation. Of dev and test no two pairs share a sentence.
    articles, unseen:
        Paragraphs of English articles to learn from, and to examine on.
    """

    pretrain: tuple[Pair, ...]
    train: tuple[Pair, ...]
    dev: tuple[Pair, ...]
    test: tuple[Pair, ...]
    articles: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def pairs(self) -> dict[str, int]:
        """How many there are in each part."""
        parts = {"pretrain": self.pretrain, "train": self.train, "dev": self.dev, "test": self.test}
        return {name: len(part) for name, part in parts.items()}

    @property
    def digest(self) -> str:
        """Names exactly this text, dealt out in this way."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def read(folder: Path, sizes: Sizes, seed: int = 0) -> Text:
    """The text of ``folder``, dealt out by ``seed``. Raises TextError."""
    dealt = deal(short(_pairs(folder / PAIRS), sizes), sizes, seed)
    articles, unseen = (tuple(_paragraphs(folder / name)) for name in ARTICLES)
    return Text(**dealt, articles=articles, unseen=unseen)


def read_plays(folder: Path) -> tuple[str, ...]:
    """The speeches of the plays of ``folder``, each with its speaker, in lower case. Raises TextError."""
    speeches = _read(folder / PLAYS).lower().split("\n\n")
    return tuple(" ".join(speech.split()) for speech in speeches if speech.strip())


def short(pairs: Iterable[Pair], sizes: Sizes) -> list[Pair]:
    """The pairs within the limits whose Chinese is in simplified characters, each once.

    Which of the two scripts a translator used cannot be told from the English: it would be noise.
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


def deal(pairs: Sequence[Pair], sizes: Sizes, seed: int) -> dict[str, tuple[Pair, ...]]:
    """Deals pairs to the four parts, those that share a sentence to the same part.

    Raises
    ------
    TextError
        If the pairs do not suffice.
    """
    families = list(_families(pairs))
    random.Random(seed).shuffle(families)
    dealt: dict[str, tuple[Pair, ...]] = {}
    for part, count in (("test", sizes.test), ("dev", sizes.dev)):
        taken, families = families[:count], families[count:]
        dealt[part] = tuple(family[0] for family in taken)
    train: list[Pair] = []
    while families and len(train) < sizes.train:
        train += families.pop()
    dealt["train"] = tuple(train[: sizes.train])
    dealt["pretrain"] = tuple(pair for family in families for pair in family)
    if not dealt["pretrain"]:
        asked = sizes.train + sizes.dev + sizes.test
        raise TextError(
            f"{len(pairs)} short pairs are too few: {asked} are asked for, and more to learn before"
        )
    return dealt


def _families(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Pairs that share a sentence, directly or through others."""
    above: dict[tuple[int, str], tuple[int, str]] = {}

    def head(key: tuple[int, str]) -> tuple[int, str]:
        while (up := above.setdefault(key, key)) != key:
            above[key] = above[up]
            key = up
        return key

    for english, chinese in pairs:
        above[head((0, _plain(english)))] = head((1, _plain(chinese)))
    families: dict[tuple[int, str], list[Pair]] = {}
    for pair in pairs:
        families.setdefault(head((0, _plain(pair[0]))), []).append(pair)
    yield from families.values()


def _plain(sentence: str) -> str:
    """Without case and punctuation, unless that is all there is."""
    return re.sub(r"[\W_]+", "", sentence.casefold()) or sentence


def _simplified(sentence: str) -> bool:
    """GB 2312 has no traditional characters where there are simplified ones."""
    try:
        sentence.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True


def _pairs(file: Path) -> Iterator[Pair]:
    for line in _read(file).splitlines():
        columns = line.split("\t")
        if len(columns) >= 2:
            yield columns[0].strip().lower(), columns[1].strip()


def _paragraphs(file: Path) -> Iterator[str]:
    """Paragraphs, without the headings."""
    lines = (line.strip().lower() for line in _read(file).splitlines())
    return (line for line in lines if line and not line.startswith("="))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TextError(
            f"there is no {file}; --text names a folder with {PAIRS}, "
            f"{' and '.join(ARTICLES)}, and for the plays {PLAYS}"
        ) from None
