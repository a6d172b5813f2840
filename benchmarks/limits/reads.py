"""Plain parallel reads of all files of some folders into reused buffers: the minimum work of a reader."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import threading
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from benchmarks.harness.sizes import parse_size

Piece = tuple[int, int]  # file descriptor, offset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--buffer", type=parse_size, required=True)
    parser.add_argument(
        "--head", type=parse_size, default="1TB", help="read only this many bytes of each folder"
    )
    options = parser.parse_args()
    began = time.perf_counter()
    pieces = list(_interleaved([_pieces(folder, options.buffer, options.head) for folder in options.folders]))
    total = _read(pieces, options.threads, options.buffer)
    seconds = time.perf_counter() - began
    facts = {"threads": options.threads, "buffer": options.buffer, "bytes_read": total}
    print(json.dumps({"seconds": seconds, **facts}))


def _pieces(folder: Path, buffer: int, head: int) -> Iterator[Piece]:
    for file in sorted(folder.glob("*.safetensors")):
        length = min(file.stat().st_size, head)
        fd = os.open(file, os.O_RDONLY)  # closed by the end of the process
        yield from ((fd, offset) for offset in range(0, length, buffer))
        head -= length
        if not head:
            return


def _interleaved(sides: list[Iterator[Piece]]) -> Iterator[Piece]:
    """The sides in turns, as a comparison must read them."""
    return (piece for together in zip_longest(*sides) for piece in together if piece)


def _read(pieces: list[Piece], threads: int, buffer: int) -> int:
    """Each thread takes the next piece. Taking one from a shared iterator is atomic."""
    todo = iter(pieces)
    totals = []

    def work() -> None:
        room = [mmap.mmap(-1, buffer)]
        totals.append(sum(os.preadv(fd, room, offset) for fd, offset in todo))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(totals)


if __name__ == "__main__":
    main()
