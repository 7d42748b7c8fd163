"""Another initial noise, near by or sharpness-aware, on the Gaussian shell."""

from __future__ import annotations

import torch
from torch import Tensor

from sdguard.correction import Correction
from sdguard.geometry.displacement import displaced, step_in
from sdguard.geometry.rollout import independent_start
from sdguard.geometry.rowwise import expand_like, norm
from sdguard.observation import Observation
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.steering.method import Method, SteeringInput

#: initial-noise adjustment: length of the look uphill as a share of the noise's norm (50 of 128 on Stable Diffusion), step, passes.
UPHILL, STEP, PASSES = 50 / 128, 0.7, 2
#: SAIL: fresh noises looked at, Adam steps, learning rate, length of the look as a share of the noise's norm.
FRESH, DESCENT_STEPS, LEARNING_RATE, LOOK = 4, 10, 0.05, 1 / 128
#: SAIL as released: noises, and the weight of their norm in the loss.
RELEASED_NOISES, PENALTY = 8, 0.05


def on_shell(x: Tensor) -> Tensor:
    """``x`` with each row brought to the norm Gaussian noise has, the square root of its dimension."""
    return x * expand_like(x[0].numel() ** 0.5 / norm(x), x)


def contrast(observation: Observation, x: Tensor) -> Tensor:
    """``D = eps_c - eps_u`` at ``x``, ``[B, C, H, W]``. Cost: 2 evaluations."""
    eps_c, eps_u = observation.both_branches(x, observation.timestep)
    return eps_c - eps_u


def along(d: Tensor, x: Tensor, length: float) -> Tensor:
    """The direction of ``d`` at ``length`` times the norm of ``x``."""
    return d * expand_like(length * norm(x) / norm(d).clamp_min(1e-12), d)


def noise_adjustment(flagged: SteeringInput) -> list[Correction | None]:
    """The noise moved against the change of the contrast along itself: ``x -= g (D(x + u) - D(x))``, u uphill along D.

    The batch-wise method of 2510.08625, by forward passes alone. Cost: 4 evaluations a pass, 2 at the first.
    """
    observation = flagged.observation
    x, d = observation.x, observation.difference
    for turn in range(PASSES):
        d = d if turn == 0 else contrast(observation, x)
        x = x - STEP * (contrast(observation, x + along(d, x, UPHILL)) - d)
    return [Correction({}, x=row) for row in on_shell(x)]


def sharpness(observation: Observation, x: Tensor) -> Tensor:
    """``||D(x + h u) - D(x)||**2`` with u along D(x), ``[B]``: SAIL's objective (2412.04140); its penalty on the norm is left to the shell.

    Cost: 4 evaluations.
    """
    d = contrast(observation, x)
    moved, share = displaced(x, along(d, x, step_in(observation.dtype, LOOK)), observation.dtype)
    return (norm(contrast(observation, moved) - d) / share.flatten()).square()


def sail(flagged: SteeringInput) -> list[Correction | None]:
    """Sharpness-aware initial noise (Jeon et al. 2025): the flattest of some fresh noises, descended on the objective.

    The direction follows the iterate. Fresh noises hang on the row's own, and so on the user's generator. An image stops once its guidance
    norm is in the ordinary range. Cost: 4 evaluations for each of `FRESH` noises, 10 for each of at most `DESCENT_STEPS` steps.
    """
    observation = flagged.observation
    fresh = [independent_start(observation, 10 + draw) for draw in range(FRESH)]
    flatness = torch.stack([sharpness(observation, noise) for noise in fresh])
    best = flatness.argmin(dim=0)
    x = on_shell(torch.stack(fresh)[best, torch.arange(len(best))])
    adam = torch.optim.Adam([x], lr=LEARNING_RATE)
    for _ in range(DESCENT_STEPS):
        active = guidance_norm(observation.from_start(x.detach())) > flagged.target
        if not active.any():
            break
        with torch.enable_grad():
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(sharpness(observation, x).sum(), x)
        observation.count_nfe(4)  # a gradient counts as one more than its forward pass
        before, x.grad = x.detach().clone(), gradient
        adam.step()
        x.requires_grad_(False)
        x.copy_(torch.where(active.view(-1, 1, 1, 1), on_shell(x), before))
    return [Correction({"noise": int(draw)}, x=row) for row, draw in zip(x, best, strict=True)]


def released_loss(observation: Observation, x: Tensor, look: Tensor) -> Tensor:
    """``||D(x + u)|| + .05 ||x||``, ``[B]``, u fixed: what SAIL's released code descends on in place of the paper's squared difference.

    Cost: 2 evaluations.
    """
    return norm(contrast(observation, x + look)) + PENALTY * norm(x)


def sail_released(flagged: SteeringInput) -> list[Correction | None]:
    """SAIL as its released code has it (Dongjae0324/sharpness_memorization_diffusion): one round, for comparison.

    It differs from the paper, and from `sail`, in the loss, in a direction that is kept from where it started, in more noises that are all
    descended, and in leaving the Gaussian shell. Cost: 4 for each of `RELEASED_NOISES` noises, and 4 for each step of it.
    """
    observation, found = flagged.observation, []
    for draw in range(RELEASED_NOISES):
        x = independent_start(observation, 20 + draw).clone()
        look = along(contrast(observation, x), x, LOOK)
        adam = torch.optim.Adam([x], lr=LEARNING_RATE)
        for _ in range(DESCENT_STEPS):
            with torch.enable_grad():
                x.requires_grad_()
                (x.grad,) = torch.autograd.grad(released_loss(observation, x, look).sum(), x)
            observation.count_nfe(2)  # a gradient counts as one more than its forward pass
            adam.step()
            x.requires_grad_(False)
        found.append((released_loss(observation, x, look), x))
    losses, noises = (torch.stack(parts) for parts in zip(*found, strict=True))
    best = losses.argmin(dim=0)
    return [Correction({"noise": int(draw)}, x=noises[draw, row]) for row, draw in enumerate(best.tolist())]


NOISE_ADJUSTMENT = Method("initial-noise adjustment", noise_adjustment, cost=4 * PASSES - 2)
SAIL = Method("SAIL", sail, cost=4 * FRESH + 10 * DESCENT_STEPS)
SAIL_RELEASED = Method("SAIL as released", sail_released, cost=RELEASED_NOISES * (4 + 4 * DESCENT_STEPS))
