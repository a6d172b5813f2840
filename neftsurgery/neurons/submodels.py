"""The submodels that a config describes, an image tower say: the family of each, its roles and its heads."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import takewhile
from typing import Any, Literal

from .families import EMBEDDINGS, FAMILIES, HEADS, Attention, AxisOrder, Family, FeedForward

__all__ = ["COMPOSITES", "DEFAULT_HEADS", "TOWERS", "Heads", "Role", "Submodel", "Submodels"]

TOWERS: dict[str, tuple[str, ...]] = {
    "vision_config": ("vision_tower", "vision_model", "visual"),
    "audio_config": ("audio_tower", "audio_model"),
    "text_config": ("language_model", "text_model"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
}
"""By nested config, the parts of a name that put a tensor under it."""

COMPOSITES: dict[str, dict[str, str]] = {
    "clip": {"text_config": "clip_text_model", "vision_config": "clip_vision_model"},
    "siglip": {"text_config": "siglip_text_model", "vision_config": "siglip_vision_model"},
    "gemma3": {"text_config": "gemma3_text", "vision_config": "siglip_vision_model"},
    "llava": {"text_config": "llama", "vision_config": "clip_vision_model"},
    "qwen2_vl": {"text_config": "qwen2_vl_text", "vision_config": "qwen2_vl_vision"},
    "qwen2_5_vl": {"text_config": "qwen2_5_vl_text", "vision_config": "qwen2_5_vl_vision"},
    "llama4": {"text_config": "llama4_text", "vision_config": "llama4_vision_model"},
    "mistral3": {"text_config": "mistral", "vision_config": "pixtral"},
    "qwen3_vl": {"text_config": "qwen3_vl_text", "vision_config": "qwen3_vl_vision"},
    "qwen3_vl_moe": {"text_config": "qwen3_vl_moe_text", "vision_config": "qwen3_vl_moe_vision"},
}
"""The model types of nested configs that do not state their own, or state that of the whole model."""


_HEAD_COUNTS: tuple[tuple[str, int, int | None], ...] = (
    ("electra", 4, None),
    ("mt5 umt5", 6, None),
    ("whisper", 6, 6),
    ("bloom t5 clip_text_model", 8, None),
    ("gemma2 gemma3_text vaultgemma", 8, 4),
    ("gpt2 gpt_bigcode opt bert roberta xlm-roberta camembert distilbert modernbert vit deit", 12, None),
    ("dinov2 dinov2_with_registers clip_vision_model siglip_text_model siglip_vision_model", 12, None),
    ("olmoe gpt_neo gptj codegen mpt biogpt bart mbart marian pegasus m2m_100", 16, None),
    ("qwen2_vl_vision qwen2_5_vl_vision qwen3_vl_vision qwen3_vl_moe_vision pixtral", 16, None),
    ("llama4_vision_model", 16, None),
    ("ernie4_5", 16, 2),
    ("smollm3", 16, 4),
    ("gemma qwen2_moe qwen3_vl_moe_text", 16, 16),
    ("helium", 20, 20),
    ("deberta-v2", 24, None),
    ("starcoder2", 24, 2),
    ("llama olmo olmo2 olmo3 granite hunyuan_v1_dense arcee apertus phi phi3 flex_olmo", 32, None),
    ("deepseek_v2 granitemoe blenderbot", 32, None),
    ("glm glm4", 32, 2),
    ("qwen3_moe", 32, 4),
    ("mistral ministral mixtral phimoe", 32, 8),
    ("qwen2 qwen3 stablelm exaone4 qwen3_vl_text dots1", 32, 32),
    ("llama4_text", 40, 8),
    ("nemotron", 48, None),
    ("cohere cohere2 gpt_neox persimmon albert", 64, None),
    ("qwen2_vl_text qwen2_5_vl_text gpt_oss", 64, 8),
    ("falcon", 71, None),
    ("seed_oss", 80, 8),
    ("glm4_moe", 96, 8),
    ("deepseek_v3", 128, 128),
)
DEFAULT_HEADS: dict[str, tuple[int, int | None]] = {
    name: (heads, kv_heads) for names, heads, kv_heads in _HEAD_COUNTS for name in names.split()
}
"""By model type, the query and key/value heads (None: as many) of a config that omits them.

