"""The guarded pipeline: a transparent stand-in for a diffusers pipeline that judges and steers every run."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import CellType, FunctionType, MethodType
from typing import Any

import wrapt
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import nn

from sdguard.decision.known_profiles import save_profiles
from sdguard.decision.profile import Profile
from sdguard.decision.store import profile_for
from sdguard.denoiser.families import check_pipeline, family_of, is_modular
from sdguard.denoiser.foreign import is_foreign, layers
from sdguard.denoiser.install import Aside, watched
from sdguard.denoiser.reference_call import keep_null_condition
from sdguard.denoiser.text_encoding import ENCODERS, Encoder
from sdguard.files.inputs import shown
from sdguard.guarded.arguments import arguments_in, arguments_of, check, check_inputs, limits, lora_scale
from sdguard.guarded.audit_log import append_records
from sdguard.guarded.config import GuardConfig, check_config
from sdguard.guarded.outputs import blank, check_count, images_of, with_images
from sdguard.guarded.report import GuardReport
from sdguard.guarded.run import GuardedRun, model_of, profile_of
from sdguard.guarded.verdicts import tell, tell_of_failure

#: looked up at every call of `GuardedPipeline.encode_prompt`.
signature_of = functools.cache(inspect.signature)

#: class methods of pipelines that make no pipeline. Those that make one are written out below, since it is to be guarded.
FORWARDED = (
    "download", "load_config", "get_config_dict", "extract_init_dict", "register_for_auto_class", "numpy_to_pil", "lora_state_dict",
    "load_lora_into_unet", "load_lora_into_transformer", "load_lora_into_text_encoder", "save_lora_weights", "write_lora_layers",
    "pack_weights",
)  # fmt: skip


class GuardedPipeline(wrapt.ObjectProxy):
    """A diffusers pipeline under guard: same attributes, same call, same return type, plus ``output.guard``.

    The pipeline inside is untouched between calls; only while a call runs does a hook stand around its denoiser.

    Args:
        pipe: a pipeline of a supported class.
        config: how to guard, by default `GuardConfig()`.

    Raises:
        TypeError: the pipeline's class, scheduler or denoiser is not supported, it is a modular one, or ``config`` is no `GuardConfig`;
            one sentence.
    """

    #: the class of the pipeline inside.
    pipeline_class: type | None = None

    def __new__(cls, pipe: Any, config: GuardConfig | None = None) -> GuardedPipeline:
        # what cannot be called is no pipeline, as will be said
        kind = class_for(pipe.__class__) if cls is GuardedPipeline and callable(pipe) else cls
        made: GuardedPipeline = super().__new__(kind, pipe, config)
        return made

    def __init__(self, pipe: Any, config: GuardConfig | None = None) -> None:
        check_config(config)
        if is_modular(pipe):
            raise TypeError(
                f"{type(pipe).__name__} is a modular pipeline: it is guarded by its guider, sdguard.guarded.guider.GuardedGuidance."
            )
        check_pipeline(pipe)
        super().__init__(pipe)
        self._self_config = config or GuardConfig()
        self._self_reports: list[GuardReport] = []

    @classmethod
    def from_pretrained(cls, path: str | Path, *, guard: GuardConfig | None = None, **kwargs: Any) -> GuardedPipeline:
        """``DiffusionPipeline.from_pretrained`` with the same arguments, under guard."""
        check_config(guard)
        return cls.of(DiffusionPipeline.from_pretrained(path, **kwargs), guard)

    @classmethod
    def from_single_file(cls, path: str | Path, *, guard: GuardConfig | None = None, **kwargs: Any) -> GuardedPipeline:
        """The ``from_single_file`` of the class of a guarded pipeline with the same arguments, under guard; it is called on one."""
        if cls.pipeline_class is None:
            raise TypeError(
                "A single file does not say which pipeline it is of: sdguard.guard(StableDiffusionPipeline.from_single_file(...))."
            )
        check_config(guard)
        return cls.of(cls.pipeline_class.from_single_file(path, **kwargs), guard)  # type: ignore[attr-defined]

    @classmethod
    def from_pipe(cls, pipe: Any, *, guard: GuardConfig | None = None, **kwargs: Any) -> GuardedPipeline:
        """A pipeline of the parts of another, of the same class as that, or of the guarded one on which this is called.

        It is guarded as ``guard`` says, by default as ``pipe`` is where it is guarded. ``kwargs`` are those of diffusers' ``from_pipe``.
        """
        inner, config = unguard(pipe), pipe.guard_config if isinstance(pipe, GuardedPipeline) else None
        return cls.of((cls.pipeline_class or type(inner)).from_pipe(inner, **kwargs), guard or config)  # type: ignore[attr-defined]

    @classmethod
    def from_config(cls, config: Any, *, guard: GuardConfig | None = None, **kwargs: Any) -> GuardedPipeline:
        """The ``from_config`` of the class of a guarded pipeline, or ``DiffusionPipeline``'s, with the same arguments, under guard."""
        check_config(guard)
        kind: Any = cls.pipeline_class or DiffusionPipeline
        return cls.of(kind.from_config(config, **kwargs), guard)

    @classmethod
    def of(cls, pipe: Any, config: GuardConfig | None) -> GuardedPipeline:
        """A guarded stand-in for a pipeline of whatever class."""
        return (GuardedPipeline if cls.pipeline_class else cls)(pipe, config)

    @property
    def components(self) -> dict[str, Any]:
        """The pipeline's parts. It warns, as whatever is made of them, by ``from_pipe`` for one, is not guarded."""
        warnings.warn(
            "A pipeline that is made of a guarded one's components is not guarded: sdguard.guard(...) guards it; sdguard.unguard(pipe) "
            "gives components without this warning.",
            stacklevel=2,
        )
        found: dict[str, Any] = self.__wrapped__.components
        return found

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

    def calibrate(self, prompts: Sequence[str] | None = None, *, adapter_scale: float | None = None) -> Profile:
        """The profile of this pipeline's model, made and kept now where none is known, so that no call waits for it.

        Args:
            prompts: your own ordinary prompts; calls go by the profile of these from then on. By default those of the config, else any.
            adapter_scale: what the calls will scale LoRA by, where they do.

        Cost: that of `sdguard.decision.calibration.calibrate`.
        """
        if prompts is not None:
            self._self_config = replace(self._self_config, profile=None, calibration_prompts=prompts)
        config = self._self_config
        return profile_for(self.__wrapped__, given=config.profile, prompts=config.calibration_prompts, adapter_scale=adapter_scale)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """The pipeline's own ``save_pretrained``, and the profiles that are known of its model beside it, where they are found again."""
        # first, since push_to_hub uploads the folder as it is then
        save_profiles(self.__wrapped__, Path(save_directory))
        self.__wrapped__.save_pretrained(save_directory, *args, **kwargs)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own ``encode_prompt``; the empty prompt is encoded too and kept, for runs after the text encoders are dropped."""
        pipe = self.__wrapped__
        found = pipe.encode_prompt(*args, **kwargs)
        call = signature_of(type(pipe).encode_prompt).bind(pipe, *args, **kwargs)
        call.apply_defaults()
        given = {name: call.arguments[name] for name in ("max_sequence_length",) if name in call.arguments}
        keep_null_condition(pipe, {**given, family_of(pipe).scale: {"scale": call.arguments.get("lora_scale")}}, found[0].shape[1])
        return found

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        inner = list(layers(found)) if callable(found) else []
        if any(holds(of, self.__wrapped__) for of in inner) and any(map(is_foreign, inner)):
            warnings.warn(
                f"{name} is no method of diffusers and holds the pipeline itself: what it makes with that is not guarded.",
                stacklevel=2,
            )
        if name == "progress_bar":
            warn_of_loop(stacklevel=3)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__" and issubclass(value, GuardedPipeline):  # what was made of the guarded one's own class
            vars(object)["__class__"].__set__(self, value)
            return
        if name in ENCODERS and value is None:
            keep_null_condition(self.__wrapped__)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in ENCODERS:
            keep_null_condition(self.__wrapped__)
        super().__delattr__(name)

    def __copy__(self) -> GuardedPipeline:
        return GuardedPipeline(copy.copy(self.__wrapped__), self._self_config)

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardedPipeline:
        return GuardedPipeline(copy.deepcopy(self.__wrapped__, memo), self._self_config)

    def __reduce__(self) -> tuple[Any, ...]:
        return GuardedPipeline, (self.__wrapped__, self._self_config)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline under guard; takes and returns what the pipeline does, and ``output.guard`` has the reports.

        Cost: no denoiser evaluations beyond the pipeline's own for an image that stops at the cascade's free signals; what
        the cascade buys for one that goes on, and steering's for one that is flagged.

        Raises:
            ProfileError: the profile given is another model's, or none is known with ``on_unknown="raise"``.
            ValueError: an argument that would blind the guard, the message names it; and whatever the pipeline itself says of a wrong call.
            TypeError: ``guard`` is among the arguments, or the pipeline has been changed into one that cannot be guarded.
            MemorizationError: with ``on_failure="raise"``.
            CannotWrite: the audit log cannot be written.
        """
        if "guard" in kwargs:
            raise TypeError("A call takes no guard: it is chosen where the pipeline is guarded, by sdguard.guard(pipe, GuardConfig(...)).")
        pipe, config = self.__wrapped__, self._self_config
        given = arguments_of(pipe, args, kwargs)
        check(pipe, given)
        check_pipeline(pipe)  # it may have another scheduler by now
        check_inputs(pipe, args, kwargs)
        encoder = Encoder(pipe, given)
        prompts = prompts_of(given)
        append_records(config, ())  # a log that cannot be written is better told of now than when the pictures are there
        profile = self.profile(given)
        run = GuardedRun(config, profile, prompts, encoder, limits(given), model_of(pipe, profile, lora_scale(given)))
        try:
            with watched(encoder, run) as aside:
                alone = {id(callback): beside(callback, aside) for callback in callbacks_in(given)}
                named = {name: alone.get(id(value), value) for name, value in kwargs.items()}
                output = pipe(*(alone.get(id(value), value) for value in args), **named)
            run.finish()
            images = images_of(output)
            check_count(images, len(prompts))
            images = blank(images, run.withheld)
        except BaseException as error:
            run.abandon(error)
            tell_of_failure(config, run.reports)
            raise
        finally:
            self._self_reports = run.reports
        tell(config, run.reports)
        return with_images(output, images, run.reports)  # which are not those of the last call, which may be another thread's

    def profile(self, given: dict[str, Any]) -> Profile | None:
        """The profile of a run with these arguments: the one given, a known one or one made now, or None where it goes on without."""
        return profile_of(self.__wrapped__, self._self_config, lora_scale(given))


