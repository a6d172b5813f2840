"""Copies every tensor with mergekit's reader and writer, and replaces rows on the way."""

from __future__ import annotations

from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tensor_writer import TensorWriter

from benchmarks.rivals.script import rows_of, sync, timed


def write(base: str, patch: str, out: str) -> None:
    rows = rows_of(patch)
    loader = LazyTensorLoader.from_disk(base)
    with TensorWriter(out) as writer:
        for name in loader.index.tensor_paths:
            tensor = loader.get_tensor(name)
            if name in rows:
                index, value = rows[name]
                tensor = tensor.clone()
                tensor[index] = value
            writer.save_tensor(name, tensor)
    sync(out)


def main() -> None:
    timed(write)


if __name__ == "__main__":
    main()