Nested configs are written without values that equal the defaults of their class.
"""

_QUERY_KEYS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_SIDES = ("encoder", "decoder")
_LONGEST_PATTERN = 5
_NO_PATTERN = ("fused", "order")  # the fields of a block that name no tensor


@dataclass(frozen=True, slots=True)
class Role:
    """What a pattern of the family table says about the tensors it matches."""

    what: Literal["embedding", "output head", "router", "weight"]  # only a weight counts
    order: AxisOrder
    block: FeedForward | Attention | None = None  # the block that the tensor is part of
    member: str = ""  # its field in the block
    depth: int = 0  # how many parts the pattern has
    # How many leading parts all patterns of the block share: tensors that agree in these, and in everything
    # before the pattern, form one block.
    container: int = 0


@functools.cache
def families_of(model_type: str) -> tuple[Family, ...]:
    """The family that serves ``model_type``, if one does."""
    return tuple(family for family in FAMILIES if model_type in family.model_types.split())


@functools.cache
def roles(family: Family) -> dict[tuple[str, ...], Role]:
    """All patterns of ``family``, split at the dots, with what they say."""
    found: dict[tuple[str, ...], Role] = {}
    for role, patterns in (
        (Role("embedding", "out in"), f"{EMBEDDINGS} {family.embeddings}"),
        (Role("output head", "out in"), f"{HEADS} {family.heads}"),
        (Role("router", "out in"), family.routers),
        (Role("weight", "in out"), family.transposed),
    ):
        found |= {tuple(pattern.split(".")): role for pattern in patterns.split()}
    for block in family.blocks:
        named = ((field.name, getattr(block, field.name)) for field in fields(block))
        members = {name: tuple(text.split(".")) for name, text in named if text and name not in _NO_PATTERN}
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

    def role(self, stem: Sequence[str]) -> Role | None:
        """The role of a name, given as its parts, with ``*`` for numbers and without ``weight``."""
        for depth in range(min(len(stem), _LONGEST_PATTERN), 0, -1):
            tail = tuple(stem[-depth:])
            for family in self.families:
                role = roles(family).get(tail)
                if role is not None:
                    return role
        return None

    def heads(self, parts: Sequence[str]) -> Heads | None:
        """The heads of the attention block that holds a name, given as its parts; None if not known.

        Where encoder and decoder may differ, the name tells which one it is.
        """
        side = next((part for part in parts if part in _SIDES), None)
        own = () if side is None else (f"{side}_attention_heads",)
        default = DEFAULT_HEADS.get(self.model_type, (0, None))
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
    """The submodels of a model."""

    main: Submodel  # for tensors outside the towers
    towers: Mapping[str, Submodel]  # by a part of the name

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> Submodels:
        """The submodels of a ``config.json``, read leniently: what it does not state is unknown."""
        config = config or {}
        whole = _text(config.get("model_type"))
        sections = {key: value for key in TOWERS if isinstance(value := config.get(key), Mapping)}
        types = {key: _section_type(key, section, whole) for key, section in sections.items()}
        towers = {
            part: Submodel(types[key], families_of(types[key]), bool(families_of(types[key])), section)
            for key, section in sections.items()
            for part in TOWERS[key]
        }
        text = types.get("text_config", "")
        nested = families_of(text)
        own = families_of(whole)
        main = Submodel(
            text if nested else whole,
            (*nested, *(family for family in own if family not in nested)),
            bool(own),
            sections["text_config"] if nested else config,
        )
        return cls(main, towers)

    @property
    def known(self) -> bool:
        """Whether a family is known for any part of the model."""
        return any(submodel.families for submodel in self.all)

    @property
    def all(self) -> tuple[Submodel, ...]:
        """The main part and the towers."""
        return (self.main, *self.towers.values())

    def of_name(self, parts: Sequence[str]) -> Submodel:
        """The submodel that a name, given as its parts, belongs to."""
        return next((self.towers[part] for part in parts if part in self.towers), self.main)


def _text(value: object) -> str:
    return value[:80] if isinstance(value, str) else ""


def _section_type(key: str, section: Mapping[str, Any], whole: str) -> str:
    stated = _text(section.get("model_type"))
    implied = COMPOSITES.get(whole, {}).get(key)
    # Older configs repeat the whole model's type in their nested ones.
    if implied is not None and (stated == whole or not families_of(stated)):
        return implied
    return stated
