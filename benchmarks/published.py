"""Published detectors as their released code computes them, beside the signals that correct them.

Each is written anew from what the code does, in its own units and with its own constants, for one image at a time. What differs from the
corrected form is said in ``difference``: it is shown in the tables. Read at the commits named in each docstring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sdguard.geometry.hessian import exact_product
from sdguard.geometry.rowwise import dot, expand_like, norm
from sdguard.noise import independent_noise
from sdguard.observation import Observation, denoised, from_noise
from sdguard.signals.attention_entropy import attention_by_token, entropy
from sdguard.signals.signal import Signal

#: seeds that the published SSIM compares, and the second of Stable Diffusion's 50 timesteps.
SSIM_SEEDS, SECOND_TIMESTEP = 10, 961.0
#: places a side of the latents that its windows were made for, and those it needs at least.
SSIM_SIDE, SSIM_LEAST = 64, 44
#: of the cross-attention layers in the order in which they run, the one whose entropy was found to tell.
ENTROPY_LAYER = 3
#: the least and the greatest rate of the linear schedule that FLIPD's released code takes Stable Diffusion's for, and the time it reads at.
LINEAR_RATES, LINEAR_TIME = (0.85, 12.0), 0.01


@dataclass(frozen=True)
class Released(Signal):
    """A detector as released.

    Attributes:
        corrected: the name of the signal that is its corrected form.
        difference: what the released code does otherwise, in a sentence.
    """

    corrected: str = ""
    difference: str = ""


@dataclass(frozen=True)
class OverRun(Released):
    """A detector as released that reads later calls of a run; its value is the sum of what ``read`` gives at each of ``calls``."""

    calls: tuple[int, ...] = ()


def raw_difference(observation: Observation, prediction_type: str) -> Tensor:
    """Conditional minus unconditional network output, in whatever the network predicts."""
    outputs = (from_noise(eps, observation.x, observation.level, prediction_type) for eps in (observation.eps_c, observation.eps_u))
    text, null = outputs
    return text - null


def similarity(pictures: Tensor) -> Tensor:
    """Multi-scale structural similarity of the first of n pictures with each of the others, ``[B, n, C, H, W]`` -> ``[B, n - 1]``.

    Wang et al. 2003, as torchmetrics 1.3 has it: a Gaussian window of 11 places and deviation 1.5, wholly inside the picture; three scales,
    each to the power .33; the range of the values at each scale is that of all n.
    """
    window = torch.exp(-(((torch.arange(11.0) - 5) / 1.5) ** 2) / 2).to(pictures)
    window /= window.sum()

    def blurred(z: Tensor) -> Tensor:
        rows = functional.conv2d(z.reshape(-1, 1, *z.shape[-2:]), window.view(1, 1, -1, 1))
        return functional.conv2d(rows, window.view(1, 1, 1, -1)).unflatten(0, z.shape[:-2]).squeeze(-3)

    product = pictures.new_ones(len(pictures), pictures.shape[1] - 1)
    for scale in range(3):
        if scale:
            pictures = functional.avg_pool2d(pictures.flatten(0, 1), 2).unflatten(0, pictures.shape[:2])
        width = expand_like(pictures.flatten(1).amax(dim=1) - pictures.flatten(1).amin(dim=1), pictures)
        mean = blurred(pictures)
        variance = (blurred(pictures.square()) - mean.square()).clamp_min(0)
        shared = blurred(pictures[:, :1] * pictures[:, 1:]) - mean[:, :1] * mean[:, 1:]
        part = (2 * shared + (0.03 * width) ** 2) / (variance[:, :1] + variance[:, 1:] + (0.03 * width) ** 2)
        if scale == 2:
            part *= (2 * mean[:, :1] * mean[:, 1:] + (0.01 * width) ** 2) / (mean[:, :1] ** 2 + mean[:, 1:] ** 2 + (0.01 * width) ** 2)
        product *= part.flatten(2).mean(dim=2).relu() ** 0.33
    return product


def ssim(observation: Observation) -> Tensor:
    """ml-research/localizing_memorization_in_diffusion_models f952ede: the largest SSIM over seeds of what the prompt predicts, ``[B]``.

    Hintersdorf et al. 2024 (2406.02366); above .428 their code takes a sample for memorized. Compared is the noise prediction less the
    noise, each channel stretched to [0, 1], of the image's own noise and of nine others, under the prompt alone and at the second of 50
    timesteps: their loop calls the network twice and takes no step between. Their windows need 44 places a side; smaller latents are
    enlarged to 64, which is what Stable Diffusion has, so that a window sees the same share of the picture. Cost: 10 evaluations.
    """
    noises = [observation.x, *(independent_noise(observation.x, draw) for draw in range(SSIM_SEEDS - 1))]
    observation.count_nfe(SSIM_SEEDS)
    differences = torch.stack([observation.conditional(noise, SECOND_TIMESTEP) - noise for noise in noises], dim=1)
    if (side := min(differences.shape[-2:])) < SSIM_LEAST:
        size = [round(places * SSIM_SIDE / side) for places in differences.shape[-2:]]
        enlarged = functional.interpolate(differences.flatten(0, 1), size=size, mode="bilinear")
        differences = enlarged.unflatten(0, differences.shape[:2])
    least, most = (end(differences, dim=(-2, -1), keepdim=True) for end in (torch.amin, torch.amax))
    return similarity((differences - least) / (most - least)).amax(dim=1)


def layer_entropy(observation: Observation) -> Tensor:
    """renjie3/MemAttn c66efd2, ``--mode E``: entropy of one layer's attention at the first call, ``[B]``, in nats. Cost: 1 evaluation.

    Of the fourth cross-attention layer, the average over places and heads (Ren et al. 2024, 2403.11052); in their Stable Diffusion the
    last of the second block down, here whichever runs fourth.
    """
    return entropy(attention_by_token(observation)[ENTROPY_LAYER].mean(dim=1))


def gaussian_probe(x: Tensor) -> Tensor:
    """One Gaussian draw of seed 42 for every row, ``[1, C, H, W]``: FLIPD's released code on latents of Stable Diffusion's size."""
    return torch.randn(x[:1].shape, generator=torch.Generator().manual_seed(42)).to(x)


def finished_flipd(observation: Observation) -> Tensor:
    """layer6ai-labs/flipd 05ab170, ``metric: lid_conditional``: minus FLIPD of the finished sample at time .01, ``[B]``.

    Read at the last call, whose denoised estimate is what the run ends at. The rates of Stable Diffusion's schedule are taken to grow
    linearly, which their roots do. Their network predicts noise; of any other the noise prediction is taken. Cost: 2 evaluations.
    """
    low, high = LINEAR_RATES
    integral = low * LINEAR_TIME + (high - low) * LINEAR_TIME**2 / 2
    a, s, timestep = math.exp(-integral / 2), math.sqrt(1 - math.exp(-integral)), 1000 * LINEAR_TIME
    y = a * denoised(observation.x, observation.guided(observation.eps_c, observation.eps_u), observation.level)

    def eps(point: Tensor) -> Tensor:
        observation.count_nfe(1)
        return observation.conditional(point, timestep)

    probe = gaussian_probe(y).expand_as(y)
    return -(y[0].numel() - s * dot(probe, exact_product(eps, y)(probe)) + norm(eps(y)).square())


def running_flipd(observation: Observation) -> Tensor:
    """layer6ai-labs/diffusion_memorization 084b8b4, ``method="flipd"``: d less FLIPD of the running latents under guidance, ``[B]``.

    In the guided prediction that is differentiated, the unconditional prediction added to the difference is a constant, made outside, so
    that its Jacobian is missing: ``w (J_c - J_u)`` for ``J_u + w (J_c - J_u)``. Cost: 2 evaluations.
    """

    def guided(point: Tensor) -> Tensor:
        eps_c, eps_u = observation.both_branches(point, observation.timestep)
        return observation.eps_u + observation.guidance_scale * (eps_c - eps_u)

    probe = gaussian_probe(observation.x).expand_as(observation.x)
    trace = dot(probe, exact_product(guided, observation.x)(probe))
    return observation.level.s * trace - norm(observation.guided(observation.eps_c, observation.eps_u)).square()


def over_run(calls: int, lengths: Tensor) -> tuple[OverRun, ...]:
    """The released detectors that read later calls, of runs of ``calls`` calls; where they read is counted in fifths of their 50.

    Args:
        calls: of the denoiser in a run.
        lengths: ``[B]``, tokens of each prompt, begin and end included.
    """
    fifth = tuple(range(calls * 4 // 5, calls))

    def run_entropy(observation: Observation) -> Tensor:
        """renjie3/MemAttn c66efd2, ``--mode D``: entropy of all layers' attention over the last fifth, plus what its padding's part has
        grown by since the first call, ``[B]``, in nats. Cost: 1 evaluation a call, none where attention is read as the run makes it.
        """
        share = torch.stack([layer.mean(dim=1) for layer in attention_by_token(observation)]).mean(dim=0)
        padding = entropy(share * (torch.arange(share.shape[1]) >= lengths[observation.rows, None] - 1).to(share))
        late = (entropy(share) + padding) / len(fifth) if observation.step in fifth else torch.zeros_like(padding)
        return late - padding if observation.step == 0 else late

    return (
        OverRun(
            "flipd_finished_released", finished_flipd, 2, "lid_conditional",
            "of the finished sample at timestep 10, noise level of another schedule, one Gaussian probe that all images share",
            (calls - 1,),
        ),
        OverRun(
            "flipd_running_released", running_flipd, 2, "lid_guided",
            "of the noisy latents at four fifths of the run, where FLIPD asks for a clean point; the unconditional Jacobian is missing",
            fifth[:1],
        ),
        OverRun(
            "attention_entropy_run_released", run_entropy, len({0, *fifth}), "attention_entropy",
            "entropy of the average over layers and heads, at the last fifth of the run, plus the growth of the padding's part",
            tuple(sorted({0, *fifth})),
        ),
    )  # fmt: skip


def released(prediction_type: str) -> tuple[Released, ...]:
    """Released detectors that read a first call, of a network that predicts ``prediction_type``; constants differ between SD 1 and 2."""

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
        eps_c, eps_u = observation.both_branches(observation.x, 41.0)
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
        Released(
            "ssim_released", ssim, SSIM_SEEDS, "agreement",
            "largest SSIM over ten noises of a single prediction without guidance, for the correlation of two guided short rollouts",
        ),
        Released(
            "attention_entropy_released", layer_entropy, 1, "attention_entropy",
            "one layer, and the entropy of its heads' average, for the average of all heads' entropies",
        ),
    )  # fmt: skip
