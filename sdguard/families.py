"""Families of pipelines: what the guard has to know of each, as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, cat

#: the denoiser's argument that carries the token embeddings, in every family.
TEXT = "encoder_hidden_states"

#: arguments of a pipeline's call that its prompts are encoded with.
ENCODING = ("max_sequence_length",)

#: (pipeline, texts, options) -> token embeddings, pooled ones or None, and the same of the pipeline's own unconditional prompt.
Encode = Callable[[Any, list[str], dict[str, Any]], tuple[Tensor, Tensor | None, Tensor, Tensor | None]]


def encode_clip(pipe: Any, texts: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """One text encoder, no pooled embedding: Stable Diffusion 1 and 2."""
    text, null = pipe.encode_prompt(texts, pipe._execution_device, 1, True, clip_skip=pipe.clip_skip, **options)
    return text, None, null, None


def encode_two_clips(pipe: Any, texts: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Two text encoders and a pooled embedding: SDXL. The texts go to both encoders."""
    text, null, pooled, null_pooled = pipe.encode_prompt(
        prompt=texts,
        device=pipe._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        clip_skip=pipe.clip_skip,
        **options,
    )
    return text, pooled, null, null_pooled


def encode_three(pipe: Any, texts: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Two CLIPs, a T5 and a pooled embedding: Stable Diffusion 3. The texts go to all encoders."""
    text, null, pooled, null_pooled = pipe.encode_prompt(
        prompt=texts,
        prompt_2=None,
        prompt_3=None,
        device=pipe._execution_device,
        do_classifier_free_guidance=True,
        clip_skip=pipe.clip_skip,
        **options,
    )
    return text, pooled, null, null_pooled


@dataclass(frozen=True)
class Family:
    """What the guard needs to know of pipeline classes that are alike.

    Attributes:
        encode: how their prompts are encoded.
        denoiser: the pipeline's attribute that holds it.
        sample: name of the denoiser's first argument.
        pooled: where among the denoiser's arguments the pooled text embedding is, if there is one.
        scale: the pipeline's attribute that holds what scales LoRA in the text encoder, in its ``scale`` entry.
    """

    encode: Encode
    denoiser: str = "unet"
    sample: str = "sample"
    pooled: tuple[str, ...] = ()
    scale: str = "cross_attention_kwargs"
    classes: tuple[str, ...] = field(default=(), repr=False)


SD = Family(
    encode_clip,
    classes=(
        "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
    ),
)  # fmt: skip
SDXL = Family(
    encode_two_clips,
    pooled=("added_cond_kwargs", "text_embeds"),
    classes=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
)
SD3 = Family(
    encode_three,
    denoiser="transformer",
    sample="hidden_states",
    pooled=("pooled_projections",),
    scale="joint_attention_kwargs",
    classes=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
)

#: pipeline class name -> family. The batch is laid out unconditional rows first, as in diffusers.
FAMILIES: dict[str, Family] = {name: family for family in (SD, SDXL, SD3) for name in family.classes}


def family_of(pipe: Any) -> Family:
    """The family of a pipeline; raises `TypeError` for a class sdguard does not know."""
    name = type(pipe).__name__
    if name not in FAMILIES:
        raise TypeError(f"sdguard does not support {name} yet; supported: {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[name]


def denoiser_of(pipe: Any) -> Any:
    """The pipeline's denoiser."""
    return getattr(pipe, family_of(pipe).denoiser)


def default_size(pipe: Any) -> int:
    """Height and width in pixels of what a pipeline makes when it is not told."""
    return int(denoiser_of(pipe).config.sample_size * pipe.vae_scale_factor)


def blends(pipe: Any) -> bool:
    """Whether the pipeline puts known parts of the picture back after every step, so that a row cannot be gone through again apart."""
    return "Inpaint" in type(pipe).__name__


def packed(tokens: Tensor, pooled: Tensor | None) -> Tensor:
    """Token embeddings and, as a last row, the pooled one, ``[n, T (+ 1), E]``; the narrower are filled up with zeros."""
    if pooled is None:
        return tokens
    width = max(tokens.shape[-1], pooled.shape[-1])
    return cat([F.pad(part, (0, width - part.shape[-1])) for part in (tokens, pooled.unsqueeze(1))], dim=1)


@dataclass(frozen=True)
class Encoder:
    """The text encoders of a pipeline, as a running call of the pipeline uses them for its own prompts.

    Attributes:
        pipe: the pipeline.
        options: further arguments of its ``encode_prompt``.
    """

    pipe: Any
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pipe: Any, given: dict[str, Any]) -> Encoder:
        """The encoder as a call with the arguments ``given`` uses it."""
        return cls(pipe, {name: given[name] for name in ENCODING if name in given})

    def both(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Text condition of n texts, and of the unconditional prompt for each, ``[n, T (+ 1), E]``."""
        family = family_of(self.pipe)
        scale = (getattr(self.pipe, family.scale, None) or {}).get("scale")
        text, pooled, null, null_pooled = family.encode(self.pipe, texts, {"lora_scale": scale, **self.options})
        return packed(text, pooled), packed(null, null_pooled)

    def __call__(self, texts: list[str]) -> Tensor:
        """Text condition of n texts, ``[n, T (+ 1), E]``."""
        return self.both(texts)[0]

    def length(self, text: str) -> int:
        """Tokens of ``text``, begin and end token included, that fit into the text encoder's window."""
        tokenizer = self.pipe.tokenizer
        return min(len(tokenizer(text).input_ids), int(tokenizer.model_max_length))

    @property
    def pads_with_end(self) -> bool:
        """Whether what lies behind a prompt is filled with copies of the end token, by the only text encoder there is."""
        alone = not family_of(self.pipe).pooled
        return alone and bool(self.pipe.tokenizer.pad_token_id == self.pipe.tokenizer.eos_token_id)
