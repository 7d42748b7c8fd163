"""Attention entropy: over how many tokens the cross-attention spreads."""

from typing import Any

import torch
from torch import Tensor, nn

from sdguard.denoiser.capture import captured, cross_attentions
from sdguard.observation import Observation
from sdguard.signals.signal import Signal, UnsupportedModel


def mean_attention(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """The attention that places on average pay to each token, ``[B, heads, T]``, of ``query`` ``[B, N, C]`` and ``key`` ``[B, T, C]``."""
    q, k = (z.float().unflatten(-1, (heads, -1)).transpose(1, 2) for z in (query, key))
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1).mean(dim=2)


def entropy(share: Tensor) -> Tensor:
    """Entropy in nats of shares along the last dimension; of some of a distribution's shares, their part of it."""
    return -(share * share.clamp_min(1e-12).log()).sum(dim=-1)


def attention_by_token(observation: Observation) -> list[Tensor]:
    """`mean_attention` of each cross-attention layer under the prompt, ``[B, heads, T]`` each, in the order in which the layers run.

    The queries and keys are read where they are projected, so that any attention processor may be in use. Cost: 1 evaluation.

    Raises:
        UnsupportedModel: the denoiser has no cross-attention that is known.
    """
    layers = cross_attentions(observation.denoiser) if observation.denoiser is not None else []
    if not layers:
        raise UnsupportedModel("The denoiser has no cross-attention layers named attn2.")
    observation.count_nfe(1)
    by_query: dict[nn.Module, Any] = {layer.to_q: layer for layer in layers}  # type: ignore[misc]
    with captured([*by_query, *(layer.to_k for layer in layers)]) as found:  # type: ignore[list-item]
        observation.conditional(observation.x, observation.timestep)
    # a U-Net registers its middle last, so that it is the order of running and not that of the modules that tells a layer
    return [mean_attention(found[q], found[by_query[q].to_k], by_query[q].heads) for q in found if q in by_query]


def attention_entropy(observation: Observation) -> Tensor:
    """Mean `entropy` of the attention of each head of each cross-attention layer under the prompt, ``[B]``, in nats.

    After Ren et al. 2024 (2403.11052). Ordinary prompts leave most attention to the begin token, memorized ones pull it to others. Cost: 1
    evaluation. Weak in independent tests, and of the other sign on the embedded model; blind where one token alone holds the key.
    """
    return torch.stack([entropy(layer).mean(dim=1) for layer in attention_by_token(observation)]).mean(dim=0)


ATTENTION_ENTROPY = Signal("attention_entropy", attention_entropy, cost=1)
