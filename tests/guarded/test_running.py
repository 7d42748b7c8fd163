"""Every way people run a pipeline, under guard, through the invariants: a table of ways, and what does not fit into it."""

from __future__ import annotations

import copy
import difflib
import gc
import importlib.util
import re
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection
from families import IMAGE_WIDTH, PROMPTS, build, call, drawn, load_ip_adapter, lora, profile_for, reworded
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import sdguard
from sdguard import GuardConfig, GuardedPipeline, ProfileError, testbed
from sdguard.correction import Correction
from sdguard.denoiser.text_encoding import Encoder
from sdguard.guarded import pipeline as pipeline_module
from sdguard.guarded import run as run_module
from sdguard.steering import SteeringInput
from sdguard.steering.fallback import Outcome

SD, SDXL, SD3 = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"
CPU = torch.device("cpu")
Prepare = Callable[[Any], object]


def load_lora(pipe: Any) -> None:
    pipe.load_lora_weights(lora(pipe), adapter_name="style")


def load_loras(pipe: Any) -> None:
    load_lora(pipe)
    pipe.load_lora_weights(lora(pipe, seed=11), adapter_name="thing")
    pipe.set_adapters(["style", "thing"], [0.7, 0.4])


def fuse_lora(pipe: Any) -> None:
    load_lora(pipe)
    pipe.fuse_lora(lora_scale=0.6)


def load_inversion(pipe: Any) -> None:
    """A textual inversion of two vectors."""
    pipe.load_textual_inversion({"<thing>": drawn(2, 16)})


def load_adapter(pipe: Any) -> None:
    """An IP-Adapter, and the image encoder that it comes with."""
    load_ip_adapter(pipe)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=IMAGE_WIDTH, **sizes)).eval()
    pipe.register_modules(image_encoder=encoder, feature_extractor=CLIPImageProcessor(size=16, crop_size=16))


def load_face_adapter(pipe: Any) -> None:
    """An IP-Adapter of faces, which is told what a picture encoder makes of them beside what the call is given."""
    load_ip_adapter(pipe)
    layer = IPAdapterFaceIDPlusImageProjection(
        embed_dims=8, output_dims=16, hidden_dims=8, id_embeddings_dim=IMAGE_WIDTH, depth=1, dim_head=4, heads=2, num_tokens=4
    )
    layer.clip_embeds = drawn(6, 1, 3, 8)
    pipe.unet.encoder_hid_proj.image_projection_layers[0] = layer.eval()


def image_embeds(pipe: Any) -> dict[str, Any]:
    return {"ip_adapter_image_embeds": [torch.cat([torch.zeros(1, 1, IMAGE_WIDTH), drawn(1, 1, IMAGE_WIDTH)])]}


def image(pipe: Any) -> dict[str, Any]:
    return {"ip_adapter_image": Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))}


def embeds(pipe: Any) -> dict[str, Any]:
    """The prompts encoded beforehand, in the names of the pipeline's call."""
    names = ["prompt_embeds", "negative_prompt_embeds"]
    if isinstance(pipe, diffusers.StableDiffusionPipeline):
        found = pipe.encode_prompt(PROMPTS, CPU, 1, True)
    else:
        names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        several = {"prompt_2": None} | ({"prompt_3": None, "max_sequence_length": 8} if hasattr(pipe, "transformer") else {})
        found = pipe.encode_prompt(PROMPTS, **several, do_classifier_free_guidance=True)
    return {"prompt": None, **dict(zip(names, found, strict=True))}


def cut_off(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Dynamic guidance as diffusers' guide to callbacks has it, for a batch: from the third step on there is none."""
    if step == 1:
        pipe._guidance_scale = 0.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
    return tensors


def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step == 1
    return tensors


def scheduler(name: str, **options: Any) -> Prepare:
    def change(pipe: Any) -> None:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)

    return change


def offload_sequentially(pipe: Any) -> None:
    """What ``enable_sequential_cpu_offload`` does, to "cpu" instead of "cpu:0", which accelerate takes for another device and fails on."""
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            cpu_offload(component, CPU, offload_buffers=bool(component._parameters))


def tile(pipe: Any) -> None:
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 8, 4
    pipe.vae.enable_tiling()


def nothing(pipe: Any) -> None:
    pass


