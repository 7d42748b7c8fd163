"""The guard for diffusers' modular pipelines, as a guider."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers import ClassifierFreeGuidance, ModularPipeline
from torch import Tensor, nn

from sdguard.correction import Correction
from sdguard.denoiser.calls import PER_ROW, DenoiserCall, by_name, concat_calls, own_call, snapshot
from sdguard.denoiser.families import GUIDANCE, denoiser_of, family_of
from sdguard.denoiser.hidden_texts import HiddenTexts
from sdguard.denoiser.hook import DenoiserHook
from sdguard.denoiser.install import attached, wrapped
from sdguard.denoiser.reference_call import same_texts
from sdguard.denoiser.text_encoding import Encoder
from sdguard.guarded.arguments import lora_scale
from sdguard.guarded.audit_log import append_records
from sdguard.guarded.config import GuardConfig, check_config
from sdguard.guarded.report import GuardReport
from sdguard.guarded.run import GuardedRun, model_of, profile_of
from sdguard.guarded.verdicts import tell, tell_of_failure
from sdguard.observation import Observation, Prediction

#: where among the denoiser's arguments an IP-Adapter's pictures are.
IMAGES = (("added_cond_kwargs", "image_embeds"), ("joint_attention_kwargs", "ip_adapter_image_embeds"))


class GuardedGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance that guards the text-to-image runs of a modular pipeline.

    ``pipe.update_components(guider=GuardedGuidance(pipe, guidance_scale=5.0))``, then ``pipe(prompt=...)`` as ever; ``reports`` has one
    `GuardReport` per image of the last run. Images that are not flagged are bit-identical to those under `ClassifierFreeGuidance`. A guider
    is handed no texts and no pictures, from which two things follow. Prompts are reworded only where ``prompts`` has them. And what is
    withheld is not blanked afterwards: its latents are set to zero at every step from the one that flagged it on, so that the decoder draws
    its picture of nothing.

    One run at a time: pipelines that share a denoiser or a scheduler are not to run at once.

    Cost: as under `GuardedPipeline`; a call without guidance that the guard reads pays one evaluation an image.

    Args:
        pipe: the modular pipeline whose guider this is to be.
        guard: how to guard, by default `GuardConfig()`.
        inputs: what else every call of the pipeline is given that prompts are encoded with: ``max_sequence_length``, the ``scale`` of LoRA.
        guidance: the arguments of `ClassifierFreeGuidance`.

    Attributes:
        prompts: set to the prompts of the next run, and forgotten after it: one text, or a list as long as the call's.
        run: the watcher of the last run; None until its first call.

    Raises:
        TypeError: the pipeline's class is not supported, or ``guard`` is no `GuardConfig`; one sentence.
        ValueError: in a run: it is no text-to-image run of a whole schedule, or has other prompts than said.
        ProfileError: in a run: the profile given is another model's, or calibration is forbidden and none is known.
        MemorizationError: in a run, with ``on_failure="raise"``.
        CannotWrite: in a run: the audit log cannot be written.
    """

    def __init__(
        self, pipe: ModularPipeline, guard: GuardConfig | None = None, inputs: dict[str, Any] | None = None, **guidance: Any
    ) -> None:
        if not isinstance(pipe, ModularPipeline):
            raise TypeError(f"{type(pipe).__name__} is no modular pipeline: it is guarded by sdguard.guard.")
        family_of(pipe)
        check_config(guard)
        super().__init__(**guidance)
        self.pipe, self.guard, self.inputs = pipe, guard or GuardConfig(), inputs or {}
        self.prompts: str | list[str] | None = None
        self.run: GuardedRun | None = None
        self.hook: GuiderHook | None = None

    @property
    def reports(self) -> list[GuardReport]:
        """One `GuardReport` per image of the last run; empty until its first call has been judged."""
        if self.hook is not None:
            self.hook.show_glances()
        return self.run.reports if self.run else []

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `ClassifierFreeGuidance` that make what this guider is now."""
        held = vars(self)
        return {name: held[name] if name in held else held[f"_{name}"] for name in GUIDANCE}

    def new(self, **changes: Any) -> GuardedGuidance:
        """The same guider with some of its arguments changed."""
        return type(self)(**{"pipe": self.pipe, "guard": self.guard, "inputs": self.inputs, **self.options, **changes})

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Note the step that begins; the first begins a run."""
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            if self.hook is not None:  # of a run that an error may have ended between two calls
                self.hook.detach()
            self.run, self.hook = None, GuiderHook(self)

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Have the next call of the denoiser noted."""
        super().prepare_models(denoiser)
        if denoiser is not denoiser_of(self.pipe) or self.pipe.guider is not self:
            raise ValueError("This GuardedGuidance was made for another pipeline than the one that runs.")
        assert self.hook is not None
        self.hook.await_call(denoiser)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Note no further call; one that has come has ended that itself."""
        super().cleanup_models(denoiser)
        assert self.hook is not None
        self.hook.detach()

    def __call__(self, data: list[Any]) -> Any:
        """Judge the step whose calls are over, and guide what comes of it."""
        assert self.hook is not None
        with self.telling_of_failure():
            judged = self.hook.judged()
        for branch, prediction in zip(data, judged, strict=True):
            branch.noise_pred = prediction
        guided = super().__call__(data)
        self.hook.await_step()
        return guided

    def begin(self, first: Observation) -> GuardedRun:
        """The watcher of a run, from its first call. Cost: none where the profile is known, else `calibrate`'s, in runs of their own."""
        encoder = Encoder(self.pipe, self.inputs)
        prompts = self.prompts_of(encoder, first)
        append_records(self.guard, ())  # as in a guarded pipeline's call
        scale = lora_scale(self.inputs)
        profile = profile_of(self.pipe, self.guard, scale)
        self.run = GuardedRun(self.guard, profile, prompts, encoder, model=model_of(self.pipe, profile, scale))
        return self.run

    @contextmanager
    def telling_of_failure(self) -> Iterator[None]:
        """What is raised within the block ends the run: who is told of verdicts is told of those that there are."""
        try:
            yield
        except BaseException:
            tell_of_failure(self.guard, self.reports)
            raise

    def prompts_of(self, encoder: Encoder, first: Observation) -> list[str | None]:
        """The prompt of each image; raises `ValueError` if they are not those of the run."""
        given, self.prompts = self.prompts, None
        texts, images = [given] if isinstance(given, str) else given, first.run_rows
        if texts is None:
            return [None] * images
        if not texts or images % len(texts):
            raise ValueError(f"The guider was told {len(texts)} prompts, and this run makes {images} images.")
        each = images // len(texts)
        if not same_texts(first.condition, encoder(texts).repeat_interleave(each, dim=0)):
            raise ValueError("The prompts that the guider was told are not those of this run.")
        return [text for text in texts for _ in range(each)]


