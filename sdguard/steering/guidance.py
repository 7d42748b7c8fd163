"""Guidance put off, turned round, weakened, or pushed away from the original prompt."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sdguard.correction import Correction
from sdguard.observation import Observation
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.steering.method import Method, SteeringInput
from sdguard.steering.rewording import rewording

#: timestep at which guidance sets in at the latest.
LATEST = 500.0
#: weight of opposite guidance (2411.16738), and of the repulsion as a share of the guidance scale (2 of 7.5 in 2603.00133).
OPPOSITE, REPULSION = -2.0, 2 / 7.5


def past_transition(observation: Observation) -> Tensor:
    """Whether the guidance norm has gone through its first local minimum, bool ``[B]``: the attraction basin lies behind. Cost: none."""
    norms = torch.cat([observation.past_norms.to(observation.x), guidance_norm(observation).unsqueeze(1)], dim=1)
    falls, rises = norms[:, 1:-1] < norms[:, :-2], norms[:, 2:] > norms[:, 1:-1]
    return (falls & rises).any(dim=1) | torch.tensor(observation.timestep <= LATEST)


def delay_rule(before: float, observation: Observation) -> Tensor:
    """Guidance of scale ``before`` up to the transition point, the run's own after it. Cost: none."""
    early = observation.eps_u + before * observation.difference
    return torch.where(past_transition(observation).view(-1, 1, 1, 1), observation.guided(observation.eps_c, observation.eps_u), early)


def delayed(before: float, flagged: SteeringInput) -> list[Correction | None]:
    """Guidance put off to the transition point (attraction basin, 2411.16738), at the latest to timestep `LATEST`. Cost: none."""
    return [Correction({"guidance_before": before}, rule=partial(delay_rule, before)) for _ in flagged.prompts]


def repulsion_rule(original: Tensor, observation: Observation) -> Tensor:
    """``eps_u + w (eps_+ - eps_u) - r (eps_- - eps_u)``, ``eps_-`` that of the ``original`` condition (2603.00133). Cost: 1 evaluation."""
    observation.count_nfe(1)
    negative = observation.conditional(observation.x, observation.timestep, original.unsqueeze(0))
    away = REPULSION * observation.guidance_scale * (negative - observation.eps_u)
    return observation.guided(observation.eps_c, observation.eps_u) - away


def attractive_repulsive(flagged: SteeringInput) -> list[Correction | None]:
    """Guidance towards the wording of the prompt that keeps most of it, and away from the prompt itself; not where there is none.

    Cost: the text encoder's ahead, 1 evaluation a step.
    """
    corrections: list[Correction | None] = []
    for correction, original in zip(rewording(0, flagged), flagged.observation.condition, strict=True):
        corrections.append(correction and replace(correction, rule=partial(repulsion_rule, original)))
    return corrections


def weakened_rule(target: float, observation: Observation) -> Tensor:
    """Guidance whose scale is lowered where the guidance norm exceeds ``target``, in proportion. Cost: none."""
    share = (target / guidance_norm(observation).clamp_min(1e-12)).clamp(max=1).view(-1, 1, 1, 1)
    return observation.guided(observation.eps_u + share * observation.difference, observation.eps_u)


def weakened_guidance(flagged: SteeringInput) -> list[Correction | None]:
    """A guidance scale of the image's own: no more pull at any step than ordinary prompts have there. Cost: none."""

    def rule(observation: Observation) -> Tensor:
        mean, std = flagged.profile.at("guidance_norm", observation.timestep)
        return weakened_rule(mean + std, observation)

    return [Correction({}, rule=rule) for _ in flagged.prompts]


GUIDANCE_DELAY = Method("guidance delay", partial(delayed, 0.0), cost=0)
OPPOSITE_GUIDANCE = Method("opposite guidance", partial(delayed, OPPOSITE), cost=0)
ATTRACTIVE_REPULSIVE = Method("attractive-repulsive guidance", attractive_repulsive, cost=0, step_cost=1)
WEAKENED_GUIDANCE = Method("weakened guidance", weakened_guidance, cost=0)