def given(**arguments: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda pipe: arguments


def none(pipe: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Way:
    """A way to run a pipeline.

    Attributes:
        prepare: what is done to it beforehand.
        arguments: what its call is given, made anew for each call.
        cost: evaluations an image that the reading takes, as far as the run does not begin with it.
    """

    name: str
    prepare: Prepare = nothing
    arguments: Callable[[Any], dict[str, Any]] = none
    family: str = SD
    marks: tuple[pytest.MarkDecorator, ...] = ()
    cost: int = 0


WAYS = [
    Way("LoRA", load_lora),
    Way("LoRA at half scale", load_lora, given(cross_attention_kwargs={"scale": 0.5})),
    Way("two LoRAs, weighted", load_loras),
    Way("LoRA, fused", fuse_lora),
    Way("LoRA, SDXL", load_lora, given(cross_attention_kwargs={"scale": 0.5}), SDXL),
    Way("textual inversion", load_inversion, given(prompt=["a <thing>", "a dog of <thing>", "<thing> in forest, poster"])),
    Way("IP-Adapter, embeds", load_adapter, image_embeds, cost=2),
    Way("IP-Adapter, faces", load_face_adapter, image_embeds, cost=2),
    Way("IP-Adapter, image", load_adapter, image, cost=2),
    Way("IP-Adapter, SDXL", load_adapter, image_embeds, SDXL, cost=2),
    Way("model offload", lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
    Way("model offload, SDXL", lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), family=SDXL),
    Way("sequential offload", offload_sequentially),
    Way("sequential offload, SD3", offload_sequentially, family=SD3),
    Way("group offload", lambda pipe: pipe.unet.enable_group_offload(CPU, CPU, offload_type="leaf_level")),
    Way("attention slicing", lambda pipe: pipe.enable_attention_slicing(1)),
    Way("VAE slicing", lambda pipe: pipe.vae.enable_slicing()),
    Way("VAE tiling", tile),
    Way("FreeU", lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)),
    Way("plain attention", lambda pipe: pipe.unet.set_attn_processor(AttnProcessor())),
    *(Way(f"embeds, {name}", nothing, embeds, name) for name in (SD, SDXL, SD3)),
    Way("images per prompt", nothing, lambda pipe: {"num_images_per_prompt": 2, "generator": torch.Generator().manual_seed(1)}),
    Way("one prompt", nothing, lambda pipe: {"prompt": PROMPTS[1], "generator": torch.Generator().manual_seed(1)}),
    Way("one generator", nothing, lambda pipe: {"generator": torch.Generator().manual_seed(1)}),
    Way("latents", nothing, lambda pipe: {"latents": drawn(3, 4, 8, 8), "generator": None}),
    Way(
        "callback that cuts guidance off",
        nothing,
        given(callback_on_step_end=cut_off, callback_on_step_end_tensor_inputs=["prompt_embeds"]),
    ),
    Way(
        "diffusers' cutoff callback",
        nothing,
        lambda pipe: {
            "prompt": PROMPTS[1],
            "generator": torch.Generator().manual_seed(1),
            "callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.4),
        },
    ),
    Way("callback that interrupts", nothing, given(callback_on_step_end=interrupt)),
    *(Way(f"output {kind}", nothing, given(output_type=kind)) for kind in ("pil", "np", "pt", "latent")),
    Way("tuple", nothing, given(return_dict=False)),
    Way("timesteps", scheduler("EulerDiscreteScheduler"), given(timesteps=[900, 600, 300, 100]), cost=2),
    Way("sigmas", scheduler("EulerDiscreteScheduler"), given(sigmas=[10.0, 5.0, 2.0, 0.5]), cost=2),
    Way("sigmas, SD3", nothing, given(sigmas=[1.0, 0.7, 0.4, 0.2]), SD3),
    Way(
        "clip skip",
        nothing,
        given(clip_skip=1),
        marks=(pytest.mark.xfail(raises=AttributeError, reason="diffusers 0.42 looks for text_model, which transformers 5 has no more"),),
    ),
    Way("clip skip, SDXL", nothing, given(clip_skip=1), SDXL),
    Way("guidance rescale", nothing, given(guidance_rescale=0.7)),
    *(
        Way(f"{name}, SD3", nothing, given(skip_guidance_layers=layers, skip_layer_guidance_stop=1.0), SD3)
        for name, layers in {"skip-layer guidance": [0], "no layer skipped": [], "layers as an array": np.array([0])}.items()
    ),
    Way("eta", nothing, given(eta=1.0)),
    Way("size", nothing, given(height=24, width=32), cost=2),
    Way("size, SDXL", nothing, given(height=24, width=32, original_size=(64, 64), crops_coords_top_left=(2, 1)), SDXL, cost=2),
    Way("negative prompt", nothing, given(negative_prompt=["dark forest"] * 3), cost=2),  # 1 without the hook that counts
    Way("second prompt, SDXL", nothing, given(prompt_2=["a lion", "sky", "a tree"]), SDXL),
    Way("SDE solver", scheduler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")),
    Way("Karras sigmas, DPM++", scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True)),
    Way("Karras sigmas, Euler", scheduler("EulerDiscreteScheduler", use_karras_sigmas=True)),
    Way(
        "Brownian SDE solver",
        scheduler("DPMSolverSDEScheduler"),
        marks=(pytest.mark.skipif(not importlib.util.find_spec("torchsde"), reason="DPMSolverSDEScheduler needs torchsde"),),
    ),
    Way("leading, few steps", scheduler("DDIMScheduler", timestep_spacing="leading"), cost=2),
    Way("leading, usual steps", scheduler("DDIMScheduler", timestep_spacing="leading"), given(num_inference_steps=25)),
    Way(
        "zero terminal SNR",
        scheduler("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
        given(guidance_rescale=0.7),
        cost=2,
    ),
    Way("v prediction", scheduler("EulerDiscreteScheduler", prediction_type="v_prediction")),
    *(Way(f"sample prediction, {name}", scheduler(f"{name}Scheduler", prediction_type="sample")) for name in ("DDIM", "EulerDiscrete")),
    Way(
        "xformers",
        lambda pipe: pipe.to("cuda").enable_xformers_memory_efficient_attention(),
        marks=(
            pytest.mark.skipif(
                not (torch.cuda.is_available() and importlib.util.find_spec("xformers")), reason="xformers needs CUDA, and to be installed"
            ),
        ),
    ),
]
by_name = {way.name: way for way in WAYS}


def made(way: Way, tokenizer: Any) -> Any:
    """A pipeline made ready for a way; its tokenizer is its own, since tokens may be added to it."""
    pipe = build(way.family, copy.deepcopy(tokenizer))
    way.prepare(pipe)
    return pipe


def run(pipe: Any, way: Way) -> Any:
    torch.manual_seed(0)  # some schedulers, and calls without a generator, draw from torch's own
    return call(pipe, **way.arguments(sdguard.unguard(pipe)))


def pictures(output: Any) -> list[np.ndarray]:
    """The pictures in whatever a call returns."""
    return [np.asarray(picture.cpu() if isinstance(picture, Tensor) else picture) for picture in output[0]]


def same(one: Any, other: Any) -> list[bool]:
    """Which pictures of two calls are bit-identical."""
    return [np.array_equal(*pair) for pair in zip(pictures(one), pictures(other), strict=True)]


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """After the block, how many rows each denoiser call in it had, whoever made it."""
    first: nn.Module = pipe.transformer.pos_embed if hasattr(pipe, "transformer") else pipe.unet.conv_in
    rows: list[int] = []
    seen = SimpleQueue[int]()  # a list that a hook holds is put back after the guard's own calls
    handle = first.register_forward_hook(lambda module, inputs, output: seen.put(len(output)))
    try:
        yield rows
    finally:
        handle.remove()
        rows.extend(seen.get() for _ in range(seen.qsize()))


def state(pipe: Any) -> dict[tuple[str, str], Any]:
    """Every attribute of the pipeline, its scheduler and every module inside it."""
    parts = {"pipeline": pipe, "scheduler": pipe.scheduler}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            parts |= {f"{name}.{place}": module for place, module in component.named_modules()}
    return {(place, name): value for place, part in parts.items() for name, value in vars(part).items()}


def changed(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> set[tuple[str, str]]:
    """The attributes that came, went or are another object now."""
    return {key for key in before.keys() | after.keys() if key not in before or key not in after or before[key] is not after[key]}


def looked(second_prompt: bool, flagged: SteeringInput, methods: Any) -> list[Outcome]:
    """`reworded`, once it is seen that the captured call can be made again and that prompts are encoded as the call encoded them.

    A wording goes to all encoders, a call's ``prompt_2`` to the second alone.
    """
    here = flagged.observation
    for seen, again in zip((here.eps_c, here.eps_u), here.both_branches(here.x, here.timestep), strict=True):
        torch.testing.assert_close(again, seen, rtol=1e-3, atol=1e-4)
    if all(flagged.prompts) and not second_prompt:
        torch.testing.assert_close(flagged.encoder([str(prompt) for prompt in flagged.prompts]), here.condition, rtol=1e-3, atol=1e-5)
    return reworded(flagged, methods)


@pytest.fixture
def given_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration's profile is taken as it is, whatever configuration it was made for."""
    monkeypatch.setattr(GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("way", [pytest.param(way, id=way.name, marks=way.marks) for way in WAYS])
def test_a_guarded_run_is_the_plain_one_but_for_the_flagged_row(way: Way, embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "try_in_order", partial(looked, way.name.startswith("second prompt")))
    pipe = made(way, embedded.tokenizer)
    run(pipe, way)
    first = state(pipe)
    with counted(pipe) as calls:
        plain = run(pipe, way)
    before = state(pipe)

    guarded = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))
    with counted(pipe) as guarded_calls:
        clean = run(guarded, way)
    reports = guarded.guard_reports
    assert all(same(clean, plain))
    images = len(pictures(plain))
    assert guarded_calls == [calls[0], *[way.cost * images] * (way.cost > 0), *calls[1:]]
    assert [(report.verdict, report.extra_evaluations) for report in reports] == [("clean", way.cost)] * images

    norms = [report.signals["guidance_norm"]["value"] for report in reports]
    assert len(set(norms)) == len(norms)
    row, bound = norms.index(max(norms)), sum(sorted([0.0, *norms])[-2:]) / 2
    guarded = sdguard.guard(pipe, GuardConfig(profile=profile_for(bound)))
    steered = run(guarded, way)
    reports = guarded.guard_reports
    only = [i == row for i in range(len(norms))]
    assert [report.error for report in reports] == [None] * len(norms)
    # a run that is ended before its picture has an outline has nothing that steering could be proven on
    turned = "withheld" if way.name == "callback that interrupts" else "steered"
    assert [report.verdict == turned for report in reports] == only
    assert [report.extra_evaluations > way.cost for report in reports] == only
    assert [not unchanged for unchanged in same(steered, plain)] == only

    assert changed(before, state(pipe)) <= changed(first, before)
    assert all(same(run(pipe, way), plain))


@pytest.mark.parametrize(
    "name",
    [
        "LoRA at half scale",
        "textual inversion",
        "IP-Adapter, embeds",
        "IP-Adapter, faces",
        "IP-Adapter, image",
        "IP-Adapter, SDXL",
        "sequential offload",
        "group offload",
        "images per prompt",
        "tuple",
    ],
)
def test_an_unknown_model_is_calibrated_on_first_use(name: str, embedded: Any) -> None:
    """The whole way, nothing replaced, with a batch of eight ordinary prompts."""
    way = by_name[name]
    pipe = made(way, embedded.tokenizer)
    plain = run(pipe, way)
    guarded = sdguard.guard(pipe, GuardConfig("observe", 0.3, calibration_prompts=[f"a cat {i}" for i in range(12)]))
    output = run(guarded, way)
    assert all(same(output, plain))
    assert [report.error for report in guarded.guard_reports] == [None] * len(pictures(plain))
    assert all(report.p_value is not None for report in guarded.guard_reports)


@pytest.mark.usefixtures("given_profile")
def test_neither_picture_nor_scale_of_an_ip_adapter_reaches_the_reading(embedded: Any) -> None:
    pipe = made(by_name["IP-Adapter, embeds"], embedded.tokenizer)
    guarded = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))
    one = image_embeds(pipe)
    other: dict[str, Any] = {"ip_adapter_image_embeds": [embeds + 1 for embeds in one["ip_adapter_image_embeds"]]}
    with_one, with_other = call(guarded, **one), call(guarded, **other)
    assert not any(same(with_one, with_other))
    assert [report.score for report in with_one.guard] == [report.score for report in with_other.guard]
    guarded.set_ip_adapter_scale(0.3)
    assert [report.score for report in call(guarded, **one).guard] == [report.score for report in with_one.guard]


