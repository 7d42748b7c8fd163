"""The hook around a denoiser: shows each call to a watcher as an `Observation`, and runs the rows it corrects as their corrections say."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from diffusers.hooks import ModelHook
from torch import Tensor

from sdguard.correction import Correction
from sdguard.denoiser.bare import bare, compiled_call, has_caches, hooked, not_compiled, patches_of, uncompiled
from sdguard.denoiser.calls import (
    DenoiserCall,
    by_name,
    call_denoiser,
    concat_calls,
    evaluated,
    only_rows,
    own_call,
    replace_prediction,
    select_rows,
    snapshot,
    timestep_of,
)
from sdguard.denoiser.faces import faces_at, told_of_faces
from sdguard.denoiser.families import TEXT, denoiser_of, family_of
from sdguard.denoiser.foreign import code_of
from sdguard.denoiser.guidance import solve_unconditional, to_model_output
from sdguard.denoiser.hidden_texts import HiddenTexts
from sdguard.denoiser.kept_state import Kept
from sdguard.denoiser.latents import condition_of, dtype_taken, embeddings_of, pack_embeddings, unpack_latents, with_condition, with_latents
from sdguard.denoiser.record import RunRecord
from sdguard.denoiser.reference_call import (
    ReferenceCall,
    first_noise,
    null_condition,
    read_answers,
    same_texts,
)
from sdguard.denoiser.replay import Replayed, activate_correction
from sdguard.denoiser.schedulers import insert_row
from sdguard.denoiser.text_encoding import Encoder
from sdguard.observation import Denoiser, Observation, Prediction, joined, prediction_type, to_noise

#: calls whose predictions are shown together, where nothing else is asked of them.
GLANCES = 16


class Watcher(Protocol):
    """Something that looks at each denoiser call of a run."""

    #: what is changed of a row's run, by row.
    corrections: dict[int, Correction]

    def reads(self, step: int) -> bool:
        """Whether a call is to be shown where that costs an evaluation an image: in a run without an unconditional branch."""

    def expects(self, rows: int, branches: int) -> bool:
        """Whether a call of so many rows, those of all its branches, is one of the run's; no other is shown or changed."""

    def follows(self, step: int) -> bool:
        """Whether a call has to be observed whatever its text; of the others what is predicted is shown (`glance`), which takes less."""

    def observe(self, observation: Observation) -> None:
        """Look at one call; what it puts into ``corrections`` holds for the whole run of that row, its past calls included."""

    def glance(self, prediction: Prediction, calls: int) -> None:
        """Look at what ``calls`` calls predict that are not observed, the images of one after those of the other."""

    def lost(self, row: int, error: Exception) -> None:
        """Note that a row's correction could not be put into force, and is none any more."""

    def rewritten(self, observation: Observation, hidden: HiddenTexts) -> None:
        """Look, when the run is over, at what its text was where it was written into unseen.

        Images that had no ``hidden`` text are in ``observation`` under the text that was judged.
        """

    def made(self, latents: Tensor) -> None:
        """Look at what the last step of the scheduler's list has made, ``[B, C, H, W]``."""


