"""Packages of other people's on tiny pipelines, each applied as its README does; what `benchmarks.packages` runs guarded and unguarded.

A function here is given a pipeline, changes it, and gives the arguments that its call then needs beside the usual. Packages are imported
where they are applied, as most are not installed. `tests/families.py` builds the pipelines, and has to be on the path where one is run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

#: weights of layers that are quantised, as all that recent quantisers do is to leave the rest as it is.
LINEAR = ("to_q", "to_k", "to_v")


class Situation(NamedTuple):
    """One way to use a package.

    Attributes:
        distribution: its name in the package registry.
        does: what of it is applied.
        pipeline: the class of the pipeline that it is applied to.
        apply: applies it, and gives arguments that the pipeline's call needs by then.
        prepare: makes the tiny pipeline one that the package supports, without the package.
        given: arguments of the call, with the package and without.
        method: that makes pictures, where the package adds one of its own.
    """

    distribution: str
    does: str
    pipeline: str
    apply: Callable[[Any], Mapping[str, Any]]
    prepare: Callable[[Any], None] = lambda pipe: None
    given: Mapping[str, Any] = MappingProxyType({})
    method: str = "__call__"

    @property
    def name(self) -> str:
        """The situation's own, which no other has."""
        return f"{self.distribution}: {self.does}, {self.pipeline}"


def moved(old: str, new: str) -> None:
    """Give a module of diffusers that has moved its old name too, which releases of some packages still import."""
    sys.modules.setdefault(old, import_module(new))


def deep_unet(pipe: Any) -> None:
    """A U-Net with the blocks of Stable Diffusion 1.5, each of few channels."""
    torch.manual_seed(2)
    shape: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 4}
    pipe.unet = UNet2DConditionModel(sample_size=32, **shape)
    pipe.register_to_config(_name_or_path="runwayml/stable-diffusion-v1-5")


def clip_text_encoder(pipe: Any) -> None:
    """A text encoder with the tokens and the window of published ones, which some packages take for granted."""
    torch.manual_seed(2)
    sizes = {"vocab_size": 49408, "max_position_embeddings": 77}
    pipe.text_encoder = CLIPTextModel(CLIPTextConfig(**{**pipe.text_encoder.config.to_dict(), **sizes})).eval()


def deep(pipe: Any) -> None:
    """A transformer of several blocks, of which a cache may skip some."""
    torch.manual_seed(2)
    pipe.transformer = type(pipe.transformer).from_config({**pipe.transformer.config, "num_layers": 4}).eval()


def deep_without_single(pipe: Any) -> None:
    """`deep` without Flux' single blocks, which recent releases of diffusers call in another way than some packages do."""
    pipe.transformer.register_to_config(num_single_layers=0)
    deep(pipe)


