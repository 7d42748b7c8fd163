"""Guidance as pipelines apply it to the denoiser's outputs, and what those have to be for it to give what is wanted."""

from __future__ import annotations

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from sdguard.observation import Observation, from_noise


def apply_guidance(null: Tensor, text: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """What a pipeline makes of the outputs of its two branches (Ho & Salimans 2022; rescaled as in Lin et al. 2023 where it is told to)."""
    if scale == 1:
        return text
    guided = null + scale * (text - null)
    return rescale_noise_cfg(guided, text, rescale) if rescale > 0 else guided


def solve_unconditional(wanted: Tensor, null: Tensor, text: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """The unconditional output with which guidance makes of ``text``, which the pipeline has already, what it makes of ``wanted``.

    ``wanted`` has the rows of both branches, the unconditional ones first. Rows that are wanted as they were come back as they were, to the
    bit.
    """
    wanted_null, wanted_text = wanted.chunk(2)
    moved = (wanted_text != text).flatten(1).any(dim=1) | (wanted_null != null).flatten(1).any(dim=1)
    solved = (scale * text.float() - apply_guidance(wanted_null.float(), wanted_text.float(), scale, rescale)) / (scale - 1)
    return torch.where(moved.reshape(-1, *[1] * (null.ndim - 1)), solved.to(null), null)


def to_model_output(observation: Observation, prediction_type: str) -> tuple[Tensor, Tensor]:
    """The network outputs, unconditional and conditional, with which guidance gives the prediction that is followed.

    Where a rule stands in guidance's place both are what the rule wants, of which any guidance makes the same. Cost: the rules'.
    """
    outputs = (observation.prediction,) * 2 if any(observation.rules) else (observation.eps_u, observation.eps_c)
    null, text = (from_noise(eps, observation.x, observation.level, prediction_type) for eps in outputs)
    return null, text
