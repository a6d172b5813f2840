"""`ns.diff` in a process of its own: a library reads by position, where the command line maps files."""

from __future__ import annotations

import json
import sys

import neftsurgery as ns


def main() -> None:
    base, tuned, *threads = sys.argv[1:]
    with ns.diff(base, tuned, threads=int(threads[0]) if threads else None) as scores:
        print(json.dumps({"seconds": scores.timing.seconds, "neurons": scores.neurons}))


if __name__ == "__main__":
    main()
