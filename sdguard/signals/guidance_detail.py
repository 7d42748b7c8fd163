"""The detail of the guidance: how much fine structure the text asks for before there is any picture."""

from torch import Tensor

from sdguard.observation import Observation
from sdguard.signals.signal import Signal


def guidance_detail(observation: Observation) -> Tensor:
    """Dirichlet energy of ``D = eps_c - eps_u``, ``[B]``: the mean squared difference of neighbouring latent pixels, both ways.

    At the first call a text can ordinarily ask for colours and coarse shapes only; one that holds a picture asks for its edges too. The
    guidance norm of Wen et al. 2024 (2407.21720) with its smooth part left out. Cost: none. Blind without a prompt, and to
    memorized pictures that are smooth.
    """
    d = observation.difference
    down, across = d[..., 1:, :] - d[..., :-1, :], d[..., 1:] - d[..., :-1]
    return down.flatten(1).square().mean(dim=1) + across.flatten(1).square().mean(dim=1)


GUIDANCE_DETAIL = Signal("guidance_detail", guidance_detail, cost=0)
