"""The part about checkpoints behind URLs: servers on this machine, which share its processor."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from typing import Any

from benchmarks.files.contestants import neftsurgery, script
from benchmarks.files.fixtures import CheckpointPair, Fixtures
from benchmarks.files.options import Options
from benchmarks.harness.servers import served, stored
from benchmarks.harness.side_by_side import Contestant, run_group
from benchmarks.harness.sizes import format_size, parse_size

SETTINGS = tuple(product((4, 24), (4 << 20,)))  # ranges in flight, and their bytes
S3_SIZE, S3_SHARD = parse_size("200MB"), parse_size("25MB")  # moto reads a whole object for each range


def remote(fixtures: Fixtures, options: Options) -> dict[str, Any]:
    """diff of two URLs beside plain range reads of the same client."""
    groups = list[dict[str, Any]]()
    pair = fixtures.pair(options.remote_size)
    with served(pair.folder) as url:
        groups.append(_group(pair, url, "over HTTP", options))
    if find_spec("moto") and find_spec("s3fs"):
        nbytes = min(S3_SIZE, options.remote_size)
        pair = fixtures.pair(nbytes, "--shards", -(-nbytes // S3_SHARD))
        with stored(pair.folder) as url:
            groups.append(_group(pair, url, "from moto's S3 server, through s3fs", options))
    return {"title": "diff of checkpoints behind URLs, on loopback", "groups": groups}


def _group(pair: CheckpointPair, url: str, where: str, options: Options) -> dict[str, Any]:
    urls = [f"{url}/{side.name}" for side in (pair.base, pair.tuned)]
    label = f"2 x {format_size(pair.nbytes / 2)} {where}"
    return run_group(label, pair.nbytes, _contestants(pair, urls), options.few)


def _contestants(pair: CheckpointPair, urls: list[str]) -> Iterator[Contestant]:
    yield Contestant("neftsurgery diff", "ours", neftsurgery("diff", *urls), pair.warm)
    names = sorted(path.name for path in pair.base.glob("*.safetensors"))
    for flying, buffer in SETTINGS:
        words = ("--names", *names, "--in-flight", flying, "--buffer", buffer)
        name = f"plain range reads, {flying} x {buffer >> 20} MiB"
        yield Contestant(name, "limit", script("limits.ranges", *urls, *words), pair.warm)
