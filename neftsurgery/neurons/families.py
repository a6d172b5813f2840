"""What the tensors of each architecture family are: one table, read by suffix of the tensor name.

Patterns are dotted name endings without ``.weight``; ``*`` stands for a number (an expert's). A
name may have any prefix (``model.``, ``transformer.``, none), so files of a bare model and of the
model with a head both match. The longest matching pattern wins. A ``.weight`` of two or more axes
that no pattern of a known family names is a linear or convolution weight ``[out, in, ...]``.

The names are those of the files that transformers writes and reads; where the live model has other
names for the same thing, with the same layout, both are listed. Nothing here is derived from a shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["EMBEDDINGS", "FAMILIES", "HEADS", "Attention", "Family", "FeedForward", "AxisOrder"]

AxisOrder = Literal["out in", "in out", "E out in", "E in out", "E ? ?"]
"""The order of a weight's axes; ``E`` are experts, ``?`` is not known and never guessed."""


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The tensors of a feed-forward block: unit u is row u of up and gate and column u of down.

    Of the two rows of a gated unit, gate is the one that goes through the activation. ``gate_up``
    holds both: ``halves`` all gates before all ups, ``pairs`` gate and up of one unit side by side.
    """

    up: str = ""
    gate: str = ""
    down: str = ""
    gate_up: str = ""
    fused: Literal["halves", "pairs"] = "halves"
    order: AxisOrder = "out in"


@dataclass(frozen=True, slots=True)
class Attention:
    """The tensors of an attention block: a unit is one key/value head and the query heads that read it.

    ``qkv`` holds all three: ``sections`` all q rows, then k, then v; ``heads`` one stretch of rows
    per key/value head; ``quarters`` four times q, v, k of a quarter of the heads.
    """

    q: str = ""
    k: str = ""
    v: str = ""
    o: str = ""
    qkv: str = ""
    fused: Literal["sections", "heads", "quarters"] = "sections"
    order: AxisOrder = "out in"


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table. Texts hold several names, separated by blanks."""

    model_types: str  # the ``model_type`` values of the configs it serves
    blocks: tuple[FeedForward | Attention, ...] = ()  # each whose tensors are in the files is used
    # These come on top of `EMBEDDINGS` and `HEADS`, which all families have.
    embeddings: str = ""
    heads: str = ""
    routers: str = ""
    transposed: str = ""  # weights ``[in, out]`` that are in no block
    one_kv_head: str = ""  # a config key: true or absent means one key/value head
    many_kv_heads: str = ""  # a config key: true overrides `one_kv_head`


EMBEDDINGS = "embed_tokens word_embeddings position_embeddings token_type_embeddings embed_positions"
HEADS = "lm_head"
"""What every family leaves out, besides its own."""