#: what a caller may turn, knowing or not that it moves the difference between the run's own two branches
TURNS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "the prompt as negative prompt": given(negative_prompt=PROMPTS),
    "its embeddings as negative ones": lambda pipe: {**(text := embeds(pipe)), "negative_prompt_embeds": text["prompt_embeds"]},
    "no guidance": given(guidance_scale=1.0),
    "strong guidance": given(guidance_scale=20.0),
    "another size": given(height=24, width=24),
    "few steps": given(num_inference_steps=1),
}


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
def test_nothing_that_a_caller_turns_blinds_the_guard(turn: Callable[[Any], dict[str, Any]], embedded: Any) -> None:
    """What pulls twice as hard as the profile allows is withheld in every setting."""
    pipe = build(SD, embedded.tokenizer)
    watching = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))).guard
    bound = min(report.signals["guidance_norm"]["value"] for report in watching) * 0.5
    output = call(sdguard.guard(pipe, GuardConfig("block", profile=profile_for(bound))), **turn(pipe))
    assert [report.verdict for report in output.guard] == ["withheld"] * 3


@pytest.mark.usefixtures("given_profile")
def test_what_would_let_a_picture_through_unread_is_refused(embedded: Any) -> None:
    """Before anything is run: by name, also where it went into ``**kwargs``."""
    pipe = build(SD, embedded.tokenizer)
    guarded = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))
    for refused, name in (
        ({"cross_attention_kwargs": {"gligen": {"objs": drawn(2, 2)}}}, "gligen"),
        ({"new_guidance": 2.0}, "new_guidance"),
    ):
        with counted(pipe) as calls, pytest.raises(ValueError, match=name):
            call(guarded, **refused)
        assert calls == []


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("mode", ["steer", "block"])
def test_a_text_that_a_callback_brings_after_guidance_is_cut_off_is_read_and_withheld(mode: Any, embedded: Any) -> None:
    pipe = build(SD, embedded.tokenizer)
    condition = pipe.encode_prompt(PROMPTS, CPU, 1, False)[0]
    norms = [report.signals["guidance_norm"]["value"] for report in call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))).guard]
    row, weak = norms.index(max(norms)), norms.index(min(norms))

    def bring(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = condition
        return tensors

    extra: dict[str, Any] = {
        "prompt": [PROMPTS[weak]] * 3,
        "callback_on_step_end": bring,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    plain = call(pipe, **extra)
    output = call(sdguard.guard(pipe, GuardConfig(mode, profile=profile_for(sum(sorted(norms)[-2:]) / 2))), **extra)
    assert [report.flagged_at for report in output.guard] == [2 if i == row else None for i in range(3)]
    assert [report.verdict for report in output.guard] == ["withheld" if i == row else "clean" for i in range(3)]
    assert all(report.steering is None for report in output.guard)
    assert not output.images[row].any()
    assert [unchanged for i, unchanged in enumerate(same(output, plain)) if i != row] == [True] * 2


@pytest.mark.usefixtures("given_profile")
def test_a_lora_comes_and_goes_under_guard(embedded: Any) -> None:
    """Everything is done through the guarded pipeline; each time its pictures are those of the pipeline inside."""
    pipe = build(SD, embedded.tokenizer)
    guarded: Any = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))
    seen = [call(pipe)]

    def now(different: bool = True, **extra: Any) -> None:
        output = call(guarded, **extra)
        assert all(same(output, call(pipe, **extra)))
        assert [report.extra_evaluations for report in output.guard] == [0] * 3
        assert any(all(same(output, before)) for before in seen) != different
        seen.append(output)

    now(different=False)
    load_lora(guarded)
    now()
    now(cross_attention_kwargs={"scale": 0.5})
    guarded.set_adapters("style", 0.3)
    now()
    guarded.disable_lora()
    now(different=False)
    guarded.unload_lora_weights()
    now(different=False)
    fuse_lora(guarded)
    now()
    guarded.unfuse_lora()
    guarded.unload_lora_weights()
    np.testing.assert_allclose(call(guarded).images, seen[0].images, atol=1e-4)  # unfusing subtracts what was added


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("name", ["textual inversion", "IP-Adapter, embeds", "FreeU", "plain attention", "attention slicing"])
def test_what_is_done_to_the_guarded_pipeline_is_done_to_the_one_inside(name: str, embedded: Any) -> None:
    way = by_name[name]
    pipe = build(SD, copy.deepcopy(embedded.tokenizer))
    guarded = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))
    call(guarded)
    way.prepare(guarded)
    assert all(same(run(guarded, way), run(made(way, embedded.tokenizer), way)))


