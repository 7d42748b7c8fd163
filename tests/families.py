"""Tiny randomly initialised pipelines of every family, 16 pixels; how they are called, judged and steered in tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    ChromaTransformer2DModel,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    LCMScheduler,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

import sdguard
from sdguard import Profile
from sdguard.correction import Correction
from sdguard.decision.cascade import Cascade, Scale, Stage
from sdguard.steering import SteeringInput
from sdguard.steering.fallback import Outcome

SIZE = 16
PROMPTS = ["a lion", "a frog in forest", "an owl at belen sky, poster"]


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


def one_block() -> UNet2DConditionModel:
    """The smallest denoiser of Stable Diffusion's kind, where each shape of its input is compiled anew."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def scheduler() -> DDIMScheduler:
    """One whose short runs, too, begin where the guard's own reference call is."""
    options: dict[str, Any] = {"beta_schedule": "scaled_linear", "clip_sample": False, "timestep_spacing": "trailing"}
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, **options)


def sd(name: str, tokenizer: Any, in_channels: int = 4, embeds_guidance: int | None = None, **extra: Any) -> Any:
    return getattr(diffusers, name)(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet(in_channels, time_cond_proj_dim=embeds_guidance),
        scheduler=LCMScheduler.from_config(scheduler().config) if embeds_guidance else scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **extra,
    )


def upscale(name: str, tokenizer: Any) -> Any:
    low_res = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    classes: dict[str, Any] = {"num_class_embeds": 400}
    return getattr(diffusers, name)(
        vae=vae(scaling_factor=0.08333),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet(4 + 3, **classes),
        low_res_scheduler=low_res,
        scheduler=scheduler(),
    )


#: SDXL's added conditions
ADDED: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}


def sdxl(name: str, tokenizer: Any, **extra: Any) -> Any:
    return getattr(diffusers, name)(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(cross_attention_dim=32, **ADDED),
        scheduler=scheduler(),
        **extra,
    )


#: the denoiser of `sd3` and its ControlNet
MMDIT: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 1,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 16,
}

#: the denoiser of `flux` and its ControlNet
FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": [4, 4, 8],
    "guidance_embeds": True,
}


def sd3(name: str, tokenizer: Any, channels: int = 4, **extra: Any) -> Any:
    transformer = SD3Transformer2DModel(in_channels=channels, out_channels=channels, **MMDIT)
    return getattr(diffusers, name)(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(channels, shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        **extra,
    )


def t5(tokenizer: Any) -> T5EncoderModel:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), pad_token_id=0, **sizes)).eval()


def flux(name: str, tokenizer: Any, in_channels: int = 16, **extra: Any) -> Any:
    transformer = FluxTransformer2DModel(**{**FLUX, "in_channels": in_channels, "out_channels": 16})
    pipe = getattr(diffusers, name)(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(shift_factor=0.06),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer),
        tokenizer_2=tokenizer,
        **extra,
    )
    pipe.default_sample_size = SIZE // pipe.vae_scale_factor
    return pipe


def chroma(name: str, tokenizer: Any) -> Any:
    sizes = {name: FLUX[name] for name in FLUX if name not in ("pooled_projection_dim", "guidance_embeds")}
    approximator = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    transformer = ChromaTransformer2DModel(**sizes, **approximator)
    transformer.register_to_config(guidance_embeds=False)  # which its inpainting pipeline asks for
    pipe = getattr(diffusers, name)(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(shift_factor=0.06),
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
    )
    pipe.default_sample_size = SIZE // pipe.vae_scale_factor
    return pipe


def flux2(name: str, tokenizer: Any) -> Any:
    """Its text is read off layers 9, 18 and 27 of a language model."""
    qwen: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 27, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    reader = copy.deepcopy(tokenizer)
    reader.chat_template = "{{ messages[0]['content'] }} ."
    pipe = getattr(diffusers, name)(
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            axes_dims_rope=(4, 4, 4, 4),
            timestep_guidance_channels=16,
            guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            layers_per_block=1,
        ),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **qwen, **heads)).eval(),
        tokenizer=reader,
    )
    pipe.default_sample_size = SIZE // pipe.vae_scale_factor
    return pipe


def pixart(name: str, tokenizer: Any) -> Any:
    """One that learns variances, as the published ones do."""
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 32}
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, in_channels=4, out_channels=8, use_additional_conditions=False, **sizes
    )
    return getattr(diffusers, name)(
        transformer=transformer, scheduler=scheduler(), vae=vae(), text_encoder=t5(tokenizer), tokenizer=tokenizer
    )


def sana(name: str, tokenizer: Any) -> Any:
    blocks: dict[str, Any] = {
        f"{part}_{what}": value
        for part in ("encoder", "decoder")
        for what, value in {"block_out_channels": (8, 16), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}.items()
    }
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 32}
    crossing: dict[str, Any] = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
    )
    return getattr(diffusers, name)(
        transformer=SanaTransformer2DModel(in_channels=4, out_channels=4, num_layers=1, sample_size=16, **sizes, **crossing),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=AutoencoderDC(latent_channels=4, attention_head_dim=4, **blocks),
        text_encoder=Gemma2Model(gemma).eval(),
        tokenizer=tokenizer,
    )


