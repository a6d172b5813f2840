"""Tensor names under another prefix, as wrappers save them: how they are read, and which change fits."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from ..errors import MismatchError, UsageError
from ..tensors.header import TensorInfo

_SEPARATOR = re.compile(r"[./]")
_MOST_PARTS = 6  # of a prefix that is looked for
_MOST_PREFIXES = 8  # of names with one end


@dataclass(frozen=True, slots=True)
class Prefixes:
    """A change of names: ``strip`` is removed from the front of names, ``add`` put there.

    With both, the names that begin with ``strip`` begin with ``add`` afterwards. ``add`` alone is put before
    names that the base does not have as they are: a head often lies outside the prefix. Made by `of`.
    """

    strip: str = ""  # ends in a dot, or in the slash of a part, as ``add``; "" for none
    add: str = ""

    @classmethod
    def of(cls, strip_prefix: str | None = None, add_prefix: str | None = None) -> Prefixes:
        """A change as the options of that name say it; a prefix may be given without its dot."""
        for name, prefix in (("strip_prefix", strip_prefix), ("add_prefix", add_prefix)):
            if prefix is not None and not prefix.strip("."):
                raise UsageError(f"[[{name}]] is empty", hint="name the first parts of names, as in 'model.'")
        return cls(*(_ended(prefix) if prefix else "" for prefix in (strip_prefix, add_prefix)))

    def __bool__(self) -> bool:
        return bool(self.strip or self.add)

    def __str__(self) -> str:
        """The options, for a message."""
        return " ".join(f"[[{name}={prefix}]]" for name, prefix in self.to_json().items())

    def to_json(self) -> dict[str, object]:
        """The options that were given."""
        return {k: v for k, v in (("strip_prefix", self.strip), ("add_prefix", self.add)) if v}

    def changed(self, names: Collection[str], base: Collection[str], where: str) -> dict[str, str]:
        """The new name of each of ``names``; refused for ``where`` if none changes, or two become one."""
        new = {name: self._changed(name, base) for name in names}
        if all(name == other for name, other in new.items()):
            first = Counter(f"{name.partition('.')[0]}." for name in names)
            raise UsageError(
                f"no name of a tensor changes by {self}",
                file=where,
                found=f"names that begin with {', '.join(prefix[:80] for prefix, _ in first.most_common(3))}",
                hint="see [[strip_prefix]] and [[add_prefix]]",
            )
        if len(set(new.values())) < len(new):
            (twice, _), *_ = Counter(new.values()).most_common(1)
            both = [name for name, other in new.items() if other == twice][:2]
            raise MismatchError(
                f"by {self} two tensors have one name", file=where, tensor=twice, found=" and ".join(both)
            )
        return new

    def _changed(self, name: str, base: Collection[str]) -> str:
        if self.strip:
            return self.add + name[len(self.strip) :] if name.startswith(self.strip) else name
        return name if name in base else self.add + name


def _ended(prefix: str) -> str:
    return prefix if prefix.endswith("/") else f"{prefix.rstrip('.')}."


NO_CHANGE = Prefixes()


def fitting_prefixes(base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo]) -> Prefixes | None:
    """The change that gives clearly more of ``tuned``'s names a tensor of ``base`` of their shape, if any."""
    common = len(base.keys() & tuned.keys())
    if 2 * common >= len(tuned):
        return None
    ends: defaultdict[str, list[str]] = defaultdict(list)
    for name in base:
        for prefix, rest in _splits(name):
            if len(ends[rest]) < _MOST_PREFIXES:  # names are not to be trusted: "weight" may end all of them
                ends[rest].append(prefix)
    votes: Counter[tuple[str, str]] = Counter()
    for name, info in tuned.items():
        for strip, rest in _splits(name) if name not in base else ():
            fits = [add for add in ends.get(rest, ()) if base[add + rest].shape == info.shape]
            votes.update((strip, add) for add in fits)
            if fits:
                break
    (best, count), *_ = votes.most_common(1) or [(("", ""), 0)]
    enough = count > max(common, 1) and 4 * count >= min(len(base), len(tuned))
    return Prefixes(*best) if enough and len("".join(best)) < 200 and "".join(best).isprintable() else None


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """A name without its first word (a part is one), two, and so on, up to the number of a layer."""
    start = 0
    for count in range(_MOST_PARTS + 1):
        yield name[:start], name[start:]
        end = _SEPARATOR.search(name, start)
        if end is None or (count and name[start : end.start()].isdecimal()):
            return
        start = end.end()
