"""The submodels that a config describes, an image tower say: the family of each, its roles and its heads."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import takewhile
from typing import Any, Literal

from .families import SHARED, Attention, AxisOrder, Family, FeedForward, architectures, family_of

_TOWERS: dict[str, tuple[str, ...]] = {
    "vision_config": ("vision_tower", "vision_model", "visual"),
    "audio_config": ("audio_tower", "audio_model"),
    "text_config": ("language_model", "text_model"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
}
"""By nested config, the parts of a name that put a tensor under it, in models of every type."""

_QUERY_KEYS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_SIDES = ("encoder", "decoder")
_MOST_DEEP = 4  # configs in configs
NO_PATTERN = ("fused", "order", "tied")  # the fields of a block that name no tensor


@dataclass(frozen=True, slots=True)
class Role:
    """What a pattern of the family table says about the tensors it matches."""

    what: Literal["embedding", "output head", "router", "norm", "other", "weight"]  # only a weight counts
    order: AxisOrder
    block: FeedForward | Attention | None = None  # the block that the tensor is part of
    member: str = ""  # its field in the block
    depth: int = 0  # how many parts the pattern has
    # How many leading parts all patterns of the block share: tensors that agree in these, and in everything
    # before the pattern, form one block.
    container: int = 0


@functools.cache
def roles(family: Family) -> dict[tuple[str, ...], Role]:
    """All patterns of ``family``, split at the dots, with what they say."""
    found: dict[tuple[str, ...], Role] = {}
    for role, patterns in (
        (Role("embedding", "out in"), family.embeddings),
        (Role("output head", "out in"), family.heads),
        (Role("router", "out in"), family.routers),
        (Role("norm", "out in"), family.norms),
        (Role("other", "out in"), family.others),
        *((Role("weight", order), names) for order, names in family.weights.items()),
    ):
        found |= {tuple(pattern.split(".")): role for pattern in patterns.split()}
    for block in family.blocks:
        named = ((field.name, getattr(block, field.name)) for field in fields(block))
        members = {name: tuple(text.split(".")) for name, text in named if text and name not in NO_PATTERN}
        columns = zip(*(parts[:-1] for parts in members.values()), strict=False)
        shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
        for member, parts in members.items():
            found[parts] = Role("weight", block.order, block, member, len(parts), shared)
    return found


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, and the key/value heads they share: the latter divide the former."""

    query: int
    kv: int


@dataclass(frozen=True)
class Submodel:
    """A part of a model that one config describes."""

    model_type: str  # as stated by the config or by the composite it is part of; empty if neither does
    families: tuple[Family, ...]  # those whose patterns apply, the most specific first
    fully_known: bool  # whether a weight that no pattern matches is ``[out, in, ...]``
    config: Mapping[str, Any]  # where the numbers of heads are

    @functools.cached_property
    def _roles(self) -> dict[tuple[str, ...], Role]:
        shared = family_of(SHARED)
        found: dict[tuple[str, ...], Role] = {}
        for family in reversed((*self.families, *([shared] if shared else ()))):
            found |= roles(family)
        return found

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self._roles), default=0)

    def role(self, stem: Sequence[str]) -> Role | None:
        """The role of a name, given as its parts without ``weight``: see `tensor_names.name_pattern`."""
        general = (*stem[:-1], "*") if stem and stem[-1].isdecimal() else None
        for depth in range(min(len(stem), self._longest), 0, -1):
            role = self._roles.get(tuple(stem[-depth:]))
            if role is None and general:
                role = self._roles.get(general[-depth:])
            if role is not None:
                return role
        return None

    def heads(self, parts: Sequence[str]) -> Heads | None:
        """The heads of the attention block that holds a name, given as its parts; None if not known."""
        side = next((part for part in parts if part in _SIDES), None)
        own = () if side is None else (f"{side}_attention_heads",)
        default = architectures().head_counts.get(self.model_type, (0, None))
        query = self._count((*own, *_QUERY_KEYS), default[0])
        if query is None:
            return None
        absent = query if default[1] is None else default[1]
        kv = 1 if self._one_kv_head() else self._count(_KV_KEYS, absent, query)
        return Heads(query, kv) if kv is not None and query % kv == 0 else None

    def _count(self, keys: Sequence[str], absent: int, null: int | None = None) -> int | None:
        """The first of ``keys`` that the config has, if it is a number of heads."""
        value = next((self.config[key] for key in keys if key in self.config), absent)
        value = null if value is None else value
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def _one_kv_head(self) -> bool:
        return any(
            family.one_kv_head
            and bool(self.config.get(family.one_kv_head, True))
            and not (family.many_kv_heads and self.config.get(family.many_kv_heads))
            for family in self.families
        )


