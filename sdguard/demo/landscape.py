"""The geometry of log p_t along a run and around its sample, for a memorized and an ordinary prompt side by side; no page in here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import lsqr
from torch import Tensor

from sdguard.demo.model import Model
from sdguard.demo.settings import Setting
from sdguard.demo.streaming import Emit, Progress
from sdguard.denoiser.probe import probe_run
from sdguard.files.inputs import BadInput
from sdguard.geometry.dimension import flipd
from sdguard.geometry.hessian import Score, branch_product, difference_product, extreme_directions, spectrum, trace
from sdguard.geometry.rollout import probe
from sdguard.geometry.rowwise import dot, expand_like
from sdguard.geometry.volume import log_volume
from sdguard.observation import Observation, denoised

#: Lanczos iterations for the density at every call, and for the spectrum at the chosen one.
ITERATIONS, FINE_ITERATIONS = 6, 24
#: noise levels, as timesteps, at which the sample's own dimension is read.
LEVELS = (41.0, 101.0, 201.0, 301.0, 401.0, 501.0, 601.0, 701.0)
#: points along a side of the slice, how far it reaches in standard deviations of the noise, and score evaluations in one batch.
SIDE, REACH, BATCH = 17, 6.0, 75


@dataclass(frozen=True)
class Slice:
    """log p_t over the plane through the sample along its flattest and its sharpest direction, in nats against the sample.

    Attributes:
        offsets: of the grid's points from the sample along either axis, in standard deviations of the noise, ``[n]``.
        heights: ``[n, n]``, along the sharpest direction first; the sample has 0.
        rest: the share of the score in the plane, by root mean square, that is no gradient and was left out.
        steepness: minus the second derivative along the flattest and the sharpest direction, in units of ``1 / s**2``: 1 is a delta's.
    """

    offsets: np.ndarray
    heights: np.ndarray
    rest: float
    steepness: tuple[float, float]


@dataclass
class Landscape:
    """What is known of each prompt of a run, row by row; lists grow as the run goes.

    Attributes:
        timesteps: of the calls so far.
        free: ``d + s**2 tr H`` at each call's own point, of the prompt's density: how many of the ``d`` directions it leaves free.
        density: minus the log volume element of the denoised estimate at each call's own point, in nats (Feiszli 2017).
        levels, lid: timesteps, and FLIPD of the finished sample there.
        nodes, weights: spectrum of ``1 + s**2 H`` at the chosen call: 0 is a pinned direction, 1 a free one.
        slices: around the finished sample at the chosen call's noise level.
    """

    prompts: list[str]
    step: int
    dimensions: int = 0
    chosen: float = 0.0
    timesteps: list[float] = field(default_factory=list)
    free: list[list[float]] = field(default_factory=list)
    density: list[list[float]] = field(default_factory=list)
    levels: list[float] = field(default_factory=list)
    lid: list[list[float]] = field(default_factory=list)
    nodes: list[list[float]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)


def potential(along: np.ndarray, across: np.ndarray, spacing: float) -> tuple[np.ndarray, float]:
    """The function on a grid whose gradient comes nearest to a field, 0 at the middle; and the share of the field that is left.

    ``along`` is the field's component along the second axis and ``across`` along the first, ``[n, m]`` both. Differences between
    neighbours are matched to the mean of the field at both ends (exact where the function is quadratic) by least squares, so that no
    path of integration is preferred. A field that is no gradient leaves a share: root mean square of what is not
    matched over that of the field.
    """
    n, m = along.shape
    index = np.arange(n * m).reshape(n, m)
    ends = [(index[:, :-1], index[:, 1:], (along[:, :-1] + along[:, 1:]) / 2), (index[:-1], index[1:], (across[:-1] + across[1:]) / 2)]
    start, end, slope = (np.concatenate([part[i].ravel() for part in ends]) for i in range(3))
    rows = np.arange(len(slope))
    values = np.repeat([-1.0, 1.0], len(slope)) / spacing
    matrix = coo_matrix((values, (np.tile(rows, 2), np.concatenate([start, end]))), shape=(len(slope), n * m)).tocsr()
    found = lsqr(matrix, slope, atol=1e-12, btol=1e-12, iter_lim=20 * n * m)[0]
    rest = float(np.sqrt(np.square(matrix @ found - slope).mean() / max(np.square(slope).mean(), 1e-30)))
    heights = found.reshape(n, m)
    return heights - heights[n // 2, m // 2], rest


def plane(score: Callable[[Tensor], Tensor], centre: Tensor, flattest: Tensor, sharpest: Tensor, scale: float) -> tuple[np.ndarray, ...]:
    """Offsets of `SIDE` points, and the score's components along either unit direction on the grid around ``centre`` ``[1, ...]``.

    The grid reaches `REACH` times ``scale`` to every side. Returns offsets ``[n]`` in units of ``scale`` and both components ``[n, n]``,
    sharpest direction along the first axis. Cost: ``SIDE**2`` score evaluations.
    """
    offsets = torch.linspace(-REACH, REACH, SIDE)
    down, right = (part.flatten() * scale for part in torch.meshgrid(offsets, offsets, indexing="ij"))
    points = centre + expand_like(down, centre) * sharpest + expand_like(right, centre) * flattest
    scores = torch.cat([score(part) for part in points.split(BATCH)])
    along, across = (dot(scores, direction.expand_as(scores)).reshape(SIDE, SIDE).double().numpy() for direction in (flattest, sharpest))
    return offsets.double().numpy(), along, across


def slice_of(
    score: Score, centre: Tensor, scale: float, start: Tensor, iterations: int = FINE_ITERATIONS, dtype: torch.dtype = torch.float32
) -> Slice:
    """The `Slice` of the density of ``score`` around ``centre`` ``[1, ...]`` at noise of standard deviation ``scale``.

    ``dtype`` is the precision in which the network takes its input.

    Cost: ``2 * iterations + SIDE**2 + 4`` score evaluations.
    """
    product = difference_product(score, centre, dtype=dtype)
    sharpest, flattest = extreme_directions(product, start, iterations)
    offsets, along, across = plane(score, centre, flattest, sharpest, scale)
    heights, rest = potential(along, across, scale * float(offsets[1] - offsets[0]))
    steepness = tuple(-float(dot(v, product(v))) * scale**2 for v in (flattest, sharpest))
    return Slice(offsets, heights, rest, (steepness[0], steepness[1]))


def look_along(found: Landscape, emit: Emit, calls: Callable[[], int]) -> Callable[[Observation], None]:
    """A look at each of so many ``calls`` that fills ``found``; at the last, the sample's own dimension and the slices too."""

    def look(observation: Observation) -> None:
        level, count = observation.level, len(observation.x)
        found.dimensions = observation.x[0].numel()
        product = branch_product(observation, "conditional")
        signs = [probe(observation.x, draw) for draw in range(2)]
        free = found.dimensions + level.s**2 * trace(product, signs).value
        volume = log_volume(product, signs, level, ITERATIONS).value
        found.timesteps.append(observation.timestep)
        for row in range(count):
            found.free[row].append(float(free[row]))
            found.density[row].append(-float(volume[row]))
        if observation.step == found.step:
            found.chosen = observation.timestep
            nodes, weights = spectrum(product, signs[0], FINE_ITERATIONS)
            found.nodes, found.weights = (1 + level.s**2 * nodes).tolist(), weights.tolist()
        emit(Progress("Walking along the run", observation.step + 1, calls()))
        if observation.step + 1 == calls():
            finish(found, observation, emit)

    return look