class DenoiserHook(ModelHook):
    """Shows each guided denoiser call to a watcher and runs the rows it corrects as their corrections say.

    Rows that are not corrected are computed by the pipeline's own call, in the pipeline's own batch, and are therefore bit-identical to
    those of an unguarded run. A row whose correction comes after the first call, or brings another noise, is replayed up to this call and
    takes its place in the batch again, in the scheduler's memory too.

    Attributes:
        patches: code from elsewhere on the denoiser, at its first call.
        fresh: what that had kept before.
        record: the run so far.
        busy: whether a call is under way.
        conditional: the conditional half of the step under way, where it is a call of its own.
        uneven: whether its unconditional half has a text of another length, in whose place the model's own empty prompt is seen.
        text_branch: what the pipeline has been given for its conditional rows, at the step under way.
        activated: the correction of each row that is in force.
        arriving: rows that enter the batch at the ``scheduler.step`` under way.
        step_arguments: those of ``scheduler.step``.
        glanced: what was predicted at the calls since the watcher was last shown any, of which nothing else is asked.
        nulls: the model's own empty prompt, by number of tokens.
        read: gives the guard's own reference call beside an observation, with the arguments of the call that was last observed.
    """

    def __init__(self, watcher: Watcher, encoder: Encoder) -> None:
        super().__init__()
        self.pipe, self.watcher, self.encoder = encoder.pipe, watcher, encoder
        self.family, self.thread = family_of(self.pipe), threading.get_ident()
        self.patches: list[Any] = []
        self.fresh: list[Kept] = []
        self.record, self.busy = RunRecord(), False
        self.conditional: DenoiserCall | None = None
        self.uneven = False
        self.text_branch = torch.zeros(0)
        self.activated: dict[int, Correction] = {}
        self.arriving: dict[int, Replayed] = {}
        self.step_arguments: dict[str, Any] = {}
        self.glanced: list[Prediction] = []
        self.nulls: dict[int, Tensor] = {}
        self.read: Callable[[Observation], Observation] | None = None

    @property
    def guidance(self) -> float:
        """The scale with which the pipeline joins its two branches at the call under way; 1 where it has one branch."""
        return self.family.guidance(self.pipe, self.encoder.given)

    @property
    def rescale(self) -> float:
        """How far the pipeline draws a guided output back to the standard deviation of the conditional one."""
        return float(getattr(self.pipe, "guidance_rescale", 0.0))

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's forward pass. Cost: none where both branches are evaluated anyway, else 1 where the call is read."""
        if self.is_foreign:
            return self.fn_ref.original_forward(*args, **kwargs)
        self.busy = True
        try:
            return self.watched_forward(module, by_name(module, args, kwargs, self.family))
        finally:
            self.busy = False

    def watched_forward(self, module: Any, kwargs: dict[str, Any]) -> Any:
        """The forward pass of one of the run's own calls."""
        if kwargs.get("skip_layers") is not None:
            return self.third_branch(kwargs)
        if self.conditional is not None:
            conditional, self.conditional = self.conditional, None
            return self.second_half(module, kwargs, conditional)
        is_half = self.family.sequential_cfg and self.guidance != 1
        rows, branches = len(kwargs[self.family.sample]), 1 if is_half or self.guidance == 1 else 2
        if not self.watcher.expects(rows, branches):
            return call_denoiser(self.fn_ref.original_forward, self.family, kwargs)
        self.begin_step(kwargs, rows // branches)
        kwargs, output = self.evaluate(kwargs)
        if is_half:
            self.conditional = snapshot(kwargs, output[0])
            return output
        prediction = output[0] if self.can_skip else self.process_step(module, DenoiserCall(kwargs, output[0]))
        self.text_branch = prediction[-self.record.images :]
        return output if prediction is output[0] else replace_prediction(output, prediction)

    def evaluate(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """A call's arguments with the conditions of corrected rows in place, and what the denoiser gives for them.

        The prediction is a tensor of its own. Where parts of calls are kept for the next, the pipeline's own call goes on under the
        conditions that it began with, for its other rows' sake, and corrected rows, which would find parts of what they are turned away
        from, are evaluated apart and in full. A cache that decides for the whole batch at once still sees where their latents have gone.
        Cost: none, with caches 1 for each such row.
        """
        changed = self.with_corrected_conditions(kwargs)
        if changed is kwargs or not has_caches(denoiser_of(self.pipe), self.fresh):
            return changed, own_call(self.fn_ref.original_forward, self.family, changed)
        output = own_call(self.fn_ref.original_forward, self.family, kwargs)
        rows = torch.tensor([row for row, correction in self.watcher.corrections.items() if correction.condition is not None])
        places = len(output[0]) - self.record.images + rows
        with bare(denoiser_of(self.pipe), self.fresh), told_of_faces(denoiser_of(self.pipe), faces_at(places, len(output[0]))):
            apart = evaluated(self.own_forward, self.family, only_rows(changed, places, self.family))
        self.record.evaluations[rows] += 1
        prediction = output[0].clone()
        prediction[places] = apart
        return changed, replace_prediction(output, prediction)

    def third_branch(self, kwargs: dict[str, Any]) -> Any:
        """Stable Diffusion 3's call without some layers, from which the pipeline turns its text branch away.

        It hears what the text branch hears. For rows that follow a rule, or are about to arrive from elsewhere, it gives what that branch
        gave, so that nothing is turned away and they go where they are to.
        """
        _, output = self.evaluate(kwargs)
        for row, correction in self.watcher.corrections.items():
            if correction.rule or row in self.arriving:
                output[0][row] = self.text_branch[row]
        return output

    def second_half(self, module: Any, kwargs: dict[str, Any], conditional: DenoiserCall) -> Any:
        """The unconditional call of a step whose branches are two calls; the pipeline has the output of the other already."""
        output = own_call(self.fn_ref.original_forward, self.family, kwargs)
        self.uneven = kwargs[TEXT].shape[1] != conditional.kwargs[TEXT].shape[1]
        if self.uneven:
            kwargs = self.with_own_null(kwargs, conditional.kwargs)
        both = concat_calls(DenoiserCall(kwargs, output[0]), conditional, self.family.sample)
        wanted = self.process_step(module, both)
        if wanted is both.prediction:
            return output
        return replace_prediction(output, solve_unconditional(wanted, output[0], conditional.prediction, self.guidance, self.rescale))

    def with_own_null(self, kwargs: dict[str, Any], conditional: dict[str, Any]) -> dict[str, Any]:
        """The arguments of an unconditional call with the model's own empty prompt, as long as the conditional text, for theirs."""
        condition = condition_of(conditional, self.family)
        null = condition  # where there is none the reading asks for it again, and an error reaches the report
        with contextlib.suppress(Exception):
            null = self.own_null(condition).expand_as(condition)
        return with_condition({**conditional, self.family.sample: kwargs[self.family.sample]}, null, self.family)

    @property
    def is_told_text(self) -> bool:
        """Whether the call was given a prompt with something in it."""
        texts = self.encoder.given.get("prompt") or ()
        return any(isinstance(text, str) and text.strip() for text in ([texts] if isinstance(texts, str) else texts))

    @property
    def own_forward(self) -> Callable[..., Any]:
        """The denoiser's forward pass for the guard's own evaluations, within `bare`: beneath the hook, and not compiled."""
        denoiser = denoiser_of(self.pipe)
        inner = uncompiled(denoiser)
        is_called = inner is not denoiser or compiled_call(denoiser)
        return inner if is_called else hooked(denoiser, not_compiled(self.fn_ref.original_forward))

    @property
    def is_foreign(self) -> bool:
        """Whether a call of the denoiser is none of this run's: it is made in another thread, or by who is shown one, while it is shown."""
        return self.busy or threading.get_ident() != self.thread

    @property
    def can_skip(self) -> bool:
        """Whether nothing is to be seen or changed at the call under way: it has one branch, is not read and follows no rule."""
        rules = any(correction.rule for correction in self.watcher.corrections.values())
        read = self.watcher.reads(self.record.step) or self.record.new_condition
        return self.record.guidance_scales[-1] == 1 and not rules and not read

    def begin_step(self, kwargs: dict[str, Any], images: int) -> None:
        """Note that a step of ``images`` images begins."""
        sample, timestep = kwargs[self.family.sample], kwargs["timestep"]
        if not self.record.timesteps:
            # now, as the pipeline's call may set up what such code keeps, and not when the run began
            self.patches, self.fresh, _ = patches_of(denoiser_of(self.pipe))  # of its hooks those that are gone stay away
            places = kwargs["img_ids"] if self.family.packed_latents else None
            self.record.begin(self.pipe.scheduler, images, sample.dtype, timestep, places)
        self.record.note_timestep(timestep, self.family.timestep_scale)
        self.record.guidance_scales.append(self.guidance)
        self.record.note_embeddings(embeddings_of(kwargs, self.family), len(sample) - images)

    def with_corrected_conditions(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments with the conditions of corrected rows in place."""
        changed = {row: c.condition for row, c in self.watcher.corrections.items() if c.condition is not None}
        if not changed:
            return kwargs
        condition = condition_of(kwargs, self.family).clone()
        for row, text in changed.items():
            condition[len(condition) - self.record.images + row] = text
        return with_condition(kwargs, condition, self.family)

    def process_step(self, module: Any, call: DenoiserCall) -> Tensor:
        """Show one step to the watcher; its prediction, unconditional rows first where there are any, as the watcher's corrections want it.

        Returns ``call.prediction`` itself where no row is corrected.
        """
        if not (self.watcher.follows(self.record.step) or self.record.new_condition):
            seen = self.predicted(call)
            if len(self.glanced) == GLANCES or (self.glanced and seen.x.shape != self.glanced[0].x.shape):
                self.show_glances()
            self.glanced.append(seen)
            return call.prediction
        self.show_glances()
        observation = self.observation(module, call)
        self.record.note(observation)
        self.watcher.observe(observation)
        prediction = call.prediction
        for row, correction in list(self.watcher.corrections.items()):
            try:
                branches = self.corrected_branches(row, correction, observation)
            except Exception as error:  # as of code from elsewhere that wants whole batches: its neighbours go on
                del self.watcher.corrections[row]
                self.watcher.lost(row, error)
                continue
            if branches is not None:
                prediction = prediction.clone()
                rows = slice(row, None, self.record.images)
                prediction[rows] = with_latents(prediction[rows], branches, self.record.patches)
        return prediction

    def show_glances(self) -> None:
        """Show the watcher what was predicted at the calls since it was last shown any, if there were any. Cost: none."""
        glanced, self.glanced = self.glanced, []
        if glanced:
            seen = joined(glanced)
            self.record.norms.extend(seen.guidance_norm.unflatten(0, (len(glanced), -1)))
            self.watcher.glance(seen, len(glanced))

    def noises(self, call: DenoiserCall) -> tuple[Tensor, Tensor]:
        """The points of all rows of a step and the noise predicted there, ``[branches B, C, H, W]`` both."""
        latents = unpack_latents(call.kwargs[self.family.sample], self.record.patches)
        prediction = unpack_latents(call.prediction, self.record.patches)
        # masks and pictures stand behind latents, and behind outputs the variances that some networks learn
        channels = min(latents.shape[1], prediction.shape[1])
        # copies, as the pipeline's loop and callbacks may write into both before they are read
        x, output = (of[:, :channels].to(torch.float, copy=True) for of in (latents, prediction))
        return x, self.to_noise(output, x, float(self.record.timesteps[-1]))

    def predicted(self, call: DenoiserCall) -> Prediction:
        """What the two branches of a step predict. Cost: none."""
        x, eps = self.noises(call)
        eps_u, eps_c = eps.chunk(2)
        return Prediction(x[: len(eps_c)], eps_c, eps_u, self.record.levels[-1], self.record.guidance_scales[-1])

    def observation(self, module: Any, call: DenoiserCall) -> Observation:
        """One step as an observation. Cost: none where the call has both branches, else 1 evaluation an image."""
        record, images, timestep = self.record, self.record.images, float(self.record.timesteps[-1])
        x, eps_c = self.noises(call)
        condition, denoise, rows = condition_of(call.kwargs, self.family), self.evaluator(call), torch.arange(images)
        if len(x) > images:
            null, condition = condition.chunk(2)
            eps_u, eps_c = eps_c.chunk(2)
            x = x[:images]
        else:
            try:
                null = self.own_null(condition).expand_as(condition)
            except Exception:  # the reading asks for it again, where an error reaches the report
                null, eps_u = condition, eps_c
            else:
                eps_u = denoise(x, timestep, null, rows)
                record.evaluations += 1
        seen = Observation(
            step=record.step,
            timestep=timestep,
            level=record.levels[-1],
            x=x,
            eps_c=eps_c,
            eps_u=eps_u,
            condition=condition,
            null_condition=null,
            guidance_scale=record.guidance_scales[-1],
            level_at=record.level_at,
            denoise=denoise,
            evaluations=record.evaluations,
            rows=rows,
            denoiser=module,
            dtype=dtype_taken(call.kwargs[self.family.sample]),
            past_norms=record.past_norms,
            memo={},
            origin=record.origin,
            new_condition=record.new_condition,
            patches=tuple(dict.fromkeys(code_of(patch)[1] for patch in self.patches)),
        )
        if record.step == 0:
            record.noise, record.half_made = first_noise(seen, self.pipe, self.encoder.given)
        self.read = read = functools.partial(self.reference_reading, module, call)
        return replace(seen, reading=functools.cache(lambda: read(seen)), half_made=record.half_made)

    def show_hidden_texts(self) -> None:
        """Show the watcher the texts that were written in unseen since it was last shown any, if there may be any. Cost: none."""
        record, read = self.record, self.read
        hidden, record.hidden_texts = record.hidden_texts, None
        if hidden is None or record.first is None or read is None:
            return
        # of a later call than the first, which is not taken for the reference call
        seen = replace(record.first, step=record.step, condition=pack_embeddings(*hidden.texts, self.family), new_condition=True, memo={})
        self.watcher.rewritten(replace(seen, reading=functools.cache(lambda: read(seen))), hidden)

    def own_null(self, condition: Tensor) -> Tensor:
        """The model's own empty prompt beside conditions ``[B, T (+ 1), E]``, ``[1, T (+ 1), E]``; asked for once a run."""
        length = condition.shape[1] - bool(self.family.beside)
        if length not in self.nulls:
            self.nulls[length] = null_condition(self.encoder, length).to(condition)
        return self.nulls[length]

    def reference_reading(self, module: Any, call: DenoiserCall, seen: Observation) -> Observation:
        """All images at the guard's own reference call, under the text condition of the call under way.

        Cost: none where the run's first call is that one, 1 evaluation an image where its null branch alone is another, else 2.
        """
        kwargs, record, null = call.kwargs, self.record, self.own_null(seen.condition)
        scale = (kwargs.get(self.family.scale) or {}).get("scale")
        adapters = {} if scale is None else {"scale": scale}
        reference = ReferenceCall(self.pipe, self.own_forward, adapters, seen.condition.dtype, record.level_at, self.fresh)
        plain = not record.half_made and not self.uneven and reference.is_plain(kwargs, seen, record.patches)
        told = seen.step == 0 and self.is_told_text
        is_plain, is_empty, is_blank = read_answers(
            plain, (told or plain is not False) and same_texts(seen.null_condition, null), told and same_texts(seen.condition, null)
        )
        if is_blank and not is_empty:
            raise ValueError("the call's text rows hold the empty prompt: the pipeline puts its halves in another order than diffusers")
        if not is_plain or (self.patches and not is_empty):  # code from elsewhere may want the halves of a batch together
            found = reference.observation(record.noise, seen.condition, null, record.evaluations, seen.guidance_scale)
            return replace(found, denoiser=module)
        found = replace(seen, denoise=reference.denoise, memo={})
        if is_empty:
            return found
        record.evaluations += 1
        null = null.expand_as(seen.condition)
        return replace(found, null_condition=null, eps_u=reference.denoise(seen.x, seen.timestep, null, seen.rows))

    def evaluator(self, call: DenoiserCall) -> Denoiser:
        """Evaluates a call again with some of its rows, elsewhere or under other conditions; all else about them stays."""
        family, kwargs, patches = self.family, call.kwargs, self.record.patches
        sample, dtype, forward = kwargs[family.sample], condition_of(kwargs, family).dtype, self.own_forward

        def denoise(x: Tensor, timestep: float, condition: Tensor, places: Tensor) -> Tensor:
            places = places % len(sample)
            chosen, whole = kwargs, sample
            if places.tolist() != list(range(len(sample))):
                places = places.to(sample.device)
                chosen, whole = select_rows(kwargs, places), sample[places]
            arguments = with_condition(chosen, condition.to(dtype), family)
            arguments[family.sample] = with_latents(whole, x, patches)
            arguments["timestep"] = timestep_of(timestep, x, family)
            with bare(denoiser_of(self.pipe), self.fresh), told_of_faces(denoiser_of(self.pipe), faces_at(places, len(sample))):
                output = evaluated(forward, family, arguments)
            return self.to_noise(unpack_latents(output, patches)[:, : x.shape[1]], x, timestep)

        return denoise

    def corrected_branches(self, row: int, correction: Correction, observation: Observation) -> Tensor | None:
        """The outputs of one row's branches at this call under its correction, ``[branches, C, H, W]``; None where the pipeline's stand."""
        here = observation.select(torch.tensor([row]))
        if self.activated.get(row) is not correction:
            self.activated[row] = correction
            here, replayed = activate_correction(here, correction, self.record, self.rescale, self.step_arguments)
            if replayed is not None:
                self.arriving[row] = replayed
            self.record.rewrite_norms(row, here)
        elif correction.rule:
            here = replace(here, rules=(correction.rule,))
        else:
            return None
        null, text = to_model_output(here, prediction_type(self.pipe.scheduler))
        return torch.cat([null, text]) if self.guidance != 1 else text

    def to_noise(self, prediction: Tensor, x: Tensor, timestep: float) -> Tensor:
        return to_noise(prediction.float(), x.float(), self.record.level_at(timestep), prediction_type(self.pipe.scheduler))

    def wrap_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``scheduler.step`` that lets arriving rows take their places in the batch first."""

        @functools.wraps(original)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.busy:  # of a run that is made by who is shown a call of this one
                return original(model_output, timestep, sample, *args, **kwargs)
            self.step_arguments = kwargs
            if self.arriving:
                sample = sample.clone()
                for row, (latents, scheduler) in self.arriving.items():
                    sample[row] = latents[0]
                    insert_row(self.pipe.scheduler, scheduler, row, sample.shape)
                self.arriving.clear()
            output = original(model_output, timestep, sample, *args, **kwargs)
            # asked in this order: a run in which nothing is corrected does not wait for a GPU here
            if self.watcher.corrections and float(timestep) == self.record.last_timestep:
                self.watcher.made(unpack_latents(output[0], self.record.patches).float())
            return output

        return step

    def wrap_noising(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``scheduler.add_noise`` and its like, whose clean latents are the run's origin where it happens before the first call."""

        @functools.wraps(original)
        def noising(clean: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self.record.timesteps:
                self.record.origin = clean.float()
            return original(clean, *args, **kwargs)

        return noising

    @property
    def wrappers(self) -> dict[str, Callable[[Any], Any]]:
        """What the scheduler's methods are wrapped in while the run lasts."""
        return {"step": self.wrap_step, "add_noise": self.wrap_noising, "scale_noise": self.wrap_noising}