@pytest.mark.usefixtures("given_profile")
def test_what_is_unloaded_leaves_the_first_pictures(embedded: Any) -> None:
    pipe = build(SD, copy.deepcopy(embedded.tokenizer))
    guarded: Any = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))
    plain = call(guarded)
    load_adapter(guarded)
    assert not any(same(call(guarded, **image_embeds(pipe)), plain))
    guarded.unload_ip_adapter()
    guarded.enable_freeu(0.9, 0.2, 1.2, 1.4)
    assert not any(same(call(guarded), plain))
    guarded.disable_freeu()
    load_inversion(guarded)
    guarded.unload_textual_inversion()
    assert all(same(call(guarded), plain))


def test_a_token_of_several_vectors_is_as_long_as_they_are(embedded: Any) -> None:
    pipe = made(by_name["textual inversion"], embedded.tokenizer)
    assert Encoder(pipe).length("a <thing>") == Encoder(pipe).length("a lion") + 1


@pytest.mark.usefixtures("given_profile")
def test_accelerates_hooks_run_and_can_be_taken_away_after_a_guarded_run(embedded: Any) -> None:
    pipe = made(by_name["model offload"], embedded.tokenizer)
    plain = call(pipe)
    call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))))
    hook = pipe.unet._hf_hook
    ran: list[Any] = []

    def ask(module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        ran.append(module)
        return args, kwargs

    hook.pre_forward = ask
    pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 4, 16))
    assert ran == [pipe.unet]
    pipe.remove_all_hooks()
    assert not {"_hf_hook", "_old_forward", "_diffusers_hook"} & set(vars(pipe.unet))
    assert pipe.unet.forward.__func__ is type(pipe.unet).forward
    assert all(same(call(pipe), plain))