def forwarded(kind: type) -> dict[str, Any]:
    """The class methods of a pipeline class that make no pipeline, as its own, for the class of its guarded pipelines."""
    return {name: staticmethod(getattr(kind, name)) for name in FORWARDED if hasattr(kind, name)}


for _name, _method in forwarded(DiffusionPipeline).items():
    setattr(GuardedPipeline, _name, _method)


@functools.cache
def class_for(kind: type) -> type[GuardedPipeline]:
    """`GuardedPipeline` for pipelines of class ``kind``, whose call has the signature and the documentation of theirs."""

    @functools.wraps(kind.__call__)
    def call(self: GuardedPipeline, *args: Any, **kwargs: Any) -> Any:
        return GuardedPipeline.__call__(self, *args, **kwargs)

    def unguarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        warn_of_loop(stacklevel=3)
        return inspect.unwrap(kind.__call__)(self, *args, **kwargs)

    # who goes past the decorators of a pipeline's call comes to the pipeline's own
    unguarded.__signature__ = inspect.signature(kind.__call__)  # type: ignore[attr-defined]
    call.__wrapped__ = unguarded
    held = {**forwarded(kind), "__call__": call, "pipeline_class": kind, "__doc__": GuardedPipeline.__doc__}
    held["__module__"] = kind.__module__  # by which libraries tell that it is a pipeline
    return type(GuardedPipeline.__name__, (GuardedPipeline,), held)


