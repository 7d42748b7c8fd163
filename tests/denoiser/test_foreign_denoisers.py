"""Denoisers as other people have them: wrapped, cached, compiled. What ran without the guard runs the same with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from families import FLUX, PROMPTS, build, call, one_block, profile_for, reworded
from torch import Tensor, nn

import sdguard
from sdguard import GuardConfig
from sdguard.correction import Correction
from sdguard.decision.identity import identity
from sdguard.denoiser.probe import probe_run, read_prompts
from sdguard.explain.attribution import norm_gradient
from sdguard.guarded import run as run_module
from sdguard.steering.fallback import Outcome


@pytest.fixture(autouse=True)
def _given_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration's profile is taken as it is, whatever model it was made for; what is flagged is reworded."""
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    monkeypatch.setattr(run_module, "try_in_order", reworded)


def is_left_alone_but_for_the_flagged_row(pipe: Any, **extra: Any) -> None:
    """Clean images are those of the unguarded pipeline; where one is flagged, it alone is another."""
    plain = call(pipe, **extra).images
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), **extra)
    assert np.array_equal(clean.images, plain)
    assert [report.error for report in clean.guard] == [None] * 3
    norms = [report.signals["guidance_norm"]["value"] for report in clean.guard]
    row, bound = norms.index(max(norms)), sum(sorted(norms)[-2:]) / 2
    steered = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(bound))), **extra)
    assert [(report.verdict, report.error) for report in steered.guard] == [("steered" if i == row else "clean", None) for i in range(3)]
    assert [np.array_equal(steered.images[i], plain[i]) for i in range(3)] == [i != row for i in range(3)]
    assert np.array_equal(call(pipe, **extra).images, plain)


