"""The volume element of the denoised estimate: how much of noise space a picture takes up."""

from collections.abc import Sequence

from torch import Tensor

from sdguard.geometry.hessian import Estimate, HessianProduct, averaged, spectrum
from sdguard.observation import NoiseLevel

#: standard deviation of a pipeline's latents, to which its autoencoder's scaling factor brings them.
RESOLUTION = 1.0


def log_volume(
    product: HessianProduct, probes: Sequence[Tensor], level: NoiseLevel, iterations: int, resolution: float = RESOLUTION
) -> Estimate:
    """``log det (J J^T + resolution**2 I) / 2`` of the denoised estimate's Jacobian ``J = (I + s**2 H) / a``.

    Minus this, added to log p(z), is to first order the log output density of Feiszli 2017 (1705.09303) of the one-step generator,
    seen at a resolution: with Gaussian noise of that standard deviation added to what it draws. Without it, directions in which a
    network's Jacobian is nothing but error decide the volume, and a delta component has none at all. By stochastic Lanczos quadrature
    (Ubaru et al. 2017); ``probes`` of independent signs. Cost: ``iterations`` products a probe.
    """

    def log_size(eigenvalues: Tensor) -> Tensor:
        return (((1 + level.s**2 * eigenvalues) / level.a).square() + resolution**2).log() / 2

    d = probes[0][0].numel()
    return averaged([d * (weights * log_size(nodes)).sum(1) for nodes, weights in (spectrum(product, v, iterations) for v in probes)])