def warn_of_loop(stacklevel: int) -> None:
    """Say that a loop of steps which is not the guarded pipeline's own call makes pictures that nobody judges."""
    warnings.warn("A loop of steps that is no call of the guarded pipeline is not guarded.", stacklevel=stacklevel)


def holds(function: Any, pipe: Any) -> bool:
    """Whether a callable is given a pipeline with whatever it is called: bound to it, or to what has it, or closed over it."""
    match function:
        case MethodType():
            return unguard(function.__self__) is pipe or is_among(pipe, getattr(function.__self__, "__dict__", {}).values())
        case functools.partial():
            return holds(function.func, pipe) or is_among(pipe, (*function.args, *function.keywords.values()))
        case FunctionType():
            return is_among(pipe, [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()])
    return not isinstance(function, nn.Module) and is_among(pipe, getattr(function, "__dict__", {}).values())


def is_among(thing: Any, others: Iterable[Any]) -> bool:
    """Whether an object is one of others."""
    return any(other is thing for other in others)


def callbacks_in(given: dict[str, Any]) -> list[Callable[..., Any]]:
    """The functions among a call's arguments that are called between its steps."""
    found = [arguments_in(given).get(name) for name in ("callback_on_step_end", "callback")]
    return [of for of in found if callable(of)]


