"""The two seams of a run: a hook around the denoiser, which shows each call as an `Observation`, and one around ``scheduler.step``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor, nn

from sdguard.correction import Correction, corrected
from sdguard.observation import NoiseLevel, Observation, from_noise, noise_level, to_noise
from sdguard.restart import input_scale, own_way, private_copy, splice

HOOK = "sdguard"


@dataclass(frozen=True)
class Family:
    """What the guard needs to know of a pipeline class: its denoiser and the argument that carries the text condition."""

    denoiser: str
    condition: str


#: pipeline class name -> family. The batch is laid out unconditional rows first, as in diffusers.
FAMILIES = {"StableDiffusionPipeline": Family(denoiser="unet", condition="encoder_hidden_states")}


def family_of(pipe: Any) -> Family:
    """The family of a pipeline; raises `TypeError` for a class sdguard does not know."""
    name = type(pipe).__name__
    if name not in FAMILIES:
        raise TypeError(f"sdguard does not support {name} yet; supported: {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[name]


def default_size(pipe: Any) -> int:
    """Height and width in pixels of what a pipeline makes when it is not told."""
    return int(getattr(pipe, family_of(pipe).denoiser).config.sample_size * pipe.vae_scale_factor)


@dataclass(frozen=True)
class Encoder:
    """The text encoder of a pipeline, as a running call of the pipeline uses it for its own prompts."""

    pipe: Any

    def __call__(self, texts: list[str]) -> Tensor:
        """Text embeddings ``[n, T, E]`` of n texts."""
        pipe = self.pipe
        lora_scale = (pipe.cross_attention_kwargs or {}).get("scale")
        return pipe.encode_prompt(texts, pipe._execution_device, 1, False, lora_scale=lora_scale, clip_skip=pipe.clip_skip)[0]

    def length(self, text: str) -> int:
        """Tokens of ``text``, begin and end token included, that fit into the text encoder's window."""
        tokenizer = self.pipe.tokenizer
        return min(len(tokenizer(text).input_ids), int(tokenizer.model_max_length))

    @property
    def pads_with_end(self) -> bool:
        """Whether what lies behind a prompt is filled with copies of the end token."""
        return bool(self.pipe.tokenizer.pad_token_id == self.pipe.tokenizer.eos_token_id)


def check_guidance(guidance_scale: float) -> None:
    """Raise `ValueError` for a run without an unconditional branch: its batch holds no rows to compare with."""
    if guidance_scale <= 1:
        raise ValueError(
            f"With guidance_scale={guidance_scale:g} the pipeline runs no unconditional branch, so the guidance norm and the "
            "look-ahead fall away and the guard refuses the run; use a guidance scale above 1, or sdguard.unguard(pipe)."
        )


class Watcher(Protocol):
    """Something that looks at each denoiser call of a run."""

    #: what is changed of a row's run, by row.
    corrections: dict[int, Correction]

    def observe(self, observation: Observation) -> None:
        """Look at one call; what it puts into ``corrections`` holds for the whole run of that row, its past calls included."""


