"""Norm clamp: the denoised estimate kept inside the band ordinary prompts have."""

from __future__ import annotations

from torch import Tensor

from sdguard.correction import Correction
from sdguard.decision.profile import Profile
from sdguard.geometry.rowwise import expand_like, norm
from sdguard.observation import Observation, denoised
from sdguard.steering.method import Method, SteeringInput

#: half width of the band in standard deviations of ordinary prompts.
WIDTH = 2.0


def clamped(profile: Profile, observation: Observation) -> Tensor:
    """The guided noise prediction whose denoised estimate has its norm inside the ordinary band of this timestep. Cost: none."""
    mean, std = profile.at("denoised_norm", observation.timestep)
    estimate = denoised(observation.x, observation.guided(observation.eps_c, observation.eps_u), observation.level)
    length = norm(estimate).clamp_min(1e-12)
    estimate = estimate * expand_like(length.clamp(mean - WIDTH * std, mean + WIDTH * std) / length, estimate)
    return (observation.x - observation.level.a * estimate) / observation.level.s


def norm_clamp(flagged: SteeringInput) -> list[Correction | None]:
    """The denoised norm brought back into the ordinary band at every step (2605.22050, the half of it that hangs on no scheduler)."""

    def rule(observation: Observation) -> Tensor:
        return clamped(flagged.profile, observation)

    return [Correction({}, rule=rule) for _ in flagged.prompts]


NORM_CLAMP = Method("norm clamp", norm_clamp, cost=0)
