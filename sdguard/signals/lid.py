"""Local intrinsic dimension: how many directions of freedom the model leaves a picture."""

from torch import Tensor

from sdguard.geometry.dimension import flipd
from sdguard.geometry.hessian import branch_product, difference_product, trace
from sdguard.geometry.rollout import probe, short_rollout
from sdguard.observation import Branch, Observation
from sdguard.signals.signal import Signal

#: noise level at which the dimension of the short rollout's end is read; .3 of the schedule, as Ross et al. 2024 take for Stable Diffusion.
TIMESTEP = 301.0
#: of the short rollout: the dimension of a picture that is only half made is that of the network's error.
STEPS = 5


def dimension(observation: Observation, y: Tensor, timestep: float, branch: Branch) -> Tensor:
    """FLIPD at ``y`` of one branch, ``[B]``, by a central difference with one probe. Cost: 3 evaluations, 6 guided."""
    score = observation.score(branch, timestep)
    estimate = trace(difference_product(score, y, dtype=observation.dtype), [probe(observation.x)])
    return flipd(score, estimate.value, y, observation.level_at(timestep))


def scaled_end(observation: Observation) -> Tensor:
    """The end of a short rollout of `STEPS` steps, scaled as FLIPD asks: ``a x_0``. Cost: the short rollout's."""
    return observation.level_at(TIMESTEP).a * short_rollout(observation, steps=STEPS)


def lid_conditional(observation: Observation) -> Tensor:
    """Minus the conditional density's dimension where the short rollout ends, ``[B]``.

    Ross et al. 2024 (2411.00113), FLIPD of Kamkari et al. 2024 (2406.03537). Cost: 8 for the short rollout and 3. Its absolute value is
    biased by the network (it can be above the number of dimensions or below 0): only ranks and contrasts mean anything. Blind to the
    difference between an over-repeated picture and a plain one.
    """
    return -dimension(observation, scaled_end(observation), TIMESTEP, "conditional")


def lid_unconditional(observation: Observation) -> Tensor:
    """Minus the unconditional density's dimension where the short rollout ends, ``[B]``. Cost: 8 and 3.

    Where only the prompt's density has memorized the picture, it is unlikely without the prompt, the squared score is large, and
    the sign turns round: on the embedded model memorized samples read lower.
    """
    return -dimension(observation, scaled_end(observation), TIMESTEP, "unconditional")


def lid_guided(observation: Observation) -> Tensor:
    """Minus the dimension of the density under guidance where the short rollout ends, ``[B]``. Cost: 8 and 6."""
    return -dimension(observation, scaled_end(observation), TIMESTEP, "guided")


def lid_contrast(observation: Observation) -> Tensor:
    """How many dimensions the text takes away where the short rollout ends: unconditional minus conditional, ``[B]``. Cost: 8 and 6."""
    y = scaled_end(observation)
    return dimension(observation, y, TIMESTEP, "unconditional") - dimension(observation, y, TIMESTEP, "conditional")


def lid_noisy(observation: Observation) -> Tensor:
    """How many dimensions the text takes away at the noisy point itself, ``[B]``, by the trace of FLIPD alone: ``s**2 (tr H_u - tr H_c)``.

    FLIPD's squared score is left out: ``x_T`` is not drawn from the density of the prompt, and there the score says how unlikely the point
    is and not how many directions it is free in. Cost: 2 evaluations.
    """

    signs = [probe(observation.x)]
    trace_u = trace(branch_product(observation, "unconditional"), signs).value
    trace_c = trace(branch_product(observation, "conditional"), signs).value
    return observation.level.s**2 * (trace_u - trace_c)


ROLLOUT_NFE = 2 * (STEPS - 1)
LID_CONDITIONAL = Signal("lid_conditional", lid_conditional, cost=ROLLOUT_NFE + 3)
LID_UNCONDITIONAL = Signal("lid_unconditional", lid_unconditional, cost=ROLLOUT_NFE + 3)
LID_GUIDED = Signal("lid_guided", lid_guided, cost=ROLLOUT_NFE + 6)
LID_CONTRAST = Signal("lid_contrast", lid_contrast, cost=ROLLOUT_NFE + 6)
LID_NOISY = Signal("lid_noisy", lid_noisy, cost=2)
