"""The guard's own call of a denoiser: plain text-to-image at the model's own size, beside the model's own empty prompt.

What a caller may turn (negative prompt, guidance, steps, sampler, size, pictures) is no part of it. So ordinary prompts read alike in every
run, and one profile serves all settings of a model. Where a run's own first call is this call already, it is taken, and costs nothing.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sdguard.denoiser.bare import bare, uncompiled
from sdguard.denoiser.calls import evaluated, timestep_of
from sdguard.denoiser.faces import no_faces, told_of_faces
from sdguard.denoiser.families import TEXT, default_of, default_size, denoiser_of, family_of
from sdguard.denoiser.kept_state import Kept
from sdguard.denoiser.latents import Patches, dtype_taken, pack_latents, patches_of, unpack_latents, with_condition
from sdguard.denoiser.text_encoding import ENCODERS, Encoder
from sdguard.noise import independent_noise
from sdguard.observation import NoiseLevel, Observation, is_flow, noise_level, prediction_type, to_noise

#: where training's noise levels are counted from 0 to 1: the first of 50 steps with Stable Diffusion's own scheduler.
FIRST = 0.975
#: how far, in log-SNR, a run's first noise level may be from that and still be taken for it: of 50 steps or of 10, of any sampler.
TOLERANCE = 0.3

#: how far an embedding may be from the one it should be, token by token: batches of another size round differently.
SAME = 0.1

#: by denoiser and number of tokens: what the text encoders were like, and what they made of the empty prompt then.
_null_conditions: weakref.WeakKeyDictionary[nn.Module, dict[int, tuple[tuple[Any, ...], Tensor]]] = weakref.WeakKeyDictionary()


def reference_timestep(scheduler: Any) -> float:
    """The timestep of the reference call; in flow matching noise alone, as every run begins there."""
    steps = int(scheduler.config.num_train_timesteps)
    return float(steps) if is_flow(scheduler) else float(round(FIRST * steps) + 1)


def latent_shape(pipe: Any) -> tuple[int, int, int]:
    """Channels, height and width of the latents that make a picture of the model's own size."""
    height, width = (side // int(pipe.vae_scale_factor) for side in default_size(pipe))
    patch = 2 if family_of(pipe).packed_latents else 1
    if getattr(pipe, "vae", None) is not None:
        channels = int(pipe.vae.config.latent_channels)
    else:  # dropped by who asks for latents; masks and pictures go in behind them, and variances come out
        config = denoiser_of(pipe).config
        channels = min(filter(None, (getattr(config, name, None) for name in ("in_channels", "out_channels")))) // patch**2
    return channels, height - height % patch, width - width % patch


def drawn_noise(pipe: Any, seed: int) -> Tensor:
    """The noise ``[C, H, W]`` that a run of the model's own size starts with from a seed."""
    shape, generator = latent_shape(pipe), torch.Generator().manual_seed(seed)
    if not family_of(pipe).drawn_in_patches:
        return torch.randn(shape, generator=generator, device="cpu")
    rows, columns = shape[1] // 2, shape[2] // 2
    return unpack_latents(torch.randn(4 * shape[0], rows * columns, generator=generator, device="cpu").T[None], (rows, columns))[0]


def has_text_encoders(pipe: Any) -> bool:
    """Whether a pipeline has a text encoder left; they may be dropped once prompts are encoded."""
    return any(getattr(pipe, name, None) is not None for name in ENCODERS)


def setup_of(pipe: Any) -> str | None:
    """What moves the encoding of a text beside the encoders: tokenizers, and whether the empty prompt is all zeros; None without any."""
    tokenizers = [getattr(pipe, name.replace("text_encoder", "tokenizer"), None) for name in ENCODERS]
    told = [(len(t), t.pad_token_id, int(t.model_max_length)) for t in tokenizers if t is not None]
    return str((told, pipe.config.get("force_zeros_for_empty_prompt"))) if told else None


def state_of(encoder: Encoder) -> tuple[Any, ...]:
    """What tells one state of a pipeline's text encoders from another; empty where they are gone.

    How the call has them encode, the tokenizers, what their adapters are set to, and shape, version and middle value of each of their
    weights. Cost: milliseconds.
    """
    parts = [part for name in ENCODERS if (part := getattr(encoder.pipe, name, None)) is not None]
    if not parts:
        return ()
    modules = [module for part in parts for module in part.modules()]
    weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
    middles: dict[torch.device, list[Tensor]] = {}
    for weight in weights:
        if not weight.is_meta and type(weight) is nn.Parameter:  # neither offloaded nor quantised
            middles.setdefault(weight.device, []).append(weight.detach()[tuple(side // 2 for side in weight.shape)])
    adapters = [str((of.scaling, of.disable_adapters, of.active_adapters)) for of in modules if "base_layer" in of._modules]
    values = [
        torch.stack([value.double() for value in found] if len({value.dtype for value in found}) > 1 else found).tolist()
        for found in middles.values()
    ]
    versions = [(weight.shape, None if weight.is_inference() else weight._version) for weight in weights]
    return str(encoder.options), setup_of(encoder.pipe), adapters, versions, values


def null_condition(encoder: Encoder, length: int) -> Tensor:
    """The model's own empty prompt, ``[1, T (+ 1), E]``, for token embeddings of ``length`` T.

    It is kept for as long as the text encoders are what they were, and when they are gone; one of zeros is known without them. Where the
    prompt has several windows (weighted or long prompts of other libraries) it is repeated: cross-attention gives the same for keys and
    values that come twice.
    Cost: that of `state_of`, and an encoding where the state is new.

    Raises:
        ValueError: the text encoders are gone and it was not encoded before, or joint attention is given another length than it has.
    """
    pipe = encoder.pipe
    known, state = _null_conditions.setdefault(denoiser_of(pipe), {}), state_of(encoder)
    if not state and length not in known and pipe.config.get("force_zeros_for_empty_prompt"):
        return torch.zeros(1, length + 1, max(family_of(pipe).widths(pipe)))
    if not state and length not in known:
        raise ValueError(
            f"{type(pipe).__name__} has no text encoder left, and its empty prompt is not known: prompts are to be encoded by the guarded "
            "pipeline's encode_prompt, or the encoders to be dropped from the guarded pipeline."
        )
    if length not in known or (state and known[length][0] != state):
        known[length] = state, encoder.both([""])[1]
    found = known[length][1]
    has = found.shape[1] - bool(family_of(pipe).beside)
    if has == length:
        return found
    if family_of(pipe).denoiser != "unet":
        # embeddings need not be as long as the call would have made them
        longest = int(encoder.given.get("max_sequence_length") or default_of(pipe, "max_sequence_length") or 0) + length - has
        if state and longest > 0 and encoder.given.get("max_sequence_length") != longest:
            return null_condition(replace(encoder, given={**encoder.given, "max_sequence_length": longest}), length)
        raise ValueError(f"The prompt's embedding has {length} tokens and the empty prompt's {has}: they cannot be compared.")
    tokens = found[:, :has].repeat(1, -(-length // has), 1)[:, :length]
    return torch.cat([tokens, found[:, has:]], dim=1)


def keep_null_condition(pipe: Any, given: dict[str, Any] | None = None, length: int | None = None) -> None:
    """Encode the empty prompt now, for runs after a pipeline's text encoders are dropped.

    ``given`` are the arguments that prompts have been encoded with, to ``length`` tokens; without them it is encoded where none is known.
    What cannot be encoded stays unknown, as the run that asks for it will say.
    """
    encoder = Encoder(pipe, given or {})
    if denoiser_of(pipe) is None or not has_text_encoders(pipe):
        return
    with contextlib.suppress(Exception):
        if length is None and not _null_conditions.get(denoiser_of(pipe)):
            length = encoder.both([""])[1].shape[1] - bool(family_of(pipe).beside)
        if length is not None:
            null_condition(encoder, length)


#: an answer that may still be on a GPU.
Answer = bool | Tensor


def same_texts(found: Tensor, wanted: Tensor) -> Answer:
    """Whether two text conditions, ``[n, T, E]`` and ``[n or 1, T, E]``, are those of the same texts, within `SAME`."""
    if found.shape[1:] != wanted.shape[1:]:
        return False
    found, wanted = found.float(), wanted.float()
    return ((found - wanted).norm(dim=-1) <= SAME * wanted.norm(dim=-1)).all()


def all_of(some: Iterable[Answer]) -> Answer:
    """Whether all of some answers are yes; those that are known are asked first."""
    asked: list[Tensor] = []
    for answer in some:
        if isinstance(answer, Tensor):
            asked.append(answer)
        elif not answer:
            return False
    return torch.stack(asked).all() if asked else True


def read_answers(*answers: Answer) -> list[bool]:
    """Answers as they are, those on a GPU read at once."""
    asked = iter(torch.stack(found).tolist() if (found := [of for of in answers if isinstance(of, Tensor)]) else [])
    return [next(asked) if isinstance(answer, Tensor) else answer for answer in answers]


@dataclass(frozen=True)
class ReferenceCall:
    """Evaluates a denoiser as plain text-to-image does, whatever else the run under way gives it.

    Attributes:
        pipe: the pipeline.
        forward: the denoiser's forward pass, not compiled.
        adapters: what goes to the attention layers: the scale of LoRA, where the call has one.
        dtype: of latents and conditions.
        level_at: the noise level of any timestep.
        fresh: as `bare` takes it.
    """

    pipe: Any
    forward: Callable[..., Any]
    adapters: dict[str, Any]
    dtype: torch.dtype
    level_at: Callable[[float], NoiseLevel]
    fresh: Sequence[Kept] = ()

    @classmethod
    def of(cls, pipe: Any, condition: Tensor, adapters: dict[str, Any] | None = None) -> ReferenceCall:
        """The reference call of a pipeline outside any run, in the precision of ``condition``."""
        return cls(
            pipe, uncompiled(denoiser_of(pipe)), adapters or {}, condition.dtype, lambda timestep: noise_level(pipe.scheduler, timestep)
        )

    def arguments(self, x: Tensor, condition: Tensor) -> dict[str, Any]:
        """All arguments of the denoiser but its timestep, for latents ``[B, C, H, W]`` and a packed text condition ``[B, T (+ 1), E]``."""
        family = family_of(self.pipe)
        x, condition = x.to(self.dtype), condition.to(self.dtype)
        patches, length = patches_of(x, family), condition.shape[1] - bool(family.beside)
        width, pooled_width = family.widths(self.pipe)
        in_channels = getattr(denoiser_of(self.pipe).config, "in_channels", 0) // (4 if patches else 1)
        behind = family.behind(x, max(in_channels - x.shape[1], 0))
        found: dict[str, Any] = {
            **family.plain(self.pipe, x),
            **family.places(x, length),
            family.sample: pack_latents(torch.cat([x, behind], dim=1), patches),
            TEXT: x.new_zeros(1, 1, 1).expand(len(x), length, width),
        }
        # to be filled in with the condition; of a mask, what goes on over the picture stays
        beside = x.new_ones(1, 1).expand(len(x), length + (patches[0] * patches[1] if patches else 0) if family.masks else pooled_width)
        match family.beside:
            case (name,):
                found[name] = beside
            case (name, entry):
                found[name] = {**found[name], entry: beside}
        return with_condition({**found, family.scale: {**found.get(family.scale, {}), **self.adapters}}, condition, family)

    def denoise(self, x: Tensor, timestep: float, condition: Tensor, places: Tensor) -> Tensor:
        """The noise prediction, ``[B, C, H, W]``, fp32; rows do not hang on their ``places`` here."""
        family = family_of(self.pipe)
        arguments = self.arguments(x, condition)
        arguments["timestep"] = timestep_of(timestep, x, family)
        with bare(denoiser_of(self.pipe), self.fresh), told_of_faces(denoiser_of(self.pipe), no_faces(len(x))):
            output = evaluated(self.forward, family, arguments)
        output = unpack_latents(output, patches_of(x, family))
        return to_noise(output[:, : x.shape[1]].float(), x.float(), self.level_at(timestep), prediction_type(self.pipe.scheduler))

    def observation(
        self, x: Tensor, condition: Tensor, null: Tensor, evaluations: Tensor, guidance_scale: float = 1.0, timestep: float | None = None
    ) -> Observation:
        """The call from noise ``x`` ``[B, C, H, W]`` of conditions ``[B, T (+ 1), E]``, at the reference timestep or another.

        Cost: 2 evaluations an image, counted.
        """
        rows, timestep = torch.arange(len(x)), reference_timestep(self.pipe.scheduler) if timestep is None else timestep
        null, dtype = null.to(condition).expand_as(condition), dtype_taken(x.to(self.dtype))
        x = x.to(dtype).to(x.dtype)  # what the denoiser is given
        both = self.denoise(torch.cat([x, x]), timestep, torch.cat([null, condition]), torch.cat([rows, rows]))
        eps_u, eps_c = both.chunk(2)
        evaluations += 2
        return Observation(
            step=0,
            timestep=timestep,
            level=self.level_at(timestep),
            x=x,
            eps_c=eps_c,
            eps_u=eps_u,
            condition=condition,
            null_condition=null,
            guidance_scale=guidance_scale,
            level_at=self.level_at,
            denoise=self.denoise,
            evaluations=evaluations,
            rows=rows,
            denoiser=denoiser_of(self.pipe),
            dtype=dtype,
            memo={},
        )

    def is_plain(self, kwargs: dict[str, Any], seen: Observation, patches: Patches) -> Answer:
        """Whether a run's call with these arguments, seen as ``seen``, is what the reference call would be, null branch aside."""
        family = family_of(self.pipe)
        if seen.step or seen.origin is not None or seen.x.shape[1:] != latent_shape(self.pipe):
            return False
        if not is_level(seen.level, seen.level_at(reference_timestep(self.pipe.scheduler))):
            return False
        if unpack_latents(kwargs[family.sample], patches).shape[1] != seen.x.shape[1]:  # a mask behind the latents
            return False
        count = len(kwargs[family.sample])
        plain = self.arguments(seen.x[:1].expand(count, -1, -1, -1), seen.condition[:1].expand(count, -1, -1))
        container, *entry = family.beside or ("",)
        apart = {family.sample, TEXT, "timestep", "return_dict", container}

        def rest(arguments: dict[str, Any]) -> dict[str, Any]:
            beside = {k: v for k, v in (arguments.get(container) or {}).items() if k not in entry} if entry else None
            return {**{k: v for k, v in arguments.items() if k not in apart}, container: beside}

        return same_value(rest(kwargs), rest(plain))


def same_value(one: Any, other: Any) -> Answer:
    """Whether two arguments of a denoiser are the same; nothing at all, None and an empty collection are, and one row is as many alike."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.shape[1:] == other.shape[1:] and (one.shape == other.shape or (one.ndim == other.ndim and 1 in (len(one), len(other))))
        return alike and (one.to(other) == other).all()
    if isinstance(one, dict) or isinstance(other, dict):
        one, other = one or {}, other or {}
        return all_of(same_value(one.get(name), other.get(name)) for name in {*one, *other})
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all_of(map(same_value, one, other))
    return one is None and other is None if one is None or other is None else bool(one == other)


def is_level(one: NoiseLevel, other: NoiseLevel) -> bool:
    """Whether a first noise level may be taken for another, within `TOLERANCE`."""
    return abs(one.log_snr - other.log_snr) <= TOLERANCE


def fitted_noise(noise: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Noise ``[B, C, h, w]`` as noise of another size: its middle, with independent noise around it where it is too small."""
    if noise.shape[1:] == shape:
        return noise
    _, height, width = shape
    found = independent_noise(noise, 3, shape)
    h, w = min(height, noise.shape[2]), min(width, noise.shape[3])
    to_y, to_x, from_y, from_x = (height - h) // 2, (width - w) // 2, (noise.shape[2] - h) // 2, (noise.shape[3] - w) // 2
    found[:, :, to_y : to_y + h, to_x : to_x + w] = noise[:, :, from_y : from_y + h, from_x : from_x + w]
    return found


def is_noise(x: Tensor) -> bool:
    """Whether latents ``[B, C, H, W]`` all spread as Gaussian noise does: within a tenth, and five deviations of so many values."""
    spread = x.float().flatten(1).std(dim=1)
    return bool(((spread - 1).abs() <= max(0.1, 5 / (2 * x[0].numel()) ** 0.5)).all())


def first_noise(seen: Observation, pipe: Any, given: dict[str, Any]) -> tuple[Tensor, bool]:
    """The noise of a run, ``[B, C, H, W]``, as the reference call takes it, from the run's first call; and whether that is half made.

    Where a picture was noised it is that noise. Where latents were handed over that are no noise any more, it is independent of the run's.
    """
    reference = seen.level_at(reference_timestep(pipe.scheduler))
    handed_over = any(given.get(name) is not None for name in ("latents", "denoising_start"))
    half_made = seen.origin is None and handed_over and not (is_level(seen.level, reference) and is_noise(seen.x))
    if seen.origin is not None:
        noise = (seen.x - seen.level.a * seen.origin) / seen.level.s
    else:
        noise = independent_noise(seen.x) if half_made else seen.x
    return fitted_noise(noise, latent_shape(pipe)), half_made
