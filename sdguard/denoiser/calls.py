"""Calls of the denoiser as values: their arguments row by row, and what they gave."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import recursively_apply
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from sdguard.denoiser.families import TEXT, Family

#: the denoiser's arguments that have an entry for each row of its batch, beside the point and the token embeddings.
PER_ROW = (
    "added_cond_kwargs", "timestep_cond", "class_labels", "encoder_attention_mask", "down_block_additional_residuals",
    "mid_block_additional_residual", "down_intrablock_additional_residuals", "pooled_projections", "block_controlnet_hidden_states",
    "guidance", "attention_mask", "controlnet_block_samples", "controlnet_single_block_samples", "joint_attention_kwargs",
)  # fmt: skip


class DenoiserCall(NamedTuple):
    """A call of the denoiser: its arguments, by name, and the prediction it gave."""

    kwargs: dict[str, Any]
    prediction: Tensor


@functools.cache
def places_of(kind: type) -> tuple[str, ...]:
    """The names of what a class of denoisers takes by place."""
    _, *parameters = inspect.signature(kind.forward).parameters.values()  # type: ignore[attr-defined]
    return tuple(part.name for part in parameters if part.kind in (part.POSITIONAL_ONLY, part.POSITIONAL_OR_KEYWORD))


def by_name(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], family: Family) -> dict[str, Any]:
    """All arguments of a call of the denoiser by their names, which loops of somebody's own may give by place.

    Raises `ValueError`, in one sentence, for more by place than can be told from the family's pipelines and the denoiser's class.
    """
    kind: type = type(denoiser)
    names = (*family.by_place, *places_of(kind)[len(family.by_place) :])
    if len(args) > len(names):
        raise ValueError(
            f"A call of the denoiser gives {len(args)} arguments by place, where it is known of {len(names)} what they are: under guard it "
            f"has to give the others by name, as {TEXT}=..."
        )
    return dict(zip(names, args, strict=False)) | kwargs


def call_denoiser(forward: Callable[..., Any], family: Family, kwargs: dict[str, Any]) -> Any:
    """The denoiser's output for arguments given by name, handed over as pipelines of its family do: some by place."""
    rest = {name: value for name, value in kwargs.items() if name not in family.by_place}
    return forward(*(kwargs[name] for name in family.by_place), **rest)


def own_call(forward: Callable[..., Any], family: Family, kwargs: dict[str, Any]) -> Any:
    """As `call_denoiser`, its prediction a tensor of its own: a captured graph writes what its next call gives over it."""
    output = call_denoiser(forward, family, kwargs)
    return replace_prediction(output, output[0].clone())


def evaluated(forward: Callable[..., Any], family: Family, kwargs: dict[str, Any]) -> Tensor:
    """The prediction of an evaluation of the guard's own, for arguments given by name.

    Raises:
        ValueError: it has other rows than were asked for, as of a graph that was captured for one shape and spreads what it is given.
    """
    prediction: Tensor = own_call(forward, family, {**kwargs, "return_dict": False})[0]
    if len(prediction) != len(kwargs[family.sample]):
        raise ValueError(
            f"The denoiser gave {len(prediction)} rows for {len(kwargs[family.sample])}, as a graph does that was captured for one shape: "
            "the guard evaluates batches of other sizes, and cannot read it."
        )
    return prediction


def timestep_of(timestep: float, rows: Tensor, family: Family) -> Tensor:
    """A scheduler's timestep as pipelines of a family give it for some rows ``[B, ...]``: a scalar where it goes by place, else ``[B]``."""
    shape = () if "timestep" in family.by_place else (len(rows),)
    return torch.full(shape, timestep / family.timestep_scale, device=rows.device, dtype=torch.float32)


def snapshot(kwargs: dict[str, Any], prediction: Tensor) -> DenoiserCall:
    """A call that stays as it is, whatever becomes of the containers among its arguments."""
    return DenoiserCall(recursively_apply(lambda entry: entry, kwargs), prediction)


def concat_kwargs(first: Any, second: Any) -> Any:
    """Per-row arguments of two calls as those of one with the rows of both."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, dict):
        return {name: concat_kwargs(entry, second[name]) for name, entry in first.items()}
    return type(first)(map(concat_kwargs, first, second)) if isinstance(first, (list, tuple)) else first


def concat_calls(first: DenoiserCall, second: DenoiserCall, sample: str) -> DenoiserCall:
    """Two calls as one with the rows of both; ``sample`` is the name of the denoiser's first argument.

    Raises `ValueError`, in one sentence, where their texts are not as long as each other.
    """
    names = [name for name in (sample, TEXT, *PER_ROW) if name in first.kwargs]
    count, tokens = len(first.prediction), [call.kwargs[TEXT].shape[1] for call in (first, second)]
    if tokens[0] != tokens[1]:
        raise ValueError(
            f"The prompt's embedding has {tokens[1]} tokens and the negative prompt's {tokens[0]}: under guard they have to have as many, "
            f"as they have with max_sequence_length={tokens[1]}."
        )

    def for_each(entry: Tensor) -> Tensor:  # one text for the whole batch, which the denoiser spreads itself
        return entry.expand(count, *entry.shape[1:]) if len(entry) == 1 else entry

    whole = [recursively_apply(for_each, {name: call.kwargs[name] for name in names}) for call in (first, second)]
    rows = {name: concat_kwargs(whole[0][name], whole[1][name]) for name in names}
    return DenoiserCall(first.kwargs | rows, torch.cat([first.prediction, second.prediction]))


def select_rows(kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """A call's arguments with the per-row ones for ``rows`` alone, which may repeat."""
    return kwargs | {name: recursively_apply(lambda entry: entry[rows], kwargs[name]) for name in PER_ROW if kwargs.get(name) is not None}


def only_rows(kwargs: dict[str, Any], rows: Tensor, family: Family) -> dict[str, Any]:
    """All of a call's arguments for ``rows`` alone."""
    apart = {name: kwargs[name][rows] for name in (family.sample, TEXT)}
    timestep = kwargs["timestep"]
    return {**select_rows(kwargs, rows), **apart, "timestep": timestep[rows] if getattr(timestep, "ndim", 0) else timestep}


def replace_prediction(output: Any, prediction: Tensor) -> Any:
    """A denoiser's output, a tuple of whatever kind, a list or one of diffusers' own, with another prediction in it."""
    if isinstance(output, BaseOutput):
        return replace(output, sample=prediction)
    make = getattr(output, "_make", type(output))
    return make((prediction, *output[1:]))
