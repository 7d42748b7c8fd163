"""The guarded pipeline: a transparent stand-in for a diffusers pipeline that judges and steers every run."""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import wrapt
from diffusers import DiffusionPipeline

from sdguard.decision.fingerprint import is_plain
from sdguard.decision.profile import Profile
from sdguard.denoiser.families import blends, default_size, family_of, is_modular, sized_by_picture
from sdguard.denoiser.install import watched
from sdguard.denoiser.text_encoding import Encoder
from sdguard.guarded.config import GuardConfig
from sdguard.guarded.report import GuardReport
from sdguard.guarded.run import GuardedRun, blank, profile_of

#: looked up at every guarded call.
signature_of = functools.cache(inspect.signature)

#: arguments of a call, beside its setting, that move the statistics of ordinary prompts.
FINGERPRINTED_ARGUMENTS = (
    "max_sequence_length", "clip_skip", "negative_prompt", "true_cfg_scale", "guidance_rescale", "eta", "timesteps", "sigmas",
    "cross_attention_kwargs", "joint_attention_kwargs",
    "original_size", "target_size", "crops_coords_top_left", "negative_original_size", "negative_target_size",
    "negative_crops_coords_top_left", "aesthetic_score", "negative_aesthetic_score",
    "image", "mask_image", "control_image", "strength", "controlnet_conditioning_scale", "ip_adapter_image", "ip_adapter_image_embeds",
)  # fmt: skip


class GuardedPipeline(wrapt.ObjectProxy):
    """A diffusers pipeline under guard: same attributes, same call, same return type, plus ``output.guard``.

    The pipeline inside is untouched between calls; only while a call runs does a hook stand around its denoiser.

    Args:
        pipe: a pipeline of a supported class.
        config: how to guard, by default `GuardConfig()`.

    Raises:
        TypeError: the pipeline's class is not supported, or it is a modular pipeline; the message names it.
    """

    def __init__(self, pipe: Any, config: GuardConfig | None = None) -> None:
        if is_modular(pipe):
            raise TypeError(
                f"{type(pipe).__name__} is a modular pipeline: it is guarded by its guider, sdguard.guarded.guider.GuardedGuidance."
            )
        family_of(pipe)
        super().__init__(pipe)
        self._self_config = config or GuardConfig()
        self._self_reports: list[GuardReport] = []

    @classmethod
    def from_pretrained(cls, path: str | Path, *, guard: GuardConfig | None = None, **kwargs: Any) -> GuardedPipeline:
        """``DiffusionPipeline.from_pretrained`` with the same arguments, under guard."""
        return cls(DiffusionPipeline.from_pretrained(path, **kwargs), guard)

    @property
    def guard_config(self) -> GuardConfig:
        """How this pipeline is guarded."""
        return self._self_config

    @property
    def guard_reports(self) -> list[GuardReport]:
        """The reports of the last call, for those who asked it for a tuple."""
        return self._self_reports

    def to(self, *args: Any, **kwargs: Any) -> GuardedPipeline:
        """Move the pipeline; returns the guarded one."""
        self.__wrapped__.to(*args, **kwargs)
        return self

    def __copy__(self) -> GuardedPipeline:
        return GuardedPipeline(copy.copy(self.__wrapped__), self._self_config)

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardedPipeline:
        return GuardedPipeline(copy.deepcopy(self.__wrapped__, memo), self._self_config)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline under guard; takes and returns what the pipeline does, and ``output.guard`` has the reports.

        Cost: no denoiser evaluations beyond the pipeline's own for an image that stops at the cascade's free signals; what
        the cascade buys for one that goes on, and steering's for one that is flagged.

        Raises:
            ProfileError: the profile given does not match the run, or calibration is forbidden and none is known.
            MemorizationError: with ``on_failure="raise"``.
        """
        pipe, config = self.__wrapped__, self._self_config
        call = signature_of(type(pipe).__call__).bind(pipe, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        encoder = Encoder(pipe, given)
        run = GuardedRun(config, self.profile(given), prompts_of(given), encoder, restartable=not blends(pipe))
        try:
            with watched(encoder, run):
                output = pipe(*args, **kwargs)
        finally:
            self._self_reports = run.reports
        withheld = [report.row for report in run.reports if report.verdict == "withheld"]
        if not given["return_dict"]:
            return (blank(output[0], withheld), *output[1:])
        output.images = blank(output.images, withheld)
        output.guard = run.reports
        return output

    def profile(self, given: dict[str, Any]) -> Profile:
        """The profile of a run with these arguments: given, known, or calibrated now."""
        pipe, config = self.__wrapped__, self._self_config
        height, width = size_of(pipe, given)
        steps = next((len(given[name]) for name in ("timesteps", "sigmas") if given.get(name) is not None), given["num_inference_steps"])
        given = {**given, "negative_prompt": negative_prompt_of(pipe, given)}
        defaults = {name: parameter.default for name, parameter in signature_of(type(pipe).__call__).parameters.items()}
        chosen = {name: given[name] for name in FINGERPRINTED_ARGUMENTS if given.get(name) is not None}
        inputs = {name: value for name, value in chosen.items() if not (is_plain(value) and value == defaults[name])}
        setting = {"steps": steps, "guidance_scale": given["guidance_scale"], "height": height, "width": width, "inputs": inputs}
        return profile_of(pipe, config, **setting)


def size_of(pipe: Any, given: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of what a call makes."""
    height, width = given.get("height"), given.get("width")
    if not (height and width) and given.get("image") is not None and sized_by_picture(pipe):
        image = given["image"][0] if isinstance(given["image"], list) else given["image"]
        default = pipe.image_processor.get_default_height_width(image)
    else:
        default = (default_size(pipe), default_size(pipe))
    return int(height or default[0]), int(width or default[1])


def negative_prompt_of(pipe: Any, given: dict[str, Any]) -> str | None:
    """The negative prompt of a call; raises `ValueError` where its images have different ones, which no one profile fits."""
    negative = given.get("negative_prompt")
    different = {negative} if negative is None or isinstance(negative, str) else set(negative)
    if len(different) > 1:
        raise ValueError(f"A guarded call takes one negative prompt for all its images; this one has {len(different)}.")
    (only,) = different
    return None if only == "" and family_of(pipe).empty_negative_is_none else only


def prompts_of(given: dict[str, Any]) -> list[str | None]:
    """The prompt of each image of a call; None where the call was given embeddings."""
    prompt = given["prompt"]
    if prompt is None:
        prompts: list[str | None] = [None] * len(given["prompt_embeds"])
    else:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    return [p for p in prompts for _ in range(given["num_images_per_prompt"])]


def guard(pipe: Any, config: GuardConfig | None = None) -> GuardedPipeline:
    """A guarded stand-in for ``pipe``; raises `TypeError` for a pipeline class sdguard does not support."""
    return GuardedPipeline(unguard(pipe), config)


def unguard(pipe: Any) -> Any:
    """The pipeline inside a guarded one, as it was; a pipeline that is not guarded is returned as it is."""
    return pipe.__wrapped__ if isinstance(pipe, GuardedPipeline) else pipe
