"""One denoiser call, made uniform: whatever a pipeline predicts and however it scales, everything above reads this.

Notation (Ho et al. 2020; Song et al. 2021): ``x_t = a x_0 + s eps`` with ``a**2 + s**2 = 1``; ``eps_c`` and ``eps_u`` are the
conditional and unconditional noise predictions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn


class NoiseLevel(NamedTuple):
    """``(a, s)`` of ``x_t = a x_0 + s eps``."""

    a: float
    s: float

    @property
    def log_snr(self) -> float:
        """Logarithm of the signal-to-noise ratio ``a**2 / s**2``."""
        return 2 * math.log(self.a / self.s)


class NoiseLevels(NamedTuple):
    """The `NoiseLevel` of each row, ``[B, 1, 1, 1]``."""

    a: Tensor
    s: Tensor


#: share of signal that a noise level counts with at least. Where there is none (flow matching's first step, zero terminal SNR), a noise
#: prediction is the point itself whatever the network says; with a trace of signal it holds what the network says, to fp32's precision.
LEAST_SIGNAL = 1e-3

#: no noise at all.
CLEAN = NoiseLevel(1.0, 0.0)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is one of flow matching, ``x_t = (1 - sigma) x_0 + sigma eps``."""
    return prediction_type(scheduler) == "flow_prediction"


def prediction_type(scheduler: Any) -> str:
    """What the network predicts under a scheduler; those made for flow matching alone have no word for it."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow_prediction"
    return str(getattr(scheduler.config, "prediction_type", "epsilon"))


def level_of_sigma(sigma: float, flow: bool) -> NoiseLevel:
    """The noise level of a scheduler's ``sigma`` above 0: ``s / a``, or in flow matching s."""
    if flow:
        sigma = min(sigma, 1 - LEAST_SIGNAL)
        return NoiseLevel(1 - sigma, sigma)
    alpha = max(1 / (1 + sigma**2), LEAST_SIGNAL**2)
    return NoiseLevel(alpha**0.5, (1 - alpha) ** 0.5)


def noise_level(scheduler: Any, timestep: float) -> NoiseLevel:
    """The noise level a scheduler gives ``timestep``; log-SNR is interpolated between whole timesteps.

    Flow-matching schedulers count ``timestep`` in thousandths of their sigma, and have ``a = 1 - sigma``, ``s = sigma``.

    Raises:
        TypeError: the scheduler has neither ``alphas_cumprod`` nor flow-matching sigmas.
    """
    if is_flow(scheduler):
        return level_of_sigma(timestep / scheduler.config.num_train_timesteps, flow=True)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise TypeError(f"{type(scheduler).__name__} has no alphas_cumprod, so its noise levels are unknown to sdguard.")
    alphas = scheduler.alphas_cumprod

    def log_snr(index: int) -> float:
        alpha = max(float(alphas[index]), LEAST_SIGNAL**2)
        return math.log(alpha) - math.log1p(-alpha)

    low = min(int(timestep), len(alphas) - 1)
    high = min(low + 1, len(alphas) - 1)
    between = log_snr(low) + (timestep - low) * (log_snr(high) - log_snr(low)) if timestep != low else log_snr(low)
    alpha = 1 / (1 + math.exp(-between))
    return NoiseLevel(alpha**0.5, (1 - alpha) ** 0.5)


def to_noise(output: Tensor, x: Tensor, level: NoiseLevel, prediction_type: str) -> Tensor:
    """A network output as a noise prediction: ``eps = a v + s x`` for v (Salimans & Ho 2022), ``(x - a x_0) / s`` for the sample.

    Flow matching has ``a + s = 1`` in place of ``a**2 + s**2 = 1`` and predicts ``eps - x_0``: ``eps = x + a u`` (Lipman et al. 2023).
    """
    match prediction_type:
        case "epsilon":
            return output
        case "v_prediction":
            return level.a * output + level.s * x
        case "flow_prediction":
            return x + level.a * output
        case "sample":
            return (x - level.a * output) / level.s
    raise TypeError(f"prediction type {prediction_type!r} is not known to sdguard.")


def from_noise(eps: Tensor, x: Tensor, level: NoiseLevel, prediction_type: str) -> Tensor:
    """The network output that stands for a noise prediction: the inverse of `to_noise`."""
    match prediction_type:
        case "epsilon":
            return eps
        case "v_prediction":
            return (eps - level.s * x) / level.a
        case "flow_prediction":
            return (eps - x) / level.a
        case "sample":
            return (x - level.s * eps) / level.a
    raise TypeError(f"prediction type {prediction_type!r} is not known to sdguard.")


def denoised(x: Tensor, eps: Tensor, level: NoiseLevel | NoiseLevels) -> Tensor:
    """The estimate of ``x_0``: ``(x_t - s eps) / a``."""
    return (x - level.s * eps) / level.a


#: the conditional or the unconditional prediction, the two under guidance, or their difference.
Branch = Literal["conditional", "unconditional", "guided", "contrast"]

