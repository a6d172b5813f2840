"""Commands as pages print them, read and run: what stands in ```console blocks, with the output below."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from support import Result

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("recipes/**/*.md"))]
_SHELL = ("|", ">", "2>&1", "&&")  # what follows is not for the command


@dataclass(frozen=True)
class Step:
    """A command of a page, and the lines that the page shows as its output."""

    words: list[str]
    shown: list[str]

    @property
    def printed(self) -> str:
        return shlex.join(self.words)


def steps(page: str) -> Iterator[Step]:
    """The commands of a page, in order."""
    for block in re.findall(r"^```console\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        for step in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            command, _, shown = step.partition("\n")
            words = shlex.split(command, comments=True)
            yield Step(list(takewhile(lambda word: word not in _SHELL, words)), shown.splitlines())


def files(page: str, language: str) -> list[str]:
    """The contents of a page's blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def shape_of(line: str) -> str:
    """A line without its numbers."""
    return re.sub(r"\d[\d.,]*( [kMG]?B)?%?", "#", line).strip()


def follow(
    page: str,
    neft: Callable[..., Result],
    skip: Callable[[Step], bool],
    seen: Callable[[str], str] = str,
) -> list[str]:
    """Run a page's commands where the process is; return those that ran.

    What is shown must be printed, as ``seen`` sees it: `shape_of` overlooks numbers.
    """
    ran = []
    for step in steps(page):
        program, *words = step.words
        if skip(step) or program in ("pip", "make", "export"):
            continue
        if program == "cd":
            os.chdir(words[0])
        elif program == "cp":
            assert words[0] == "-r"
            shutil.copytree(words[1], words[2])
        else:
            assert program == "neftsurgery", step.printed
            here = Path.cwd()
            result = neft(*words)
            os.chdir(here)
            assert result.code == 0, (step.printed, result)
            printed = [seen(line) for line in (result.out + result.err).splitlines()]
            missing = [line for line in step.shown if seen(line) not in printed]
            assert not missing, (step.printed, missing, printed)
        ran.append(step.printed)
    return ran