class RunOpener:
    """The watcher of a guider's run: the guard's, from the first call on, which says how many images of which size there are."""

    def __init__(self, guider: GuardedGuidance) -> None:
        self.guider = guider
        self.run: GuardedRun | None = None
        self.corrections: dict[int, Correction] = {}

    def reads(self, step: int) -> bool:
        return self.run.reads(step) if self.run else True

    def expects(self, rows: int, branches: int) -> bool:
        return True

    def follows(self, step: int) -> bool:
        return self.run.follows(step) if self.run else True

    def glance(self, prediction: Prediction, calls: int) -> None:
        if self.run:
            self.run.glance(prediction, calls)

    def made(self, latents: Tensor) -> None:
        if self.run:
            self.run.made(latents)

    def lost(self, row: int, error: Exception) -> None:
        if self.run:
            self.run.lost(row, error)

    def rewritten(self, observation: Observation, hidden: HiddenTexts) -> None:
        if self.run:
            self.run.rewritten(observation, hidden)

    def observe(self, observation: Observation) -> None:
        if self.run is None:
            self.run = self.guider.begin(observation)
            self.corrections = self.run.corrections
        self.run.observe(observation)


class GuiderHook(DenoiserHook):
    """The hook of one run of a guider. It stands around the denoiser, and around ``scheduler.step``, for one call at a time.

    It is gone when that call begins, whatever becomes of it, and a step is judged between its calls of the denoiser and the scheduler's:
    the pipeline is free then, and the corrected branches go to the guider as they are.
    """

    def __init__(self, guider: GuardedGuidance) -> None:
        super().__init__(RunOpener(guider), Encoder(guider.pipe, guider.inputs))
        self.guider = guider
        self.calls: list[DenoiserCall] = []
        self.module: Any = None
        self.attachments = ExitStack()

    def detach(self) -> None:
        """Take away what still stands around denoiser and scheduler."""
        self.attachments.close()

    def await_call(self, denoiser: nn.Module) -> None:
        """Stand around the denoiser until it is called."""
        self.detach()
        self.module = denoiser
        self.attachments.enter_context(attached(denoiser, self))

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_foreign:
            return self.fn_ref.original_forward(*args, **kwargs)
        self.detach()
        kwargs = by_name(module, args, kwargs, self.family)
        if not self.calls:
            self.begin_step(kwargs, len(kwargs[self.family.sample]))
            kwargs, output = self.evaluate(kwargs)
        else:
            output = own_call(self.fn_ref.original_forward, self.family, kwargs)
        self.calls.append(snapshot(kwargs, output[0]))
        return output

    def judged(self) -> list[Tensor]:
        """What the step's calls gave, in their order, as the watcher's corrections want it."""
        (conditional, *unconditional), self.calls = self.calls, []
        if self.record.step == 0:
            self.check(*conditional)
        if unconditional:
            both = concat_calls(unconditional[0], conditional, self.family.sample)
            return list(reversed(self.process_step(self.module, both).chunk(2)))
        return [conditional.prediction if self.can_skip else self.process_step(self.module, conditional)]

    def check(self, kwargs: dict[str, Any], output: Tensor) -> None:
        """Raise `ValueError` if a run's first call is not that of a text-to-image run of a whole schedule."""
        scheduler, given = self.pipe.scheduler, [name for name in PER_ROW if kwargs.get(name) is not None]
        images = [(kwargs.get(name) or {}).get(entry) for name, entry in IMAGES]
        whole = (
            self.record.timesteps[0] == self.record.schedule[0].timestep
            and scheduler.num_inference_steps == self.guider._num_inference_steps
        )
        found = {
            "has a ControlNet": any("residual" in name or "controlnet" in name for name in given),
            "has an IP-Adapter": any(image is not None for image in images),
            "fills in a mask": kwargs[self.family.sample].shape[1] != output.shape[1],
            "does not go through its whole schedule": not whole,
        }
        if reasons := [reason for reason, is_so in found.items() if is_so]:
            raise ValueError(f"GuardedGuidance guards text-to-image runs only; this one {' and '.join(reasons)}.")

    @property
    def rescale(self) -> float:
        return float(self.guider.guidance_rescale)

    def await_step(self) -> None:
        """Stand around ``scheduler.step`` until it is called, for the rows that arrive and those that are withheld."""

        def once(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def step(*args: Any, **kwargs: Any) -> Any:
                self.detach()
                with self.guider.telling_of_failure():
                    output = self.wrap_step(original)(*args, **kwargs)
                    if self.record.timesteps[-1].item() == self.record.last_timestep:
                        self.show_glances()
                        self.show_hidden_texts()
                if self.guider.run and (withheld := self.guider.run.withheld):
                    output[0][withheld] = 0
                if self.record.step + 1 == len(self.record.schedule):  # Heun's method goes through its last timestep twice
                    tell(self.guider.guard, self.guider.reports)
                return output

            return step

        self.attachments.enter_context(wrapped(self.pipe.scheduler, {"step": once}))
