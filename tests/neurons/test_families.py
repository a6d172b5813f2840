"""The family table against live models of transformers: what they compute, not what the table says.

Each case is a tiny random model, saved as transformers saves it. Files are edited where the anatomy
says a unit lies, loaded again, and run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neftsurgery.neurons.anatomy import Anatomy, NeuronTensor, read_anatomy
from neftsurgery.neurons.families import architectures
from neftsurgery.tensors.header import TensorInfo, read_header

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

Tensors = dict[str, Any]

# All sizes differ, so that no axis, head or half can stand in for another.
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "vocab_size": 34,
    "max_position_embeddings": 16,
    **_SPECIAL,
}
_GQA = {**_TEXT, "num_attention_heads": 6, "num_key_value_heads": 2}
_WIDE = {**_GQA, "head_dim": 10}
_MHA = {**_TEXT, "num_attention_heads": 3}
_VISION = {
    "hidden_size": 36,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 8,
    "patch_size": 4,
}
_GPT = {
    "n_embd": 24,
    "n_inner": 20,
    "n_layer": 2,
    "n_head": 3,
    "vocab_size": 34,
    "n_positions": 16,
    **_SPECIAL,
}
_SEQ2SEQ = {
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 28,
    "vocab_size": 34,
    "max_position_embeddings": 16,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
    **_SPECIAL,
}
_T5 = {"d_model": 24, "d_kv": 10, "d_ff": 20, "num_layers": 2, "num_heads": 3, "vocab_size": 34, **_SPECIAL}
_FALCON = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 34, "ffn_hidden_size": 20, **_SPECIAL}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
}

_LLAMA4_VISION = {
    **_VISION,
    "intermediate_size": 144,
    "vision_output_dim": 22,
    "projector_input_dim": 22,
    "projector_output_dim": 22,
}


@dataclass(frozen=True)
class Case:
    """A class of transformers, its config class, what to make of it, and how to run it."""

    model: str
    config: str
    values: dict[str, Any]
    inputs: tuple[str, ...] = ("input_ids",)
    blocks: tuple[str, ...] = field(default=(), kw_only=True)
    """Only blocks with one of these in their names take part in a run with ``inputs``; none: all."""


_ENCODER_DECODER = ("input_ids", "decoder_input_ids")
CASES = {
    "llama": Case("LlamaForCausalLM", "LlamaConfig", {**_WIDE, "attention_bias": True, "mlp_bias": True}),
    "mistral": Case("MistralForCausalLM", "MistralConfig", _WIDE),
    "ministral": Case("MinistralForCausalLM", "MinistralConfig", _WIDE),
    "qwen2": Case("Qwen2ForCausalLM", "Qwen2Config", _GQA),
    "qwen3": Case("Qwen3ForCausalLM", "Qwen3Config", _WIDE),
    "gemma": Case("GemmaForCausalLM", "GemmaConfig", _WIDE),
    "gemma2": Case("Gemma2ForCausalLM", "Gemma2Config", _WIDE),
    "gemma3_text": Case("Gemma3ForCausalLM", "Gemma3TextConfig", _WIDE),
    "olmo": Case("OlmoForCausalLM", "OlmoConfig", _GQA),
    "olmo2": Case("Olmo2ForCausalLM", "Olmo2Config", _GQA),
    "olmo3": Case("Olmo3ForCausalLM", "Olmo3Config", _GQA),
    "granite": Case("GraniteForCausalLM", "GraniteConfig", _GQA),
    "cohere": Case("CohereForCausalLM", "CohereConfig", {**_GQA, "use_qk_norm": True}),
    "cohere2": Case("Cohere2ForCausalLM", "Cohere2Config", _GQA),
    "smollm3": Case("SmolLM3ForCausalLM", "SmolLM3Config", _GQA),
    "stablelm": Case("StableLmForCausalLM", "StableLmConfig", _GQA),
    "exaone4": Case("Exaone4ForCausalLM", "Exaone4Config", _GQA),
    "seed_oss": Case("SeedOssForCausalLM", "SeedOssConfig", _WIDE),
    "hunyuan_v1_dense": Case("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", _WIDE),
    "ernie4_5": Case("Ernie4_5ForCausalLM", "Ernie4_5Config", _WIDE),
    "helium": Case("HeliumForCausalLM", "HeliumConfig", {**_GQA, "head_dim": 4}),
    "vaultgemma": Case("VaultGemmaForCausalLM", "VaultGemmaConfig", _WIDE),
    "arcee": Case("ArceeForCausalLM", "ArceeConfig", _GQA),
    "nemotron": Case("NemotronForCausalLM", "NemotronConfig", _GQA),
    "apertus": Case("ApertusForCausalLM", "ApertusConfig", _GQA),
    "starcoder2": Case("Starcoder2ForCausalLM", "Starcoder2Config", _GQA),
    "phi": Case("PhiForCausalLM", "PhiConfig", {**_MHA, "num_attention_heads": 6}),
    "phi3": Case("Phi3ForCausalLM", "Phi3Config", _GQA),
    "glm": Case("GlmForCausalLM", "GlmConfig", _WIDE),
    "glm4": Case("Glm4ForCausalLM", "Glm4Config", _WIDE),
    "mixtral": Case("MixtralForCausalLM", "MixtralConfig", {**_WIDE, "num_local_experts": 3}),
    "phimoe": Case("PhimoeForCausalLM", "PhimoeConfig", {**_GQA, "num_local_experts": 3}),
    "qwen2_moe": Case(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_GQA, **_EXPERTS, "num_experts": 3, "shared_expert_intermediate_size": 18},
    ),
    "qwen3_moe": Case(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_WIDE, **_EXPERTS, "num_experts": 3, "mlp_only_layers": [1]},
    ),
    "olmoe": Case("OlmoeForCausalLM", "OlmoeConfig", {**_GQA, "num_experts": 3, "num_experts_per_tok": 2}),
    "flex_olmo": Case(
        "FlexOlmoForCausalLM", "FlexOlmoConfig", {**_GQA, "num_experts": 3, "num_experts_per_tok": 2}
    ),
    "dots1": Case(
        "Dots1ForCausalLM",
        "Dots1Config",
        {**_WIDE, **_EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "glm4_moe": Case(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {**_WIDE, **_EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "deepseek_v2": Case(
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {
            **_GQA,
            **_EXPERTS,
            **_LATENT,
            "num_key_value_heads": 6,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
    ),
    "deepseek_v3": Case(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_GQA,
            **_EXPERTS,
            **_LATENT,
            "num_key_value_heads": 6,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "granitemoe": Case(
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**_GQA, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "gpt_oss": Case(
        "GptOssForCausalLM", "GptOssConfig", {**_WIDE, "num_local_experts": 3, "num_experts_per_tok": 2}
    ),
    "llama4_text": Case(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_WIDE, "intermediate_size_mlp": 28, "num_local_experts": 3, "moe_layers": [0]},
    ),
    "gpt2": Case("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gpt2 bare": Case("GPT2Model", "GPT2Config", _GPT),
    "gpt_bigcode": Case("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT),
    "gpt_bigcode many": Case("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {**_GPT, "multi_query": False}),
    "gpt_neo": Case(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "hidden_size": 24,
            "num_layers": 2,
            "num_heads": 3,
            "intermediate_size": 20,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": 34,
            "max_position_embeddings": 16,
            **_SPECIAL,
        },
    ),
    "gptj": Case("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "codegen": Case(
        "CodeGenForCausalLM", "CodeGenConfig", {**_GPT, "n_embd": 48, "n_head": 8, "rotary_dim": 4}
    ),
    "gpt_neox": Case("GPTNeoXForCausalLM", "GPTNeoXConfig", _MHA),
    "persimmon": Case("PersimmonForCausalLM", "PersimmonConfig", _MHA),
    "bloom": Case(
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 24, "n_layer": 2, "n_head": 3, "vocab_size": 34, **_SPECIAL},
    ),
    "falcon old": Case(
        "FalconForCausalLM",
        "FalconConfig",
        {**_FALCON, "num_attention_heads": 3, "multi_query": False, "alibi": True, "bias": True},
    ),
    "falcon new": Case(
        "FalconForCausalLM",
        "FalconConfig",
        {**_FALCON, "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "falcon multi-query": Case(
        "FalconForCausalLM", "FalconConfig", {**_FALCON, "num_attention_heads": 3, "multi_query": True}
    ),
    "mpt": Case(
        "MptForCausalLM",
        "MptConfig",
        {"d_model": 24, "n_heads": 3, "n_layers": 2, "vocab_size": 34, "max_seq_len": 16, **_SPECIAL},
    ),
    "opt": Case(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 24,
            "ffn_dim": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "vocab_size": 34,
            "max_position_embeddings": 16,
            "word_embed_proj_dim": 12,
            **_SPECIAL,
        },
    ),
    "biogpt": Case("BioGptForCausalLM", "BioGptConfig", _MHA),
    "t5": Case("T5ForConditionalGeneration", "T5Config", _T5, _ENCODER_DECODER),
    "t5 gated": Case(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        _ENCODER_DECODER,
    ),
    "mt5": Case("MT5ForConditionalGeneration", "MT5Config", _T5, _ENCODER_DECODER),
    "umt5": Case("UMT5ForConditionalGeneration", "UMT5Config", _T5, _ENCODER_DECODER),
    "bart": Case("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ, _ENCODER_DECODER),
    "mbart": Case("MBartForConditionalGeneration", "MBartConfig", _SEQ2SEQ, _ENCODER_DECODER),
    "marian": Case("MarianMTModel", "MarianConfig", _SEQ2SEQ, _ENCODER_DECODER),
    "pegasus": Case("PegasusForConditionalGeneration", "PegasusConfig", _SEQ2SEQ, _ENCODER_DECODER),
    "m2m_100": Case("M2M100ForConditionalGeneration", "M2M100Config", _SEQ2SEQ, _ENCODER_DECODER),
    "blenderbot": Case("BlenderbotForConditionalGeneration", "BlenderbotConfig", _SEQ2SEQ, _ENCODER_DECODER),
    "whisper": Case(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 8,
            "max_target_positions": 16,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        ("input_features", "decoder_input_ids"),
    ),
    "bert": Case("BertForMaskedLM", "BertConfig", _MHA),
    "bert bare": Case("BertModel", "BertConfig", _MHA),
    "bert classifier": Case("BertForSequenceClassification", "BertConfig", _MHA),
    "roberta": Case("RobertaForMaskedLM", "RobertaConfig", _MHA),
    "xlm-roberta": Case("XLMRobertaForMaskedLM", "XLMRobertaConfig", _MHA),
    "camembert": Case("CamembertForMaskedLM", "CamembertConfig", _MHA),
    "electra": Case("ElectraForMaskedLM", "ElectraConfig", {**_MHA, "embedding_size": 12}),
    "deberta-v2": Case(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {
            **_MHA,
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
        },
    ),
    "distilbert": Case(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "dim": 24,
            "hidden_dim": 20,
            "n_layers": 2,
            "n_heads": 3,
            "vocab_size": 34,
            "max_position_embeddings": 16,
            **_SPECIAL,
        },
    ),
    "albert": Case("AlbertForMaskedLM", "AlbertConfig", {**_MHA, "embedding_size": 12}),
    "modernbert": Case(
        "ModernBertForMaskedLM", "ModernBertConfig", {**_MHA, "cls_token_id": 1, "sep_token_id": 2}
    ),
    "vit": Case("ViTForImageClassification", "ViTConfig", {**_VISION, "num_labels": 5}, ("pixel_values",)),
    "deit": Case("DeiTForImageClassification", "DeiTConfig", {**_VISION, "num_labels": 5}, ("pixel_values",)),
    "dinov2": Case("Dinov2Model", "Dinov2Config", {**_VISION, "mlp_ratio": 2}, ("pixel_values",)),
    "dinov2 gated": Case(
        "Dinov2Model", "Dinov2Config", {**_VISION, "mlp_ratio": 2, "use_swiglu_ffn": True}, ("pixel_values",)
    ),
    "dinov2_with_registers": Case(
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**_VISION, "mlp_ratio": 2},
        ("pixel_values",),
    ),
    "clip": Case(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**_MHA, "num_attention_heads": 6},
            "vision_config": _VISION,
            "projection_dim": 14,
        },
        ("input_ids", "pixel_values"),
    ),
    "clip vision": Case("CLIPVisionModel", "CLIPVisionConfig", _VISION, ("pixel_values",)),
    "siglip": Case(
        "SiglipModel",
        "SiglipConfig",
        {
            "text_config": {**_MHA, "num_attention_heads": 6, "projection_size": 36},
            "vision_config": _VISION,
        },
        ("input_ids", "pixel_values"),
    ),
    "gemma3": Case(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": _WIDE, "vision_config": _VISION, "mm_tokens_per_image": 4},
        blocks=("language_model",),
    ),
    "llava": Case(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**_GQA, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": 14},
            "vision_feature_layer": -1,
        },
        blocks=("language_model",),
    ),
    "qwen2_vl": Case(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": _GQA,
            "vision_config": {
                "depth": 2,
                "embed_dim": 36,
                "hidden_size": 24,
                "num_heads": 3,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
        },
        ("patches",),
        blocks=("visual",),
    ),
    "qwen3_vl": Case(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": _WIDE,
            "vision_config": {
                "depth": 2,
                "hidden_size": 36,
                "intermediate_size": 20,
                "out_hidden_size": 24,
                "num_heads": 3,
                "patch_size": 4,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [1],
            },
        },
        ("patches",),
        blocks=("visual",),
    ),
    "mistral3": Case(
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": {**_WIDE, "model_type": "mistral"},
            "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 12},
        },
        blocks=("language_model",),
    ),
    "pixtral": Case(
        "PixtralVisionModel", "PixtralVisionConfig", {**_VISION, "head_dim": 12}, ("pixel_values",)
    ),
    "llama4": Case(
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {
            "text_config": {**_WIDE, "intermediate_size_mlp": 28, "num_local_experts": 3, "moe_layers": [0]},
            "vision_config": _LLAMA4_VISION,
        },
        blocks=("language_model",),
    ),
    "llama4 vision": Case(
        "Llama4VisionModel",
        "Llama4VisionConfig",
        _LLAMA4_VISION,
        ("pixel_values",),
        blocks=("self_attn", "layers"),
    ),
    "qwen2_5_vl": Case(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {
                **_GQA,
                "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 0]},
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 36,
                "intermediate_size": 20,
                "out_hidden_size": 24,
                "num_heads": 3,
                "patch_size": 4,
            },
        },
        blocks=("model.layers",),
    ),
}


@dataclass(frozen=True)
class Sample:
    """A case made real."""

    case: Case
    folder: Path
    model: Any
    config: dict[str, Any]
    infos: dict[str, TensorInfo]
    tensors: Tensors

    def anatomy(self, name: str) -> Anatomy:
        return read_anatomy(name, self.infos, self.config)

    def run(self, tensors: Tensors, folder: Path) -> Any:
        """What the model gives once its file holds ``tensors``."""
        safetensors_torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config))
        model = type(self.model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return _run(model.eval(), self.case.inputs)


def _run(model: Any, inputs: tuple[str, ...]) -> Any:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 34, (3, 7), generator=draw)
    given = {
        "input_ids": tokens,
        "decoder_input_ids": tokens.flip(1)[:, :5],
        "pixel_values": torch.randn(3, 3, 8, 8, generator=draw),
        "input_features": torch.randn(3, 8, 16, generator=draw),
    }
    with torch.no_grad():
        if inputs == ("patches",):
            patches = torch.randn(16, 3 * 2 * 4 * 4, generator=draw)
            return torch.flatten(
                model.model.visual(patches, grid_thw=torch.tensor([[1, 4, 4]])).pooler_output
            )
        out = model(**{name: given[name] for name in inputs})
    found = [out[key] for key in ("logits", "logits_per_text", "last_hidden_state") if key in out]
    return found[0].double().flatten()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sample]:
    made: dict[str, Sample] = {}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def make(name: str) -> Sample:
        if name not in made:
            case = CASES[name]
            config = getattr(transformers, case.config)(**case.values)
            torch.manual_seed(0)
            model = getattr(transformers, case.model)(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn_like(parameter) * (0.4 if parameter.ndim > 1 else 0.2)
                    parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder)
            path = folder / "model.safetensors"
            made[name] = Sample(
                case,
                folder,
                model,
                json.loads((folder / "config.json").read_text()),
                dict(read_header(path).tensors),
                safetensors_torch.load_file(path),
            )
        return made[name]

    return make


def _bytes(tensor: Any) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def _weights_of(model: Any) -> list[tuple[Any, int, tuple[int, ...]]]:
    """Every linear and convolution weight of a live model as it may be written: values, neurons, axes."""
    found = []
    left_out = {id(model.get_output_embeddings())}
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    for path, module in model.named_modules():
        kind = type(module).__name__
        if id(module) in left_out or "Router" in kind or path.endswith("shared_expert_gate"):
            continue
        if kind == "Conv1D":
            found.append((module.weight, module.nf, (1,)))
        elif isinstance(module, torch.nn.Linear):
            found.append((module.weight, module.out_features, (0,)))
        elif isinstance(module, convolutions):
            found.append((module.weight, module.out_channels, (0,)))
        elif isinstance(module, torch.nn.MultiheadAttention):
            found.append((module.in_proj_weight, 3 * module.embed_dim, (0,)))
        elif kind.endswith("MultiModalProjector") and hasattr(module, "mm_input_projection_weight"):
            found.append((module.mm_input_projection_weight, 24, (1,)))
        elif kind.endswith("Experts"):
            found += _experts_of(module)
        elif kind == "Dinov2SwiGLUFFN":  # written as one tensor
            both = torch.cat([module.gate_proj.weight, module.up_proj.weight])
            found.append((both, len(both), (0,)))
    return found


def _experts_of(module: Any) -> list[tuple[Any, int, tuple[int, ...]]]:
    """Stacked experts, and the same cut into one tensor per expert, gate, up and down."""
    gate_up, down = module.gate_up_proj, module.down_proj
    experts, hidden = len(gate_up), 24
    inner = down.numel() // experts // hidden
    turned = gate_up.shape[1] == hidden  # hidden differs from 2 * inner in every case
    stacked = [
        (gate_up, experts * 2 * inner, (0, 2) if turned else (0, 1)),
        (down, experts * hidden, (0, 2) if turned else (0, 1)),
    ]
    if turned:
        return stacked
    apart = [(half, inner, (0,)) for both in gate_up for half in both.chunk(2)]
    return stacked + apart + [(one, hidden, (0,)) for one in down]


@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_output_units_of_the_live_modules(name: str, sample: Callable[[str], Sample]) -> None:
    made = sample(name)
    live = {_bytes(weight): (count, axes) for weight, count, axes in _weights_of(made.model)}
    scored = {tensor.info.name: tensor for tensor in made.anatomy("rows").scored}
    for key, tensor in made.tensors.items():
        expected = live.get(_bytes(tensor))
        found = scored.get(key)
        assert (found is None) == (expected is None), key
        if found is not None and expected is not None:
            assert (found.layout.count, found.axes) == expected, key
            assert found.layer == key[: len(found.layer)]
            assert not found.layer or found.layer[-1].isdigit()
    written = {_bytes(tensor) for tensor in made.tensors.values()}
    for module in made.model.modules():  # nothing that is live is missing from the files
        linear = isinstance(module, torch.nn.Linear) and "Router" not in type(module).__name__
        if linear and module is not made.model.get_output_embeddings() and name != "dinov2 gated":
            assert _bytes(module.weight) in written
    assert made.anatomy("rows").warnings == ()


@pytest.mark.parametrize("name", CASES)
def test_biases_belong_to_the_module_of_their_weight(name: str, sample: Callable[[str], Sample]) -> None:
    made = sample(name)
    live = {}
    for module in made.model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and weight.ndim > 1:
            bias = getattr(module, "bias", None)
            live[_bytes(weight)] = None if bias is None else _bytes(bias)
    for tensor in made.anatomy("rows").scored:
        key = _bytes(made.tensors[tensor.info.name])
        if key in live:
            assert (None if tensor.bias is None else _bytes(made.tensors[tensor.bias])) == live[key]


@dataclass(frozen=True)
class Member:
    """The neurons of one tensor that belong to one unit."""

    tensor: NeuronTensor
    index: np.ndarray
    columns: bool
    """Whether it is the unit's output: down or o, whose vectors are columns."""

    def edit(self, tensors: Tensors, change: Callable[[Any], Any]) -> None:
        """Replace the neurons' vectors, and the bias elements that go with them."""
        info = self.tensor.info
        where: list[Any] = [slice(None)] * len(info.shape)
        at = np.unravel_index(self.index, [info.shape[axis] for axis in self.tensor.axes])
        for axis, coordinates in zip(self.tensor.axes, at, strict=True):
            where[axis] = torch.from_numpy(coordinates)
        tensors[info.name][tuple(where)] = change(tensors[info.name][tuple(where)])
        if self.tensor.bias is not None:
            flat = tensors[self.tensor.bias].view(-1)
            flat[torch.from_numpy(self.index)] = change(flat[torch.from_numpy(self.index)])