def finish(found: Landscape, last: Observation, emit: Emit) -> None:
    """Fill in what is read off the finished sample: FLIPD along `LEVELS`, and the slices at the chosen call's noise level."""
    sample = denoised(last.x, last.prediction, last.level)
    for done, timestep in enumerate(LEVELS):
        level, score = last.level_at(timestep), last.score("conditional", timestep)
        y = level.a * sample
        estimate = trace(difference_product(score, y, dtype=last.dtype), [probe(y, draw) for draw in range(2)])
        found.levels.append(timestep)
        for row, value in enumerate(flipd(score, estimate.value, y, level).tolist()):
            found.lid[row].append(value)
        emit(Progress("Reading the sample's dimension", done + 1, len(LEVELS)))
    level = last.level_at(found.chosen)
    for row in range(len(sample)):
        emit(Progress("Measuring log p around the sample", row, len(sample)))
        here = last.select(torch.tensor([row]))

        def score(x: Tensor, here: Observation = here) -> Tensor:
            return here.select(torch.zeros(len(x), dtype=torch.long)).score("conditional", found.chosen)(x)

        centre = level.a * sample[row : row + 1]
        found.slices.append(slice_of(score, centre, level.s, probe(centre), dtype=last.dtype))


def landscape(model: Model, prompts: list[str], setting: Setting, step: int, emit: Emit) -> None:
    """Emit progress, then the `Landscape` of prompts that start from the same noise; ``step`` counts from 0.

    Cost, in evaluations a prompt: the run, 14 a call, 24 for the spectrum, 5 a level, and 341 for the slice.

    Raises:
        ValueError: the setting cannot be; one sentence.
    """
    settings = [replace(setting, prompt=prompt).checked(model) for prompt in prompts]
    setting, checked = settings[0], [each.prompt for each in settings]
    if not 0 <= step < setting.steps:
        raise BadInput(f"The step must lie between 1 and {setting.steps}; it is {step + 1}.")
    found = Landscape(checked, step, free=[[] for _ in checked], density=[[] for _ in checked], lid=[[] for _ in checked])
    emit(Progress("Walking along the run", 0, setting.steps))
    pipe = model.own()
    look = look_along(found, emit, lambda: len(pipe.scheduler.timesteps))
    probe_run(pipe, checked, [setting.seed] * len(checked), look, None, **setting.call)
    emit(found)
