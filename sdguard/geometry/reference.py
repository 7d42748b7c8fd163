"""The reference reading: the conditional branch alone, in one DDIM step from a run's first call.

Guidance scale, negative prompt, sampler and number of steps of the run move none of it. What is evaluated for one signal is there for the
next. `sdguard.signals.persistence` and `sdguard.signals.estimate_agreement` are read off it.
"""

from __future__ import annotations

from torch import Tensor

from sdguard.geometry.rollout import grid, independent_start, once_a_row
from sdguard.geometry.rowwise import correlation
from sdguard.noise import independent_noise
from sdguard.observation import Observation, denoised

#: log signal-to-noise ratio that the step goes to: as much signal as noise, timestep 350 of Stable Diffusion's 1,000.
LOG_SNR = 0.0
#: log signal-to-noise ratio that a picture is noised to in `recurrence`, timestep 700 of Stable Diffusion's 1,000; and one of less noise,
#: timestep 600, at which some are known that the text alone does not draw: guidance does.
NOISED_LOG_SNR, LESS_NOISED_LOG_SNR = -2.4, -1.66
#: by which it goes up at least, for runs that begin nearer to the picture (image-to-image).
LEAST_RISE = 2.0


def timestep_at(observation: Observation, wanted: float) -> float:
    """The timestep whose log-SNR is ``wanted``, to the whole number, by bisection below the observation's own."""
    low, high = 0.0, observation.timestep
    while high - low > 0.5:
        middle = (low + high) / 2
        low, high = (middle, high) if observation.level_at(middle).log_snr > wanted else (low, middle)
    return float(max(1, round(high)))


def estimate_at_start(observation: Observation, draw: int | None = None) -> Tensor:
    """The conditional denoised estimate at the observation's own noise level, ``[B, C, H, W]``, from its own or another noise.

    Cost: none from its own; 1 evaluation from the independent noise number ``draw``, once a row.
    """
    if draw is None:
        return denoised(observation.x, observation.eps_c, observation.level)

    def estimate(here: Observation) -> Tensor:
        start = independent_start(here, draw)
        here.count_nfe(1)
        return denoised(start, here.conditional(start, here.timestep), here.level)

    return once_a_row(observation, ("estimate at start", draw), estimate)


def estimate_ahead(observation: Observation, wanted: float = LOG_SNR, draw: int | None = None) -> Tensor:
    """The conditional denoised estimate after one DDIM step (Song et al. 2021, eq. 12) under the conditional branch, ``[B, C, H, W]``.

    Cost: 1 evaluation beside `estimate_at_start`, once a row.

    Args:
        wanted: the log-SNR the step goes to.
        draw: number of an independent noise to start from in place of the observation's own.
    """
    timestep = timestep_at(observation, max(wanted, observation.level.log_snr + LEAST_RISE))

    def estimate(here: Observation) -> Tensor:
        start, level = here.x if draw is None else independent_start(here, draw), here.level_at(timestep)
        picture = estimate_at_start(here, draw)
        eps = (start - here.level.a * picture) / here.level.s
        x = level.a * picture + level.s * eps
        here.count_nfe(1)
        return denoised(x, here.conditional(x, timestep), level)

    return once_a_row(observation, ("estimate ahead", timestep, draw), estimate)


def reference_end(observation: Observation, draw: int | None = None) -> Tensor:
    """Where ``ROLLOUT_STEPS`` DDIM steps of the conditional branch end, ``[B, C, H, W]``, from the observation's own or another noise.

    What the text draws by itself: no guidance can overshoot on so few steps, and none hides what is memorized. Cost: ``ROLLOUT_STEPS - 1``
    evaluations beside `estimate_at_start`, once a row.
    """

    def end(here: Observation) -> Tensor:
        x = here.x if draw is None else independent_start(here, draw)
        picture, level = estimate_at_start(here, draw), here.level
        for timestep in grid(here)[1:]:
            following = here.level_at(timestep)
            x = following.a * picture + following.s * (x - level.a * picture) / level.s
            level = following
            here.count_nfe(1)
            picture = denoised(x, here.conditional(x, timestep), level)
        return picture

    return once_a_row(observation, ("reference end", draw), end)


def recurrence(observation: Observation, pictures: Tensor, timestep: float) -> Tensor:
    """How like itself each of ``pictures`` (denoised latents ``[B, C, H, W]``) comes back from noise, ``[B]``, in [-1, 1].

    Independent noise, a function of the noise that the row starts from, whose bits do not round as the picture's do with processor and
    threads, is added up to ``timestep``, one conditional evaluation takes it away again, and the two are correlated. So much
    noise leaves the outline of a picture; what else returns the denoiser knows by heart. Whichever memorized picture it is: no other
    picture is asked for, and no guidance. Cost: 1 evaluation.
    """
    level = observation.level_at(timestep)
    noised = level.a * pictures + level.s * independent_noise(observation.x, 5)
    observation.count_nfe(1)
    return correlation(denoised(noised, observation.conditional(noised, timestep), level), pictures)
