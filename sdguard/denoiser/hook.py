"""The two seams of a run: a hook around the denoiser, which shows each call as an `Observation`, and one around ``scheduler.step``."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from accelerate.utils import recursively_apply
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor, nn

from sdguard.correction import Correction, corrected
from sdguard.denoiser.families import TEXT, Encoder, denoiser_of, family_of, in_sequence, packed, pictured
from sdguard.denoiser.replay import input_scale, own_way, private_copy, scaled, splice
from sdguard.observation import NoiseLevel, Observation, from_noise, noise_level, prediction_type, to_noise

HOOK = "sdguard"


#: the denoiser's arguments that have an entry for each row of its batch, beside the point and the token embeddings.
PER_ROW = (
    "added_cond_kwargs", "timestep_cond", "class_labels", "encoder_attention_mask", "down_block_additional_residuals",
    "mid_block_additional_residual", "down_intrablock_additional_residuals", "pooled_projections", "block_controlnet_hidden_states",
    "guidance", "controlnet_block_samples", "controlnet_single_block_samples", "joint_attention_kwargs",
)  # fmt: skip


def joined(first: Any, second: Any) -> Any:
    """Per-row arguments of two calls as those of one with the rows of both."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, dict):
        return {name: joined(entry, second[name]) for name, entry in first.items()}
    return type(first)(map(joined, first, second)) if isinstance(first, (list, tuple)) else first


def rewrapped(output: Any, prediction: Tensor) -> Any:
    """A denoiser's output with another prediction in it."""
    return (prediction, *output[1:]) if isinstance(output, tuple) else type(output)(sample=prediction)


#: a call of the denoiser: its arguments, by name, and what it gave.
Call = tuple[dict[str, Any], Tensor]


def kept(kwargs: dict[str, Any], output: Tensor) -> Call:
    """A call that stays as it is, whatever becomes of the containers among its arguments."""
    return recursively_apply(lambda entry: entry, kwargs), output


class Watcher(Protocol):
    """Something that looks at each denoiser call of a run."""

    #: what is changed of a row's run, by row.
    corrections: dict[int, Correction]

    def reads(self, step: int) -> bool:
        """Whether a call is to be shown where that costs an evaluation an image: in a run without an unconditional branch."""

    def observe(self, observation: Observation) -> None:
        """Look at one call; what it puts into ``corrections`` holds for the whole run of that row, its past calls included."""