class Exported(nn.Module):
    """A denoiser with names of its own for what it is called with."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.inner, self.config, self.dtype, self.device = unet, unet.config, unet.dtype, unet.device

    def forward(self, latent_model_input: Tensor, t: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        return (self.inner(latent_model_input, t, encoder_hidden_states).sample,)


def test_a_denoiser_may_name_its_arguments_otherwise(embedded: Any) -> None:
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    pipe.unet = Exported(pipe.unet)
    is_left_alone_but_for_the_flagged_row(pipe)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"])
def test_a_timestep_is_found_at_its_place_and_is_one_number(name: str, embedded: Any) -> None:
    pipe = build(name, embedded.tokenizer)
    seen, inner = [], pipe.unet.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[1].item())
        return inner(*args, **kwargs)

    pipe.unet.forward = forward
    is_left_alone_but_for_the_flagged_row(pipe)
    assert {*pipe.scheduler.timesteps.tolist()} <= {*seen}


#: caches of diffusers, by what makes a configuration of them for a pipeline
CACHES: dict[str, Callable[[Any], Any]] = {
    "first block": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=0.5),
    "pyramid attention broadcast": lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1001),
        spatial_attention_block_identifiers=["transformer_blocks"],
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "faster": lambda pipe: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "Taylor": lambda pipe: diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=1),
    "magnitude": lambda pipe: diffusers.MagCacheConfig(
        threshold=0.5, max_skip_steps=3, retention_ratio=0.0, num_inference_steps=6, mag_ratios=torch.ones(6)
    ),
}
STEPS: dict[str, Any] = {"num_inference_steps": 6}


def cached_flux(embedded: Any, cache: str | None) -> Any:
    """A Flux of two blocks of each kind, with a cache."""
    pipe = build("FluxPipeline", embedded.tokenizer)
    torch.manual_seed(0)
    pipe.transformer = diffusers.FluxTransformer2DModel(**{**FLUX, "num_layers": 2, "num_single_layers": 2})
    if cache:
        pipe.transformer.enable_cache(CACHES[cache](pipe))
    return pipe


@pytest.mark.parametrize("extra", [{}, {"negative_prompt": ["a cow"] * 3, "true_cfg_scale": 3.0}], ids=["distilled", "true guidance"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_keeps_what_it_keeps_without_the_guard(cache: str, extra: dict[str, Any], embedded: Any) -> None:
    pipe = cached_flux(embedded, cache)
    assert not np.array_equal(call(pipe, **STEPS, **extra).images, call(cached_flux(embedded, None), **STEPS, **extra).images)
    is_left_alone_but_for_the_flagged_row(pipe, **STEPS, **extra)


@pytest.mark.parametrize("cache", CACHES)
def test_a_steered_row_finds_nothing_of_its_own_text_in_a_cache(cache: str, embedded: Any) -> None:
    """It is what it is without a cache: all of its parts are evaluated under the new text, and counted."""
    config = GuardConfig(profile=profile_for(1e-9))
    kept, plain = (call(sdguard.guard(cached_flux(embedded, which), config), **STEPS) for which in (cache, None))
    np.testing.assert_allclose(kept.images, plain.images, atol=1e-5)
    spent = [[report.extra_evaluations for report in output.guard] for output in (kept, plain)]
    assert spent[0] == [count + 5 for count in spent[1]]


@pytest.mark.parametrize("cache", CACHES)
def test_a_run_that_ends_early_leaves_nothing_in_a_cache(cache: str, embedded: Any) -> None:
    pipe = cached_flux(embedded, cache)
    plain = call(pipe, **STEPS).images
    probe_run(pipe, ["a cow"], [0], lambda observation: None, 3, height=16, width=16, max_sequence_length=8, **STEPS)
    assert np.array_equal(call(pipe, **STEPS).images, plain)


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_moves_no_identity_and_no_reading(cache: str, embedded: Any) -> None:
    """The guard reads beside it, also outside of any run."""
    plain, kept = (cached_flux(embedded, which) for which in (None, cache))
    assert identity(plain) == identity(kept)
    one, other = (read_prompts(pipe, PROMPTS, [7, 8, 9]) for pipe in (plain, kept))
    assert torch.equal(one.eps_c, other.eps_c)


class DeepCacheLike:
    """Keeps what a block gave at every second step of the pipeline's schedule, as DeepCache does, with its names."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.cur_timestep, self.start_timestep = pipe, 0, None
        self.cached_output: dict[str, Any] = {}
        self.replace(pipe.unet, self.whole)
        self.replace(pipe.unet.mid_block, self.block)

    def replace(self, module: Any, made: Callable[..., Any]) -> None:
        forward, helper = module.forward, self

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return made(helper, forward, *args, **kwargs)

        wrapped.__module__ = "DeepCache.extension.deepcache"
        module.forward = wrapped

    @staticmethod
    def whole(helper: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        helper.cur_timestep = list(helper.pipe.scheduler.timesteps).index(args[1].item())
        return forward(*args, **kwargs)

    @staticmethod
    def block(helper: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        helper.start_timestep = helper.cur_timestep if helper.start_timestep is None else helper.start_timestep
        if (helper.cur_timestep - helper.start_timestep) % 2 == 0:
            helper.cached_output["mid"] = forward(*args, **kwargs)
        return helper.cached_output["mid"]


def test_deepcache_keeps_what_it_keeps_without_the_guard(embedded: Any) -> None:
    """The guard reads at timesteps that are not in the schedule, with batches of other sizes."""
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    plain, read = call(pipe, **STEPS).images, read_prompts(pipe, PROMPTS, [7, 8, 9])
    DeepCacheLike(pipe)
    assert not np.array_equal(call(pipe, **STEPS).images, plain)
    is_left_alone_but_for_the_flagged_row(pipe, **STEPS)
    is_left_alone_but_for_the_flagged_row(pipe, **STEPS, negative_prompt=["a cow"] * 3)
    assert torch.equal(read_prompts(pipe, PROMPTS, [7, 8, 9]).eps_c, read.eps_c)


def compile_in_place(unet: Any, **options: Any) -> Any:
    unet.compile(**options)
    return unet


def compile_forward(unet: Any, **options: Any) -> Any:
    unet.forward = torch.compile(unet.forward, **options)
    return unet


def compile_blocks(unet: Any, **options: Any) -> Any:
    unet.compile_repeated_blocks(**options)
    return unet


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("compile_it", [compile_in_place, compile_forward, compile_blocks, torch.compile])
def test_a_compiled_denoiser_is_compiled_for_the_pipelines_calls_alone(compile_it: Any, fullgraph: bool, embedded: Any) -> None:
    """Neither the guard nor any of its own evaluations is traced, and rows are what they are without it."""
    torch.compiler.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    pipe.unet = compile_it(one_block(), backend=backend, fullgraph=fullgraph)
    call(pipe)
    made = len(graphs)
    is_left_alone_but_for_the_flagged_row(pipe)
    is_left_alone_but_for_the_flagged_row(pipe, negative_prompt=["a cow"] * 3)
    read_prompts(pipe, PROMPTS, [7, 8, 9])
    assert len(graphs) == made > 0


def test_a_denoiser_of_no_square_pictures_is_read_at_its_own_size(embedded: Any) -> None:
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    pipe.unet.register_to_config(sample_size=(8, 12))
    pipe._is_unet_config_sample_size_int = False  # as it would have found
    is_left_alone_but_for_the_flagged_row(pipe)
    assert call(pipe).images.shape == (3, 16, 24, 3)
    assert read_prompts(pipe, PROMPTS, [7, 8, 9]).x.shape == (3, 4, 8, 12)
    assert identity(pipe)["size"] == [16, 24]


def test_gradients_of_weights_that_are_stored_in_eight_bits_are_those_of_their_values(embedded: Any) -> None:
    pipe, twin = (build("StableDiffusionPipeline", embedded.tokenizer) for _ in range(2))
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    for stored, plain in zip(pipe.unet.parameters(), twin.unet.parameters(), strict=True):
        plain.data = stored.data.float()
    assert any(stored.dtype == torch.float8_e4m3fn for stored in pipe.unet.parameters())
    seen = [read_prompts(one, PROMPTS, [7, 8, 9]) for one in (pipe, twin)]
    (_, one), (_, other) = (norm_gradient(of, of.condition) for of in seen)
    assert other.any()
    torch.testing.assert_close(one, other)


def longer(pipe: Any, length: int) -> dict[str, Any]:
    """The prompts as embeddings of ``length`` tokens, beside a negative prompt that is encoded to fewer."""
    if isinstance(pipe, diffusers.FluxPipeline):
        text, pooled, _ = pipe.encode_prompt(PROMPTS, None, device="cpu", max_sequence_length=length)
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "negative_prompt": ["blurry"] * 3, "true_cfg_scale": 3.0}
    if isinstance(pipe, diffusers.ChromaPipeline):
        text, _, mask, *_ = pipe.encode_prompt(PROMPTS, device="cpu", max_sequence_length=length)
        return {"prompt_embeds": text, "prompt_attention_mask": mask, "negative_prompt": ["blurry"] * 3}
    text, _ = pipe.encode_prompt(PROMPTS, device="cpu", max_sequence_length=length)
    return {
        "prompt_embeds": text,
        "negative_prompt_embeds": pipe.encode_prompt(["blurry"] * 3, device="cpu", max_sequence_length=length - 3)[0],
    }


@pytest.mark.parametrize("length", [12, 21])
@pytest.mark.parametrize("name", ["FluxPipeline", "ChromaPipeline", "Flux2KleinPipeline"])
def test_embeddings_of_prompt_and_negative_prompt_may_be_of_two_lengths(name: str, length: int, embedded: Any) -> None:
    pipe = build(name, embedded.tokenizer)
    extra = {"prompt": None, **longer(pipe, length)}
    plain = call(pipe, **extra).images
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), **extra)
    assert np.array_equal(clean.images, plain)
    assert [report.error for report in clean.guard] == [None] * 3


