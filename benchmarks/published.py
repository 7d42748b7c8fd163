"""Published detectors as their released code computes them, beside the signals that correct them.

Each is written anew from what the code does, in its own units and with its own constants, for one image at a time. What differs from the
corrected form is said in ``difference``: it is shown in the tables. Read at the commits named in each docstring.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdguard.geometry import exact_product, norm
from sdguard.observation import Observation, from_noise
from sdguard.signals.signal import Signal


@dataclass(frozen=True)
class Released(Signal):
    """A detector as released.

    Attributes:
        corrected: the name of the signal that is its corrected form.
        difference: what the released code does otherwise, in a sentence.
    """

    corrected: str = ""
    difference: str = ""


def raw_difference(observation: Observation, prediction_type: str) -> Tensor:
    """Conditional minus unconditional network output, in whatever the network predicts."""
    outputs = (from_noise(eps, observation.x, observation.level, prediction_type) for eps in (observation.eps_c, observation.eps_u))
    text, null = outputs
    return text - null


def released(prediction_type: str) -> tuple[Released, ...]:
    """The released detectors for a network that predicts ``prediction_type``; their constants differ between SD 1 and SD 2."""

    def wen(observation: Observation) -> Tensor:
        """YuxinWenRick/diffusion_memorization c8fe471: the norm of the difference of the network's outputs, ``[B]``. Cost: none."""
        return norm(raw_difference(observation, prediction_type))

    def sharpness(observation: Observation) -> Tensor:
        """Dongjae0324/sharpness_memorization_diffusion f4ee4b8: ``||J (s_c - s_u)||``, forward mode, ``[B]``. Cost: 2 evaluations."""
        score = observation.score("contrast")
        return norm(exact_product(score, observation.x)(-observation.difference / observation.level.s))

    def anisotropy(observation: Observation) -> Tensor:
        """rohanasthana/memorization-anisotropy 97e991b: norm plus the mean over places of the cosine over channels, ``[B]``.

        The cosine is between the unconditional prediction and the difference at the third-last of 50 timesteps, 41. Cost: 2 evaluations.
        """
        eps_c, eps_u = observation.replay(observation.x, 41.0)
        level = observation.level_at(41.0)
        text, null = (from_noise(eps, observation.x, level, prediction_type) for eps in (eps_c, eps_u))
        cosine = torch.cosine_similarity(null, text - null, dim=1).flatten(1).mean(dim=1)
        return wen(observation) + (2.0 if prediction_type == "epsilon" else 0.1) * cosine

    return (
        Released(
            "wen_released", wen, 0, "guidance_norm",
            "norm of the network's outputs, not of noise predictions: the same ranks at one timestep, other weights in a mean over steps",
        ),
        Released(
            "sharpness_released", sharpness, 2, "sharpness",
            "exact Jacobian product and its norm, not the square: other weights in a mean over seeds",
        ),
        Released(
            "anisotropy_released", anisotropy, 2, "low_noise_alignment",
            "cosine over channels at each place, of the network's outputs, added to the norm with weights set on the evaluation set",
        ),
    )  # fmt: skip
