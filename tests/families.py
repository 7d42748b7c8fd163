"""Tiny randomly initialised pipelines of every family, 16 pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SIZE = 16


def vae(channels: int = 4, **extra: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=SIZE,
        **extra,
    )


def text_config(tokenizer: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=16,
        eos_token_id=tokenizer.eos_token_id,
    )


def unet(in_channels: int = 4, cross_attention_dim: int = 16, **extra: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=4,
        **extra,
    )


def scheduler(**extra: Any) -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, **extra)


def sd(name: str, tokenizer: Any, in_channels: int = 4, **extra: Any) -> Any:
    return getattr(diffusers, name)(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet(in_channels),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **extra,
    )


def sdxl(name: str, tokenizer: Any, **extra: Any) -> Any:
    added: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    return getattr(diffusers, name)(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(cross_attention_dim=32, **added),
        scheduler=scheduler(),
        **extra,
    )


def sd3(name: str, tokenizer: Any) -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    return getattr(diffusers, name)(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def controlnet(cross_attention_dim: int = 16, **extra: Any) -> ControlNetModel:
    model = ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8),
        **extra,
    )
    for parameter in model.parameters():  # its zero convolutions would make it have no effect
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def picture() -> torch.Tensor:
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def mask() -> torch.Tensor:
    whole = torch.zeros(1, 1, SIZE, SIZE)
    whole[..., SIZE // 2 :] = 1
    return whole


#: pipeline class -> (how it is made, what its call needs beside prompts)
PIPELINES: dict[str, tuple[Callable[[Any], Any], Callable[[], dict[str, Any]]]] = {
    "StableDiffusionPipeline": (lambda t: sd("StableDiffusionPipeline", t), dict),
    "StableDiffusionImg2ImgPipeline": (lambda t: sd("StableDiffusionImg2ImgPipeline", t), lambda: {"image": picture(), "strength": 0.8}),
    "StableDiffusionInpaintPipeline": (
        lambda t: sd("StableDiffusionInpaintPipeline", t, in_channels=9),
        lambda: {"image": picture(), "mask_image": mask(), "height": SIZE, "width": SIZE},
    ),
    "StableDiffusionControlNetPipeline": (
        lambda t: sd("StableDiffusionControlNetPipeline", t, controlnet=controlnet()),
        lambda: {"image": picture()},
    ),
    "StableDiffusionXLPipeline": (lambda t: sdxl("StableDiffusionXLPipeline", t), dict),
    "StableDiffusionXLImg2ImgPipeline": (
        lambda t: sdxl("StableDiffusionXLImg2ImgPipeline", t),
        lambda: {"image": picture(), "strength": 0.8},
    ),
    "StableDiffusionXLInpaintPipeline": (
        lambda t: sdxl("StableDiffusionXLInpaintPipeline", t),
        lambda: {"image": picture(), "mask_image": mask(), "height": SIZE, "width": SIZE, "strength": 0.9},
    ),
    "StableDiffusion3Pipeline": (lambda t: sd3("StableDiffusion3Pipeline", t), lambda: {"max_sequence_length": 8}),
    "StableDiffusion3Img2ImgPipeline": (
        lambda t: sd3("StableDiffusion3Img2ImgPipeline", t),
        lambda: {"image": picture().repeat(3, 1, 1, 1), "strength": 0.8, "max_sequence_length": 8, "height": SIZE, "width": SIZE},
    ),
}


def build(name: str, tokenizer: Any) -> Any:
    """A pipeline of a class, the same each time."""
    torch.manual_seed(1)
    pipe = PIPELINES[name][0](tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe
