"""Where a checkpoint came from, as scores, selections and patches record it. The same base? Does it fit?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from json.encoder import encode_basestring_ascii
from os import PathLike
from typing import Self

import xxhash

from ..errors import MismatchError
from ..tensors.document import Facts, TextFact
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorReader
from .checkpoint import Checkpoint
from .saved_forms import why_unfit

_EDGE_BYTES = 4096
_EDGES_AT_ONCE = 1000  # tensors whose edges are fetched together from a URL
HASH_PREFIX = "xxh3-128:"


def fingerprint(
    weights: TensorReader,
    change: Callable[[str, int, memoryview], None] = lambda name, start, part: None,
    tied: Collection[str] = (),
    names: Mapping[str, str] | None = None,
) -> str:
    """XXH3-128 over every tensor, in code-point order of names: dtype, shape, first and last 4096 bytes.

    Of each, the hash takes in the JSON text ``[name, dtype, [shape]]`` (ASCII, no spaces), a newline, the
    first ``min(4096, n)`` and the last ``min(4096, n)`` of its ``n`` bytes. ``change`` may alter what was
    read: bytes of a tensor, given its name, from a byte of it. Instead of tensors that are ``tied``, those
    of ``names`` count: by the name that counts, the one in the files.
    """
    own = {n: n for n, info in weights.tensors.items() if info.name == n and n not in tied}
    names = {**own, **(names or {})}

    def read(name: str, start: int, part: memoryview) -> None:
        weights.read_into(names[name], start, part)
        change(name, start, part)

    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(2 * _EDGE_BYTES))
    for number, name in enumerate(ordered := sorted(names)):
        if number % _EDGES_AT_ONCE == 0 and isinstance(weights, Checkpoint):
            weights.keep_edges((names[n] for n in ordered[number:][:_EDGES_AT_ONCE]), _EDGE_BYTES)
        info = weights.tensors[names[name]]
        shape = ",".join(map(str, info.shape))
        state.update(f'[{encode_basestring_ascii(name)},"{info.dtype}",[{shape}]]\n'.encode())
        edge = min(_EDGE_BYTES, info.nbytes)
        if info.nbytes <= len(buffer):
            view = buffer[: info.nbytes]
            read(name, 0, view)
        else:
            view = buffer
            read(name, 0, view[:edge])
            read(name, info.nbytes - edge, view[edge:])
        state.update(view[:edge])
        state.update(view[len(view) - edge :])
    return HASH_PREFIX + state.hexdigest()


class Provenance(Facts):
    """The ``base`` or ``tuned`` of a file: what is known of the checkpoint it was made from."""

    name = TextFact()  # of its file or folder
    repo = TextFact()  # ``org/name`` on the Hub
    revision = TextFact()  # of `repo`
    fingerprint = TextFact()  # of its tensors

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Of a checkpoint that is at hand; reads the edges of its tensors."""
        source = checkpoint.source
        known: dict[str, object] = {"name": source.local_name}
        if source.repo is not None:
            known |= {"repo": source.repo, "revision": source.revision}
        if checkpoint.original is not None:
            known |= checkpoint.prefixes.to_json() if checkpoint.prefixes else {}
            checkpoint = checkpoint.original  # its fingerprint is of the names in its files
        return cls({**known, "fingerprint": fingerprint(checkpoint)})

    @property
    def label(self) -> str | None:
        """What to call it in a sentence: the repository, or else the name."""
        return self.repo or self.name or None


def same_tensor(a: TensorInfo | None, b: TensorInfo | None) -> bool:
    """Whether both are there, with the same shape and dtype."""
    return a is not None and b is not None and (a.dtype, a.shape) == (b.dtype, b.shape)


def require_tensors(
    checkpoint: Checkpoint, tensors: Iterable[TensorInfo], what: str, made_from: Provenance | None = None
) -> None:
    """Raise a `MismatchError` unless the checkpoint has all ``tensors``, with their shapes and dtypes.

    For the message: ``what`` they belong to, and the checkpoint that this was made from.
    """
    needed = {info.name: info for info in tensors}
    for info in needed.values():
        found = checkpoint.tensors.get(info.name)
        if not same_tensor(info, found):
            label = None if made_from is None else made_from.label
            hint = None if label is None else f"it was made from {label}"
            raise MismatchError(
                f"{what} is not for this checkpoint",
                file=checkpoint.name,
                tensor=info.name,
                expected=info.describe(),
                found=found.describe() if found else "no such tensor",
                hint=why_unfit(needed, checkpoint) or hint,
            )


def same_files(one: Provenance, other: Provenance) -> bool | None:
    """Whether both have the same fingerprint; None if one has none."""
    a, b = one.get("fingerprint"), other.get("fingerprint")
    return None if a is None or b is None else a == b


def require_same_files(
    what: str,
    expected: Provenance,
    found: Provenance,
    *,
    file: str | PathLike[str] | None = None,
    hint: str | None = None,
) -> None:
    """Raise a `MismatchError` that says ``what`` if the two have different fingerprints."""
    if same_files(expected, found) is False:
        raise MismatchError(
            what,
            file=file,
            expected=f"fingerprint {expected['fingerprint']}",
            found=found["fingerprint"],
            hint=hint,
        )