def denoiser(pipe: Any) -> Any:
    """A pipeline's U-Net or transformer."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def tomesd(pipe: Any) -> dict[str, Any]:
    import_module("tomesd").apply_patch(pipe, ratio=0.5, max_downsample=2)
    return {}


def deep_cache(pipe: Any) -> dict[str, Any]:
    helper = import_module("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    return {}


def hidiffusion(pipe: Any) -> dict[str, Any]:
    moved("diffusers.pipelines.controlnet.multicontrolnet", "diffusers.models.controlnets.multicontrolnet")
    import_module("hidiffusion").apply_hidiffusion(pipe)
    return {}


def first_block_cache(pipe: Any) -> dict[str, Any]:
    import_module("para_attn.first_block_cache.diffusers_adapters").apply_cache_on_pipe(pipe, residual_diff_threshold=0.9)
    return {}


def cache_dit(pipe: Any) -> dict[str, Any]:
    package = import_module("cache_dit")
    config = package.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=0.9)
    package.enable_cache(pipe, cache_config=config)
    return {}


def cache_dit_forecast(pipe: Any) -> dict[str, Any]:
    package = import_module("cache_dit")
    config = package.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=0.9)
    package.enable_cache(pipe, cache_config=config, calibrator_config=package.TaylorSeerCalibratorConfig(taylorseer_order=1))
    return {}


def smooth_cache(pipe: Any) -> dict[str, Any]:
    """Its helper for diffusers' DiT pipeline, whose blocks PixArt's are."""
    schedule = {"attn1": [1, 0, 1, 0, 1, 0, 1, 0]}
    import_module("SmoothCache").DiffuserCacheHelper(pipe.transformer, schedule=schedule).enable()
    return {}


def tgate(loader: str) -> Callable[[Any], dict[str, Any]]:
    """Of T-GATE, whose loaders each give a pipeline a method of its own."""

    def apply(pipe: Any) -> dict[str, Any]:
        getattr(import_module("tgate"), loader)(pipe)
        return {"gate_step": 4, "sp_interval": 1, "fi_interval": 1, "warm_up": 1}

    return apply


def ca_tome(pipe: Any) -> dict[str, Any]:
    package = import_module("ca_tome")
    package.apply_CA_ToMe(pipe=pipe, cache_conf=package.CacheConf.CONFIG_3, r=0.3)
    return {}


def compel(pipe: Any) -> dict[str, Any]:
    package = import_module("compel")
    texts = ["a (lion)1.4", "a frog++ in forest", "an owl at belen sky, poster--"]
    embeds = package.Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, truncate_long_prompts=False)(texts)
    return {"prompt": None, "prompt_embeds": embeds}


def prompt_embedder(pipe: Any) -> dict[str, Any]:
    texts = ["a (lion:1.4)", "a [frog] in forest", "an owl at belen sky, poster"]
    batch = import_module("diffusion_prompt_embedder").get_embeddings_sd15_batch
    return {"prompt": None, "prompt_embeds": batch(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, prompts=texts)}


def compel_sdxl(pipe: Any) -> dict[str, Any]:
    found = import_module("compel").CompelForSDXL(pipe)(["a (lion)1.4", "a frog++ in forest", "an owl at belen sky, poster--"])
    return {"prompt": None, "prompt_embeds": found.embeds, "pooled_prompt_embeds": found.pooled_embeds}


def daam(pipe: Any) -> dict[str, Any]:
    import_module("daam").trace(pipe).__enter__()
    return {}


def attention_maps(pipe: Any) -> dict[str, Any]:
    import_module("attention_map_diffusers").AttentionCapture(pipe).__enter__()
    return {}


def lycoris(pipe: Any) -> dict[str, Any]:
    """A network of its own with weights that do something; those it begins with do not."""
    package = import_module("lycoris")
    package.LycorisNetwork.apply_preset({"target_name": [".*attn.*"]})
    network = package.create_lycoris(denoiser(pipe), 1.0, linear_dim=4, linear_alpha=2.0, algo="lokr")
    network.apply_to()
    torch.manual_seed(3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return {}


def peft(pipe: Any) -> dict[str, Any]:
    """A LoRA by way of diffusers."""
    pipe.load_lora_weights(import_module("families").lora(pipe))
    return {}


def peft_dora(pipe: Any) -> dict[str, Any]:
    config = import_module("peft").LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=["to_q", "to_v"])
    denoiser(pipe).add_adapter(config)
    return {}


def linear_layers(module: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Linear layers of attention: what holds each, under which name, and it."""
    found = [(holder, name, layer) for holder in module.modules() for name, layer in holder.named_children() if name in LINEAR]
    return [(holder, name, layer) for holder, name, layer in found if type(layer) is nn.Linear]


def bitsandbytes_8bit(pipe: Any) -> dict[str, Any]:
    """Layers as diffusers' ``BitsAndBytesConfig(load_in_8bit=True)`` makes them."""
    layers = import_module("bitsandbytes").nn
    for holder, name, layer in linear_layers(denoiser(pipe)):
        quantised = layers.Linear8bitLt(layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False)
        quantised.weight = layers.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        setattr(holder, name, quantised.to("cpu"))
        if quantised.weight.CB is None:
            quantised.weight._quantize("cpu")
    return {}


def bitsandbytes_4bit(pipe: Any) -> dict[str, Any]:
    """Layers as diffusers' ``BitsAndBytesConfig(load_in_4bit=True)`` makes them."""
    layers = import_module("bitsandbytes").nn
    for holder, name, layer in linear_layers(denoiser(pipe)):
        quantised = layers.Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
        )
        quantised.weight = layers.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4", module=quantised)
        setattr(holder, name, quantised.to("cpu"))
    return {}


def torchao(config: str) -> Callable[[Any], dict[str, Any]]:
    """Weights in eight bits, by one of its configurations."""

    def apply(pipe: Any) -> dict[str, Any]:
        package = import_module("torchao.quantization")
        package.quantize_(denoiser(pipe), getattr(package, config)())
        return {}

    return apply