@dataclass(frozen=True)
class Submodels:
    """The submodels of a model, and of its parts in turn."""

    main: Submodel  # for tensors outside the towers
    towers: Mapping[str, Submodels]  # by a part of the name

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, implied: str = "", *, depth: int = _MOST_DEEP) -> Submodels:
        """The submodels of a ``config.json``, read leniently; ``implied``: the type if it states none."""
        config = config or {}
        whole = implied or _text(config.get("model_type"))
        parts = architectures().parts.get(whole, {})
        towers: dict[str, Submodels] = {}
        for key, section in config.items() if depth == _MOST_DEEP else ():
            if key.endswith("/") and isinstance(section, Mapping):  # a part of the folder
                towers[key] = cls.of(section, depth=depth - 1)
        text: Submodel | None = None
        for key in sorted({*_TOWERS, *parts}) if depth else ():
            part = parts.get(key)
            section = config.get(key)
            if section is None and part and part.model_type != whole:
                # Configs omit a part that equals the default; older ones hold the text's values at the top.
                section = config if key == "text_config" else {}
            if isinstance(section, Mapping):
                stated = _text(section.get("model_type"))
                # Older configs repeat the whole model's type in their nested ones.
                unstated = stated == whole or family_of(stated) is None
                tower = cls.of(section, part.model_type if part and unstated else stated, depth=depth - 1)
                towers |= dict.fromkeys((*(part.names if part else ()), *_TOWERS.get(key, ())), tower)
                if key == "text_config" and tower.main.families:
                    text = tower.main
        own = family_of(whole)
        main = Submodel(
            text.model_type if text else whole,
            tuple(dict.fromkeys(family for family in (*(text.families if text else ()), own) if family)),
            own is not None,
            text.config if text else config,
        )
        return cls(main, towers)

    @property
    def known(self) -> bool:
        """Whether a family is known for any part of the model."""
        return any(submodel.families for submodel in self.all)

    @property
    def all(self) -> tuple[Submodel, ...]:
        """The main part and the towers."""
        return (self.main, *(submodel for tower in self.towers.values() for submodel in tower.all))

    def of_name(self, parts: Sequence[str]) -> Submodel:
        """The submodel that a name, given as its parts, belongs to."""
        for index, part in enumerate(parts):
            if part in self.towers:
                return self.towers[part].of_name(parts[index + 1 :])
        return self.main


def split_part(name: str) -> tuple[str, str]:
    """The part of a checkpoint made of several models that a tensor is in, ``unet/``, and its name there."""
    start = name.rfind("/") + 1
    return name[:start], name[start:]


def part_config(config: Mapping[str, Any] | None, name: str) -> Mapping[str, Any] | None:
    """The config of the part that a tensor is in; of a checkpoint that has none, the whole one."""
    section = (config or {}).get(split_part(name)[0])
    return section if isinstance(section, Mapping) else config


def stated_type(config: Mapping[str, Any] | None) -> str:
    """The type that a config states: a model type, or as diffusers and timm name it; "" for none."""
    keys = ("model_type", "_class_name", "architecture")
    return next((found for key in keys if (found := _text((config or {}).get(key)))), "")


def _text(value: object) -> str:
    return value[:80] if isinstance(value, str) else ""
