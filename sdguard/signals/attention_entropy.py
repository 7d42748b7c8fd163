"""Attention entropy: over how many tokens the cross-attention spreads."""

import torch
from torch import Tensor, nn

from sdguard.capture import captured
from sdguard.observation import Observation
from sdguard.signals.signal import Signal


def cross_attentions(denoiser: nn.Module) -> list[nn.Module]:
    """The cross-attention layers of a U-Net of diffusers, which names them ``attn2``."""
    return [module for name, module in denoiser.named_modules() if name.endswith("attn2")]


def entropy(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Entropy over tokens of the attention that places on average pay to each, averaged over heads, ``[B]``, in nats.

    ``query`` ``[B, N, C]``, ``key`` ``[B, T, C]``; after Ren et al. 2024 (2403.11052).
    """
    q, k = (z.float().unflatten(-1, (heads, -1)).transpose(1, 2) for z in (query, key))
    paid = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1).mean(dim=2)
    return -(paid * paid.clamp_min(1e-12).log()).sum(-1).mean(dim=1)


def attention_entropy(observation: Observation) -> Tensor:
    """Mean `entropy` over the cross-attention layers under the prompt, ``[B]``, in nats.

    Ordinary prompts leave most attention to the begin token, memorized ones pull it to others. The queries and keys are read
    where they are projected, so that any attention processor may be in use. Cost: 1 evaluation. Weak in independent tests,
    and of the other sign on the embedded model; blind where one token alone holds the key.

    Raises:
        ValueError: the denoiser has no cross-attention that is known.
    """
    layers = cross_attentions(observation.denoiser) if observation.denoiser is not None else []
    if not layers:
        raise ValueError("The denoiser has no cross-attention layers named attn2.")
    observation.spend(1)
    with captured([projection for layer in layers for projection in (layer.to_q, layer.to_k)]) as found:  # type: ignore[misc]
        observation.conditional(observation.x, observation.timestep)
    pairs = zip(found[::2], found[1::2], layers, strict=True)
    return torch.stack([entropy(query, key, layer.heads) for query, key, layer in pairs]).mean(dim=0)  # type: ignore[arg-type]


ATTENTION_ENTROPY = Signal("attention_entropy", attention_entropy, cost=1)
