"""The options of the files suite."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.harness.sizes import format_size, parse_size

# Every part with the options that it depends on, in an order in which parts share checkpoints.
PARTS = {
    "warm": ("size", "threads", "repeat"),
    "cold": ("size", "repeat"),
    "extract": ("size", "threads", "repeat"),
    "threads": ("size", "repeat"),
    "bits": ("size",),
    "apply": ("size", "threads", "repeat"),
    "sizes": ("sizes", "threads", "repeat"),
    "inplace": ("in_place_size", "threads", "repeat"),
    "shards": ("size", "shards", "threads", "repeat"),
    "tensors": ("tensors", "threads", "repeat"),
    "tiny": ("tensors", "threads", "repeat"),
    "remote": ("remote_size", "repeat"),
    "sparse": ("sparse_size", "threads", "repeat"),
}
GROUPS = {"growth": ("sizes", "threads", "shards", "tensors", "tiny", "sparse"), "diff": ("warm", "cold")}
WITH_RIVALS = ("warm", "cold", "apply", "tensors", "tiny")
QUICK = {  # the defaults with --quick; options given beside it win
    "size": "20MB",
    "sizes": "10MB,20MB,40MB",
    "in_place_size": "20MB",
    "sparse_size": "400MB",
    "remote_size": "20MB",
    "shards": "1,5,20",
    "tensors": 600,
    "repeat": 1,
}


@dataclass(frozen=True)
class Options:
    """Sizes are bytes per side; ``threads`` are this tool's; ``repeat`` is the number of rounds."""

    size: int
    sizes: tuple[int, ...]
    in_place_size: int
    sparse_size: int
    remote_size: int
    shards: tuple[int, ...]
    tensors: int
    threads: int
    repeat: int
    rivals: bool
    parts: tuple[str, ...]
    work: Path | None
    out: Path

    @classmethod
    def of(cls, given: argparse.Namespace) -> Options:
        """The options of a parsed command line."""
        parts = tuple(part for part in PARTS if part in given.only and part not in given.skip)
        others = {field.name: getattr(given, field.name) for field in fields(cls) if field.name != "parts"}
        return cls(parts=parts, **others)

    @property
    def few(self) -> int:
        """The rounds of slow rivals and of the scaling parts."""
        return min(self.repeat, 3)

    def command(self, part: str) -> str:
        """The command line that measures this part again."""
        flags = [f"--{name.replace('_', '-')} {_typed(name, getattr(self, name))}" for name in PARTS[part]]
        if part in WITH_RIVALS and not self.rivals:
            flags.append("--no-rivals")
        return " ".join([f"python -m benchmarks files --only {part}", *flags])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    add = parser.add_argument
    add("--size", type=parse_size, default="2.4GB", help="bytes per side of most parts (default: 2.4GB)")
    add("--sizes", type=_sizes, default="0.5GB,2GB,8GB", help="part sizes (default: 0.5GB,2GB,8GB)")
    add("--in-place-size", type=parse_size, default="8GB", help="part inplace (default: 8GB)")
    add("--sparse-size", type=parse_size, default="100GB", help="part sparse: sparse files (default: 100GB)")
    add("--remote-size", type=parse_size, default="2GB", help="part remote: behind URLs (default: 2GB)")
    add("--shards", type=_numbers, default="1,20,100,500", help="part shards (default: 1,20,100,500)")
    add(
        "--tensors",
        type=int,
        default=64_000,
        help="parts tensors, tiny: entries of one header (default: 64000)",
    )
    add("--threads", type=int, default=2, help="this tool's threads (default: 2)")
    add("--repeat", type=int, default=5, help="rounds of every side-by-side run (default: 5)")
    add("--no-rivals", dest="rivals", action="store_false", help="measure only this tool and the limits")
    add("--only", type=_parts, default=tuple(PARTS), help=f"some of: {', '.join((*PARTS, *GROUPS))}")
    add("--skip", type=_parts, default=(), help="all but these")
    add("--quick", action="store_true", help="smoke test: megabytes, one round; the figures mean nothing")
    add("--work", type=Path, help="folder for temporary checkpoints (default: the temporary folder)")
    add("--out", type=Path, default=Path("docs/benchmarks"), help="results and charts; the page is OUT.md")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(parse_size(word) for word in text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _parts(text: str) -> tuple[str, ...]:
    names = [part for word in text.split(",") for part in GROUPS.get(word, (word,))]
    if unknown := set(names) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}")
    return tuple(names)


def _typed(name: str, value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(_typed(name, item) for item in value)
    return format_size(value).replace(" ", "") if "size" in name and isinstance(value, int) else str(value)
