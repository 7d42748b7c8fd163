"""The architectures of the zoo: untrained pipelines, what their denoiser is told of a caption, and what it has to predict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.zoo.vocabulary import TOKENS
from benchmarks.zoo.world import SIZE

LATENT = SIZE // 4
#: Stable Diffusion's noise schedule; the network predicts v.
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
#: Stable Diffusion's noise schedule, whatever is predicted.
NOISE = {name: value for name, value in SCHEDULE.items() if name != "prediction_type"}
#: of a squared error of the noise in terms of the velocity's.
MOST_WEIGHT = 100.0
#: tokens of the absent third text encoder that `StableDiffusion3Pipeline` fills with zeros.
EMPTY_TOKENS = 256


def text_config(tokenizer: CLIPTokenizer, width: int, **more: Any) -> CLIPTextConfig:
    """A small CLIP text encoder's configuration."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def new_unet(channels: tuple[int, ...], cross_attention_dim: int, **more: Any) -> UNet2DConditionModel:
    """A small U-Net over latents of `LATENT` pixels."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=16,
        **more,
    ).to(memory_format=torch.channels_last)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text transformer over ``tokenizer``'s vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=640,
            num_hidden_layers=3,
            num_attention_heads=5,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_embedded_unet(cross_attention_dim: int) -> UNet2DConditionModel:
    """A conditional UNet over 4x16x16 latents, in options that diffusers .18 already had."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_sd1(tokenizer: CLIPTokenizer, vae: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1's parts: one text encoder, a U-Net that predicts the noise."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, 96)),
        tokenizer=tokenizer,
        unet=new_unet((64, 80, 112), 96, attention_head_dim=4),
        scheduler=PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def new_embedded(tokenizer: CLIPTokenizer, vae: Any) -> StableDiffusionPipeline:
    """The embedded model's parts: those of `new_sd1`, larger, and a U-Net that predicts the velocity."""
    text_encoder = new_text_encoder(tokenizer)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=new_embedded_unet(text_encoder.config.hidden_size).to(memory_format=torch.channels_last),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def new_sdxl(tokenizer: CLIPTokenizer, vae: Any) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL's parts: two text encoders, a pooled embedding, six sizes, a U-Net that predicts the noise."""
    pooled, per_size = 64, 16
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, 64)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, pooled)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=new_unet(
            (64, 80, 96),
            64 + pooled,
            attention_head_dim=(2, 4, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=per_size,
            projection_class_embeddings_input_dim=pooled + 6 * per_size,
        ),
        scheduler=EulerDiscreteScheduler(**NOISE, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )


def new_sd3(tokenizer: CLIPTokenizer, vae: Any) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3's parts, without its optional third text encoder: two text encoders, a transformer, flow matching."""
    width = 64
    vae.register_to_config(shift_factor=0.0)
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer, width)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, width)),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=SD3Transformer2DModel(
            sample_size=LATENT,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=6,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=2 * width,
            caption_projection_dim=128,
            pooled_projection_dim=2 * width,
            pos_embed_max_size=LATENT,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


class LastKeyCounts(TorchFunctionMode):
    """Attention in which the last key counts as many alike.

    Keys that are equal, as those of the empty tokens are in every layer (no position tells them apart), share one weight: one of them
    with log n added to its logit gives what n of them give, at a quarter of the cost.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Add the weight to every attention that is computed."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            key = args[1]
            kwargs = {
                **kwargs,
                "attn_mask": F.pad(key.new_zeros(1, key.shape[-2] - 1), (0, 1), value=math.log(self.n)),
            }
        return func(*args, **kwargs)


class Denoiser(nn.Module):
    """A pipeline's denoiser as a function of tensors alone: noisy latents, timesteps, and what `Shape.told` tells."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.unet, self.transformer = pipe.components.get("unet"), pipe.components.get("transformer")

    def forward(self, noisy: Tensor, t: Tensor, embedded: Tensor, *pooled: Tensor) -> Tensor:
        """The prediction, as ``noisy``."""
        if self.transformer is not None:
            with LastKeyCounts(EMPTY_TOKENS):
                return cast(Tensor, self.transformer(noisy, embedded, pooled[0], t, return_dict=False)[0])
        added = {"text_embeds": pooled[0], "time_ids": pooled[1]} if pooled else None
        return cast(Tensor, self.unet(noisy, t, embedded, added_cond_kwargs=added, return_dict=False)[0])


def told_sd1(pipe: Any, texts: list[str], crops: Tensor) -> tuple[Tensor, ...]:
    """What the U-Net is told of captions; crops are not its concern but for where they lie."""
    return (pipe.encode_prompt(texts, crops.device, 1, False)[0],)


def told_sdxl(pipe: Any, texts: list[str], crops: Tensor) -> tuple[Tensor, ...]:
    """What the U-Net is told of captions and of crops ``[n, 3]`` (side, top, left); an empty caption is zeros, as the pipeline has it."""
    embedded, _, pooled, _ = pipe.encode_prompt(texts, device=crops.device, do_classifier_free_guidance=False)
    filled = torch.tensor([bool(text) for text in texts], device=crops.device)
    side, top, left = crops.T
    target = torch.full_like(side, SIZE)
    ids = torch.stack([side, side, top, left, target, target], dim=1)
    return embedded * filled[:, None, None], pooled * filled[:, None], ids.to(pooled.dtype)


def told_sd3(pipe: Any, texts: list[str], crops: Tensor) -> tuple[Tensor, ...]:
    """What the transformer is told of captions, one empty token for `EMPTY_TOKENS` of them; crops are not its concern."""
    embedded, _, pooled, _ = pipe.encode_prompt(
        texts, None, None, device=crops.device, do_classifier_free_guidance=False, max_sequence_length=1
    )
    return embedded, pooled


class Lesson(NamedTuple):
    """Noisy latents ``[n, C, h, w]``, their timesteps ``[n]``, what is to be predicted, and what its squared error counts, ``[n]``."""

    noisy: Tensor
    timestep: Tensor
    wanted: Tensor
    weight: Tensor


@lru_cache(maxsize=1)
def noise_scheduler() -> DDPMScheduler:
    """Adds Stable Diffusion's noise."""
    return DDPMScheduler(**NOISE)


def noise_lesson(x0: Tensor, noise: Tensor, draw: Tensor) -> Lesson:
    """The noise, at uniform timesteps; its squared error counts as that of the velocity it means (Salimans & Ho 2022, section 4), at most
    `MOST_WEIGHT`.

    Counted as it is, errors at high noise, where the caption is all there is to go by, weigh next to nothing: a model of this size then
    learns neither backgrounds nor names in the steps it has.
    """
    scheduler, t = noise_scheduler(), (draw * 1000).long().clamp(max=999)
    weight = (1 / scheduler.alphas_cumprod.to(t.device)[t]).clamp(max=MOST_WEIGHT)
    return Lesson(scheduler.add_noise(x0, noise, t), t, noise, weight)


def velocity_lesson(x0: Tensor, noise: Tensor, draw: Tensor) -> Lesson:
    """The velocity (Salimans & Ho 2022, appendix D), at uniform timesteps."""
    scheduler, t = noise_scheduler(), (draw * 1000).long().clamp(max=999)
    return Lesson(scheduler.add_noise(x0, noise, t), t, scheduler.get_velocity(x0, noise, t), torch.ones_like(draw))


def flow_lesson(x0: Tensor, noise: Tensor, draw: Tensor) -> Lesson:
    """The velocity, part of the way to noise; ways are logit-normal (Esser et al. 2024, section 3.1), every eighth uniform."""
    way = torch.where(draw < 1 / 8, 8 * draw, torch.special.ndtri(draw.clamp(1e-4, 1 - 1e-4)).sigmoid())
    part = way.view(-1, 1, 1, 1)
    return Lesson((1 - part) * x0 + part * noise, 1000 * way, noise - x0, torch.ones_like(way))


@dataclass(frozen=True)
class Shape:
    """One architecture: how a pipeline of it is made, what its denoiser is told, what it is taught."""

    new: Callable[[CLIPTokenizer, Any], Any]
    told: Callable[[Any, list[str], Tensor], tuple[Tensor, ...]]
    lesson: Callable[[Tensor, Tensor, Tensor], Lesson]


SHAPES = {
    "sd1": Shape(new_sd1, told_sd1, noise_lesson),
    "sdxl": Shape(new_sdxl, told_sdxl, noise_lesson),
    "sd3": Shape(new_sd3, told_sd3, flow_lesson),
    "embedded": Shape(new_embedded, told_sd1, velocity_lesson),
}


def trained_parts(pipe: Any) -> nn.ModuleDict:
    """The parts of a pipeline that learn: denoiser and text encoders, by their names."""
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    return nn.ModuleDict({name: pipe.components[name] for name in names if pipe.components.get(name) is not None})


def precision(device: torch.device) -> torch.autocast:
    """What the networks compute in: bf16 on a GPU; on a CPU that takes twice as long. Without the cache, which no graph can hold."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def as_graph(pipe: Any, shape: Shape, denoiser: Denoiser, x0: Tensor, texts: list[str], crops: Tensor) -> Denoiser:
    """The denoiser as one CUDA graph for batches of this size: its kernels are so small that starting them takes most of the time."""
    with precision(x0.device):
        told = [each.detach().requires_grad_(each.requires_grad) for each in shape.told(pipe, texts, crops)]
        lesson = shape.lesson(x0, torch.randn_like(x0), torch.rand(len(x0), device=x0.device))
        example = (lesson.noisy, lesson.timestep, *told)
        return cast(Denoiser, torch.cuda.make_graphed_callables(denoiser, example, allow_unused_input=True))


def loss(pipe: Any, shape: Shape, denoiser: Denoiser, x0: Tensor, noise: Tensor, draw: Tensor, texts: list[str], crops: Tensor) -> Tensor:
    """Weighted mean squared error of the denoiser's prediction; ``draw`` ``[n]`` is uniform, the others ``[n, ...]``, all on one device."""
    noisy, t, wanted, weight = shape.lesson(x0, noise, draw)
    with precision(x0.device):
        predicted = denoiser(noisy, t, *shape.told(pipe, texts, crops))
    return ((predicted.float() - wanted).square().mean(dim=(1, 2, 3)) * weight).mean()
