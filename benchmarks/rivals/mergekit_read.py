"""Reads every tensor of both checkpoints into memory with mergekit's reader. Computes nothing.

The reader returns views of a mapped file. Each is copied once: otherwise nothing would be read.
"""

from __future__ import annotations

from mergekit.io.lazy_tensor_loader import LazyTensorLoader

from benchmarks.rivals.script import timed


def read(*folders: str) -> None:
    base, tuned = (LazyTensorLoader.from_disk(folder) for folder in folders)
    for name in base.index.tensor_paths:
        for loader in (base, tuned):
            loader.get_tensor(name).clone()


def main() -> None:
    timed(read)


if __name__ == "__main__":
    main()