def hqq(pipe: Any) -> dict[str, Any]:
    package = import_module("hqq.core.quantize")
    config = package.BaseQuantizeConfig(nbits=8, group_size=8)
    for holder, name, layer in linear_layers(denoiser(pipe)):
        setattr(holder, name, package.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu"))
    return {}


def quanto(pipe: Any) -> dict[str, Any]:
    package = import_module("optimum.quanto")
    package.quantize(denoiser(pipe), weights=package.qint8)
    package.freeze(denoiser(pipe))
    return {}


def gguf(pipe: Any) -> dict[str, Any]:
    """The layers that diffusers reads a GGUF file into, whose weights are in blocks of 32."""
    package, utils = import_module("gguf"), import_module("diffusers.quantizers.gguf.utils")
    kind, transformer = package.GGMLQuantizationType.Q8_0, pipe.transformer
    weights = {
        f"{name}.weight": utils.GGUFParameter(torch.from_numpy(package.quantize(layer.weight.detach().numpy(), kind)), quant_type=kind)
        for name, layer in transformer.named_modules()
        if type(layer) is nn.Linear and layer.in_features % 32 == 0
    }
    kept = {name: value for name, value in transformer.state_dict().items() if name not in weights}
    utils._replace_with_gguf_linear(transformer, torch.float32, weights)
    transformer.load_state_dict(kept, strict=False, assign=True)
    for name, weight in weights.items():
        transformer.get_submodule(name.removesuffix(".weight")).weight = weight
    return {}


def sdnq(pipe: Any) -> dict[str, Any]:
    package = import_module("sdnq")
    sizes = {"minimum_allowed_numel": 1, "minimum_allowed_channel_size": 1}
    pipe.transformer = package.sdnq_post_load_quant(pipe.transformer, weights_dtype="int8", **sizes)
    return {}


def accelerate_offload(pipe: Any) -> dict[str, Any]:
    for part in (denoiser(pipe), pipe.text_encoder, pipe.vae):
        import_module("accelerate").cpu_offload(part, execution_device=torch.device("cpu"))
    return {}


def accelerate_disk(pipe: Any) -> dict[str, Any]:
    folder = TemporaryDirectory()
    pipe._offloaded = folder  # kept as long as the pipeline is
    import_module("accelerate").disk_offload(denoiser(pipe), str(Path(folder.name)), execution_device=torch.device("cpu"))
    return {}


def managed(pipe: Any) -> dict[str, Any]:
    import_module("diffusers_mm").managed(pipe, strategy="model_offload", device="cpu")
    return {}


def dynamic_offload(pipe: Any) -> dict[str, Any]:
    pipe.transformer = (
        import_module("diffusers_dynamic_offloader")
        .enable_offload(pipe.transformer, component="transformer", execution_device="cpu", use_environment=False)
        .module
    )
    return {}


def mmgp(pipe: Any) -> dict[str, Any]:
    offload = import_module("mmgp.offload")
    offload.profile(pipe, offload.profile_type.LowRAM_LowVRAM, quantizeTransformer=False)
    return {}


def ip_adapter(pipe: Any) -> dict[str, Any]:
    """The processors of attention that it puts into a U-Net, and their image tokens behind the text's, here without a picture's encoder."""
    several = import_module("diffusers.models.controlnets.multicontrolnet").MultiControlNetModel
    vars(import_module("diffusers.pipelines.controlnet"))["MultiControlNetModel"] = several
    adapter_class = import_module("ip_adapter").IPAdapter
    adapter = adapter_class.__new__(adapter_class)
    adapter.pipe, adapter.num_tokens, adapter.device = pipe, 4, "cpu"
    torch.manual_seed(3)
    adapter.set_ip_adapter()
    pipe.unet.to(torch.float32)
    text, null = pipe.encode_prompt(["a lion", "a frog in forest", "an owl at belen sky, poster"], "cpu", 1, True)
    tokens = torch.randn(3, 4, text.shape[-1], generator=torch.Generator().manual_seed(3))
    embeds = {"prompt_embeds": torch.cat([text, tokens], 1), "negative_prompt_embeds": torch.cat([null, torch.zeros_like(tokens)], 1)}
    return {"prompt": None, **embeds}


def dmse_scheduler(pipe: Any) -> dict[str, Any]:
    pipe.scheduler = import_module("diffusers_dmse").DMSEScheduler.from_config(DDPMScheduler().config)
    return {}


def pruna(pipe: Any) -> dict[str, Any]:
    """Its own caches of diffusers' denoisers."""
    package = import_module("pruna")
    config = package.SmashConfig()
    config["cacher"] = "fora"
    package.smash(model=pipe, smash_config=config)
    return {}


SD, SDXL, SD3, FLUX = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
FLUX2, CHROMA, PIXART, SANA = "Flux2KleinPipeline", "ChromaPipeline", "PixArtSigmaPipeline", "SanaPipeline"
IMG2IMG, INPAINT, CONTROLNET = (f"StableDiffusion{of}Pipeline" for of in ("Img2Img", "Inpaint", "ControlNet"))

#: what is tried, in the order of the documentation's table.
SITUATIONS = (
    Situation("tomesd", "token merging", SD, tomesd),
    Situation("tomesd", "token merging", SDXL, tomesd),
    Situation("tomesd", "token merging", IMG2IMG, tomesd),
    Situation("tomesd", "token merging", CONTROLNET, tomesd),
    Situation("ca-tome", "token merging that is cached", SD, ca_tome, deep_unet, method="call"),
    Situation("DeepCache", "cache", SD, deep_cache),
    Situation("DeepCache", "cache", SDXL, deep_cache),
    Situation("DeepCache", "cache", INPAINT, deep_cache),
    Situation("cache-dit", "DBCache", FLUX, cache_dit, deep),
    Situation("cache-dit", "DBCache with TaylorSeer", FLUX, cache_dit_forecast, deep),
    Situation("cache-dit", "DBCache", SD3, cache_dit, deep),
    Situation("cache-dit", "DBCache", FLUX2, cache_dit, deep),
    Situation("cache-dit", "DBCache", CHROMA, cache_dit, deep),
    Situation("cache-dit", "DBCache", PIXART, cache_dit, deep),
    Situation("cache-dit", "DBCache", SANA, cache_dit, deep),
    Situation("para-attn", "first-block cache", FLUX, first_block_cache, deep_without_single),
    Situation("dit-smoothcache", "cache", PIXART, smooth_cache, deep),
    Situation("pruna", "cache", FLUX, pruna, deep),
    Situation("tgate", "its own loop", SD, tgate("TgateSDLoader"), method="tgate"),
    Situation("tgate", "its own loop", SDXL, tgate("TgateSDXLLoader"), method="tgate"),
    Situation("tgate", "its own loop", PIXART, tgate("TgatePixArtSigmaLoader"), method="tgate"),
    Situation("hidiffusion", "higher resolution", SD, hidiffusion, deep_unet, given={"height": 64, "width": 64}),
    Situation("compel", "weighted prompts", SD, compel),
    Situation("compel", "weighted prompts", SDXL, compel_sdxl),
    Situation("diffusion-prompt-embedder", "weighted prompts", SD, prompt_embedder, clip_text_encoder),
    Situation("daam", "attention traced, which follows one prompt", SD, daam, given={"prompt": ["a lion"], "num_images_per_prompt": 3}),
    Situation("attention-map-diffusers", "attention maps", SD, attention_maps),
    Situation("attention-map-diffusers", "attention maps", SD3, attention_maps),
    Situation("attention-map-diffusers", "attention maps", SDXL, attention_maps),
    Situation("attention-map-diffusers", "attention maps", FLUX, attention_maps),
    Situation("attention-map-diffusers", "attention maps", FLUX2, attention_maps),
    Situation("attention-map-diffusers", "attention maps", SANA, attention_maps),
    Situation("ip-adapter", "its attention processors", SD, ip_adapter),
    Situation("lycoris-lora", "LoKr", SD, lycoris),
    Situation("lycoris-lora", "LoKr", FLUX, lycoris),
    Situation("peft", "LoRA", SD, peft),
    Situation("peft", "DoRA", SD, peft_dora),
    Situation("peft", "DoRA", FLUX, peft_dora),
    Situation("bitsandbytes", "8 bits", SD, bitsandbytes_8bit),
    Situation("bitsandbytes", "4 bits", SD, bitsandbytes_4bit),
    Situation("bitsandbytes", "8 bits", FLUX, bitsandbytes_8bit),
    Situation("bitsandbytes", "4 bits", FLUX, bitsandbytes_4bit),
    Situation("torchao", "int8 weights", SDXL, torchao("Int8WeightOnlyConfig")),
    Situation("torchao", "int8 weights", FLUX, torchao("Int8WeightOnlyConfig")),
    Situation("torchao", "int8 weights and activations", SD3, torchao("Int8DynamicActivationInt8WeightConfig")),
    Situation("hqq", "8 bits", SD, hqq),
    Situation("hqq", "8 bits", FLUX, hqq),
    Situation("optimum-quanto", "int8 weights", SD, quanto),
    Situation("optimum-quanto", "int8 weights", FLUX, quanto),
    Situation("optimum-quanto", "int8 weights", PIXART, quanto),
    Situation("gguf", "Q8_0 weights", FLUX, gguf),
    Situation("sdnq", "int8 weights", FLUX, sdnq),
    Situation("accelerate", "offload to the CPU", SD, accelerate_offload),
    Situation("accelerate", "offload to the CPU", FLUX, accelerate_offload),
    Situation("accelerate", "offload to disk", SD, accelerate_disk),
    Situation("diffusers-mm", "managed", FLUX, managed),
    Situation("diffusers-dynamic-offloader", "offload", FLUX, dynamic_offload),
    Situation("mmgp", "offload", FLUX, mmgp),
    Situation("diffusers-dmse", "a scheduler", SD, dmse_scheduler),
)
