"""A point moved for the sake of a difference, as a network that rounds what it is given sees it move."""

import torch
from torch import Tensor

from sdguard.geometry.rowwise import dot, expand_like


def step_in(dtype: torch.dtype, step: float) -> float:
    """A relative step well above the spacing of ``dtype``: ``step``, or ``eps ** (2/3)`` where that is more, .04 in bf16 and .01 in fp16.

    A difference errs by what rounding adds to each component, ``eps / step``, which a trace averages out, and by the curvature along the
    step, which it does not: so the step lies below ``eps ** (1/2)``, which would balance the two in a single component.
    """
    return max(step, torch.finfo(dtype).eps ** (2 / 3))


def displaced(x: Tensor, way: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x + way`` as a network that takes its input in ``dtype`` is given it, and how much of ``way`` ``x`` was moved by, ``[B, 1, ...]``.

    That is the displacement's component along ``way``, as a share of it; of what rounding adds across it a difference hears as noise. In
    single precision and above rounding moves less than differences err: the point is not rounded, and the share is 1.
    """
    if torch.finfo(dtype).eps <= torch.finfo(torch.float32).eps:
        return x + way, expand_like(x.new_ones(len(x)), x)
    moved = (x + way).to(dtype).to(x.dtype)
    with torch.no_grad():
        share = dot(moved - x.to(dtype).to(x.dtype), way) / dot(way, way)
        # nothing to go, or less than the spacing
        return moved, expand_like(torch.where(share > 0, share, 1.0), x)
