"""Plain writes of one new file from a reused buffer, and fsync: the minimum work of a writer."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from benchmarks.harness.sizes import parse_size

BUFFER = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", type=parse_size, required=True)
    options = parser.parse_args()
    source = memoryview(os.urandom(BUFFER))
    began = time.perf_counter()
    with open(options.file, "wb", buffering=0) as stream:
        for offset in range(0, options.size, BUFFER):
            stream.write(source[: options.size - offset])
        os.fsync(stream.fileno())
    print(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