@pytest.mark.usefixtures("given_profile")
def test_the_registry_of_diffusers_hooks_is_as_it_was(embedded: Any) -> None:
    pipe = made(by_name["group offload"], embedded.tokenizer)
    registries = {name: module._diffusers_hook for name, module in pipe.unet.named_modules() if hasattr(module, "_diffusers_hook")}
    before = {name: dict(registry.hooks) for name, registry in registries.items()}
    assert any(before.values())
    call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))))
    assert {name: pipe.unet.get_submodule(name)._diffusers_hook.hooks for name in registries} == before
    assert all(pipe.unet.get_submodule(name)._diffusers_hook is registry for name, registry in registries.items())


class Stopped(RuntimeError):
    pass


def stop(*args: Any, **kwargs: Any) -> None:
    raise Stopped


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("offload", ["none", "model offload", "sequential offload", "group offload"])
@pytest.mark.parametrize("who", ["callback", "denoiser", "denoiser, steered", "scheduler"])
def test_a_run_that_is_stopped_leaves_nothing_behind(who: str, offload: str, embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    pipe = build(SD, embedded.tokenizer)
    if offload in by_name:
        by_name[offload].prepare(pipe)
    call(pipe)
    first = state(pipe)
    plain = call(pipe)
    before = state(pipe)
    judged: list[int] = []
    config = GuardConfig(profile=profile_for(1e-9 if "steered" in who else 1e6), on_call=lambda seen, reports: judged.append(seen.step))
    guarded = sdguard.guard(pipe, config)

    def once_judged(module: Any, inputs: Any, output: Any) -> None:
        if judged:
            raise Stopped

    with monkeypatch.context() as patch:
        handle = pipe.unet.conv_out.register_forward_hook(once_judged) if "denoiser" in who else None
        if who == "scheduler":
            patch.setattr(type(pipe.scheduler), "step", stop)
        with pytest.raises(Stopped):
            call(guarded, callback_on_step_end=stop if who == "callback" else None)
        if handle:
            handle.remove()
    assert changed(before, state(pipe)) <= changed(first, before)
    assert all(same(call(pipe), plain))
    assert len(call(guarded).guard) == 3


def runs_another(pipe: Any, guard: Callable[[Any], Any]) -> Any:
    """An image-to-image run of the same denoiser, with a copy of the scheduler as it is in mid-run."""
    other = build("StableDiffusionImg2ImgPipeline", pipe.tokenizer)
    other.unet, other.scheduler = pipe.unet, copy.deepcopy(pipe.scheduler)
    return call(guard(other)).images


def asks_the_denoiser(pipe: Any, guard: Callable[[Any], Any]) -> Any:
    return pipe.unet(drawn(1, 4, 8, 8), 500, encoder_hidden_states=drawn(1, 32, 16), return_dict=False)[0]


def loads_a_lora(pipe: Any, guard: Callable[[Any], Any]) -> None:
    load_lora(pipe)


def offloads(pipe: Any, guard: Callable[[Any], Any]) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def swaps_the_denoiser(pipe: Any, guard: Callable[[Any], Any]) -> None:
    pipe.unet = build(SDXL if hasattr(pipe, "text_encoder_2") else SD, pipe.tokenizer).unet


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("extra", [{}, {"guidance_scale": 1.0}], ids=["guidance", "no guidance"])
@pytest.mark.parametrize("what", [runs_another, asks_the_denoiser, loads_a_lora, offloads, swaps_the_denoiser])
def test_what_a_callback_makes_of_the_parts_of_the_run_is_none_of_the_run(what: Any, extra: dict[str, Any], embedded: Any) -> None:
    """It finds them unguarded, and does what it does in an unguarded run; pipelines that it guards itself are guarded."""
    config = GuardConfig(profile=profile_for(1e6))
    found: list[tuple[Any, list[Any]]] = []
    for outer, inner in ((False, False), (True, False), (True, True)):
        made: list[Any] = []

        def aside(
            pipe: Any, step: int, timestep: Any, tensors: dict[str, Any], made: list[Any] = made, inner: bool = inner
        ) -> dict[str, Any]:
            if step == 1:
                assert not {"forward", "_diffusers_hook"} & set(vars(pipe.unet))
                made.append(what(pipe, partial(sdguard.guard, config=config) if inner else sdguard.unguard))
            return tensors

        pipe = build(SD, copy.deepcopy(embedded.tokenizer))
        output = call(sdguard.guard(pipe, config) if outer else pipe, callback_on_step_end=aside, **extra)
        found.append((output, made))
        if outer:
            assert [report.error for report in output.guard] == [None] * 3
            assert [len(report.series["guidance_norm"]) for report in output.guard] == [1 if extra else 4] * 3
    for output, made in found[1:]:
        assert all(same(output, found[0][0]))
        assert made[0] is None or np.array_equal(made[0], found[0][1][0])


@pytest.mark.usefixtures("given_profile")
def test_who_is_shown_a_call_may_ask_the_denoiser(embedded: Any) -> None:
    pipe = build(SD, embedded.tokenizer)
    plain, asked = call(pipe), []
    config = GuardConfig(profile=profile_for(1e6), on_call=lambda seen, reports: asked.append(asks_the_denoiser(pipe, sdguard.unguard)))
    output = call(sdguard.guard(pipe, config))
    assert all(same(output, plain))
    assert len(asked) == 4
    assert all(torch.equal(one, asks_the_denoiser(pipe, sdguard.unguard)) for one in asked)


@pytest.mark.usefixtures("given_profile")
def test_another_default_precision_changes_no_decision(embedded: Any) -> None:
    pipe = build(SD, embedded.tokenizer)
    config = GuardConfig(profile=profile_for(1e6))
    before, default = call(sdguard.guard(pipe, config)), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        plain, output = call(pipe), call(sdguard.guard(pipe, config))
    finally:
        torch.set_default_dtype(default)
    assert all(same(output, plain))
    for report, other in zip(output.guard, before.guard, strict=True):
        assert (report.verdict, report.error) == ("clean", None)
        assert report.score == pytest.approx(other.score, rel=1e-3)


@pytest.mark.usefixtures("given_profile")
def test_copies_made_for_each_request_may_run_at_once(embedded: Any) -> None:
    """As servers have them: shallow copies, each with a scheduler of its own."""
    pipe = build(SD, embedded.tokenizer)
    guarded, plain = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), call(pipe)

    def request(_: int) -> Any:
        own: Any = copy.copy(guarded)
        own.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        return call(own)

    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(request, range(4)))
    assert all(all(same(output, plain)) for output in outputs)
    assert all(report.error is None for output in outputs for report in output.guard)