def beside(callback: Any, aside: Aside) -> Any:
    """A callback that finds the pipeline unguarded: what it makes of denoiser and scheduler is none of the run's.

    diffusers' own callbacks only change the run's values, and are given as they are.
    """
    if isinstance(callback, MultiPipelineCallbacks):
        several = copy.copy(callback)
        several.callbacks = [beside(of, aside) for of in callback.callbacks]
        return several
    if isinstance(callback, PipelineCallback):  # a pipeline asks it which tensors it is to be given
        if type(callback).__module__.startswith("diffusers."):
            return callback
        one = copy.copy(callback)
        vars(one)["callback_fn"] = beside(callback.callback_fn, aside)
        return one

    @functools.wraps(callback)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with aside():
            return callback(*args, **kwargs)

    return alone


def prompts_of(given: dict[str, Any]) -> list[str | None]:
    """The prompt of each image of a call that the pipeline has checked; None where it was given embeddings, or something else than a text.

    Raises `TypeError`, in one sentence, where the call does not say how many images it makes, which pipelines do not check.
    """
    prompt, embeddings, each = given.get("prompt"), given.get("prompt_embeds"), given.get("num_images_per_prompt", 1)
    prompts: list[str | None]
    if prompt is None:
        if embeddings is None:
            raise TypeError("The call has neither a prompt nor prompt_embeds, so that it cannot be told how many images are to be judged.")
        prompts = [None] * len(embeddings)
    else:
        prompts = [prompt] if isinstance(prompt, str) else [text if isinstance(text, str) else None for text in prompt]
    try:
        count = operator.index(each)
    except TypeError:
        raise TypeError(f"num_images_per_prompt is {shown(each)}; it must be a whole number.") from None
    return [p for p in prompts for _ in range(count)]


def guard(pipe: Any, config: GuardConfig | None = None) -> GuardedPipeline:
    """A guarded stand-in for ``pipe``; raises `TypeError` for a pipeline class sdguard does not support."""
    return GuardedPipeline(unguard(pipe), config)


def unguard(pipe: Any) -> Any:
    """The pipeline inside a guarded one, as it was; a pipeline that is not guarded is returned as it is."""
    return pipe.__wrapped__ if isinstance(pipe, GuardedPipeline) else pipe
