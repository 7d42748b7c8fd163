"""Probe runs: what a pipeline's denoiser shows for some prompts, without making their pictures."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from diffusers import ClassifierFreeGuidance
from PIL import Image
from torch import Tensor

from sdguard.correction import Correction
from sdguard.denoiser.bare import unmoved
from sdguard.denoiser.families import GUIDANCE, default_of, denoiser_of, family_of, is_modular
from sdguard.denoiser.foreign import foreign_in, modules_in
from sdguard.denoiser.hidden_texts import HiddenTexts
from sdguard.denoiser.install import lock_of, watched
from sdguard.denoiser.reference_call import ReferenceCall, drawn_noise
from sdguard.denoiser.schedulers import clone_scheduler
from sdguard.denoiser.text_encoding import Encoder
from sdguard.observation import Observation, Prediction

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Enough(BaseException):
    """Ends a probe run once everything has been observed; no `Exception`, which modular pipelines would log as an error of theirs."""


class _FirstCalls:
    """Hands the first ``calls`` observations to ``look`` and then ends the run; with ``calls`` None the run goes to its end."""

    def __init__(self, look: Callable[[Observation], None], calls: int | None) -> None:
        self.corrections: dict[int, Correction] = {}
        self.look, self.calls = look, calls

    def reads(self, step: int) -> bool:
        return True

    def expects(self, rows: int, branches: int) -> bool:
        return True

    def follows(self, step: int) -> bool:
        return True

    def glance(self, prediction: Prediction, calls: int) -> None:
        """Each call is observed."""

    def made(self, latents: Tensor) -> None:
        """Nothing is corrected, and so nothing looked at."""

    def lost(self, row: int, error: Exception) -> None:
        raise error

    def rewritten(self, observation: Observation, hidden: HiddenTexts) -> None:
        """Nothing is judged here."""

    def observe(self, observation: Observation) -> None:
        self.look(observation)
        if observation.step + 1 == self.calls:
            raise _Enough


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Within the block the pipeline, or the loops among a modular one's blocks, show no progress bar."""
    blocks = [pipe]
    if is_modular(pipe):
        blocks = [pipe._blocks]
        for block in blocks:
            blocks.extend(block.sub_blocks.values())
    talking = [block for block in blocks if hasattr(block, "set_progress_bar_config")]
    before = [dict(getattr(block, "_progress_bar_config", {})) for block in talking]
    for block, config in zip(talking, before, strict=True):
        block.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield
    finally:
        for block, config in zip(talking, before, strict=True):
            block.set_progress_bar_config(**config)


@functools.cache
def plain_guider(**options: Any) -> ClassifierFreeGuidance:
    """Guidance and nothing else; made once, as it warns each time that it is new in diffusers."""
    return ClassifierFreeGuidance(**options)


@contextmanager
def isolated_components(pipe: Any, setting: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Within the block a modular pipeline runs with a scheduler and plain guidance of its own, so that a run of it may be under way.

    Gives what of ``setting`` its call takes, the rest of it being the guider's; for any other pipeline all of it.
    """
    if not is_modular(pipe):
        yield setting
        return
    options = {name: setting[name] for name in GUIDANCE if name in setting}
    before = pipe.guider, pipe.scheduler
    pipe.guider, pipe.scheduler = copy.copy(plain_guider(**options)), clone_scheduler(pipe.scheduler)
    try:
        yield {name: value for name, value in setting.items() if name not in options}
    finally:
        pipe.guider, pipe.scheduler = before


def fitting(read: Callable[[Sequence[Item]], Result], batch: Sequence[Item]) -> list[Result]:
    """What ``read`` makes of a batch, or of its halves where it does not fit into memory, and so on down to single items."""
    try:
        return [read(batch)]
    except Exception as error:
        if len(batch) == 1 or not should_reduce_batch_size(error):
            raise
    half = len(batch) // 2
    return [*fitting(read, batch[:half]), *fitting(read, batch[half:])]


def for_each(count: int, value: Any) -> Any:
    """A picture or a text for each of ``count`` prompts, where ``value`` is a single one; everything else as it is."""
    if isinstance(value, (Image.Image, str)):
        return [value] * count
    if isinstance(value, Tensor) and value.ndim >= 3 and len(value) == 1:
        return value.expand(count, *value.shape[1:])
    return value


@contextmanager
def observe_calls(pipe: Any, given: dict[str, Any], look: Callable[[Observation], None], calls: int | None = None) -> Iterator[None]:
    """Within the block ``look`` is shown the first ``calls`` denoiser calls (all of them with None) of a run given ``given``.

    After the last of so many the run ends, and with it the block; with None it goes on as it would unwatched, to the same picture.
    """
    try:
        with quiet(pipe), watched(Encoder(pipe, given), _FirstCalls(look, calls)):
            yield
    except _Enough:
        pass


def probe_run(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], look: Callable[[Observation], None], calls: int | None = 1, **setting: Any
) -> None:
    """Show ``look`` the first ``calls`` denoiser calls (all of them with None) of one run of ``prompts``, one seed each.

    ``setting`` goes to the pipeline, and to a modular one's guider, a single picture or text in it as one for each prompt; of an
    IP-Adapter's pictures there is one an adapter, whatever the number of prompts. No picture is decoded, and patches keep nothing of the
    run. Cost: 2 denoiser evaluations a prompt and call.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with unmoved(denoiser_of(pipe)), isolated_components(pipe, setting) as given, observe_calls(pipe, given, look, calls):
        inputs = {name: value if name.startswith("ip_adapter") else for_each(len(prompts), value) for name, value in given.items()}
        pipe(prompt=list(prompts), generator=generators, output_type="latent", **inputs)


@torch.no_grad()
def read_prompts(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], adapter_scale: float | None = None, timestep: float | None = None
) -> Observation:
    """The guard's own reference call of prompts, one seed each, outside any run: its noise is what a run from that seed starts with.

    ``timestep`` is another than the reference call's, where one is given. Nobody's random generator takes part, nor does the pipeline's
    call, but for a denoiser with code from elsewhere on it that cannot be called outside of a run: it is read within one.
    Cost: 2 denoiser evaluations a prompt; 2 more where a run had to be begun.
    """
    adapters = {} if adapter_scale is None else {"scale": adapter_scale}
    encoder, denoiser = Encoder(pipe, {family_of(pipe).scale: adapters}), denoiser_of(pipe)

    def read() -> Observation:
        evaluations, scale = torch.zeros(len(prompts), dtype=torch.long), float(default_of(pipe, "guidance_scale") or 1.0)
        reference = ReferenceCall.of(pipe, condition, adapters)
        return reference.observation(noise.to(condition.device), condition, null, evaluations, scale, timestep)

    with lock_of(denoiser):
        condition, null = encoder.both(list(prompts))
        noise = torch.stack([drawn_noise(pipe, seed) for seed in seeds])
        try:
            return read()
        except Exception as error:
            if should_reduce_batch_size(error) or not foreign_in(modules_in(denoiser)):
                raise
            found: list[Observation] = []
            scheduler, pipe.scheduler = pipe.scheduler, clone_scheduler(pipe.scheduler)
            try:
                with contextlib.suppress(Exception):  # which may say less than the first
                    probe_run(pipe, prompts[:1], seeds[:1], lambda _: found.append(read()))
            finally:
                pipe.scheduler = scheduler
            if not found:
                raise
            return found[0]
