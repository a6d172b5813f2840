"""Where a checkpoint came from, as files record it; whether it is the same base, and why it does not fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from json.encoder import encode_basestring_ascii
from os import PathLike
from typing import Self

import xxhash

from ..errors import MismatchError
from ..neurons.quantized import quantization_reasons
from ..tensors.document import Fact, Facts, as_text
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorReader, neighbours
from .checkpoint import Checkpoint
from .name_prefixes import fitting_prefixes

_EDGE_BYTES = 4096
_EDGES_AT_ONCE = 1000  # tensors whose edges are fetched together from a URL
_READ_BYTES = 1 << 20  # of small neighbours, read at once
HASH_PREFIX = "xxh3-128:"
_WRAPPERS = re.compile(r"(?:^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)(?=\.)")
_UNWRAP = "save the model inside: `accelerator.unwrap_model(model).save_pretrained(OUT)`"
_MERGE = "merge it (`model.merge_and_unload().save_pretrained(OUT)`), or name the adapter's folder"
_DEQUANTIZE = "compare unquantized checkpoints, as `model.dequantize()` of transformers makes them"
_PATCH_BEFORE = "patch the checkpoint that it was made from, and quantize the result again"
_GATHER = (
    "have the trainer gather the weights (`stage3_gather_16bit_weights_on_model_save`), or join those of the "
    "training checkpoint: `python -m deepspeed.utils.zero_to_fp32 CHECKPOINT OUT --safe_serialization`"
)


def fingerprint(
    weights: TensorReader,
    change: Callable[[str, int, memoryview], None] | None = None,
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
    tensors = [(name, stored, weights.tensors[stored]) for name, stored in sorted(names.items())]
    state, edge, whole, kept = xxhash.xxh3_128(), _EDGE_BYTES, 2 * _EDGE_BYTES, 0
    nbytes = [info.nbytes for _, _, info in tensors]
    address = weights.address if isinstance(weights, Checkpoint) else lambda name: -1
    addresses = [address(stored) if info.nbytes <= whole else -1 for _, stored, info in tensors]
    for run in neighbours(nbytes, [addresses], _READ_BYTES):
        if run.start >= kept and isinstance(weights, Checkpoint):
            kept = run.start + _EDGES_AT_ONCE
            weights.keep_edges(
                [one for _, one, info in tensors[run.start : kept] if info.nbytes > whole], edge
            )
        some = tensors[run.start : run.stop]
        sizes = [min(size, whole) for size in nbytes[run.start : run.stop]]
        buffer, (_, first, info) = memoryview(bytearray(sum(sizes))), some[0]
        for start, part in _ends(info.nbytes, buffer) if len(some) == 1 else [(0, buffer)]:
            weights.read_into(first, start, part)
        text, done = list[bytes | memoryview](), 0
        for (name, _, info), size in zip(some, sizes, strict=True):
            view = buffer[done : done + size]
            done += size
            if change is not None:
                for start, part in _ends(info.nbytes, view):
                    change(name, start, part)
            shape = ",".join(map(str, info.shape))
            text.append(f'[{encode_basestring_ascii(name)},"{info.dtype}",[{shape}]]\n'.encode())
            text += (view, view) if size <= edge else (view[:edge], view[-edge:])
        state.update(b"".join(text))
    return HASH_PREFIX + state.hexdigest()


def _ends(nbytes: int, buffer: memoryview) -> list[tuple[int, memoryview]]:
    """Where the first and last bytes of a tensor are in it, and in the buffer of what is hashed of it."""
    if nbytes <= 2 * _EDGE_BYTES:
        return [(0, buffer)]
    return [(0, buffer[:_EDGE_BYTES]), (nbytes - _EDGE_BYTES, buffer[_EDGE_BYTES:])]


class Provenance(Facts):
    """The ``base`` or ``tuned`` of a file: what is known of the checkpoint it was made from."""

    name = Fact(as_text)  # of its file or folder
    repo = Fact(as_text)  # ``org/name`` on the Hub
    revision = Fact(as_text)  # of `repo`
    fingerprint = Fact(as_text)  # of its tensors

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
    """Raise a `MismatchError` about ``what`` unless the checkpoint has all ``tensors``, alike."""
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


def why_unlike(one: Checkpoint, other: Checkpoint) -> str | None:
    """Why two checkpoints that should be of one model have so little in common, and what helps."""
    for side, model in ((other, one), (one, other)):
        if why := _form(side, model.tensors, model.config):
            return f"{side.name} {why}"
    return None


def _form(
    side: Checkpoint, tensors: Mapping[str, TensorInfo], config: Mapping[str, object] | None = None
) -> str | None:
    """The form of ``side``, if a model with these ``tensors`` does not have it."""
    new = side.tensors.keys() - tensors.keys()
    if any(".lora_A." in name for name in new):
        return f"holds the factors of a LoRA adapter: {_MERGE}"
    if any(name.endswith((".exp_avg", ".exp_avg_sq")) for name in new):
        return "holds the state of an optimizer: name the weights"
    if wrapper := next((found[1] for name in new if (found := _WRAPPERS.search(name))), None):
        return f"was saved with a wrapper ({wrapper!r} in its names): {_UNWRAP}"
    if quantization_reasons(side.tensors, side.config) and not quantization_reasons(tensors, config):
        return f"is quantized: {_DEQUANTIZE}"
    return _shapes(tensors, side.tensors)


def why_unfit(needed: Mapping[str, TensorInfo], side: Checkpoint) -> str | None:
    """Why a checkpoint lacks tensors that something was made for, and what helps."""
    if prefixes := fitting_prefixes(side.tensors, needed):
        return f"its names have another prefix: `neftsurgery extract` makes a patch for it, with {prefixes}"
    if quantization_reasons(needed, None):
        return "the patch holds codes of quantized weights: it is only for the checkpoint it was made from"
    if quantization_reasons(side.tensors, side.config):
        return f"{side.name} is quantized: {_PATCH_BEFORE}"
    form = _form(side, needed)
    return f"{side.name} {form}" if form else None


def _shapes(expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]) -> str | None:
    """What the shapes of tensors say that have another one than ``expected``, and what helps."""
    unequal = [
        (info.shape, found[name].shape)
        for name, info in expected.items()
        if name in found and found[name].shape != info.shape
    ]
    empty = sum(0 in other and 0 not in shape for shape, other in unequal)
    if empty:
        return f"has {empty} tensors without elements, as DeepSpeed ZeRO-3 and FSDP leave them: {_GATHER}"
    ranks = Counter(count for shape, other in unequal if (count := _ranks(shape, other)))
    (count, times), *_ = ranks.most_common(1) or [(0, 0)]
    if times > 2 and 2 * times > len(unequal):
        return f"has 1/{count} of {times} tensors each, as one of {count} ranks has: join the ranks first"
    return None


def _ranks(whole: tuple[int, ...], part: tuple[int, ...]) -> int:
    """Among how many ranks one axis of ``whole`` was divided to give ``part``; 0 if it was not."""
    axes = [(a, b) for a, b in zip(whole, part, strict=False) if a != b]
    if len(whole) != len(part) or len(axes) != 1 or not 0 < axes[0][1] < axes[0][0]:
        return 0
    (size, share) = axes[0]
    count = round(size / share)
    return count if count > 1 and share in (size // count, -(-size // count)) else 0