@pytest.mark.usefixtures("given_profile")
def test_positional_arguments(embedded: Any) -> None:
    pipe = build(SD, embedded.tokenizer)
    arguments = ("a cat", 24, 16, 3, None, None, 4.0, "sky", 2)
    plain, guarded = (
        target(*arguments, generator=torch.Generator().manual_seed(1), output_type="np")
        for target in (pipe, sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))))
    )
    assert all(same(guarded, plain))
    assert [report.prompt for report in guarded.guard] == ["a cat"] * 2
    assert [len(report.series["guidance_norm"]) for report in guarded.guard] == [3] * 2


def test_a_pipeline_from_auto_is_guarded_by_the_profile_of_its_directory(embedded: Any) -> None:
    pipe = diffusers.AutoPipelineForText2Image.from_pretrained(testbed.path())
    pipe.set_progress_bar_config(disable=True)
    guarded = sdguard.guard(pipe, GuardConfig("observe", on_unknown="raise"))
    setting: dict[str, Any] = {"num_inference_steps": testbed.STEPS, "guidance_scale": testbed.GUIDANCE_SCALE}
    output = call(guarded, PROMPTS[:1], **setting)
    assert all(same(output, call(embedded, PROMPTS[:1], **setting)))
    assert all(report.p_value is not None for report in output.guard)


@pytest.mark.usefixtures("given_profile")
def test_the_parts_of_a_guarded_pipeline_make_other_pipelines(embedded: Any) -> None:
    pipe = build(SD, embedded.tokenizer)
    guarded: Any = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))
    call(guarded)
    twin = diffusers.StableDiffusionPipeline.from_pipe(guarded)
    other = diffusers.AutoPipelineForImage2Image.from_pipe(guarded)
    parts = diffusers.StableDiffusionImg2ImgPipeline(**guarded.components, requires_safety_checker=False)
    assert type(other) is type(parts) is diffusers.StableDiffusionImg2ImgPipeline
    assert twin.unet is other.unet is parts.unet is pipe.unet
    for made in (twin, other, parts):
        made.set_progress_bar_config(disable=True)
    assert all(same(call(twin), call(pipe)))
    plain = call(other)
    assert all(same(call(parts), plain))
    clean = call(sdguard.guard(other, GuardConfig(profile=profile_for(1e6))))
    assert all(same(clean, plain))
    assert [report.extra_evaluations for report in clean.guard] == [2] * 3