def _blocks(made: Sample) -> list[tuple[bool, list[list[Member]]]]:
    """One block of each shape: whether it is a feed-forward one, and the members of each of its units."""
    rows = {tensor.info.name: tensor.axes for tensor in made.anatomy("rows").scored}
    ffn = {tensor.info.name for tensor in made.anatomy("ffn").scored}
    groups: dict[int, list[tuple[NeuronTensor, np.ndarray]]] = {}
    for tensor in made.anatomy("units").scored:
        assert tensor.units is not None
        ids = tensor.units.ids()
        groups.setdefault(int(ids.min()), []).append((tensor, ids))
    found = {}
    for group in groups.values():
        names = [tensor.info.name for tensor, _ in group]
        if made.case.blocks and not any(part in names[0] for part in made.case.blocks):
            continue
        units = [
            [
                Member(tensor, np.flatnonzero(ids == unit), tensor.axes != rows[tensor.info.name])
                for tensor, ids in group
            ]
            for unit in np.unique(group[0][1])
        ]
        kinds = tuple(tensor.kind for tensor, _ in group)
        side = "decoder" in names[0], "vision" in names[0]
        found.setdefault((kinds, side), (any(name in ffn for name in names), units))
    return list(found.values())


def _kv_heads(name: str, tensor: str) -> int:
    """How many key/value heads the attention block of ``tensor`` was made with: see ``CASES``."""
    values = CASES[name].values
    if name in ("gpt_bigcode", "falcon multi-query"):
        return 1
    if "encoder_attention_heads" in values:
        return 6 if "decoder" in tensor else 3
    if "text_config" in values:
        in_tower = any(part in tensor for part in ("vision", "visual"))
        values = values["vision_config" if in_tower else "text_config"]
    keys = ("num_key_value_heads", "num_kv_heads", "num_attention_heads", "n_head", "num_heads", "n_heads")
    return next(int(values[key]) for key in keys if key in values)


