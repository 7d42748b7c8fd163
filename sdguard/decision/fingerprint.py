"""The fingerprint of a configuration: everything that moves what ordinary prompts look like on it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from sdguard.denoiser.families import denoiser_of

#: attributes by which peft's adapters, IP-Adapters and FreeU change what a module does, its parameters being the same.
SETTINGS = ("scaling", "_active_adapter", "_disable_adapters", "s1", "s2", "b1", "b2", "scale")


def fingerprint(
    pipe: Any, *, steps: int, guidance_scale: float, height: int, width: int, inputs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything about a run that moves the statistics of ordinary prompts; of its other ``inputs`` numbers and texts, not the pictures."""
    plain = {name: json.loads(json.dumps(value)) for name, value in (inputs or {}).items() if is_plain(value)}
    scheduler = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_") and k != "trained_betas"}
    return {
        "pipeline": type(pipe).__name__,
        "weights": weights_digest(pipe),
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": hashlib.sha256(json.dumps(scheduler, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "steps": steps,
        "guidance_scale": float(guidance_scale),
        "height": height,
        "width": width,
        "dtype": str(next(denoiser_of(pipe).parameters()).dtype),
        **plain,
    }


def is_plain(value: Any) -> bool:
    """Whether a value is a number or a text, or a list, tuple or dictionary of nothing else."""
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return all(map(is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, (int, float, str))


def settings_of(module: nn.Module) -> list[Any]:
    """What moves a module's output beside its parameters: an adapter's scale and whether it is on, FreeU's factors."""
    held = vars(module)
    names = SETTINGS if "IPAdapter" in type(module).__name__ else SETTINGS[:-1]
    return [[name, held[name]] for name in names if held.get(name) is not None]


def sample_values(parameter: Tensor) -> Tensor:
    """16 evenly spaced values of a parameter, or all if there are fewer; its shape if it cannot be read."""
    if parameter.is_meta:
        return torch.tensor(parameter.shape).float()
    count, flat = parameter.numel(), parameter if parameter.is_contiguous() else parameter.reshape(-1)
    return flat.as_strided((16,), (count // 16,)) if count >= 16 else flat.as_strided((count,), (1,))


def submodules(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all inside it, as ``module.modules()`` has them, in less than half the time."""
    ahead = [module]
    while ahead:
        yield (part := ahead.pop())
        ahead += [child for child in reversed(part._modules.values()) if child is not None]


@torch.inference_mode()
def weights_digest(pipe: Any) -> str:
    """A hash over 16 evenly spaced values of every parameter of denoiser and text encoders, and `settings_of` their modules.

    Cheap, and moved by any fine-tune, LoRA or IP-Adapter and its scale. Accelerate's offloaded parameters are loaded for it, module by
    module; those that cannot be read even so count by their shapes.
    """
    digest, nothing = hashlib.sha256(), nullcontext()
    encoders = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "controlnet"))
    for module in (denoiser_of(pipe), *encoders):
        values, settings = [], []
        # this is done at every guarded call, and is half of what the guard costs where nothing is flagged
        for part in submodules(module) if module is not None else ():
            held = vars(part)
            if not held.keys().isdisjoint(SETTINGS):
                settings += settings_of(part)
            with align_module_device(part) if "_hf_hook" in held else nothing:
                values += [sample_values(parameter) for parameter in held["_parameters"].values() if parameter is not None]
        for _, group in itertools.groupby(values, key=lambda value: value.device):
            digest.update(torch.cat(list(group)).float().cpu().numpy().tobytes())
        if settings:
            digest.update(json.dumps(settings).encode())
    return digest.hexdigest()[:16]