_SWIGLU_FUSED = FeedForward(gate_up="mlp.gate_up_proj", down="mlp.down_proj")
_FC = FeedForward(up="fc1", down="fc2")
_MLP_FC = FeedForward(up="mlp.fc1", down="mlp.fc2")
_MLP_FC_IN = FeedForward(up="mlp.fc_in", down="mlp.fc_out")
_H_TO_4H = FeedForward(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")
_C_FC = FeedForward(up="mlp.c_fc", down="mlp.c_proj")
_BERT_FFN = FeedForward(up="intermediate.dense", down="output.dense")


def _gated(block: str, up: str = "up_proj", gate: str = "gate_proj", down: str = "down_proj") -> FeedForward:
    """Three tensors ``block.up_proj`` to ``block.down_proj``; in ``mlp.experts.*``, of each expert."""
    return FeedForward(f"{block}.{up}", f"{block}.{gate}", f"{block}.{down}")


def _stacked(block: str, order: AxisOrder, fused: Literal["halves", "pairs"] = "halves") -> FeedForward:
    """All experts in one tensor: ``block.experts.gate_up_proj``."""
    return FeedForward(
        gate_up=f"{block}.experts.gate_up_proj", down=f"{block}.experts.down_proj", fused=fused, order=order
    )


def _projections(block: str, o: str = "o_proj") -> Attention:
    """Four tensors ``block.q_proj`` to ``block.o_proj``."""
    return Attention(f"{block}.q_proj", f"{block}.k_proj", f"{block}.v_proj", f"{block}.{o}")


def _query_key_value(block: str) -> Attention:
    return Attention(qkv=f"{block}.query_key_value", o=f"{block}.dense", fused="heads")


def _bert_attention(block: str, o: str = "attention.output.dense", end: str = "") -> Attention:
    return Attention(f"{block}.query{end}", f"{block}.key{end}", f"{block}.value{end}", o)


_SWIGLU = _gated("mlp")
_SELF_ATTN = _projections("self_attn")
_SELF_OUT = _projections("self_attn", "out_proj")
_CROSS_OUT = _projections("encoder_attn", "out_proj")

FAMILIES: tuple[Family, ...] = (
    # Decoders with q, k, v, o apart and a gated feed-forward block of three tensors.
    Family(
        (
            "llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text olmo olmo2 olmo3 granite cohere "
            "cohere2 smollm3 stablelm exaone4 seed_oss hunyuan_v1_dense ernie4_5 helium vaultgemma qwen2_vl "
            "qwen2_vl_text qwen2_5_vl qwen2_5_vl_text qwen3_vl_text"
        ),
        (_SWIGLU, _SELF_ATTN),
    ),
    Family("arcee nemotron apertus", (FeedForward(up="mlp.up_proj", down="mlp.down_proj"), _SELF_ATTN)),
    Family("starcoder2", (_C_FC, _SELF_ATTN)),
    Family("phi", (_MLP_FC, _projections("self_attn", "dense"))),
    Family("phi3", (_SWIGLU_FUSED, Attention(qkv="self_attn.qkv_proj", o="self_attn.o_proj"))),
    Family("glm glm4", (_SWIGLU_FUSED, _SELF_ATTN)),
    # Mixtures of experts. transformers 5 holds experts stacked in memory and writes one file each.
    Family(
        "mixtral phimoe",
        (_gated("block_sparse_moe.experts.*", "w3", "w1", "w2"), _stacked("mlp", "E out in"), _SELF_ATTN),
        routers="block_sparse_moe.gate mlp.gate mlp.router",
    ),
    Family(
        "qwen2_moe qwen3_moe olmoe flex_olmo dots1 glm4_moe",
        (
            _gated("mlp.experts.*"),
            _stacked("mlp", "E out in"),
            _SWIGLU,
            _gated("mlp.shared_expert"),
            _gated("mlp.shared_experts"),
            _SELF_ATTN,
        ),
        routers="mlp.gate mlp.shared_expert_gate",
    ),
    # Latent attention mixes heads in its low-rank tensors: it has no attention units.
    Family(
        "deepseek_v2 deepseek_v3",
        (_gated("mlp.experts.*"), _stacked("mlp", "E out in"), _SWIGLU, _gated("mlp.shared_experts")),
        routers="mlp.gate",
    ),
    Family(
        "granitemoe",
        (
            FeedForward(
                gate_up="block_sparse_moe.input_linear",
                down="block_sparse_moe.output_linear",
                order="E out in",
            ),
            _stacked("block_sparse_moe", "E out in"),
            _SELF_ATTN,
        ),
        routers="block_sparse_moe.router.layer block_sparse_moe.router",
    ),
    Family("gpt_oss", (_stacked("mlp", "E in out", "pairs"), _SELF_ATTN), routers="mlp.router"),
    Family(
        "llama4_text",
        (
            _stacked("feed_forward", "E in out"),
            _gated("feed_forward.shared_expert"),
            _gated("feed_forward"),
            _SELF_ATTN,
        ),
        routers="feed_forward.router",
    ),
    # Its files name the same tensors in either order of axes: transformers turns them as needed.
    Family("qwen3_vl_moe_text", (_stacked("mlp", "E ? ?"), _SWIGLU, _SELF_ATTN), routers="mlp.gate"),
    # The GPTs and their kin.
    Family(
        "gpt2",
        (
            FeedForward(up="mlp.c_fc", down="mlp.c_proj", order="in out"),
            Attention(qkv="attn.c_attn", o="attn.c_proj", order="in out"),
        ),
        embeddings="wte wpe",
        transposed="crossattention.q_attn crossattention.c_attn crossattention.c_proj",
    ),
    Family(
        "gpt_bigcode",
        (_C_FC, Attention(qkv="attn.c_attn", o="attn.c_proj", fused="heads")),
        embeddings="wte wpe",
        one_kv_head="multi_query",
    ),
    Family("gpt_neo", (_C_FC, _projections("attn.attention", "out_proj")), embeddings="wte wpe"),
    Family("gptj", (_MLP_FC_IN, _projections("attn", "out_proj")), embeddings="wte"),
    Family(
        "codegen",
        (_MLP_FC_IN, Attention(qkv="attn.qkv_proj", o="attn.out_proj", fused="quarters")),
        embeddings="wte",
    ),
    Family("gpt_neox", (_H_TO_4H, _query_key_value("attention")), embeddings="embed_in", heads="embed_out"),
    Family("persimmon", (_H_TO_4H, _query_key_value("self_attn"))),
    Family("bloom", (_H_TO_4H, _query_key_value("self_attention"))),
    Family(
        "falcon",
        (_H_TO_4H, _query_key_value("self_attention")),
        one_kv_head="multi_query",
        many_kv_heads="new_decoder_architecture",
    ),
    Family(
        "mpt",
        (FeedForward(up="ffn.up_proj", down="ffn.down_proj"), Attention(qkv="attn.Wqkv", o="attn.out_proj")),
        embeddings="wte",
    ),
    Family("opt", (_FC, _SELF_OUT)),
    Family("biogpt", (_FC, _SELF_OUT), heads="output_projection"),
    # Encoders and decoders together.
    Family(
        "t5 mt5 umt5",
        (
            FeedForward(up="DenseReluDense.wi", down="DenseReluDense.wo"),
            FeedForward(up="DenseReluDense.wi_1", gate="DenseReluDense.wi_0", down="DenseReluDense.wo"),
            Attention("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"),
            Attention("EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v", "EncDecAttention.o"),
        ),
        embeddings="shared relative_attention_bias",
    ),
    Family(
        "bart mbart marian pegasus m2m_100 blenderbot whisper",
        (_FC, _SELF_OUT, _CROSS_OUT),
        embeddings="shared",
        heads="proj_out",
    ),
    # Encoders of text.
    Family(
        "bert roberta xlm-roberta camembert electra",
        (
            _BERT_FFN,
            _bert_attention("attention.self"),
            _bert_attention("crossattention.self", "crossattention.output.dense"),
        ),
        heads="cls.predictions.decoder lm_head.decoder generator_lm_head",
    ),
    Family(
        "deberta-v2",
        (_BERT_FFN, _bert_attention("attention.self", end="_proj")),
        embeddings="rel_embeddings",
        heads="cls.predictions.decoder lm_predictions.lm_head",
    ),
    Family(
        "distilbert",
        (
            FeedForward(up="ffn.lin1", down="ffn.lin2"),
            Attention("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        ),
        heads="vocab_projector",
    ),
    Family(
        "albert",
        (FeedForward(up="ffn", down="ffn_output"), _bert_attention("attention", "attention.dense")),
        heads="predictions.decoder",
    ),
    Family(
        "modernbert",
        (FeedForward(gate_up="mlp.Wi", down="mlp.Wo"), Attention(qkv="attn.Wqkv", o="attn.Wo")),
        embeddings="tok_embeddings",
        heads="decoder",
    ),
    # Encoders of images, and the text towers trained with them.
    Family(
        "vit deit", (_BERT_FFN, _MLP_FC, _bert_attention("attention.attention"), _projections("attention"))
    ),
    Family(
        "dinov2 dinov2_with_registers",
        (
            _MLP_FC,
            FeedForward(gate_up="mlp.weights_in", down="mlp.weights_out"),
            _SWIGLU,
            _bert_attention("attention.attention"),
            _projections("attention"),
        ),
    ),
    Family(
        "clip_text_model clip_vision_model siglip_text_model siglip_vision_model",
        (_MLP_FC, _SELF_OUT, Attention(qkv="head.attention.in_proj_weight", o="head.attention.out_proj")),
        embeddings="token_embedding position_embedding",
    ),
    Family("qwen2_vl_vision qwen2_5_vl_vision", (_MLP_FC, _SWIGLU, Attention(qkv="attn.qkv", o="attn.proj"))),
    Family(
        "qwen3_vl_vision qwen3_vl_moe_vision",
        (FeedForward(up="mlp.linear_fc1", down="mlp.linear_fc2"), Attention(qkv="attn.qkv", o="attn.proj")),
        embeddings="pos_embed",
    ),
    Family("pixtral", (_gated("feed_forward"), _projections("attention"))),
    Family("llama4_vision_model", (_MLP_FC, _SELF_ATTN), embeddings="positional_embedding_vlm"),
    # Models put together from the above: only what belongs to none of their parts.
    Family(
        "clip siglip gemma3 llava mistral3 llama4 qwen3_vl qwen3_vl_moe",
        transposed="mm_input_projection_weight",
    ),
)
