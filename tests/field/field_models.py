"""Small models of many libraries: how each is made, run, saved and loaded by its own library."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import sentence_transformers
import timm
import torch
import transformers
from torch import Tensor, nn

__all__ = ["MODELS", "FieldModel"]


@dataclass(frozen=True)
class FieldModel:
    """A model of a library; the ``parts`` of a folder of several, by what comes before their names."""

    make: Callable[[], Any]
    save: Callable[[Any, Path], object]
    load: Callable[[Path], Any]
    run: Callable[[Any], Tensor]
    parts: Callable[[Any], Mapping[str, nn.Module]] = lambda model: {"": model}


def _latent(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _diffusers(cls: Any, run: Callable[[Any], Tensor], **config: Any) -> FieldModel:
    return FieldModel(
        lambda: cls(**config), lambda model, path: model.save_pretrained(path), cls.from_pretrained, run
    )


_BLOCKS: dict[str, Any] = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 32, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}  # fmt: skip
_UNET = _BLOCKS | {"sample_size": 8, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
_VAE: dict[str, Any] = {
    "block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
_SDXL = _UNET | {
    "attention_head_dim": (2, 4), "use_linear_projection": True, "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}  # fmt: skip
_TEXT = _latent(1, 6, 32)


def _unet(model: Any) -> Tensor:
    return model(_latent(1, 4, 8, 8), 10, _TEXT).sample


def _sdxl(model: Any) -> Tensor:
    added = {"text_embeds": _latent(1, 32), "time_ids": _latent(1, 6)}
    return model(_latent(1, 4, 8, 8), 10, _TEXT, added_cond_kwargs=added).sample


def _sd3(model: Any) -> Tensor:
    return model(_latent(1, 4, 8, 8), _TEXT, _latent(1, 64), torch.tensor([3])).sample


def _flux(model: Any) -> Tensor:
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)}
    return model(_latent(1, 16, 4), _TEXT, _latent(1, 32), torch.tensor([1.0]), **ids).sample


def _controlnet(model: Any) -> Tensor:
    down, middle = model(_latent(1, 4, 8, 8), 10, _TEXT, _latent(1, 3, 16, 16), return_dict=False)
    return torch.cat([one.flatten() for one in (*down, middle)])


def _pipeline() -> Any:
    letters = [chr(97 + n) for n in range(26)]
    words = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    text = transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=16, projection_dim=32,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**_VAE),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[]),
        unet=diffusers.UNet2DConditionModel(**_UNET, attention_head_dim=8),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _run_pipeline(pipeline: Any) -> Tensor:
    words = pipeline.text_encoder(torch.arange(12).reshape(1, 12)).last_hidden_state
    pixels = pipeline.vae(_latent(1, 3, 16, 16)).sample
    return torch.cat([one.flatten() for one in (_unet(pipeline.unet), words, pixels)])


def _pipeline_parts(pipeline: Any) -> Mapping[str, nn.Module]:
    return {f"{name}/": getattr(pipeline, name) for name in ("text_encoder", "unet", "vae")}


def _timm(name: str, size: int, **arguments: Any) -> FieldModel:
    def save(model: Any, path: Path) -> None:
        config = {"model_args": arguments}
        timm.models.save_for_hf(model, path, model_config=config, safe_serialization=True)

    return FieldModel(
        lambda: timm.create_model(name, num_classes=5, **arguments),
        save,
        lambda path: timm.create_model(f"local-dir:{path}", pretrained=True),
        lambda model: model(_latent(1, 3, size, size)),
    )


def _sentences() -> Any:
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + n) for n in range(26))]
    with tempfile.TemporaryDirectory() as folder:
        transformers.BertModel(config).save_pretrained(folder)
        transformers.BertTokenizer(vocab={word: n for n, word in enumerate(words)}).save_pretrained(folder)
        modules = [Transformer(folder), Pooling(32, "mean"), Dense(32, 6), Normalize()]
    return sentence_transformers.SentenceTransformer(modules=modules, device="cpu")


def _embed(model: Any) -> Tensor:
    return model(model.preprocess(["a b c", "d e"]))["sentence_embedding"]


def _transformers(cls: Any, config: Any, run: Callable[[Any], Tensor]) -> FieldModel:
    return FieldModel(
        lambda: cls(config), lambda model, path: model.save_pretrained(path), cls.from_pretrained, run
    )


def _musicgen_config() -> Any:
    decoder = transformers.MusicgenDecoderConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4,
        num_codebooks=2, pad_token_id=16, bos_token_id=16,
    )  # fmt: skip
    text = transformers.T5Config(
        vocab_size=40, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, pad_token_id=0
    )
    audio = transformers.EncodecConfig(
        hidden_size=16,
        num_filters=4,
        num_lstm_layers=1,
        upsampling_ratios=[2, 2],
        codebook_size=16,
        codebook_dim=16,
    )
    return transformers.MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)


def _musicgen(model: Any) -> Tensor:
    codes = torch.arange(12).reshape(4, 3) % 16
    return model(input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]), decoder_input_ids=codes).logits


def _sam_config() -> Any:
    vision = transformers.SamVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=4, mlp_dim=48,
        output_channels=16, global_attn_indexes=[1], window_size=4, num_pos_feats=8,
    )  # fmt: skip
    prompt = transformers.SamPromptEncoderConfig(
        hidden_size=16, image_size=32, patch_size=4, mask_input_channels=4
    )
    mask = transformers.SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=24, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
    )
    return transformers.SamConfig(
        vision_config=vision.to_dict(),
        prompt_encoder_config=prompt.to_dict(),
        mask_decoder_config=mask.to_dict(),
    )


def _sam(model: Any) -> Tensor:
    return model(pixel_values=_latent(1, 3, 32, 32), input_points=torch.tensor([[[[4.0, 8.0]]]])).pred_masks


def _generator() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((12, 16), (16, 8)):
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh()).eval()


def _save_generator(model: nn.Module, path: Path) -> None:
    path.mkdir()
    safetensors.torch.save_model(model, str(path / "generator.safetensors"))
    (path / "config.json").write_text(json.dumps({"latent": 12}))


def _load_generator(path: Path) -> nn.Module:
    model = _generator()
    safetensors.torch.load_model(model, str(path / "generator.safetensors"))
    return model


MODELS: dict[str, FieldModel] = {
    "sd-unet": _diffusers(diffusers.UNet2DConditionModel, _unet, **_UNET, attention_head_dim=8),
    "sdxl-unet": _diffusers(diffusers.UNet2DConditionModel, _sdxl, **_SDXL),
    "sd3": _diffusers(
        diffusers.SD3Transformer2DModel, _sd3, sample_size=8, patch_size=1, in_channels=4, num_layers=1,
        attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4,
    ),
    "flux": _diffusers(
        diffusers.FluxTransformer2DModel, _flux, patch_size=1, in_channels=4, num_layers=1,
        num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    ),
    "autoencoder": _diffusers(diffusers.AutoencoderKL, lambda m: m(_latent(1, 3, 16, 16)).sample, **_VAE),
    "controlnet": _diffusers(
        diffusers.ControlNetModel, _controlnet, **_BLOCKS, attention_head_dim=8,
        conditioning_embedding_out_channels=(8, 16),
    ),
    "sd-pipeline": FieldModel(
        _pipeline,
        lambda pipeline, path: pipeline.save_pretrained(path),
        diffusers.StableDiffusionPipeline.from_pretrained,
        _run_pipeline,
        _pipeline_parts,
    ),
    "timm-vit": _timm("vit_tiny_patch16_224", 32, img_size=32, embed_dim=32, depth=2, num_heads=2),
    "timm-convnext": _timm("convnext_atto", 64, dims=(8, 16, 16, 32), depths=(1, 1, 1, 1)),
    "timm-resnet": _timm("test_resnet", 32),
    "timm-swin": _timm(
        "swin_tiny_patch4_window7_224", 56, img_size=56, embed_dim=16, depths=(1, 1), num_heads=(2, 2)
    ),
    "sentence-transformers": FieldModel(
        _sentences,
        lambda model, path: model.save_pretrained(str(path)),
        lambda path: sentence_transformers.SentenceTransformer(str(path), device="cpu"),
        _embed,
        lambda model: {"": model[0].model, "2_Dense/": model[2]},
    ),
    "musicgen": _transformers(transformers.MusicgenForConditionalGeneration, _musicgen_config(), _musicgen),
    "sam": _transformers(transformers.SamModel, _sam_config(), _sam),
    "gan-generator": FieldModel(
        _generator, _save_generator, _load_generator, lambda model: model(_latent(1, 12, 4, 4))
    ),
}  # fmt: skip