def _edited(made: Sample, change: Callable[[Any], Any], *members: Member) -> Tensors:
    tensors = {name: tensor.clone() for name, tensor in made.tensors.items()}
    for member in members:
        member.edit(tensors, change)
    return tensors


def _same(a: Any, b: Any, scale: float) -> bool:
    return bool((a - b).abs().max() <= 1e-3 * scale)


@pytest.mark.parametrize("name", CASES)
def test_a_feed_forward_unit_is_silenced_by_any_of_its_members(
    name: str, sample: Callable[[str], Sample], tmp_path: Path
) -> None:
    made = sample(name)
    base = made.run(made.tensors, tmp_path)
    ups = {
        tensor.info.name: None if tensor.part is None else tensor.part.mask()
        for tensor in made.anatomy("ffn").scored
    }
    blocks = [units for is_ffn, units in _blocks(made) if is_ffn]
    assert blocks
    for units in blocks:
        felt = False
        for unit in (units[1], units[-2], *units[4:8]):
            (column,) = [member for member in unit if member.columns]
            inputs = [
                Member(member.tensor, member.index[n : n + 1], False)
                for member in unit
                if not member.columns
                for n in range(len(member.index))
            ]
            silent = made.run(_edited(made, torch.zeros_like, column), tmp_path)
            effect = float((silent - base).abs().max())
            felt = effect > 1e-3
            if not felt:  # a ReLU that never fires, an expert that no token is sent to
                continue
            doubled = made.run(_edited(made, lambda old: 2 * old, column), tmp_path)
            for member in inputs:
                key = member.tensor.info.name
                up = key in ups and (ups[key] is None or bool(ups[key][member.index[0]]))
                gated = len(inputs) == 2
                out = made.run(_edited(made, torch.zeros_like, member), tmp_path)
                # GPT-OSS multiplies by up + 1, and clamps: there only the gate silences a unit.
                assert _same(out, silent, effect) == (name != "gpt_oss" or not up), key
                if gated and name != "gpt_oss":  # only up is a factor of what the unit gives
                    twice = made.run(_edited(made, lambda old: 2 * old, member), tmp_path)
                    assert _same(twice, doubled, float((doubled - base).abs().max())) == up, key
            break
        assert felt, "no unit of this block does anything"