class DenoiserHook(ModelHook):
    """Shows each guided denoiser call to a watcher and runs the rows it corrects as their corrections say.

    Rows that are not corrected are computed by the pipeline's own call, in the pipeline's own batch, and are therefore
    bit-identical to those of an unguarded run. A row whose correction comes after the first call, or brings another noise, goes
    its own way up to this call and takes its place in the batch again, in the scheduler's memory too.
    """

    def __init__(self, watcher: Watcher, encoder: Encoder) -> None:
        super().__init__()
        self.pipe, self.watcher, self.encoder = encoder.pipe, watcher, encoder
        self.family, self.thread = family_of(self.pipe), threading.get_ident()
        self.timesteps: list[Tensor] = []
        self.levels: dict[float, NoiseLevel] = {}
        self.guidances: list[float] = []  # a callback may change it in mid-run
        self.norms: list[Tensor] = []
        self.entered: set[int] = set()
        self.evaluations, self.rows = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        self.first: Observation | None = None
        self.origin: Tensor | None = None  # clean latents that were noised to start from
        self.start: Any = None  # the scheduler before its first step
        self.dtype = torch.float32  # of the pipeline's latents
        self.arguments: dict[str, Any] = {}  # of scheduler.step
        self.arriving: dict[int, tuple[Tensor, Any]] = {}  # rows that enter the batch at the step under way
        self.patch_rows = 0  # where latents travel as a sequence
        self.text: Call | None = None  # the conditional half of the step under way, where it is a call of its own

    def level_at(self, timestep: float) -> NoiseLevel:
        if timestep not in self.levels:
            self.levels[timestep] = noise_level(self.pipe.scheduler, timestep)
        return self.levels[timestep]

    @property
    def guidance(self) -> float:
        """The scale with which the pipeline joins its two branches at the call under way; 1 where it has one branch."""
        return self.family.guidance(self.pipe, self.encoder.given)

    @property
    def rescale(self) -> float:
        """How far the pipeline draws a guided output back to the spread of the conditional one."""
        return float(getattr(self.pipe, "guidance_rescale", 0.0))

    @functools.cached_property
    def null_condition(self) -> Tensor:
        """The pipeline's own unconditional prompt, ``[1, T (+ 1), E]``, for runs that do not encode it."""
        return self.encoder.both([""])[1]

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if self.strange(kwargs):
            return self.fn_ref.original_forward(*args, **kwargs)
        kwargs = self.named(args, kwargs)
        if self.text is not None:  # the unconditional half of a step whose branches are two calls
            text, self.text = self.text, None
            output = self.fn_ref.original_forward(**kwargs)
            prediction = self.look_at_both(module, (kwargs, output[0]), text)
            return rewrapped(output, self.told_apart(prediction, output[0], text[1]))
        apart = self.family.apart and self.guidance != 1
        self.begin(kwargs, len(kwargs[self.family.sample]) // (1 if apart or self.guidance == 1 else 2))
        kwargs = self.redirect(kwargs)
        output = self.fn_ref.original_forward(**kwargs)
        if apart:
            self.text = kept(kwargs, output[0])
            return output
        prediction = output[0] if self.idle else self.look(module, kwargs, output[0])
        return output if prediction is output[0] else rewrapped(output, prediction)

    def strange(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call of the denoiser is none of this run's: another thread's, or Stable Diffusion 3's third branch, of no use here."""
        return threading.get_ident() != self.thread or bool(kwargs.get("skip_layers"))

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by their names."""
        return dict(zip((self.family.sample, "timestep"), args, strict=False)) | kwargs

    @property
    def idle(self) -> bool:
        """Whether nothing is to be seen or changed at the call under way: it has one branch, is not read and follows no rule."""
        rules = any(correction.rule for correction in self.watcher.corrections.values())
        return self.guidances[-1] == 1 and not rules and not self.watcher.reads(len(self.timesteps) - 1)

    def begin(self, kwargs: dict[str, Any], count: int) -> None:
        """Note that a step of ``count`` images begins."""
        sample, time = kwargs[self.family.sample], torch.as_tensor(kwargs["timestep"]).flatten()[0].cpu()
        if not self.timesteps:
            self.start, self.dtype = private_copy(self.pipe.scheduler), sample.dtype
            self.evaluations, self.rows = torch.zeros(count, dtype=torch.long), torch.arange(count)
            # all at once: one by one, between calls of the network, each would take several times as long
            self.levels = {t: noise_level(self.pipe.scheduler, t) for t in self.pipe.scheduler.timesteps.tolist()}
            self.patch_rows = int(kwargs["img_ids"][..., 1].max()) + 1 if self.family.sequence else 0
        self.timesteps.append(time * self.family.clock)
        self.guidances.append(self.guidance)

    def look_at_both(self, module: Any, null: Call, text: Call) -> Tensor:
        """`look` at a step whose branches are two calls; returns the rows of both, the unconditional ones first."""
        (kwargs, null_output), (text_kwargs, text_output) = null, text
        rows = {name: joined(kwargs[name], text_kwargs[name]) for name in (self.family.sample, TEXT, *PER_ROW) if name in kwargs}
        return self.look(module, kwargs | rows, torch.cat([null_output, text_output]))

    def look(self, module: Any, kwargs: dict[str, Any], prediction: Tensor) -> Tensor:
        """Show one step to the watcher; ``prediction``, unconditional rows first where there are any, as its corrections want it.

        ``kwargs`` are the denoiser's arguments that gave it. Returns ``prediction`` itself where no row is corrected.
        """
        sample, condition, count = kwargs[self.family.sample], self.condition(kwargs), len(self.evaluations)
        guided, timestep = len(sample) > count, float(self.timesteps[-1])
        seen = self.seen(sample)
        channels = self.seen(prediction).shape[1]

        def denoise(x: Tensor, t: float, text: Tensor, places: Tensor) -> Tensor:
            places = (places % len(sample)).to(sample.device)
            others = {name: recursively_apply(lambda rows: rows[places], kwargs[name]) for name in PER_ROW if kwargs.get(name) is not None}
            point = self.sent(torch.cat([x.to(sample), seen[places, channels:]], dim=1))
            at = torch.full((len(x),), t / self.family.clock, device=x.device, dtype=torch.float32)
            told = self.told({**kwargs, **others}, text.to(condition.dtype))
            changed = {**told, self.family.sample: point, "timestep": at, "return_dict": False}
            return self.to_noise(self.seen(self.fn_ref.original_forward(**changed)[0]), x, t)

        x, rows = seen[:, :channels].float(), self.rows
        if guided:
            null_condition, text_condition = condition.chunk(2)
            eps_u, eps_c = self.to_noise(self.seen(prediction), x, timestep).chunk(2)
            x = x[:count]
        else:
            null_condition, text_condition = self.null_condition.expand_as(condition), condition
            eps_c, eps_u = self.to_noise(self.seen(prediction), x, timestep), denoise(x, timestep, null_condition, rows)
            self.evaluations += 1
        observation = Observation(
            step=len(self.timesteps) - 1,
            timestep=timestep,
            level=self.level_at(timestep),
            x=x,
            eps_c=eps_c,
            eps_u=eps_u,
            condition=text_condition,
            null_condition=null_condition,
            guidance_scale=self.guidances[-1],
            level_at=self.level_at,
            denoise=denoise,
            evaluations=self.evaluations,
            rows=rows,
            denoiser=module,
            past_norms=torch.stack(self.norms, 1) if self.norms else torch.zeros(count, 0),
            estimates={},
            origin=self.origin,
        )
        self.first = self.first or observation
        self.norms.append(observation.guidance_norm.cpu())
        self.watcher.observe(observation)
        for row, correction in self.watcher.corrections.items():
            if (branches := self.correct(row, correction, observation)) is not None:
                prediction = prediction.clone()
                prediction[row::count] = self.sent(branches).to(prediction)
        return prediction

    def told_apart(self, wanted: Tensor, null: Tensor, text: Tensor) -> Tensor:
        """The unconditional output with which guidance makes of ``text``, which the pipeline has already, what it makes of ``wanted``.

        Rows that are wanted as they were come back as they were, to the bit.
        """
        wanted_null, wanted_text = wanted.chunk(2)
        moved = (wanted_text != text).flatten(1).any(dim=1) | (wanted_null != null).flatten(1).any(dim=1)
        solved = (self.guidance * text.float() - self.guide(wanted_null.float(), wanted_text.float(), self.guidance)) / (self.guidance - 1)
        return torch.where(moved.reshape(-1, *[1] * (null.ndim - 1)), solved.to(null), null)

    def seen(self, sample: Tensor) -> Tensor:
        """The denoiser's sample or output as latents ``[B, C, H, W]``."""
        return pictured(sample, self.patch_rows) if self.family.sequence else sample

    def sent(self, latents: Tensor) -> Tensor:
        """Latents as the denoiser takes them: the inverse of `seen`."""
        return in_sequence(latents) if self.family.sequence else latents

    def condition(self, kwargs: dict[str, Any]) -> Tensor:
        """The text condition in a call's arguments, `packed`."""
        pooled: Any = functools.reduce(lambda found, name: found[name], self.family.pooled, kwargs) if self.family.pooled else None
        return packed(kwargs[TEXT], pooled)

    def told(self, kwargs: dict[str, Any], condition: Tensor) -> dict[str, Any]:
        """A call's arguments with another text condition in them."""
        _, length, width = kwargs[TEXT].shape
        told = {**kwargs, TEXT: condition[:, :length, :width]}
        match self.family.pooled:
            case (name,):
                told[name] = condition[:, length, : kwargs[name].shape[-1]]
            case (name, entry):
                told[name] = {**kwargs[name], entry: condition[:, length, : kwargs[name][entry].shape[-1]]}
        return told

    def correct(self, row: int, correction: Correction, observation: Observation) -> Tensor | None:
        """The outputs of one row's branches at this call under its correction, ``[branches, C, H, W]``; None where the pipeline's stand."""
        here = observation.select(torch.tensor([row]))
        if row not in self.entered:
            self.entered.add(row)
            here = self.enter(row, correction, here)
            now = here.guidance_norm.to(here.past_norms)
            for norms, norm in zip(self.norms, [*here.past_norms[0], now[0]], strict=True):
                norms[row] = norm
        elif correction.rule:
            here = replace(here, rules=(correction.rule,))
        else:
            return None
        null, text = self.raw(here)
        return torch.cat([null, text]) if self.guidance != 1 else text

    def enter(self, row: int, correction: Correction, here: Observation) -> Observation:
        """One row at this call under its correction; if it starts elsewhere or late, after going its own way from the start."""
        if not here.step and correction.x is None:
            return corrected(here, [correction])
        assert self.first is not None
        seen = corrected(self.first.select(torch.tensor([row])), [correction])

        def follow(call: int, x: Tensor, timestep: Tensor) -> Tensor:
            nonlocal seen
            if call:
                seen = replace(seen.at(self.seen(x.float()), float(timestep)), guidance_scale=self.guidances[call])
            return self.sent(self.guide(*self.raw(seen), seen.guidance_scale)).to(x.dtype)

        latents = self.sent(seen.x / input_scale(self.start, self.timesteps[0])).to(self.dtype)
        latents, scheduler = own_way(self.start, latents, self.timesteps, follow, self.arguments)
        self.arriving[row] = latents, scheduler
        if here.step:
            seen = replace(
                seen.at(self.seen(scaled(scheduler, latents, self.timesteps[-1]).float()), here.timestep), guidance_scale=self.guidance
            )
        return seen

    def raw(self, here: Observation) -> tuple[Tensor, Tensor]:
        """The network outputs, unconditional and conditional, with which the pipeline's guidance gives the prediction that is followed.

        Where a rule stands in guidance's place both are what the rule wants, of which any guidance makes the same.
        """
        outputs = (here.prediction,) * 2 if any(here.rules) else (here.eps_u, here.eps_c)
        kind = prediction_type(self.pipe.scheduler)
        null, text = (from_noise(eps, here.x, here.level, kind) for eps in outputs)
        return null, text

    def guide(self, null: Tensor, text: Tensor, guidance: float) -> Tensor:
        """What the pipeline makes of the two branches' outputs (Ho & Salimans 2022; rescaled as in Lin et al. 2023 where it is told to)."""
        if guidance == 1:
            return text
        guided = null + guidance * (text - null)
        return rescale_noise_cfg(guided, text, self.rescale) if self.rescale > 0 else guided

    def redirect(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments with the conditions of corrected rows in place."""
        changed = {row: c.condition for row, c in self.watcher.corrections.items() if c.condition is not None}
        if not changed:
            return kwargs
        condition = self.condition(kwargs).clone()
        for row, text in changed.items():
            condition[len(condition) - len(self.evaluations) + row] = text
        return self.told(kwargs, condition)

    def to_noise(self, prediction: Tensor, x: Tensor, timestep: float) -> Tensor:
        return to_noise(prediction.float(), x.float(), self.level_at(timestep), prediction_type(self.pipe.scheduler))

    def step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``scheduler.step`` that lets arriving rows take their places in the batch first."""

        @functools.wraps(original)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.arguments = kwargs
            if self.arriving:
                sample = sample.clone()
                for row, (latents, scheduler) in self.arriving.items():
                    sample[row] = latents[0]
                    splice(self.pipe.scheduler, scheduler, row, sample.shape)
                self.arriving.clear()
            return original(model_output, timestep, sample, *args, **kwargs)

        return step

    def noising(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``scheduler.add_noise`` and its like, whose clean latents are the run's origin where it happens before the first call."""

        @functools.wraps(original)
        def noising(clean: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self.timesteps:
                self.origin = clean.float()
            return original(clean, *args, **kwargs)

        return noising

    @property
    def seams(self) -> dict[str, Callable[[Any], Any]]:
        """What stands around the scheduler's methods while the run lasts."""
        return {"step": self.step, "add_noise": self.noising, "scale_noise": self.noising}


_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def lock_of(module: nn.Module) -> threading.RLock:
    """The lock under which a denoiser is watched."""
    return _locks.setdefault(module, threading.RLock())


@contextmanager
def watched(encoder: Encoder, watcher: Watcher) -> Iterator[None]:
    """Within the block, ``watcher`` sees every call of the denoiser of the encoder's pipeline; afterwards all is as it was.

    Of several threads that share a denoiser one is watched at a time, the others wait.
    """
    with lock_of(denoiser_of(encoder.pipe)):
        yield from seams_of(encoder, watcher)


def seams_of(encoder: Encoder, watcher: Watcher) -> Iterator[None]:
    """Put the seams in place, give way, and take them away."""
    hook, scheduler = DenoiserHook(watcher, encoder), encoder.pipe.scheduler
    with hung(denoiser_of(encoder.pipe), hook):
        seams = {name: wrap(getattr(scheduler, name)) for name, wrap in hook.seams.items() if hasattr(scheduler, name)}
        vars(scheduler).update(seams)
        try:
            yield
        finally:
            for name in seams:
                vars(scheduler).pop(name, None)


@contextmanager
def hung(module: nn.Module, hook: DenoiserHook) -> Iterator[None]:
    """Within the block ``hook`` stands around ``module``, which is as it was afterwards."""
    names = ("forward", "_diffusers_hook")
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, HOOK)
    try:
        yield
    finally:
        registry.remove_hook(HOOK, recurse=False)
        for name in names:  # the registry leaves itself and a bound forward behind on a module that had neither
            vars(module).pop(name, None)
        vars(module).update(before)
