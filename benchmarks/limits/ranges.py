"""Plain parallel reads of the weight files behind URLs by ranges, with the client that `diff` uses."""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

from benchmarks.harness.sizes import parse_size
from neftsurgery.sources.places import find_place
from neftsurgery.sources.web_file import RangedFile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--names", nargs="+", help="the files below each URL")
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--buffer", type=parse_size, required=True)
    options = parser.parse_args()
    places = [find_place(url) for url in options.urls]
    files = [place.file(name) for name in options.names for place in places]
    with ThreadPoolExecutor(options.in_flight) as threads:
        list(threads.map(lambda file: list(file.read(0, 8)), files))  # sizes and versions
    began = time.perf_counter()
    buffer = options.buffer
    sides = [[(file, start) for start in range(0, file.nbytes, buffer)] for file in files]
    parts = [one for together in zip_longest(*sides) for one in together if one]

    def read(part: tuple[RangedFile, int]) -> int:
        file, start = part
        into, done = memoryview(bytearray(min(buffer, file.nbytes - start))), 0
        for chunk in file.read(start, start + len(into)):
            into[done : done + len(chunk)] = chunk
            done += len(chunk)
        return done

    with ThreadPoolExecutor(options.in_flight) as threads:
        total = sum(threads.map(read, parts))
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "bytes_read": total, "buffer": buffer}))


if __name__ == "__main__":
    main()