@pytest.mark.parametrize("name", CASES)
def test_an_attention_unit_speaks_only_through_its_output_columns(
    name: str, sample: Callable[[str], Sample], tmp_path: Path
) -> None:
    made = sample(name)
    base = made.run(made.tensors, tmp_path)
    blocks = [units for is_ffn, units in _blocks(made) if not is_ffn]
    assert bool(blocks) == ("deepseek" not in name)
    draw = torch.Generator().manual_seed(2)

    def noise(old: Any) -> Any:
        return old + torch.randn(old.shape, generator=draw)

    # Where one norm spans the q of all heads, only what keeps its size stays within one of them.
    spans = any(
        key.endswith("q_norm.weight") and tensor.shape == (24,) for key, tensor in made.tensors.items()
    )
    change = torch.neg if spans else noise
    for units in blocks:
        assert len(units) == _kv_heads(name, units[0][0].tensor.info.name)
        for unit in units:
            (column,) = [member for member in unit if member.columns]
            rest = [member for member in unit if not member.columns]
            assert len(rest) in (1, 3)
            silent = _edited(made, torch.zeros_like, column)
            out = made.run(silent, tmp_path)
            assert not _same(out, base, 1.0)
            for together in [[member] for member in rest] if spans else [rest]:
                tensors = {key: tensor.clone() for key, tensor in silent.items()}
                for member in together:
                    member.edit(tensors, change)
                assert _same(made.run(tensors, tmp_path), out, 0.1), together[0].tensor.info.name
        # The control: the same change is heard where the columns are not silent.
        assert not _same(made.run(_edited(made, change, *rest), tmp_path), base, 1.0)


