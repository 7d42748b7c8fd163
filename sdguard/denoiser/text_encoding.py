"""The text encoders of a pipeline, as the guard uses them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sdguard.denoiser.families import default_of, family_of
from sdguard.denoiser.foreign import foreign_in, is_foreign, modules_in
from sdguard.denoiser.kept_state import left_alone
from sdguard.denoiser.latents import pack_condition
from sdguard.noise import generators_kept

#: the pipelines' attributes that hold text encoders.
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
#: arguments of a pipeline's call that its prompts are encoded with.
ENCODING = ("max_sequence_length", "clip_skip", "clean_caption", "complex_human_instruction", "text_encoder_out_layers")


@dataclass(frozen=True)
class Encoder:
    """The text encoders of a pipeline, as a running call of the pipeline uses them for its own prompts.

    Attributes:
        pipe: the pipeline.
        given: the arguments of its call.
    """

    pipe: Any
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """How the call has its prompts encoded."""
        scale = (self.given.get(family_of(self.pipe).scale) or {}).get("scale")
        ready = self.given.get("prompt_embeds") is not None  # which no layer of the encoder was skipped for here
        told = {name: default for name in ENCODING if (default := default_of(self.pipe, name)) is not None} | self.given
        names = [name for name in ENCODING if name in told and not (ready and name == "clip_skip")]
        return {"lora_scale": scale, **{name: told[name] for name in names}}

    def both(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Text condition of n texts, and of the unconditional prompt for each, ``[n, T (+ 1), E]``."""
        encoders = [part for name in ENCODERS if (part := getattr(self.pipe, name, None)) is not None]
        modules = [module for part in encoders for module in modules_in(part)]
        foreign = [*foreign_in(modules), *(of for of in [getattr(self.pipe, "encode_prompt", None)] if of and is_foreign(of))]
        with generators_kept(bool(foreign) or any(module.training for module in modules)), left_alone(foreign, modules):
            text, pooled, null, null_pooled = family_of(self.pipe).encode(self.pipe, texts, self.options)
        return pack_condition(text, pooled), pack_condition(null, null_pooled)

    def __call__(self, texts: list[str]) -> Tensor:
        """Text condition of n texts, ``[n, T (+ 1), E]``."""
        return self.both(texts)[0]

    def length(self, text: str) -> int:
        """Tokens of ``text``, begin and end token included, that fit into the text encoder's window."""
        tokenizer = self.pipe.tokenizer
        if hasattr(self.pipe, "maybe_convert_prompt"):  # textual inversion's tokens of several vectors
            text = self.pipe.maybe_convert_prompt(text, tokenizer)
        return min(len(tokenizer(text).input_ids), int(tokenizer.model_max_length))

    @property
    def pads_with_end(self) -> bool:
        """Whether what lies behind a prompt is filled with copies of the end token, by the only text encoder there is."""
        tokenizer = self.pipe.tokenizer
        alone = not family_of(self.pipe).beside and not getattr(tokenizer, "chat_template", None)  # behind which a message goes on
        return alone and bool(tokenizer.pad_token_id == tokenizer.eos_token_id)
