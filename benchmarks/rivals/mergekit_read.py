"""Reads every tensor of both checkpoints into memory with mergekit's reader. Computes nothing.

The reader returns views of a mapped file. Each is copied once: otherwise nothing would be read.
"""

from __future__ import annotations

import argparse
import json
import time

from mergekit.io.lazy_tensor_loader import LazyTensorLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("tuned")
    options = parser.parse_args()
    began = time.perf_counter()
    base, tuned = (LazyTensorLoader.from_disk(folder) for folder in (options.base, options.tuned))
    for name in base.index.tensor_paths:
        for loader in (base, tuned):
            loader.get_tensor(name).clone()
    print(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