@pytest.mark.parametrize("name", CASES)
def test_unit_ids_count_up_in_the_order_of_first_members(name: str, sample: Callable[[str], Sample]) -> None:
    anatomy = sample(name).anatomy("units")
    first_seen: dict[int, None] = {}
    for tensor in sorted(anatomy.scored, key=lambda tensor: tensor.info.name):
        assert tensor.units is not None
        ids = tensor.units.ids()
        assert ids.dtype == np.int64
        assert len(ids) == len(tensor.units) == tensor.layout.count
        first_seen.update(dict.fromkeys(ids.tolist()))
    assert list(first_seen) == list(range(anatomy.unit_count))


@pytest.mark.parametrize("name", CASES)
def test_ffn_scores_as_many_up_rows_as_down_columns(name: str, sample: Callable[[str], Sample]) -> None:
    made = sample(name)
    rows = {tensor.info.name: tensor.axes for tensor in made.anatomy("rows").scored}
    up = down = 0
    for tensor in made.anatomy("ffn").scored:
        count = tensor.layout.count
        if tensor.part is not None:
            assert tensor.part.count == tensor.part.mask().sum() == count // 2
            count //= 2
        if tensor.axes == rows[tensor.info.name]:
            up += count
        else:
            down += count
            assert tensor.bias is None
    assert up == down > 0


@pytest.mark.parametrize("model_type", sorted({case.partition(" ")[0] for case in CASES}))
def test_default_heads_are_those_of_the_config_class(model_type: str) -> None:
    config = transformers.CONFIG_MAPPING[model_type]
    renamed = config.attribute_map

    def default(*names: str) -> Any:
        found = [renamed.get(name, name) for name in names]
        return next((getattr(config, name) for name in found if hasattr(config, name)), None)

    heads = default("num_attention_heads", "num_heads")
    if heads is not None:
        assert architectures().head_counts[model_type] == (
            heads,
            default("num_key_value_heads", "num_kv_heads"),
        )
