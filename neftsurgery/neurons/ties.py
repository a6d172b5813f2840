"""Names that models give to one tensor: an output head and an embedding, shared embeddings, tied biases.

The names are those of transformers' ``_tied_weights_keys``. Whether two of them are one tensor in a
checkpoint, its files and config say: see `neftsurgery.checkpoint.ties`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate
from typing import Any

__all__ = ["is_head", "stated_tie", "tie_groups"]

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
_LAYER_HEAD = re.compile(r"^(?:model\.decoder\.)?((?:class|bbox)_embed)\.\d+\.")


def is_head(name: str) -> bool:
    """Whether ``name`` is that of an output head, which a model may tie to an embedding."""
    return _prefix(name, _HEADS) is not None


def stated_tie(config: Mapping[str, Any] | None) -> bool | None:
    """Whether a ``config.json`` says that the output head is tied to the embedding; None: it does not say."""
    sections = [config or {}, (config or {}).get("text_config"), (config or {}).get("decoder")]
    stated = [one.get("tie_word_embeddings") for one in sections if isinstance(one, Mapping)]
    return True if True in stated else False if False in stated else None


def tie_groups(names: Iterable[str], known: Iterable[tuple[str, str]] = ()) -> list[list[str]]:
    """Those of ``names`` that may be one tensor, by group, embeddings first; ``known`` pairs are in a group.

    A head goes with the embeddings below its own prefix, such as ``text_decoder.``
    """
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
        starts = accumulate(name.split("."), "{}.{}".format, initial="^")
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
    if len(name) > _LONGEST_NAME or not name.endswith(".weight"):
        return None
    parts = ["^", *name.split(".")[:-1]]
    for count in (3, 2, 1):
        if ".".join(parts[-count:]) in ends:
            return ".".join(parts[:-count]) or "^"
    return None