class DenoiserHook(ModelHook):
    """Shows each guided denoiser call to a watcher and runs the rows it corrects as their corrections say.

    Rows that are not corrected are computed by the pipeline's own call, in the pipeline's own batch, and are therefore
    bit-identical to those of an unguarded run. A row whose correction comes after the first call, or brings another noise, goes
    its own way up to this call and takes its place in the batch again, in the scheduler's memory too.
    """

    def __init__(self, pipe: Any, family: Family, watcher: Watcher) -> None:
        super().__init__()
        self.pipe, self.family, self.watcher = pipe, family, watcher
        self.timesteps: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.entered: set[int] = set()
        self.evaluations = torch.zeros(0, dtype=torch.long)
        self.first: Observation | None = None
        self.start: Any = None  # the scheduler before its first step
        self.dtype = torch.float32  # of the pipeline's latents
        self.arguments: dict[str, Any] = {}  # of scheduler.step
        self.arriving: dict[int, tuple[Tensor, Any]] = {}  # rows that enter the batch at the step under way

    def level_at(self, timestep: float) -> NoiseLevel:
        return noise_level(self.pipe.scheduler, timestep)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        check_guidance(self.pipe.guidance_scale)
        sample, timestep = args[0], float(args[1])
        count = len(sample) // 2
        if not self.timesteps:
            self.start, self.dtype = private_copy(self.pipe.scheduler), sample.dtype
            self.evaluations = torch.zeros(count, dtype=torch.long)
        self.timesteps.append(torch.as_tensor(args[1]).cpu())
        condition = self.redirect(kwargs[self.family.condition])
        output = self.fn_ref.original_forward(*args, **{**kwargs, self.family.condition: condition})
        prediction = output[0]

        def predict(x: Tensor, t: float, text: Tensor) -> Tensor:
            """The network's own output, whatever it predicts."""
            at = torch.full((len(x),), t, device=x.device, dtype=torch.float32)
            changed = {**kwargs, self.family.condition: text.to(condition.dtype), "return_dict": False}
            return self.fn_ref.original_forward(x.to(sample.dtype), at, *args[2:], **changed)[0]

        def denoise(x: Tensor, t: float, text: Tensor) -> Tensor:
            return self.to_noise(predict(x, t, text), x, t)

        null_condition, text_condition = condition.chunk(2)
        eps_u, eps_c = self.to_noise(prediction, sample, timestep).chunk(2)
        observation = Observation(
            step=len(self.timesteps) - 1,
            timestep=timestep,
            level=self.level_at(timestep),
            x=sample[:count].float(),
            eps_c=eps_c,
            eps_u=eps_u,
            condition=text_condition,
            null_condition=null_condition,
            guidance_scale=float(self.pipe.guidance_scale),
            level_at=self.level_at,
            denoise=denoise,
            evaluations=self.evaluations,
            rows=torch.arange(count),
            denoiser=module,
            past_norms=torch.stack(self.norms, 1) if self.norms else torch.zeros(count, 0),
            estimates={},
        )
        self.first = self.first or observation
        self.norms.append(observation.difference.flatten(1).norm(dim=1).cpu())
        self.watcher.observe(observation)
        if self.watcher.corrections:
            prediction = prediction.clone()
            for row, correction in self.watcher.corrections.items():
                self.correct(row, correction, observation, prediction)
        return (prediction, *output[1:]) if isinstance(output, tuple) else type(output)(sample=prediction)

    def correct(self, row: int, correction: Correction, observation: Observation, prediction: Tensor) -> None:
        """Put what one row's correction makes of this call into ``prediction``, in both branches of the pipeline's batch."""
        here = observation.select(torch.tensor([row]))
        if row not in self.entered:
            self.entered.add(row)
            here = self.enter(row, correction, here)
            now = here.difference.flatten(1).norm(dim=1).to(here.past_norms)
            for norms, norm in zip(self.norms, [*here.past_norms[0], now[0]], strict=True):
                norms[row] = norm
        elif correction.rule:
            here = replace(here, rules=(correction.rule,))
        else:
            return
        null, text = self.raw(here)
        prediction[[row, len(prediction) // 2 + row]] = torch.cat([null, text]).to(prediction)

    def enter(self, row: int, correction: Correction, here: Observation) -> Observation:
        """One row at this call under its correction; if it starts elsewhere or late, after going its own way from the start."""
        if not here.step and correction.x is None:
            return corrected(here, [correction])
        assert self.first is not None
        seen = corrected(self.first.select(torch.tensor([row])), [correction])

        def follow(call: int, x: Tensor, timestep: Tensor) -> Tensor:
            nonlocal seen
            if call:
                seen = seen.at(x.float(), float(timestep))
            return self.guide(*self.raw(seen)).to(x.dtype)

        latents = (seen.x / input_scale(self.start, self.timesteps[0])).to(self.dtype)
        latents, scheduler = own_way(self.start, latents, self.timesteps, follow, self.arguments)
        self.arriving[row] = latents, scheduler
        if here.step:
            seen = seen.at(scheduler.scale_model_input(latents, self.timesteps[-1]).float(), here.timestep)
        return seen

    def raw(self, here: Observation) -> tuple[Tensor, Tensor]:
        """The network outputs, unconditional and conditional, with which the pipeline's guidance gives the prediction that is followed."""
        outputs = here.eps_u, here.eps_c if not any(here.rules) else here.eps_u + (here.prediction - here.eps_u) / here.guidance_scale
        kind = self.prediction_type
        null, text = (from_noise(eps, here.x, here.level, kind) for eps in outputs)
        return null, text

    def guide(self, null: Tensor, text: Tensor) -> Tensor:
        """What the pipeline makes of the two branches' outputs (Ho & Salimans 2022; rescaled as in Lin et al. 2023 where it is told to)."""
        guided = null + self.pipe.guidance_scale * (text - null)
        return rescale_noise_cfg(guided, text, self.pipe.guidance_rescale) if self.pipe.guidance_rescale > 0 else guided

    def redirect(self, condition: Tensor) -> Tensor:
        """The batch's conditions with those of corrected rows in place."""
        changed = {row: c.condition for row, c in self.watcher.corrections.items() if c.condition is not None}
        if not changed:
            return condition
        condition = condition.clone()
        for row, text in changed.items():
            condition[len(condition) // 2 + row] = text
        return condition

    @property
    def prediction_type(self) -> str:
        return str(getattr(self.pipe.scheduler.config, "prediction_type", "epsilon"))

    def to_noise(self, prediction: Tensor, x: Tensor, timestep: float) -> Tensor:
        return to_noise(prediction.float(), x.float(), self.level_at(timestep), self.prediction_type)

    def step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``scheduler.step`` that lets arriving rows take their places in the batch first."""

        @functools.wraps(original)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.arguments = kwargs
            if self.arriving:
                sample = sample.clone()
                for row, (latents, scheduler) in self.arriving.items():
                    sample[row] = latents[0]
                    splice(self.pipe.scheduler, scheduler, row, sample.shape)
                self.arriving.clear()
            return original(model_output, timestep, sample, *args, **kwargs)

        return step


@contextmanager
def watched(pipe: Any, watcher: Watcher) -> Iterator[None]:
    """Within the block, ``watcher`` sees every call of the pipeline's denoiser; afterwards module and scheduler are as they were."""
    family = family_of(pipe)
    module: nn.Module = getattr(pipe, family.denoiser)
    names = ("forward", "_diffusers_hook")
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    registry = HookRegistry.check_if_exists_or_initialize(module)
    hook, scheduler = DenoiserHook(pipe, family, watcher), pipe.scheduler
    registry.register_hook(hook, HOOK)
    scheduler.step = hook.step(scheduler.step)
    try:
        yield
    finally:
        vars(scheduler).pop("step", None)
        registry.remove_hook(HOOK, recurse=False)
        for name in names:  # the registry leaves itself and a bound forward behind on a module that had neither
            vars(module).pop(name, None)
        vars(module).update(before)