@pytest.mark.usefixtures("given_profile")
def test_a_guarded_pipeline_is_saved_as_the_one_inside(embedded: Any, tmp_path: Path) -> None:
    pipe = build(SD, embedded.tokenizer)
    guarded = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))
    plain = call(guarded)
    pipe.save_pretrained(tmp_path / "plain")
    guarded.save_pretrained(tmp_path / "guarded")
    files = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file()]
    assert files
    assert all((tmp_path / "plain" / file).read_bytes() == (tmp_path / "guarded" / file).read_bytes() for file in files)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "guarded", safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is diffusers.StableDiffusionPipeline
    np.testing.assert_allclose(call(loaded).images, plain.images, atol=1e-5)  # weights lie elsewhere in memory, which moves the last bit


@pytest.mark.usefixtures("given_profile")
def test_a_guarded_pipeline_can_be_let_go(embedded: Any) -> None:
    guarded = sdguard.guard(build(SD, embedded.tokenizer), GuardConfig(profile=profile_for(1e6)))
    output = call(guarded)
    denoiser = weakref.ref(guarded.unet)
    del guarded
    gc.collect()
    assert denoiser() is None
    assert len(output.guard) == 3


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("made", [copy.copy, copy.deepcopy])
def test_the_copy_of_a_guarded_pipeline_is_guarded(made: Callable[[Any], Any], embedded: Any) -> None:
    guarded = sdguard.guard(build(SD, embedded.tokenizer), GuardConfig(profile=profile_for(1e6)))
    twin = made(guarded)
    assert sdguard.unguard(twin) is not sdguard.unguard(guarded)
    assert (twin.unet is guarded.unet) == (made is copy.copy)
    output = call(twin)
    assert all(same(output, call(guarded)))
    assert len(output.guard) == 3


#: the text-to-image example of diffusers' own README.
DIFFUSERS_README = """\
from diffusers import DiffusionPipeline
import torch

pipeline = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=torch.float16)
pipeline.to("cuda")
pipeline("An image of a squirrel in Picasso style").images[0]
"""


def our_readme() -> str:
    """The script under "One changed line"."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    found = re.search(r"## One changed line\n+```python[^\n]*\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def test_one_line_of_a_script_is_changed() -> None:
    lines = difflib.ndiff(DIFFUSERS_README.splitlines(), our_readme().splitlines())
    assert [line[0] for line in lines if line[0] != " " and line[0] != "?"] == ["-", "+"]


@pytest.mark.usefixtures("given_profile")
def test_the_script_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the embedded model, in the precision and on the device that are here, two steps."""
    here = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(testbed.path()),
        "float16": "float32",
        "cuda": "cpu",
        'style"': 'style", num_inference_steps=2',
    }
    script = re.sub("|".join(here), lambda found: here[found[0]], our_readme())
    monkeypatch.setattr(pipeline_module, "GuardConfig", lambda: GuardConfig(profile=profile_for(1e6)))
    names: dict[str, Any] = {}
    exec(script, names)
    assert isinstance(names["pipeline"], GuardedPipeline)
    assert len(names["pipeline"].guard_reports) == 1


def pixels() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).random((16, 16, 3), dtype=np.float32)


#: forms in which pictures are given, one for each of three prompts or one for all
PICTURES: dict[str, Callable[[], Any]] = {
    "a picture": lambda: Image.fromarray((255 * pixels()).astype(np.uint8)),
    "pictures": lambda: [PICTURES["a picture"]()] * 3,
    "a batch": lambda: torch.from_numpy(pixels()).permute(2, 0, 1).expand(3, -1, -1, -1),
    "a batch of one": lambda: PICTURES["a batch"]()[:1],
    "a list of tensors": lambda: list(PICTURES["a batch"]()),
    "a list of arrays": lambda: [pixels()] * 3,
}


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("form", PICTURES)
@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint", "ControlNet"])
def test_pictures_may_be_given_in_every_form(kind: str, form: str, embedded: Any) -> None:
    pipe, given = build(f"StableDiffusion{kind}Pipeline", embedded.tokenizer), {"image": PICTURES[form]()}
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), **given)
    assert all(same(clean, call(pipe, **given)))
    assert [(report.verdict, report.error) for report in clean.guard] == [("clean", None)] * 3


#: skip-layer guidance from the second step to the last
SKIPPING: dict[str, Any] = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0}


@pytest.mark.usefixtures("given_profile")
def test_skip_layer_guidance_is_let_be_where_nothing_is_steered(embedded: Any) -> None:
    pipe = build(SD3, embedded.tokenizer)
    extra = SKIPPING
    plain, without = call(pipe, **extra), call(pipe)
    norms = [report.signals["guidance_norm"]["value"] for report in call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))).guard]
    output = call(sdguard.guard(pipe, GuardConfig("block", profile=profile_for(sum(sorted(norms)[-2:]) / 2))), **extra)
    row = norms.index(max(norms))
    assert not any(same(plain, without))
    assert [report.verdict for report in output.guard] == ["withheld" if i == row else "clean" for i in range(3)]
    assert same(output, plain) == [i != row for i in range(3)]


