"""Tied tensors: several names of a model for one tensor, of which its files hold one, or equal copies.

As transformers loads them (``_tied_weights_keys``): if the config ties the names, one that the files lack is
the other, and two are one if they are equal. ``safetensors.torch.save_model`` says in a file's metadata under
which name it kept a tensor. Where a config says nothing, the files decide.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, chain, islice, product
from typing import Any

from ..neurons.submodels import part_config, split_part
from ..tensors.header import TensorInfo
from ..text import label, natural_key
from .checkpoint import Checkpoint
from .provenance import same_tensor

_FIRST = 64 << 10  # bytes that tell most tensors apart
_PIECE = 4 << 20
_HEAD = "lm_head.weight"  # what most models call their output head
_MOST_TIES, _MOST_FORMS = 4, 64  # that `tied_forms` tries
_LONGEST_NAME = 300
# Ends of names without ``.weight``; ``^`` is the start of a name.
_HEAD_ENDS = """lm_head lm_head.decoder lm_head.out_proj generator_lm_head cls.predictions.decoder
predictions.decoder entity_predictions.decoder mlm_score.decoder lm_loss vocab_projector pred_layer.proj
proj_out head.decoder output_projection embed_out ^.decoder ^.head ^.output"""
_SHARED_ENDS = """shared word_embeddings encoder.embed_tokens decoder.embed_tokens encoder.word_embeddings
decoder.word_embeddings text_encoder.embed_tokens text_decoder.embed_tokens"""
_OTHER_ENDS = """embed_tokens embed_tokens.embed_tokens wte w word_embedding tok_embeddings tokens_embed
embed_in entity_embeddings embeddings"""
_HEADS, _SHARED = frozenset(_HEAD_ENDS.split()), frozenset(_SHARED_ENDS.split())
_EMBEDDINGS = _SHARED.union(_OTHER_ENDS.split())
_LAST = frozenset(end.rpartition(".")[2] for end in (*_HEADS, *_EMBEDDINGS))
_LAYER_HEAD = re.compile(r"^(?:model\.decoder\.)?((?:class|bbox)_embed)\.\d+\.")


@dataclass(frozen=True, slots=True)
class Joined:
    """A base and a tuned model, whose tensors are found under the names of the base."""

    tuned: Checkpoint
    copies: Mapping[str, str]  # tensors of the base that are another one of it, on both sides; and that one
    untied: Mapping[str, str]  # tensors of the base that are another one of it, but not in the tuned model
    only_base: tuple[str, ...]
    only_tuned: tuple[str, ...]
    notes: tuple[str, ...]  # where config and files disagree


def join(base: Checkpoint, tuned: Checkpoint) -> Joined:
    """Find out which tensors are one. Reads those of one side that may be equal, until they differ."""
    sides = (_Ties.of(base), _Ties.of(tuned))
    aliases, copies, untied = dict[str, str](), dict[str, str](), dict[str, str]()
    settled, notes = set[str](), list[str]()
    for group in _groups(sides, {**base.tensors, **tuned.tensors}):
        here, there = (side.stored(group) for side in sides)
        a = sides[0].meaning(group, here, there)
        b = sides[1].meaning(group, there, here)
        notes += [*sides[0].notes(group, here), *sides[1].notes(group, there)]
        first: dict[tuple[str, str], str] = {}
        for name in sorted(group, key=lambda name: name not in here):  # else embeddings first
            if name not in a or name not in b:
                continue
            one = first.setdefault((a[name], b[name]), name)
            if name not in here:
                settled |= {name} if one in here else set()
            elif one != name:
                copies[name] = one
            else:
                aliases |= {name: b[name]} if name not in there else {}
                untied |= {name: a[name]} if a[name] != name else {}
    seen = tuned.under(aliases)
    for name, one in untied.items():
        notes.append(
            f"{tuned.name} has {label(name)} apart from {label(one)}: in {base.name} they are one tensor"
        )
    only_base = base.tensors.keys() - tuned.tensors.keys() - aliases.keys() - copies.keys()
    only_tuned = tuned.tensors.keys() - base.tensors.keys() - settled
    base_alone, tuned_alone = (tuple(sorted(names, key=natural_key)) for names in (only_base, only_tuned))
    return Joined(seen, copies, untied, base_alone, tuned_alone, tuple(notes))


def with_tied_names(checkpoint: Checkpoint, wanted: Iterable[TensorInfo]) -> Checkpoint:
    """The checkpoint; those of ``wanted`` that it holds under a tied name are found under their own, too."""
    absent = {info.name: info for info in wanted if info.name not in checkpoint.tensors}
    aliases: dict[str, str] = {}
    if absent:
        side = _Ties.of(checkpoint)
        for group in _groups((side,), {**checkpoint.tensors, **absent}):
            meaning = side.meaning(group, side.stored(group), {})
            aliases |= {name: meaning[name] for name in group if name in absent and name in meaning}
    return checkpoint.under(aliases)


def stored_ties(
    checkpoint: Checkpoint, about: Iterable[str] | None = None
) -> tuple[dict[str, list[str]], list[str]]:
    """By stored tensor of a tie, all that are one with it, embeddings first. And notes, as `Joined` has them.

    Only of tensors that may be tied to one of ``about``. Reads them.
    """
    side, wanted = _Ties.of(checkpoint), None if about is None else set(about)
    same, notes = dict[str, list[str]](), list[str]()
    for group in _groups((side,), checkpoint.tensors):
        if wanted is None or not wanted.isdisjoint(group):
            stored = side.stored(group)
            notes += side.notes(group, stored)
            for name, home in stored.items():
                same[name] = same.setdefault(home, [])
                same[name].append(name)
    return {name: names for name, names in same.items() if len(names) > 1}, notes


def tied_forms(checkpoint: Checkpoint) -> tuple[list[dict[str, str]], dict[str, list[str]]]:
    """How files may hold the tied tensors of this model: the stored one by each name, in each form.

    Its own form is the first; then they may be there under all of their names, or any one. And by name, all
    that are tied to it. Of odd models with many ties, only a few forms.
    """
    side, infos = _Ties.of(checkpoint), dict(checkpoint.tensors)
    infos |= {name: infos[one] for name, one in side.saved.items()}
    for group in tie_groups([*infos, _HEAD]):
        if _HEAD in group and group[0] in infos:
            infos.setdefault(_HEAD, infos[group[0]])
    choices, tied = list[list[dict[str, str]]](), dict[str, list[str]]()
    for group in islice(_groups((side,), infos), _MOST_TIES):
        stored = side.stored(group)
        if len(homes := set(stored.values())) == 1:
            tied |= dict.fromkeys(group, group)
            held = [stored, group, *([name] for name in group[:_MOST_TIES])]
            choices.append([dict.fromkeys(names, *homes) for names in held])
    return [dict(chain(*map(dict.items, one))) for one in islice(product(*choices), _MOST_FORMS)], tied


def missing_tensors(side: Checkpoint) -> list[str]:
    """The tensors that an index lists and no file has, without those that are tied to one that is there."""
    absent = set(side.absent)
    ties = _Ties.of(side)
    for group in tie_groups([*side.tensors, *absent], ties.saved.items()) if absent else ():
        absent -= ties.meaning(group, {name: name for name in group if name in side.tensors}, {}).keys()
    return sorted(absent)


@dataclass(frozen=True, slots=True)
class _Ties:
    """What the config and the metadata of one model say, and what is equal in its files."""

    side: Checkpoint
    saved: Mapping[str, str]  # by a name that was not saved, the one that was

    @classmethod
    def of(cls, side: Checkpoint) -> _Ties:
        shards = ((shard.part, shard.header.metadata) for shard in side.shards)
        pairs = [(part + a, part + b) for part, metadata in shards for a, b in metadata.items()]
        return cls(side, {a: b for a, b in pairs if a not in side.tensors and b in side.tensors})

    def stated(self, group: Iterable[str]) -> bool | None:
        """Whether the config ties the head of ``group`` to its embeddings; None: it does not say."""
        return stated_tie(part_config(self.side.config, next(iter(group), "")))

    def stored(self, group: Iterable[str]) -> dict[str, str]:
        """The tensors of ``group`` that the files hold; each with the first that is the same."""
        tensors = self.side.tensors
        names = [name for name in group if name in tensors and tensors[name].name == name]
        equal = _equal_tensors(self.side, names)
        apart = self.stated(names) is False
        homes: dict[tuple[str, bool], str] = {}
        return {name: homes.setdefault((equal[name], apart and is_head(name)), name) for name in names}

    def meaning(
        self, group: Iterable[str], stored: Mapping[str, str], other: Mapping[str, str]
    ) -> dict[str, str]:
        """By name, the stored tensor that it is, if that is known; ``other``: what the other side holds."""
        found = dict(stored)
        # If nothing is stated, a head that is not an embedding on the other side tells against a tie.
        stated = self.stated(group)
        tied = stated is True or (stated is None and len(set(other.values())) < 2)
        kinds = {head: {stored[one] for one in stored if is_head(one) == head} for head in (False, True)}
        for name in group:
            likely = kinds[is_head(name)] or (kinds[not is_head(name)] if tied else set())
            if name not in found and self.saved.get(name) in stored:
                found[name] = stored[self.saved[name]]
            elif name not in found and len(likely) == 1:
                found[name] = next(iter(likely))
        return found

    def notes(self, group: Iterable[str], stored: Mapping[str, str]) -> Iterator[str]:
        """Where config and files disagree about the head and an embedding of ``group``."""
        embedding = next((name for name in stored if not is_head(name)), None)
        head = next((name for name in group if is_head(name)), None)
        stated = self.stated(group)
        if stated is None or embedding is None or head is None:
            return
        tied, config = "tied" if stated else "not tied", f"{split_part(head)[0]}config.json"
        said = f"{self.side.name}: {config} says that {label(head)} is {tied} to {label(embedding)}"
        if stated and head in stored and stored[head] != stored[embedding]:
            yield f"{said}, but the two differ in the files: they count as two tensors"
        elif not stated and head not in stored:
            yield f"{said}, but the files hold only the latter"
        elif not stated and len(set(_equal_tensors(self.side, [embedding, head]).values())) == 1:
            yield f"{said}, but the two are equal in the files: they count as two tensors"


def _groups(sides: Iterable[_Ties], tensors: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    """Names that may be one tensor, all of one shape and dtype."""
    known = [pair for side in sides for pair in side.saved.items()]
    for group in tie_groups(tensors, known):
        kinds: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for name in group:
            info = tensors.get(name)
            if info is not None and all(same_tensor(info, s.side.tensors.get(name, info)) for s in sides):
                kinds.setdefault((info.dtype, info.shape), []).append(name)
        yield from (names for names in kinds.values() if len(names) > 1)


def _equal_tensors(side: Checkpoint, names: Collection[str]) -> dict[str, str]:
    """By name, a text that is the same for tensors with the same bytes."""
    if len(names) < 2:
        return dict(zip(names, names, strict=True))
    found = {name: _digest(side, name, _FIRST) for name in names}
    count = Counter(found.values())
    alike = [name for name in names if count[found[name]] > 1]
    return found | {name: _digest(side, name, side.tensors[name].nbytes) for name in alike}


def _digest(side: Checkpoint, name: str, most: int) -> str:
    state, size = hashlib.blake2b(), min(most, side.tensors[name].nbytes)
    for start in range(0, size, _PIECE):
        buffer = bytearray(min(_PIECE, size - start))
        side.read_into(name, start, memoryview(buffer))
        state.update(buffer)
    return state.hexdigest()


def is_head(name: str) -> bool:
    """Whether ``name`` is that of an output head, which a model may tie to an embedding."""
    return _prefix(name, _HEADS) is not None


def stated_tie(config: Mapping[str, Any] | None) -> bool | None:
    """Whether a ``config.json`` says that the output head is tied to the embedding; None: it does not say."""
    sections = [config or {}, (config or {}).get("text_config"), (config or {}).get("decoder")]
    stated = [one.get("tie_word_embeddings") for one in sections if isinstance(one, Mapping)]
    return True if True in stated else False if False in stated else None


def tie_groups(names: Iterable[str], known: Iterable[tuple[str, str]] = ()) -> list[list[str]]:
    """Those of ``names`` that may be one tensor, by group, embeddings first; ``known`` pairs are one."""
    above: dict[str, str] = {}  # a forest: the names of a tree are a group

    def root(key: str) -> str:
        while (up := above.setdefault(key, key)) != key:
            above[key] = above[up]
            key = up
        return key

    heads: dict[str, str] = {}
    embeddings: list[str] = []
    for name in names:
        if (prefix := _prefix(name, _HEADS)) is not None:
            above[root(name)] = root(heads.setdefault(prefix, name))
        elif _prefix(name, _EMBEDDINGS) is not None:
            embeddings.append(name)
            if (prefix := _prefix(name, _SHARED)) is not None:
                above[root(name)] = root(f"\0{prefix}")
        elif name.endswith(".decoder.bias"):
            above[root(name)] = root(name.removesuffix(".decoder.bias") + ".bias")
        elif "_embed." in name and _LAYER_HEAD.match(name):
            above[root(name)] = root("\0" + _LAYER_HEAD.sub(r"\1.", name))
    for name in embeddings:
        part, rest = split_part(name)
        starts = accumulate(rest.split("."), "{}.{}".format, initial=f"{part}^")
        for prefix in heads.keys() & set(starts):
            above[root(heads[prefix])] = root(name)
    for one, other in known:
        above[root(one)] = root(other)
    found: dict[str, list[str]] = {}
    for name in sorted(above, key=lambda name: (is_head(name), name)):
        if not name.startswith("\0"):
            found.setdefault(root(name), []).append(name)
    return [group for group in found.values() if len(group) > 1]


def _prefix(name: str, ends: Collection[str]) -> str | None:
    """What is before the end of ``name`` that is one of ``ends``; None if it has no such end."""
    last = name[name.rfind(".", 0, -7) + 1 : -7].rpartition("/")[2]
    if last not in _LAST or not name.endswith(".weight") or len(name) > _LONGEST_NAME:
        return None
    part, rest = split_part(name)
    parts = ["^", *rest.split(".")[:-1]]
    for count in (3, 2, 1):
        if ".".join(parts[-count:]) in ends:
            return part + (".".join(parts[:-count]) or "^")
    return None
