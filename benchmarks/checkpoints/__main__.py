"""``python -m benchmarks.checkpoints FOLDER --size 2.4GB``: writes FOLDER/base and FOLDER/tuned."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.checkpoints.quantized import CONFIGS, write_quantized_pair
from benchmarks.checkpoints.shapes import deep_llama, llama, many_experts
from benchmarks.checkpoints.write import write_pair
from benchmarks.harness.sizes import parse_size


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=parse_size, default="2.4GB", help="bytes per side (default: 2.4GB)")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--sparse", action="store_true", help="sparse files: holes instead of most data")
    parser.add_argument("--width", type=int, default=64, help="rows and columns of an expert (default: 64)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--least-tensors", type=int, help="small layers, until there are at least this many tensors"
    )
    kind.add_argument("--experts", type=int, help="about this many matrices of --width; --size is ignored")
    kind.add_argument("--quantized", choices=CONFIGS, help="codes and scales instead of bf16")
    options = parser.parse_args()
    if options.quantized:
        write_quantized_pair(options.folder, options.quantized, options.size)
        return
    if options.experts:
        model = many_experts(options.experts, options.width)
    elif options.least_tensors:
        model = deep_llama(options.size, options.least_tensors)
    else:
        model = llama(options.size)
    write_pair(options.folder, model, options.shards, options.sparse)


if __name__ == "__main__":
    main()
