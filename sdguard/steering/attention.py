"""Attention attenuation: tokens that spike in cross-attention are turned down, through diffusers' attention processors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sdguard.correction import Correction
from sdguard.observation import Observation
from sdguard.steering.method import Method, SteeringInput

#: a token spikes in a head where its highest logit stands this many standard deviations above the other tokens'.
SPIKE = 2.0
#: what a spiking token's logits are multiplied by.
SCALE = 0.3


class Attenuated:
    """An attention processor that runs another one with the logits of spiking text tokens scaled; self-attention is left alone."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if encoder_hidden_states is not None and not args and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = spike_bias(attn, hidden_states, encoder_hidden_states)
        return self.inner(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def spike_bias(attn: Any, hidden_states: Tensor, text: Tensor) -> Tensor:
    """What is added to the logits, ``[B * heads, queries, T]``, so that those of spiking tokens come out scaled; begin token never.

    A logit below 0 is left alone: scaled it would draw more attention than before.
    """
    query, key = (attn.head_to_batch_dim(to(x)).float() for to, x in ((attn.to_q, hidden_states), (attn.to_k, text)))
    logits = attn.scale * query @ key.transpose(1, 2)
    highest = logits.amax(dim=1)[:, 1:]
    z = (highest - highest.mean(dim=1, keepdim=True)) / highest.std(dim=1, keepdim=True).clamp_min(1e-12)
    spiking = nn.functional.pad(z > SPIKE, (1, 0))
    return ((SCALE - 1) * logits.clamp_min(0) * spiking.unsqueeze(1)).to(hidden_states.dtype)


@contextmanager
def attenuated(denoiser: Any) -> Iterator[None]:
    """Within the block every attention processor of ``denoiser`` is attenuated; afterwards they are the ones they were."""
    before = dict(denoiser.attn_processors)
    denoiser.set_attn_processor({name: Attenuated(processor) for name, processor in before.items()})
    try:
        yield
    finally:
        denoiser.set_attn_processor(dict(before))


def attenuated_prediction(observation: Observation) -> Tensor:
    """The conditional noise prediction under attenuated attention, ``[B, C, H, W]``. Cost: 1 evaluation."""
    observation.count_nfe(1)
    with attenuated(observation.denoiser):
        return observation.conditional(observation.x, observation.timestep)


def attenuation_rule(observation: Observation) -> Tensor:
    """Guidance towards the attenuated prediction. Cost: 1 evaluation."""
    return observation.guided(attenuated_prediction(observation), observation.eps_u)


def attention_attenuation(flagged: SteeringInput) -> list[Correction | None]:
    """The attenuation of GUARD (2603.00133) at every step; not where the denoiser has no cross-attention processors.

    It runs in a call of its own, so that the batch's other rows keep theirs. Cost: none ahead, 1 evaluation a step.
    """
    processors = getattr(flagged.observation.denoiser, "attn_processors", {})
    applies = any("attn2" in name for name in processors)
    return [Correction({}, rule=attenuation_rule) if applies else None for _ in flagged.prompts]


ATTENTION_ATTENUATION = Method("attention attenuation", attention_attenuation, cost=0, step_cost=1)
