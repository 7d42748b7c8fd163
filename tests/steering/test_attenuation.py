"""Attention attenuation through diffusers' processors: what it scales, and that nothing of it is left."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from sdguard.steering import METHODS, attention
from sdguard.steering.attention import SCALE, attenuated, spike_bias


def predict(pipe: Any, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(pipe.unet(x, 500.0, encoder_hidden_states=text, return_dict=False)[0])


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 8, 8), torch.randn(2, 6, 16)


def cross_attention(pipe: Any) -> Any:
    return next(module for name, module in pipe.unet.named_modules() if name.endswith("attn2"))


def test_logits_of_spiking_tokens_come_out_scaled_and_the_others_as_they_were(tiny: Any) -> None:
    attn, text, queries = cross_attention(tiny), torch.randn(1, 12, 16), torch.randn(1, 5, 16)
    text[:, 4] *= 50
    query, key = attn.head_to_batch_dim(attn.to_q(queries)), attn.head_to_batch_dim(attn.to_k(text))
    logits = attn.scale * query @ key.transpose(1, 2)
    highest = logits.amax(dim=1)
    spiking = [head for head in range(len(highest)) if highest[head, 4] > highest[head, [1, 2, 3, 5]].max() * 5]
    assert spiking
    scaled = logits + spike_bias(attn, queries, text)
    above = logits[spiking, :, 4] > 0
    torch.testing.assert_close(scaled[spiking, :, 4][above], SCALE * logits[spiking, :, 4][above])
    assert not above.all()
    torch.testing.assert_close(scaled[spiking, :, 4][~above], logits[spiking, :, 4][~above])  # scaled they would attract more
    torch.testing.assert_close(scaled[..., [0, 1, 2, 3]], logits[..., [0, 1, 2, 3]])


def test_the_begin_token_is_never_attenuated(tiny: Any) -> None:
    text = torch.randn(1, 12, 16)
    text[:, 0] *= 100
    assert spike_bias(cross_attention(tiny), torch.randn(1, 5, 16), text)[..., 0].abs().max() == 0


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_where_nothing_spikes_nothing_changes(processor: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.unet.set_attn_processor(processor())
    x, text = inputs()
    plain = predict(tiny, x, text)
    monkeypatch.setattr(attention, "SPIKE", 1e9)
    with attenuated(tiny.unet):
        torch.testing.assert_close(predict(tiny, x, text), plain, rtol=1e-4, atol=1e-5)


def test_attenuation_acts_and_leaves_the_processors_that_were_there(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPIKE", 0.5)
    x, text = inputs()
    before, plain = tiny.unet.attn_processors, predict(tiny, x, text)
    with attenuated(tiny.unet):
        assert not torch.allclose(predict(tiny, x, text), plain, atol=1e-4)
    after = tiny.unet.attn_processors
    assert all(after[name] is processor for name, processor in before.items())
    assert torch.equal(predict(tiny, x, text), plain)


def test_an_error_inside_restores_the_processors(tiny: Any) -> None:
    before = tiny.unet.attn_processors
    with pytest.raises(RuntimeError, match="no luck"), attenuated(tiny.unet):
        raise RuntimeError("no luck")
    assert all(tiny.unet.attn_processors[name] is processor for name, processor in before.items())


def test_it_costs_an_evaluation_a_step() -> None:
    assert METHODS["attention attenuation"].step_cost == 1
