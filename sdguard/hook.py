"""The seam: a hook that stands around a pipeline's denoiser for the length of one run and shows each call as an `Observation`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from sdguard.observation import NoiseLevel, Observation, noise_level, to_noise

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


def encode(pipe: Any, texts: list[str]) -> Tensor:
    """Text embeddings ``[n, T, E]`` of n texts, as a running call of ``pipe`` encodes its own prompts."""
    lora_scale = (pipe.cross_attention_kwargs or {}).get("scale")
    return pipe.encode_prompt(texts, pipe._execution_device, 1, False, lora_scale=lora_scale, clip_skip=pipe.clip_skip)[0]


def check_guidance(guidance_scale: float) -> None:
    """Raise `ValueError` for a run without an unconditional branch: its batch holds no rows to compare with."""
    if guidance_scale <= 1:
        raise ValueError(
            f"With guidance_scale={guidance_scale:g} the pipeline runs no unconditional branch, so the guidance norm and the "
            "look-ahead fall away and the guard refuses the run; use a guidance scale above 1, or sdguard.unguard(pipe)."
        )


class Watcher(Protocol):
    """Something that looks at each denoiser call of a run."""

    #: text condition ``[T, E]`` that takes the place of a row's own, by row.
    conditions: dict[int, Tensor]

    def observe(self, observation: Observation) -> None:
        """Look at one call; what it puts into ``conditions`` holds from this very call on."""


class DenoiserHook(ModelHook):
    """Shows each guided denoiser call to a watcher and runs the rows it redirects under their new conditions.

    Rows that are not redirected are computed by the pipeline's own call, in the pipeline's own batch, and are therefore
    bit-identical to those of an unguarded run.
    """

    def __init__(self, pipe: Any, family: Family, watcher: Watcher) -> None:
        super().__init__()
        self.pipe, self.family, self.watcher = pipe, family, watcher
        self.step = 0
        self.evaluations: Tensor | None = None

    def level_at(self, timestep: float) -> NoiseLevel:
        return noise_level(self.pipe.scheduler, timestep)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        check_guidance(self.pipe.guidance_scale)
        sample, timestep = args[0], float(args[1])
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
        count = len(eps_c)
        if self.evaluations is None:
            self.evaluations = torch.zeros(count, dtype=torch.long)
        before = set(self.watcher.conditions)
        self.watcher.observe(
            Observation(
                step=self.step,
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
            )
        )
        self.step += 1
        if redirected := sorted(set(self.watcher.conditions) - before):
            rows = torch.tensor(redirected)
            text = torch.stack([self.watcher.conditions[row] for row in redirected])
            prediction = prediction.clone()
            prediction[count + rows] = predict(sample[rows], timestep, text)
            self.evaluations[rows] += 1
        return (prediction, *output[1:]) if isinstance(output, tuple) else type(output)(sample=prediction)

    def redirect(self, condition: Tensor) -> Tensor:
        """The batch's conditions with redirected rows in place."""
        if not self.watcher.conditions:
            return condition
        condition = condition.clone()
        for row, text in self.watcher.conditions.items():
            condition[len(condition) // 2 + row] = text
        return condition

    def to_noise(self, prediction: Tensor, x: Tensor, timestep: float) -> Tensor:
        kind = getattr(self.pipe.scheduler.config, "prediction_type", "epsilon")
        return to_noise(prediction.float(), x.float(), self.level_at(timestep), kind)


@contextmanager
def watched(pipe: Any, watcher: Watcher) -> Iterator[None]:
    """Within the block, ``watcher`` sees every call of the pipeline's denoiser; afterwards the module is as it was."""
    family = family_of(pipe)
    module: nn.Module = getattr(pipe, family.denoiser)
    names = ("forward", "_diffusers_hook")
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(DenoiserHook(pipe, family, watcher), HOOK)
    try:
        yield
    finally:
        registry.remove_hook(HOOK, recurse=False)
        for name in names:  # the registry leaves itself and a bound forward behind on a module that had neither
            vars(module).pop(name, None)
        vars(module).update(before)
