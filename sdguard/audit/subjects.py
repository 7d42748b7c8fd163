"""What an audit needs of a model: four small tuples, and the import path by which a command finds the callable that makes one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from sdguard.observation import NoiseLevel

#: points ``[m, ...]`` -> log-likelihood of each ``[m]``, in nats.
LogLikelihood = Callable[[Tensor], Tensor]

#: noise prediction of a diffusion model: (x ``[B, ...]``, noise level) -> ``[B, ...]``; x = a x_0 + s eps with a**2 + s**2 = 1.
Noise = Callable[[Tensor, NoiseLevel], Tensor]


class Trainable(NamedTuple):
    """A learning algorithm and its data, for `memorization`.

    Attributes:
        data: the training points, ``[n, ...]``; indices will do where `fit` knows what they stand for.
        fit: (training points ``[m, ...]``, seed) -> the log-likelihood under the model trained on them.
        groups: ``[n]``, points of one group are left out together, as duplicates of a point have to be; None where each is its own.
    """

    data: Tensor
    fit: Callable[[Tensor, int], LogLikelihood]
    groups: np.ndarray | None = None


class Generator(NamedTuple):
    """A deterministic generator, for `density`.

    Attributes:
        generate: latents ``[B, ...]`` -> outputs ``[B, ...]``, each row on its own, differentiable.
        latents: where it is to be looked at, ``[n, ...]``, draws of a standard Gaussian or encoded points.
    """

    generate: Callable[[Tensor], Tensor]
    latents: Tensor


class Diffusion(NamedTuple):
    """A diffusion model and what to compare it with, for `dimension`.

    Attributes:
        noise: its noise prediction; rows are those of ``points``, so that one may depend on its row's condition.
        level: the noise level the dimension is read at, small against the manifold's own scales.
        points: where, ``[n, ...]``.
        data: what the data's own dimension is estimated from, ``[N, ...]``, without repetitions.
        simple: a dimension below which a point counts as simple.
    """

    noise: Noise
    level: NoiseLevel
    points: Tensor
    data: Tensor
    simple: float


class Samples(NamedTuple):
    """What a model gave, what it was trained on, and what it was not, for `neighbours`.

    Pictures are uint8 ``[n, H, W, 3]``, other points float ``[n, ...]``.
    """

    generated: np.ndarray
    training: np.ndarray
    held_out: np.ndarray


Subject = TypeVar("Subject", Trainable, Generator, Diffusion, Samples)

#: the worked examples by name.
EXAMPLES = {
    "digits-vae": "sdguard.audit.digits:vae",
    "digits-vae-slow": "sdguard.audit.digits:slow_vae",
    "digits-diffusion": "sdguard.audit.digits:diffusion",
    "digits-diffusion-flow": "sdguard.audit.digits:diffusion_flow",
    "digits-decoder": "sdguard.audit.digits:decoder",
    "digits-samples": "sdguard.audit.digits:samples",
    "manifolds": "sdguard.audit.manifolds:manifolds",
}


def load_subject(name: str, kind: type[Subject]) -> Subject:
    """What the callable at ``module:callable`` (or the example of that name) makes, called without arguments.

    Raises:
        ValueError: there is no such callable, or it makes something else; one sentence.
    """
    module, found, attribute = EXAMPLES.get(name, name).partition(":")
    if not found:
        raise ValueError(f"{name!r} is neither an example ({', '.join(EXAMPLES)}) nor an import path of the form module:callable.")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a script's console entry does not look in the working directory
    try:
        made: Any = getattr(importlib.import_module(module), attribute)()
    except ModuleNotFoundError as error:
        raise ValueError(f"{name!r} cannot be imported: {error}.") from None
    except AttributeError as error:
        raise ValueError(f"{name!r} cannot be used: {error}.") from None
    if not isinstance(made, kind):
        raise ValueError(f"{name!r} makes a {type(made).__name__}, and this audit needs a {kind.__name__} (sdguard.audit.subjects).")
    return made