#: what takes guidance's place for one image: its observation (one row) -> the noise prediction that is followed, ``[1, C, H, W]``.
Rule = Callable[["Observation"], Tensor]

#: evaluates the denoiser as the pipeline's own call did: (x, timestep, condition, places) -> noise prediction, fp32. ``places`` are the
#: rows of the pipeline's own batch, unconditional ones first, whose other arguments (size ids, ControlNet residuals, masks) hold.
Denoiser = Callable[[Tensor, float, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Prediction:
    """What one denoiser call predicts for ``B`` images.

    Attributes:
        x: ``x_t`` in the variance-preserving convention, ``[B, C, H, W]``, fp32.
        eps_c, eps_u: conditional and unconditional noise predictions, ``[B, C, H, W]``, fp32.
        level: the noise level ``(a, s)``; of several calls' predictions that of each row.
        guidance_scale: the run's guidance scale; of several calls' that of each row, ``[B, 1, 1, 1]``.
    """

    x: Tensor
    eps_c: Tensor
    eps_u: Tensor
    level: NoiseLevel | NoiseLevels
    guidance_scale: float | Tensor

    @functools.cached_property
    def difference(self) -> Tensor:
        """``D = eps_c - eps_u``, ``[B, C, H, W]``."""
        return self.eps_c - self.eps_u

    @functools.cached_property
    def guidance_norm(self) -> Tensor:
        """``||D||_2`` of each image, ``[B]``."""
        return torch.linalg.vector_norm(self.difference.flatten(1), dim=1)

    def guided(self, eps_c: Tensor, eps_u: Tensor) -> Tensor:
        """The prediction under guidance, ``eps_u + w (eps_c - eps_u)`` (Ho & Salimans 2022)."""
        return eps_u + self.guidance_scale * (eps_c - eps_u)


def joined(predictions: Sequence[Prediction]) -> Prediction:
    """What several calls predict as one prediction, the images of one call after those of the other.

    A GPU is started as often for all as for one, but to write down what a row has of its call.
    """
    x, eps_c, eps_u = (torch.cat([getattr(of, name) for of in predictions]) for name in ("x", "eps_c", "eps_u"))
    a, s, scale = (
        torch.cat([of.x.new_full((len(of.x), 1, 1, 1), value) for of, value in zip(predictions, values, strict=True)])
        for values in zip(*((*of.level, of.guidance_scale) for of in predictions), strict=True)
    )
    return Prediction(x, eps_c, eps_u, NoiseLevels(a, s), scale)


@dataclass(frozen=True)
class Observation(Prediction):
    """What one denoiser call shows, for ``B`` images: what it predicts, and all that is needed to evaluate it again.

    Attributes:
        step: index of the call in the run.
        timestep: the scheduler's timestep.
        condition, null_condition: text embeddings of the two branches, ``[B, T, E]``; where a model has a pooled embedding, it is the last
            row, filled up with zeros.
        level_at: the noise level of any timestep of this scheduler.
        denoise: evaluates the captured call again.
        evaluations: ``[B]``, the extra denoiser evaluations spent on each image so far; shared by derived observations' rows.
        rows: ``[B]``, which rows of the run these are.
        dtype: precision in which the denoiser takes a point: whatever is asked of it is rounded to that first.
        denoiser: the network itself, for signals that read features inside it.
        past_norms: ``[B, calls before this one]``, the guidance norm at each of them.
        rules: one entry a row, what takes guidance's place for it or None; empty where no row has one.
        origin: ``[B, C, H, W]``, the clean latents that were noised to start from, as in image-to-image; None where it is noise alone.
        reading: gives the guard's own reference call of all the run's rows, made when it is first asked for; None where this call is it.
        half_made: whether the run was handed over latents that are no noise any more: what is in them cannot be steered.
        new_condition: whether the run's text condition is another than at its last call, as where a callback has changed it.
        patches: code from elsewhere on the denoiser, by name: it is read as it is when the run begins.
        memo: what was evaluated at this very point, by row and name (`sdguard.geometry.rollout.once_a_row`); None where nothing is kept.
    """

    level: NoiseLevel
    guidance_scale: float
    step: int
    timestep: float
    condition: Tensor
    null_condition: Tensor
    level_at: Callable[[float], NoiseLevel]
    denoise: Denoiser
    evaluations: Tensor
    rows: Tensor
    denoiser: nn.Module | None = None
    dtype: torch.dtype = torch.float32
    past_norms: Tensor = field(default_factory=lambda: torch.zeros(0))
    rules: tuple[Rule | None, ...] = ()
    memo: dict[tuple[int, Hashable], Tensor] | None = None
    origin: Tensor | None = None
    reading: Callable[[], Observation] | None = None
    half_made: bool = False
    new_condition: bool = False
    patches: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.past_norms):
            object.__setattr__(self, "past_norms", torch.zeros(len(self.x), 0))

    @property
    def at_reference(self) -> Observation:
        """The guard's own reference call of these rows (`sdguard.denoiser.reference_call`). Cost: up to 2 evaluations, once a run."""
        return self if self.reading is None else self.reading().select(self.rows)

    @property
    def prediction(self) -> Tensor:
        """The noise prediction that is followed, ``[B, C, H, W]``: each row's under its rule, or under guidance. Cost: the rules'."""
        if not any(self.rules):
            return self.guided(self.eps_c, self.eps_u)
        rows = [self.select(torch.tensor([i])) for i in range(len(self.x))]
        return torch.cat([rule(row) if rule else row.prediction for rule, row in zip(self.rules, rows, strict=True)])

    def score(self, branch: Branch, timestep: float | None = None) -> Callable[[Tensor], Tensor]:
        """``x -> grad log p_t(x) = -eps / s`` of a branch, ``[B, C, H, W]`` both, at this or another timestep.

        ``"guided"`` is ``u + w (c - u)`` for guidance scale w, ``"contrast"`` is ``c - u``.
        Cost: 1 evaluation per image a call, 2 for guided and contrast.
        """
        t = self.timestep if timestep is None else timestep
        s = self.level_at(t).s

        def score(x: Tensor) -> Tensor:
            if branch in ("conditional", "unconditional"):
                self.count_nfe(1)
                return -(self.conditional(x, t) if branch == "conditional" else self.unconditional(x, t)) / s
            eps_c, eps_u = self.both_branches(x, t)
            return -(self.guided(eps_c, eps_u) if branch == "guided" else eps_c - eps_u) / s

        return score

    def count_nfe(self, count: int) -> None:
        """Count ``count`` function evaluations of the denoiser (NFE) for every row; a gradient counts as one more than its forward pass."""
        self.evaluations.index_add_(0, self.rows, torch.full_like(self.rows, count))

    def select(self, rows: Tensor) -> Observation:
        """The observation of some of its rows (positions in this observation, also repeated ones); of all in their order itself."""
        if rows.tolist() == list(range(len(self.x))):
            return self
        names = ("x", "eps_c", "eps_u", "condition", "null_condition", "rows", "past_norms")
        picked: dict[str, Any] = {name: getattr(self, name)[rows] for name in names}
        picked["origin"] = None if self.origin is None else self.origin[rows]
        return replace(self, **picked, rules=tuple(self.rules[i] for i in rows.tolist()) if self.rules else ())

    def differentiable(self) -> Observation:
        """The same where gradients can be taken, also of a run inside ``torch.inference_mode``; made outside of that mode."""
        names = ("x", "eps_c", "eps_u", "condition", "null_condition", "past_norms")
        held = {name: getattr(self, name) for name in names}
        return replace(self, **{name: value.clone() for name, value in held.items() if value.is_inference()})

    def conditional(self, x: Tensor, timestep: float, condition: Tensor | None = None) -> Tensor:
        """The conditional noise prediction of the rows elsewhere, not counted; under their own text condition or another."""
        return self.denoise(x, timestep, self.condition if condition is None else condition, self.run_rows + self.rows)

    def unconditional(self, x: Tensor, timestep: float) -> Tensor:
        """The unconditional noise prediction of the rows elsewhere, not counted."""
        return self.denoise(x, timestep, self.null_condition, self.rows)

    @property
    def run_rows(self) -> int:
        """How many images the run has."""
        return len(self.evaluations)

    def with_condition(self, condition: Tensor) -> Observation:
        """The same call under another text condition ``[B, T, E]``. Cost: 1 evaluation per image."""
        self.count_nfe(1)
        return replace(self, condition=condition, eps_c=self.conditional(self.x, self.timestep, condition), memo={})

    def at(self, x: Tensor, timestep: float) -> Observation:
        """The call that follows this one at another point ``x`` and timestep. Cost: 2 evaluations per image."""
        x = self.as_taken(x)
        eps_c, eps_u = self.both_branches(x, timestep)
        norms = torch.cat([self.past_norms.to(self.guidance_norm), self.guidance_norm[:, None]], dim=1)
        level, step = self.level_at(timestep), self.step + 1
        return replace(self, step=step, timestep=timestep, level=level, x=x, eps_c=eps_c, eps_u=eps_u, past_norms=norms, memo=None)

    def from_start(self, x: Tensor) -> Observation:
        """This very call from another ``x_t``. Cost: 2 evaluations per image."""
        x = self.as_taken(x)
        eps_c, eps_u = self.both_branches(x, self.timestep)
        return replace(self, x=x, eps_c=eps_c, eps_u=eps_u, memo={})

    def as_taken(self, x: Tensor) -> Tensor:
        """A point as the denoiser takes it, so that its noise is told from what the denoiser has seen."""
        return x.to(self.dtype).to(x.dtype)

    def both_branches(self, x: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        """``(eps_c, eps_u)`` of the same rows and conditions elsewhere. Cost: 2 evaluations per image."""
        self.count_nfe(2)
        both = torch.cat([self.null_condition, self.condition])
        places = torch.cat([self.rows, self.run_rows + self.rows])
        eps_u, eps_c = self.denoise(torch.cat([x, x]), timestep, both, places).chunk(2)
        return eps_c, eps_u
