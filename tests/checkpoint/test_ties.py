"""Names of one tensor: against transformers' own lists of the names it ties."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from neftsurgery.checkpoint.ties import is_head, stated_tie, tie_groups

#: Ties of transformers that are not known here: whole layers and modules, and names of a single model.
UNKNOWN = {
    "backbone_model.embed_tokens.embed_audio_tokens.weight",
    "ctc_head.bias",
    "ctc_head.weight",
    "decoder.embed_tokens.eoi_embedding",
    "decoder.relative_bias.biases.0.relative_attention_bias.weight",
    "encoder.embed_patches.proj.bias",
    "encoder.embed_patches.proj.weight",
    "encoder.language_model.embed_tokens.weight",
    "encoder.language_model.norm.weight",
    "encoder.relative_bias.biases.0.relative_attention_bias.weight",
    "prompt_encoder.shared_embedding.positional_embedding",
    "text_decoder_postnet.lm_head.weight",
    "unembedding_projection.weight",
}
PLAIN = re.compile(r"[\w.]+\.(weight|bias|\w+_embedding)")
#: The dictionary of a class, in one line or several: parsing whole files takes seconds.
TIED = re.compile(r"^    _tied_weights_keys = (\{.*\}|\{\n(?:        .*\n)*    \})$", re.MULTILINE)


def tied_by_transformers() -> set[tuple[str, str]]:
    """The pairs of full names in all ``_tied_weights_keys``, read from the sources."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("transformers is not installed")
    found = set()
    for path in Path(spec.origin).parent.glob("models/*/modeling_*.py"):
        for literal in TIED.findall(path.read_text("utf-8")):
            pairs = ast.literal_eval(literal)
            found |= {(a, b.rstrip("$")) for a, b in pairs.items() if PLAIN.fullmatch(a)}
    return found


def test_the_names_that_transformers_ties() -> None:
    pairs = tied_by_transformers()
    assert len(pairs) > 60
    apart = {pair for pair in pairs if [set(pair)] != [set(group) for group in tie_groups(pair)]}
    assert {target for target, _ in apart} <= UNKNOWN | {"decoder.embed_tokens.weight"}
    assert ("lm_head.weight", "model.embed_tokens.weight") in pairs - apart
    assert ("lm_head.weight", "shared.weight") in pairs - apart


def test_embeddings_come_first_and_heads_are_known() -> None:
    names = ["lm_head.weight", "model.encoder.embed_tokens.weight", "model.shared.weight", "x.weight"]
    assert tie_groups(names) == [
        ["model.encoder.embed_tokens.weight", "model.shared.weight", "lm_head.weight"]
    ]
    assert [is_head(name) for name in names] == [True, False, False, False]


@pytest.mark.parametrize(
    "names",
    [
        ["q.embeddings.word_embeddings.weight", "ctx.embeddings.word_embeddings.weight"],  # two encoders
        ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"],
        ["other.lm_head.weight", "model.embed_tokens.weight"],  # below another prefix
        ["score.weight", "model.embed_tokens.weight"],
        ["lm_head.weight" + "x" * 400, "model.embed_tokens.weight"],
    ],
)
def test_names_of_different_tensors(names: list[str]) -> None:
    assert tie_groups(names) == []


def test_two_models_in_one_file() -> None:
    names = [
        f"{part}.{name}" for part in ("a", "b") for name in ("lm_head.weight", "model.embed_tokens.weight")
    ]
    assert sorted(map(sorted, tie_groups(names))) == [sorted(names[:2]), sorted(names[2:])]


def test_known_pairs_join_groups() -> None:
    assert tie_groups(["x", "y", "z"], [("x", "y")]) == [["x", "y"]]


def test_very_many_names_take_no_time() -> None:
    names = [f"{'a.' * (n % 100)}m{n}.embed_tokens.weight" for n in range(20_000)]
    names += [f"{'a.' * (n % 100)}lm_head.weight" for n in range(20_000)]
    assert sum(map(len, tie_groups(names))) > 20_000


@pytest.mark.parametrize(
    ("config", "stated"),
    [
        (None, None),
        ({}, None),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": "yes", "text_config": 7}, None),
    ],
)
def test_what_a_config_states(config: dict[str, object] | None, stated: bool | None) -> None:
    assert stated_tie(config) is stated