def test_a_negative_prompt_of_another_length_moves_no_reading(embedded: Any) -> None:
    """Its length is the only difference here: it is the empty prompt, as long as the prompt or shorter."""
    pipe, seen = build("FluxPipeline", embedded.tokenizer), []
    text, pooled, _ = pipe.encode_prompt(PROMPTS, None, device="cpu", max_sequence_length=12)
    given = {"prompt": None, "prompt_embeds": text, "pooled_prompt_embeds": pooled, "true_cfg_scale": 3.0}
    config = GuardConfig("observe", profile=profile_for(1e6), on_call=lambda observation, reports: seen.append(observation.at_reference))
    for length in (12, 9):
        call(sdguard.guard(pipe, config), **given, negative_prompt=[""] * 3, max_sequence_length=length)
    first, other = seen[0], seen[4]
    torch.testing.assert_close(other.eps_c, first.eps_c)
    torch.testing.assert_close(other.eps_u, first.eps_u)


def test_of_embeddings_of_two_lengths_the_flagged_row_alone_is_steered(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(flagged: Any, methods: Any, outcomes: Any = None) -> list[Outcome]:
        return [Outcome(Correction({}, condition=text / 2), [{"method": "halving"}]) for text in flagged.observation.condition]

    monkeypatch.setattr(run_module, "try_in_order", halved)
    pipe = build("FluxPipeline", embedded.tokenizer)
    is_left_alone_but_for_the_flagged_row(pipe, prompt=None, **longer(pipe, 12))