def unzeroed(model: Any) -> Any:
    """A ControlNet that has an effect, which its zero convolutions would keep it from."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def controlnet(cross_attention_dim: int = 16, **extra: Any) -> ControlNetModel:
    return unzeroed(
        ControlNetModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=2,
            norm_num_groups=4,
            conditioning_embedding_out_channels=(4, 8),
            **extra,
        )
    )


def picture() -> torch.Tensor:
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def mask() -> torch.Tensor:
    whole = torch.zeros(1, 1, SIZE, SIZE)
    whole[..., SIZE // 2 :] = 1
    return whole


SIZED: dict[str, Any] = {"height": SIZE, "width": SIZE}
SHORT: dict[str, Any] = {"max_sequence_length": 8, **SIZED}


def masked() -> dict[str, Any]:
    return {"image": picture(), "mask_image": mask(), **SIZED}


#: pipeline class -> (what makes it, what its call needs beside prompts)
PIPELINES: dict[str, tuple[Callable[[str, Any], Any], Callable[[], dict[str, Any]]]] = {
    "StableDiffusionPipeline": (sd, dict),
    "StableDiffusionImg2ImgPipeline": (sd, lambda: {"image": picture(), "strength": 0.8}),
    "StableDiffusionInpaintPipeline": (lambda name, t: sd(name, t, in_channels=9), masked),
    "StableDiffusionControlNetPipeline": (lambda name, t: sd(name, t, controlnet=controlnet()), lambda: {"image": picture()}),
    "StableDiffusionControlNetImg2ImgPipeline": (
        lambda name, t: sd(name, t, controlnet=controlnet()),
        lambda: {"image": picture(), "control_image": picture(), "strength": 0.8},
    ),
    "StableDiffusionControlNetInpaintPipeline": (
        lambda name, t: sd(name, t, controlnet=controlnet()),
        lambda: {**masked(), "control_image": picture()},
    ),
    "LatentConsistencyModelPipeline": (lambda name, t: sd(name, t, embeds_guidance=8), dict),
    "LatentConsistencyModelImg2ImgPipeline": (
        lambda name, t: sd(name, t, embeds_guidance=8),
        lambda: {"image": picture(), "strength": 0.8, "original_inference_steps": 40},
    ),
    "StableDiffusionUpscalePipeline": (upscale, lambda: {"image": picture()[..., :8, :8].repeat(3, 1, 1, 1)}),
    "StableDiffusionXLPipeline": (sdxl, dict),
    "StableDiffusionXLImg2ImgPipeline": (sdxl, lambda: {"image": picture(), "strength": 0.8}),
    "StableDiffusionXLInpaintPipeline": (sdxl, lambda: {**masked(), "strength": 0.9}),
    "StableDiffusionXLControlNetPipeline": (
        lambda name, t: sdxl(name, t, controlnet=controlnet(32, **ADDED)),
        lambda: {"image": picture(), **SIZED},
    ),
    "StableDiffusionXLControlNetImg2ImgPipeline": (
        lambda name, t: sdxl(name, t, controlnet=controlnet(32, **ADDED)),
        lambda: {"image": picture(), "control_image": picture(), "strength": 0.8},
    ),
    "StableDiffusionXLControlNetInpaintPipeline": (
        lambda name, t: sdxl(name, t, controlnet=controlnet(32, **ADDED)),
        lambda: {**masked(), "control_image": picture(), "strength": 0.9},
    ),
    "StableDiffusion3Pipeline": (sd3, lambda: {"max_sequence_length": 8}),
    "StableDiffusion3Img2ImgPipeline": (sd3, lambda: {"image": picture().repeat(3, 1, 1, 1), "strength": 0.8, **SHORT}),
    "StableDiffusion3InpaintPipeline": (
        lambda name, t: sd3(name, t, channels=16),
        lambda: {**masked(), "strength": 0.9, **SHORT},
    ),
    "StableDiffusion3ControlNetPipeline": (
        lambda name, t: sd3(name, t, controlnet=unzeroed(SD3ControlNetModel(in_channels=4, out_channels=4, **MMDIT))),
        lambda: {"control_image": picture(), **SHORT},
    ),
    "FluxPipeline": (flux, lambda: SHORT),
    "FluxImg2ImgPipeline": (flux, lambda: {"image": picture(), "strength": 0.8, **SHORT}),
    "FluxInpaintPipeline": (flux, lambda: {**masked(), "strength": 0.9, **SHORT}),
    "FluxControlNetPipeline": (
        lambda name, t: flux(name, t, controlnet=unzeroed(FluxControlNetModel(**FLUX))),
        lambda: {"control_image": picture(), **SHORT},
    ),
    "FluxKontextPipeline": (flux, lambda: {"image": picture(), "max_area": SIZE**2, "_auto_resize": False, **SHORT}),
    "FluxKontextInpaintPipeline": (
        flux,
        lambda: {**masked(), "strength": 0.9, "max_area": SIZE**2, "_auto_resize": False, **SHORT},
    ),
    "FluxFillPipeline": (
        # latents, a picture's latents, and the mask of two pixels by two, in patches of two by two
        lambda name, t: flux(name, t, in_channels=(4 + 4 + 2 * 2) * 4),
        lambda: {**masked(), "strength": 0.9, **SHORT},
    ),
    "ChromaPipeline": (chroma, lambda: SHORT),
    "ChromaImg2ImgPipeline": (chroma, lambda: {"image": picture(), "strength": 0.8, **SHORT}),
    "ChromaInpaintPipeline": (chroma, lambda: {**masked(), "strength": 0.9, **SHORT}),
    "Flux2KleinPipeline": (flux2, lambda: SHORT),
    "PixArtSigmaPipeline": (pixart, lambda: {"use_resolution_binning": False, **SHORT}),
    "SanaPipeline": (
        sana,
        lambda: {"use_resolution_binning": False, "complex_human_instruction": ["a poster"], **SHORT, "height": 32, "width": 32},
    ),
}

#: pipelines that have no unconditional branch
DISTILLED = {name for name in PIPELINES if name.startswith(("Flux", "LatentConsistency")) and not name.startswith("Flux2")}


def build(name: str, tokenizer: Any) -> Any:
    """A pipeline of a class, the same each time."""
    torch.manual_seed(1)
    pipe = PIPELINES[name][0](name, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, prompts: list[str] = PROMPTS, **extra: Any) -> Any:
    """A run of four steps, a seed a prompt; ``extra`` goes to the call, in place of what is given here where it names the same."""
    arguments: dict[str, Any] = {"prompt": prompts, "num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}
    seeds = {"generator": [torch.Generator().manual_seed(7 + i) for i in range(len(prompts))]}
    return pipe(**{**arguments, **seeds, **PIPELINES[type(sdguard.unguard(pipe)).__name__][1](), **extra})


#: what ordinary prompts are like where verification is to let everything pass, the guidance norm aside
LENIENT = {"reference_agreement": [2.0] * 100, "recurrence": [2.0] * 100, "guidance_detail": [1e9] * 100, "alignment": [-1e9] * 100}


def profile_for(threshold: float) -> Profile:
    """Of which a score above ``threshold`` is flagged at 1%, and no other."""
    cascade = Cascade((Stage(("guidance_norm",), ("guidance_norm",), None),), {"guidance_norm": Scale(False, 0.0, 1.0)})
    norms = [threshold * min(1.0, 0.5 + 0.5 * i / 196) for i in range(200)]
    return Profile(
        {},
        cascade,
        norms,
        {**LENIENT, "guidance_norm": norms, "reference_agreement": [0.99] * 100},
    )


def reworded(flagged: SteeringInput, methods: Any, outcomes: Any = None) -> list[Outcome]:
    conditions = flagged.encoder([str(prompt).split()[-1] for prompt in flagged.prompts])
    return [Outcome(Correction({}, condition=c), [{"method": "rewording", "wording": "..."}]) for c in conditions]


def modular(name: str, tokenizer: Any) -> Any:
    """A modular pipeline with the components of the pipeline of the same family."""
    pipe = getattr(diffusers, name)()
    whole = build(name.replace("Modular", ""), tokenizer)
    pipe.update_components(**{part: whole.components[part] for part in pipe.pretrained_component_names if part in whole.components})
    return pipe


#: layers that a LoRA is put on
ATTENTION = ("to_q", "to_v", "q_proj", "v_proj")
#: of the embedding that an IP-Adapter is given of a picture
IMAGE_WIDTH = 12


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(pipe: Any, seed: int = 5, layers: tuple[str, ...] = ATTENTION) -> dict[str, Tensor]:
    """A LoRA of rank 2 on layers of denoiser and text encoder."""
    state = {}
    for part in ("unet", "text_encoder"):
        for path, module in getattr(pipe, part).named_modules():
            if path.endswith(layers):
                state[f"{part}.{path}.lora_A.weight"] = drawn(2, module.in_features, seed=seed)
                state[f"{part}.{path}.lora_B.weight"] = drawn(module.out_features, 2, seed=seed + 1)
    return state


def load_ip_adapter(pipe: Any) -> None:
    """An IP-Adapter of four image tokens, in the layout of its published files."""
    width = pipe.unet.config.cross_attention_dim
    keys_and_values: dict[str, Tensor] = {}
    for place, name in enumerate(pipe.unet.attn_processors):
        if "attn2" in name:
            hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            keys_and_values |= {f"{place}.to_{kind}_ip.weight": drawn(hidden, width, seed=place) for kind in "kv"}
    projection = {
        "proj.weight": drawn(4 * width, IMAGE_WIDTH),
        "proj.bias": drawn(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys_and_values}])