@pytest.mark.usefixtures("given_profile")
def test_the_branch_without_some_layers_hears_what_a_steered_row_hears(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is what the whole pipeline makes of its new prompt."""
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    pipe = build(SD3, embedded.tokenizer)
    norms = [report.signals["guidance_norm"]["value"] for report in call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))).guard]
    row = norms.index(max(norms))
    prompts = [prompt.split()[-1] if i == row else prompt for i, prompt in enumerate(PROMPTS)]
    wanted = call(pipe, prompts, **SKIPPING)
    output = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(sum(sorted(norms)[-2:]) / 2))), **SKIPPING)
    assert [report.verdict for report in output.guard] == ["steered" if i == row else "clean" for i in range(3)]
    np.testing.assert_allclose(output.images, wanted.images, atol=5e-5)
    assert not np.allclose(output.images[row], call(pipe, prompts).images[row], atol=5e-3)


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("start", [-1.0, 0.01], ids=["from the first step", "from the second"])
@pytest.mark.parametrize("how", ["rule", "noise"])
def test_nothing_is_turned_away_where_a_rule_or_another_noise_says_where_a_row_goes(
    how: str, start: float, embedded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a row that follows a rule, at no step; of one that starts elsewhere, at the step where it enters."""

    def corrected(flagged: SteeringInput, methods: Any, outcomes: Any = None) -> list[Outcome]:
        noises = drawn(*flagged.observation.x.shape)
        return [
            Outcome(Correction({}, rule=lambda seen: seen.eps_u) if how == "rule" else Correction({}, x=noise), [{"method": how}])
            for noise in noises
        ]

    monkeypatch.setattr(run_module, "try_in_order", corrected)
    pipe = build(SD3, embedded.tokenizer)
    found = {}
    for name, extra in {"without": {}, "with": {**SKIPPING, "skip_layer_guidance_start": start}}.items():
        if how == "noise" and name == "with":
            extra["skip_layer_guidance_stop"] = 0.1  # over when the row has entered
        output = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e-9))), **extra)
        assert [report.error for report in output.guard] == [None] * 3
        found[name] = output.images
    np.testing.assert_allclose(found["with"], found["without"], atol=1e-5)


def drop_encoders(pipe: Any) -> None:
    for name in sdguard.unguard(pipe).components:
        if name.startswith(("text_encoder", "tokenizer")):
            setattr(pipe, name, None)


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("name", [SD, SDXL, SD3, "FluxPipeline"])
def test_prompts_may_be_encoded_and_the_encoders_dropped_before_any_run(name: str, embedded: Any) -> None:
    """As diffusers advises for small memory; what is read then is what is read of the prompts themselves."""
    guarded: Any = sdguard.guard(build(name, embedded.tokenizer), GuardConfig(profile=profile_for(1e6)))
    if name == "FluxPipeline":
        found = guarded.encode_prompt(PROMPTS, None, max_sequence_length=8)
        given = {"prompt": None, "prompt_embeds": found[0], "pooled_prompt_embeds": found[1]}
    else:
        given = embeds(guarded)
    drop_encoders(guarded)
    output = call(guarded, **given)
    assert all(same(output, call(sdguard.unguard(guarded), **given)))
    assert [report.error for report in output.guard] == [None] * 3
    whole = call(sdguard.guard(build(name, embedded.tokenizer), GuardConfig(profile=profile_for(1e6))))
    for here, there in zip(output.guard, whole.guard, strict=True):
        assert here.signals["guidance_norm"]["value"] == pytest.approx(there.signals["guidance_norm"]["value"], rel=1e-3)


@pytest.mark.usefixtures("given_profile")
def test_encoders_that_are_dropped_from_a_guarded_pipeline_leave_the_empty_prompt(embedded: Any) -> None:
    pipe = build(SD, embedded.tokenizer)
    given = embeds(pipe)
    guarded: Any = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))
    drop_encoders(guarded)
    output = call(guarded, **given)
    assert [(report.verdict, report.error) for report in output.guard] == [("clean", None)] * 3


@pytest.mark.usefixtures("given_profile")
def test_an_empty_prompt_of_zeros_needs_no_encoder(embedded: Any) -> None:
    """SDXL's own."""
    pipe = build(SDXL, embedded.tokenizer)
    given, null = embeds(pipe), Encoder(pipe).both([""])[1]
    assert not null.any()
    drop_encoders(pipe)
    output = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), **given)
    assert [(report.verdict, report.error) for report in output.guard] == [("clean", None)] * 3


@pytest.mark.parametrize("on_unknown", ["calibrate", "background"])
def test_without_text_encoders_no_profile_is_made(on_unknown: Any, embedded: Any) -> None:
    pipe = build(SD, embedded.tokenizer)
    given = embeds(pipe)
    drop_encoders(pipe)
    with pytest.raises(ProfileError, match="none can be made without its text encoders"):
        call(sdguard.guard(pipe, GuardConfig(on_unknown=on_unknown)), **given)


def train_denoiser(pipe: Any) -> None:
    for module in pipe.unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    pipe.unet.train()


#: pipelines with dropout in a part that is in training mode, as a part is that was made and not loaded
TRAINING: dict[str, Prepare] = {"FluxPipeline": lambda pipe: pipe.text_encoder_2.train(), SD: train_denoiser}


@pytest.mark.parametrize("name", TRAINING)
def test_dropout_draws_what_it_draws_unguarded(name: str, embedded: Any) -> None:
    """And so do the calls that come after, though the guard has encoded and evaluated beside them."""
    pipe = build(name, embedded.tokenizer)
    TRAINING[name](pipe)
    found: dict[Any, list[Any]] = {}
    for of in (pipe, sdguard.guard(pipe, GuardConfig("observe", on_unknown="first_call_only"))):
        torch.manual_seed(0)
        found[type(of)] = [call(of).images for _ in range(2)]
    plain, guarded = found.values()
    assert not np.array_equal(*plain)
    assert all(map(np.array_equal, plain, guarded))
