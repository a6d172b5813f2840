"""Copies every tensor with mergekit's reader and writer, and replaces rows on the way."""

from __future__ import annotations

import argparse
import json
import time

from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tensor_writer import TensorWriter

from benchmarks.rivals.patching import rows_of, sync


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("patch")
    parser.add_argument("out")
    options = parser.parse_args()
    began = time.perf_counter()
    rows = rows_of(options.patch)
    loader = LazyTensorLoader.from_disk(options.base)
    with TensorWriter(options.out) as writer:
        for name in loader.index.tensor_paths:
            tensor = loader.get_tensor(name)
            if name in rows:
                index, value = rows[name]
                tensor = tensor.clone()
                tensor[index] = value
            writer.save_tensor(name, tensor)
    sync(options.out)
    print(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
