"""Families of pipelines: what the guard has to know of each, as a table."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from diffusers import ModularPipeline
from torch import Tensor, nn

from sdguard.observation import noise_level, prediction_type, to_noise

#: the denoiser's argument that carries the token embeddings, in every family.
TEXT = "encoder_hidden_states"

#: (pipeline, texts, options) -> token embeddings, pooled ones or None, and the same of the pipeline's own unconditional prompt.
Encode = Callable[[Any, list[str], dict[str, Any]], tuple[Tensor, Tensor | None, Tensor, Tensor | None]]


def encode_clip(pipe: Any, texts: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """One text encoder, no pooled embedding: Stable Diffusion 1 and 2."""
    text, null = pipe.encode_prompt(texts, pipe._execution_device, 1, True, **options)
    return text, None, null, None


def encode_two_clips(pipe: Any, texts: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Two text encoders and a pooled embedding: SDXL. The texts go to both encoders."""
    text, null, pooled, null_pooled = pipe.encode_prompt(
        prompt=texts,
        device=pipe._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
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
        **options,
    )
    return text, pooled, null, null_pooled


def encode_clip_and_t5(pipe: Any, texts: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """A T5 and a CLIP's pooled embedding: Flux, whose unconditional prompt is the empty one. The texts go to both encoders."""
    text, pooled, _ = pipe.encode_prompt(prompt=[*texts, ""], prompt_2=None, device=pipe._execution_device, **options)
    count = len(texts)
    return text[:count], pooled[:count], text[count:].expand(count, -1, -1), pooled[count:].expand(count, -1)


def encode_with_mask(pipe: Any, texts: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """One text encoder, and which tokens count: PixArt-Sigma and Sana."""
    text, mask, null, null_mask = pipe.encode_prompt(texts, True, device=pipe._execution_device, **options)
    return text, mask, null, null_mask


def encode_t5(pipe: Any, texts: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """A T5, and which tokens count: Chroma."""
    text, _, mask, null, _, null_mask = pipe.encode_prompt(texts, device=pipe._execution_device, **options)
    return text, mask, null, null_mask


def encode_by_template(pipe: Any, texts: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """A language model that reads a prompt as a message: Flux 2 Klein, whose unconditional prompt is the empty message."""
    given = {name: value for name, value in options.items() if name != "lora_scale"}
    text, _ = pipe.encode_prompt([*texts, ""], device=pipe._execution_device, **given)
    count = len(texts)
    return text[:count], None, text[count:].expand(count, -1, -1), None


def encode_in_blocks(pipe: Any, texts: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """SDXL as a modular pipeline, whose encoding is its text block's. The texts go to both encoders."""
    from diffusers.modular_pipelines.stable_diffusion_xl.encoders import StableDiffusionXLTextEncoderStep

    text, null, pooled, null_pooled = StableDiffusionXLTextEncoderStep.encode_prompt(pipe, texts, **options)
    return text, pooled, null, null_pooled


def encode_three_in_blocks(pipe: Any, texts: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Stable Diffusion 3 as a modular pipeline, which has no unconditional prompt of its own: it is the empty one here."""
    from diffusers.modular_pipelines.stable_diffusion_3.encoders import encode_prompt

    text, null, pooled, null_pooled = encode_prompt(pipe, texts, negative_prompt="", **options)
    return text, pooled, null, null_pooled


def classifier_free(pipe: Any, given: dict[str, Any]) -> float:
    """Guidance in one call of the denoiser, unconditional rows first."""
    if not hasattr(pipe, "_guidance_scale"):  # a loop of somebody's own need not say what it does
        cls: type = type(pipe)
        defaults = (of.parameters["guidance_scale"].default for of in signatures_of_call(cls) if "guidance_scale" in of.parameters)
        scales = (given.get("guidance_scale"), *defaults)
        return next(float(scale) for scale in scales if isinstance(scale, (int, float)))
    return float(pipe.guidance_scale) if pipe.do_classifier_free_guidance else 1.0


def told_guidance(pipe: Any, given: dict[str, Any]) -> float:
    """The same where the pipeline itself does not keep the scale."""
    return max(1.0, float(given.get("guidance_scale", default_of(pipe, "guidance_scale"))))


def true_guidance(pipe: Any, given: dict[str, Any]) -> float:
    """Guidance beside a distilled one, where there is a negative prompt."""
    names = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    negative = given.get("negative_prompt") is not None or all(given.get(name) is not None for name in names)
    return max(1.0, float(given.get("true_cfg_scale", 1.0))) if negative else 1.0


def by_guider(pipe: Any, given: dict[str, Any]) -> float:
    """Guidance by a modular pipeline's guider, at the step that it is at."""
    guider = pipe.guider
    return float(guider.guidance_scale + guider.use_original_formulation) if guider._is_cfg_enabled() else 1.0


#: the guidance scales that distilled models are told: the defaults of the pipelines that they came with, since those of other pipelines of
#: the same model are others.
TOLD_FLUX, TOLD_CONSISTENCY = 3.5, 8.5

#: the embedding of what latent consistency models are told, ``[1, width]``, by width, device and dtype: bringing it to a GPU is a wait.
_told: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

#: (pipeline, latents it is called with, [B, C, H, W]) -> the denoiser's other arguments in plain text-to-image.
PlainArguments = Callable[[Any, Tensor], dict[str, Any]]


@functools.cache
def signatures_of_call(cls: type) -> list[inspect.Signature]:
    """The signatures of a pipeline class's call, and of those of the classes it is made from.

    One that takes anything by place says nothing, and hands all on to the next.
    """
    found = [inspect.signature(base.__call__) for base in cls.__mro__ if "__call__" in vars(base)]
    return [of for of in found if not any(part.kind is part.VAR_POSITIONAL for part in of.parameters.values())] or found


@functools.cache
def parameters_of_call(cls: type) -> Mapping[str, inspect.Parameter]:
    """What a call of a pipeline class takes, by name; where it hands on what it does not name, what those take that it may hand it to."""
    found: dict[str, inspect.Parameter] = {}
    for signature in signatures_of_call(cls):
        parts = {name: part for name, part in signature.parameters.items() if part.kind is not part.VAR_KEYWORD}
        found = {**parts, **found}
        if len(parts) == len(signature.parameters):  # nothing is handed on
            break
    return found


def default_of(pipe: Any, name: str) -> Any:
    """The default of an argument of the pipeline's call, None where it has none."""
    cls: type = type(pipe)
    parameter = parameters_of_call(cls).get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def text_width(widths: Any) -> int:
    """The width of the text embeddings of a U-Net, which has one for all its blocks or one for each."""
    return int(widths[0] if isinstance(widths, (list, tuple)) else widths)


def plain_unet(pipe: Any, x: Tensor) -> dict[str, Any]:
    """Nothing, but for latent consistency models the guidance scale that they are told, and for IP-Adapters pictures that act nowhere."""
    config = pipe.unet.config
    found: dict[str, Any] = {}
    if width := config.time_cond_proj_dim:
        if (kept := (width, x.device, x.dtype)) not in _told:
            with torch.inference_mode(False):
                scale = torch.full((1,), TOLD_CONSISTENCY - 1)
                _told[kept] = pipe.get_guidance_scale_embedding(scale, embedding_dim=width).to(x)
        found["timestep_cond"] = _told[kept].expand(len(x), -1)
    if config.encoder_hid_dim_type == "ip_image_proj":
        layers = pipe.unet.encoder_hid_proj.image_projection_layers
        widths = [next(part.in_features for part in layer.modules() if isinstance(part, nn.Linear)) for layer in layers]
        # one that resamples takes a sequence of them for each picture
        shapes = [(len(x), 1, *[1] * hasattr(layer, "latents"), width) for layer, width in zip(layers, widths, strict=True)]
        found["added_cond_kwargs"] = {"image_embeds": [x.new_zeros(shape) for shape in shapes]}
        # even a picture of nothing acts, by the scale of its adapter, where it is not masked
        found["cross_attention_kwargs"] = {"ip_adapter_masks": [x.new_zeros(1, 1, *x.shape[2:]) for _ in shapes]}
    return found


def plain_sdxl(pipe: Any, x: Tensor) -> dict[str, Any]:
    """The size ids of an uncropped picture of the model's own size; the refiner's have its usual aesthetic score."""
    found, size = plain_unet(pipe, x), default_size(pipe)
    last = (6.0,) if getattr(pipe.config, "requires_aesthetics_score", False) else size
    # number by number, which no GPU is waited for
    ids = torch.stack([x.new_full((), number) for number in (*size, 0, 0, *last)]).expand(len(x), -1)
    return {**found, "added_cond_kwargs": {**found.get("added_cond_kwargs", {}), "time_ids": ids}}


def plain_upscale(pipe: Any, x: Tensor) -> dict[str, Any]:
    """The noise level of the picture that is made larger: the highest that there is, at which it says least."""
    return {**plain_unet(pipe, x), "class_labels": torch.full((len(x),), int(pipe.config.max_noise_level), device=x.device)}


def plain_flux(pipe: Any, x: Tensor) -> dict[str, Any]:
    """No picture for IP-Adapters, and for distilled models the guidance scale that they are told."""
    found: dict[str, Any] = {}
    if getattr(pipe.transformer, "encoder_hid_proj", None) is not None:
        found["joint_attention_kwargs"] = {"ip_hidden_states": []}
    if getattr(pipe.transformer.config, "guidance_embeds", False):
        found["guidance"] = torch.full((len(x),), TOLD_FLUX, device=x.device)
    return found


#: (latents [B, C, H, W], number of tokens) -> what the denoiser is told of the places of patches and tokens.
Places = Callable[[Tensor, int], dict[str, Tensor]]


def grid(x: Tensor, entries: int) -> Tensor:
    """Row and column of each patch of latents, ``[patches, entries]``, behind an entry that says whose patch it is."""
    rows, columns = (side // 2 for side in x.shape[2:])
    places = torch.zeros(rows, columns, entries, device=x.device)
    places[..., 1], places[..., 2] = torch.arange(rows, device=x.device)[:, None], torch.arange(columns, device=x.device)[None]
    return places.flatten(0, 1)


def places_flux(x: Tensor, length: int) -> dict[str, Tensor]:
    """Patches by row and column, and all tokens at one place: Flux and Chroma."""
    return {"img_ids": grid(x, 3).to(x), "txt_ids": x.new_zeros(length, 3)}


def places_flux2(x: Tensor, length: int) -> dict[str, Tensor]:
    """Patches by row and column, tokens one after the other, in a batch of one for all images: Flux 2."""
    tokens = torch.zeros(length, 4, device=x.device)
    tokens[:, 3] = torch.arange(length, device=x.device)
    return {"img_ids": grid(x, 4)[None], "txt_ids": tokens[None]}


#: (latents [B, C, H, W], number of channels) -> so many more channels, as an inpainting model has them where everything is masked.
Behind = Callable[[Tensor, int], Tensor]


def nothing(x: Tensor, channels: int) -> Tensor:
    """A picture of nothing."""
    return x.new_zeros(len(x), channels, *x.shape[2:])


def mask_first(x: Tensor, channels: int) -> Tensor:
    """Everything masked, in one channel, and then a picture of nothing."""
    found = nothing(x, channels)
    found[:, :1] = 1
    return found


def mask_last(x: Tensor, channels: int) -> Tensor:
    """A picture of nothing, and then, in as many channels as a latent has pixels, everything masked."""
    found = nothing(x, channels)
    found[:, x.shape[1] :] = 1
    return found


def two_pooled(pipe: Any) -> int:
    """Width of SDXL's pooled embedding: what of its added conditions the size ids leave."""
    config = pipe.unet.config
    ids = 5 if getattr(pipe.config, "requires_aesthetics_score", False) else 6
    return int(config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim)


@dataclass(frozen=True)
class Family:
    """What the guard needs to know of pipeline classes that are alike.

    Attributes:
        encode: how their prompts are encoded.
        denoiser: the pipeline's attribute that holds it.
        sample: name of the denoiser's first argument.
        by_place: names of the arguments that its pipelines give the denoiser by their places, as wrapped denoisers may name them otherwise.
        plain: the denoiser's other arguments in plain text-to-image.
        behind: what stands behind the latents' own channels in plain text-to-image.
        widths: (pipeline) -> widths of token embeddings and of the pooled one, 0 where there is none.
        beside: where among the denoiser's arguments that is what of a text stands beside its token embeddings, if anything does.
        masks: whether that says which tokens count, and is no pooled embedding.
        scale: the pipeline's attribute that holds what scales LoRA in the text encoder, in its ``scale`` entry.
        guidance: (pipeline, its call's arguments) -> scale of the guidance that joins two branches; 1 where there is one branch.
        sequential_cfg: whether the branches are two calls of the denoiser, the conditional one first, and not one.
        packed_latents: whether latents travel as a sequence of patches.
        drawn_in_patches: whether noise is drawn as patches already.
        places: what the denoiser is told of the places of patches and tokens.
        empty_negative_is_none: whether an empty negative prompt is the same as none.
        timestep_scale: what the denoiser's timestep is multiplied with to be the scheduler's.
    """

    encode: Encode
    denoiser: str = "unet"
    sample: str = "sample"
    by_place: tuple[str, ...] = ("sample", "timestep")
    plain: PlainArguments = plain_unet
    behind: Behind = mask_first
    widths: Callable[[Any], tuple[int, int]] = lambda pipe: (text_width(pipe.unet.config.cross_attention_dim), 0)
    beside: tuple[str, ...] = ()
    masks: bool = False
    scale: str = "cross_attention_kwargs"
    guidance: Callable[[Any, dict[str, Any]], float] = classifier_free
    sequential_cfg: bool = False
    packed_latents: bool = False
    drawn_in_patches: bool = False
    places: Places = lambda x, length: {}
    empty_negative_is_none: bool = True
    timestep_scale: int = 1
    classes: tuple[str, ...] = field(default=(), repr=False)


SD = Family(
    encode_clip,
    classes=(
        "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline", "StableDiffusionControlNetInpaintPipeline",
        "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline",
    ),
)  # fmt: skip
UPSCALE = replace(SD, plain=plain_upscale, behind=nothing, guidance=told_guidance, classes=("StableDiffusionUpscalePipeline",))
SDXL = Family(
    encode_two_clips,
    plain=plain_sdxl,
    widths=lambda pipe: (text_width(pipe.unet.config.cross_attention_dim), two_pooled(pipe)),
    beside=("added_cond_kwargs", "text_embeds"),
    empty_negative_is_none=False,
    classes=(
        "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline", "StableDiffusionXLControlNetImg2ImgPipeline", "StableDiffusionXLControlNetInpaintPipeline",
    ),
)  # fmt: skip
SD3 = Family(
    encode_three,
    plain=lambda pipe, x: {},
    widths=lambda pipe: (int(pipe.transformer.config.joint_attention_dim), int(pipe.transformer.config.pooled_projection_dim)),
    denoiser="transformer",
    sample="hidden_states",
    by_place=(),
    beside=("pooled_projections",),
    scale="joint_attention_kwargs",
    classes=(
        "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
    ),
)  # fmt: skip
FLUX = Family(
    encode_clip_and_t5,
    plain=plain_flux,
    widths=lambda pipe: (int(pipe.transformer.config.joint_attention_dim), int(pipe.transformer.config.pooled_projection_dim)),
    denoiser="transformer",
    sample="hidden_states",
    by_place=(),
    beside=("pooled_projections",),
    scale="joint_attention_kwargs",
    guidance=true_guidance,
    sequential_cfg=True,
    packed_latents=True,
    places=places_flux,
    behind=mask_last,
    empty_negative_is_none=False,
    timestep_scale=1000,
    classes=(
        "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxControlNetPipeline", "FluxKontextPipeline",
        "FluxKontextInpaintPipeline", "FluxFillPipeline",
    ),
)  # fmt: skip
CHROMA = replace(
    FLUX,
    encode=encode_t5,
    widths=lambda pipe: (int(pipe.transformer.config.joint_attention_dim), 0),
    beside=("attention_mask",),
    masks=True,
    guidance=classifier_free,
    classes=("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
)
FLUX2 = replace(
    FLUX,
    encode=encode_by_template,
    widths=lambda pipe: (int(pipe.transformer.config.joint_attention_dim), 0),
    beside=(),
    guidance=classifier_free,
    drawn_in_patches=True,
    places=places_flux2,
    classes=("Flux2KleinPipeline",),
)
PIXART = Family(
    encode_with_mask,
    plain=lambda pipe, x: {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    widths=lambda pipe: (int(pipe.transformer.config.caption_channels), 0),
    denoiser="transformer",
    sample="hidden_states",
    by_place=("hidden_states",),
    beside=("encoder_attention_mask",),
    masks=True,
    guidance=told_guidance,
    classes=("PixArtSigmaPipeline",),
)
SANA = replace(PIXART, plain=lambda pipe, x: {}, scale="attention_kwargs", guidance=classifier_free, classes=("SanaPipeline",))
MODULAR_SDXL = replace(
    SDXL, encode=encode_in_blocks, guidance=by_guider, sequential_cfg=True, classes=("StableDiffusionXLModularPipeline",)
)
MODULAR_SD3 = replace(
    SD3, encode=encode_three_in_blocks, guidance=by_guider, sequential_cfg=True, classes=("StableDiffusion3ModularPipeline",)
)

TABLE = (SD, UPSCALE, SDXL, SD3, FLUX, CHROMA, FLUX2, PIXART, SANA, MODULAR_SDXL, MODULAR_SD3)

#: pipeline class name -> family.
FAMILIES: dict[str, Family] = {name: family for family in TABLE for name in family.classes}

#: what a modular pipeline is told through its guider, and other pipelines, where they can be told, through their call.
GUIDANCE = ("guidance_scale", "guidance_rescale", "use_original_formulation", "start", "stop", "enabled")


#: why pipelines of diffusers are refused for good, or until they are tried, by what is in the names of their classes.
REFUSED: dict[str, str] = {
    "PAG": "it has a branch with perturbed attention, which would hear the prompt as it is given where a flagged image is steered",
    "InstructPix2Pix": "it joins three branches, one of them without the picture, and the guard steers where there are two",
    "Qwen": "it draws guided outputs to the length of the conditional ones, which the guard cannot undo where branches are two calls",
    "ZImage": "its denoiser takes lists of pictures and of texts, and the guard reads batches",
    "Flux2": "of Flux 2 only Klein's own pipeline was tried with the guard yet",
    "Kolors": "its tokenizer needs a package that the guard was not tried with yet",
}


def family_of(pipe: Any) -> Family:
    """The family of a pipeline, that of the nearest class that it is made from; raises `TypeError` for one sdguard does not support."""
    cls: type = type(pipe)
    return family_of_class(cls)


@functools.cache
def family_of_class(cls: type) -> Family:
    """The family of a pipeline class, or of the nearest class that it is made from.

    Raises:
        TypeError: sdguard does not support it, for a reason that is said where it is known.
    """
    for name in (base.__name__ for base in cls.__mro__ if base.__module__.startswith("diffusers.")):
        if name in FAMILIES:
            return FAMILIES[name]
        if why := next((why for part, why in REFUSED.items() if part in name), None):
            raise TypeError(f"sdguard does not support {cls.__name__}: {why}.")
    names = [name.removesuffix("Pipeline") for name in FAMILIES]
    shortest = [name for name in names if not any(name != other and name.startswith(other) for other in names)]
    shortest += [name for name in ("StableDiffusionXL", "StableDiffusion3") if name in names]
    yet = " yet" if cls.__name__.endswith("Pipeline") else ""
    raise TypeError(f"sdguard does not support {cls.__name__}{yet}; it does support pipelines of {', '.join(sorted(shortest))}.")


def is_modular(pipe: Any) -> bool:
    """Whether a pipeline is made of blocks and guided by a component of its own."""
    return isinstance(pipe, ModularPipeline)


def denoiser_of(pipe: Any) -> Any:
    """The pipeline's denoiser."""
    return getattr(pipe, family_of(pipe).denoiser)


def default_size(pipe: Any) -> tuple[int, int]:
    """Height and width in pixels of what a pipeline makes when it is not told."""
    side = getattr(pipe, "default_sample_size", None) or denoiser_of(pipe).config.sample_size
    if side is None:
        raise TypeError("The denoiser's configuration has no sample_size, so that nothing tells the size that the model is meant for.")
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return int(height * pipe.vae_scale_factor), int(width * pipe.vae_scale_factor)


def check_weights(denoiser: nn.Module | None) -> None:
    """Raise `TypeError`, in one sentence, for a denoiser that shows no weights, as one that only calls a traced one."""
    if denoiser is not None and not any(True for _ in chain(denoiser.parameters(), denoiser.buffers())):
        raise TypeError("The denoiser's weights cannot be seen, so that nothing tells which model it is: it is not guarded.")


def check_pipeline(pipe: Any) -> None:
    """Raise `TypeError`, in one sentence, for a pipeline that cannot be guarded as it is: its class, its scheduler, or its denoiser."""
    denoiser, scheduler = denoiser_of(pipe), pipe.scheduler
    if not isinstance(denoiser, nn.Module | None):
        raise TypeError(
            f"The denoiser is a {type(denoiser).__name__} and no torch module, so that the guard cannot stand around its calls."
        )
    check_weights(denoiser)
    if denoiser is not None:
        default_size(pipe)  # says what it needs to know
    if scheduler is not None:
        if scheduler.config.get("invert_sigmas"):
            raise TypeError("The scheduler inverts its sigmas (invert_sigmas), so that its noise levels are not known to sdguard.")
        nothing = torch.zeros(())
        to_noise(nothing, nothing, noise_level(scheduler, 1.0), prediction_type(scheduler))  # says what of these it does not know
