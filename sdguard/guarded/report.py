"""What the guard says of each image."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Verdict = Literal["clean", "flagged", "steered", "withheld"]


@dataclass
class GuardReport:
    """The guard's judgement of one image.

    Attributes:
        prompt: the prompt, where the pipeline was given text.
        row: place of the image in its batch.
        verdict: ``"clean"``: not flagged; ``"flagged"``: flagged and let through; ``"steered"``: flagged, turned away and
            verified; ``"withheld"``: its image was blanked.
        score: the cascade's score, higher = more memorized; in standard deviations of ordinary prompts up to its first bound. Without a
            profile the correlation of what the text draws from two noises.
        threshold: the score from which an image is flagged.
        p_value: conformal p-value of the score among ordinary prompts; None without a profile.
        signals: ``value`` and ``z`` score against ordinary prompts of each signal that was read.
        series: each free signal at every denoising step.
        extra_evaluations: denoiser evaluations spent on this image beyond the pipeline's own; a gradient counts as one more.
        flagged_at: index of the denoiser call at which it was flagged; above 0 for a text condition that came later, or for steering that
            was withdrawn on the run.
        steering: what was tried: ``attempts``, each with its ``method``, what it did, what verification found (None where it was not
            asked any more) and what it ``failed`` on; the ``limits`` that was held to; and
            ``passed``, the one that passed or None; where one did, the highest values that the run and its picture have had:
            ``recurrence_on_the_run`` and ``recurrence_from_less_noise`` (see `sdguard.geometry.reference.recurrence`), and
            ``resemblance_on_the_run``, the correlation with the picture that was steered away from.
        error: why the image could not be judged, if so.
        judged_by: ``"profile NAME"``; or, where no profile of the model was known, that, and by what it was judged then.
        limits: what moves the picture and is not judged, by name: pictures, masks, latents and callbacks that the call was given, and
            patches on the denoiser, which are read as they are when the run begins.
        id: the image's own, which no other has; the audit log has it too. Two reports that differ in it and in ``time`` alone are equal.
        time: when its run began, UTC, as RFC 3339 writes it.
        version: sdguard's.
        model: the model's name: its denoiser and a hash of all that a profile hangs on (`sdguard.decision.identity`).
        profile: the name of the profile that it was judged by; None without one.
        false_positive_rate: the one it was held to, of images: with ``rate_per="prompt"`` the prompt's, divided among its images. None
            without a profile, which alone can promise one.
        seed: of the generator that its noise came from, where that was handed to the call fresh; where a batch had one generator, that
            of the batch. Else None.
    """

    prompt: str | None
    row: int
    verdict: Verdict = "clean"
    score: float | None = None
    threshold: float | None = None
    p_value: float | None = None
    signals: dict[str, dict[str, float]] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=dict)
    extra_evaluations: int = 0
    flagged_at: int | None = None
    steering: dict[str, Any] | None = None
    error: str | None = None
    judged_by: str | None = None
    limits: list[str] = field(default_factory=list)
    id: str = field(default="", compare=False)
    time: str = field(default="", compare=False)
    version: str = ""
    model: str | None = None
    profile: str | None = None
    false_positive_rate: float | None = None
    seed: int | None = None

    @property
    def reason(self) -> str:
        """The verdict in one plain sentence."""
        return self.reason_with(texts=True)

    @property
    def reason_without_texts(self) -> str:
        """The same without anything of the prompt: no words that were put in its place, and of an error its kind alone."""
        return self.reason_with(texts=False)

    def reason_with(self, texts: bool) -> str:
        """The verdict in one plain sentence, with or without texts."""
        if self.error:
            error = self.error if texts else self.error.partition(":")[0]
            return f"Could not be judged ({error}){'; withheld' if self.verdict == 'withheld' else ''}."
        if self.score is None:
            return "Not judged."
        if self.p_value is None:
            pull = f"without a profile, its pictures from two noises correlate by {self.score:.2f}, where {self.threshold:.2f} is the limit"
        else:
            pull = f"score {self.score:+.1f}, threshold {self.threshold:+.1f} (p = {self.p_value:.3g})"
        match self.verdict:
            case "clean":
                return f"Nothing memorized: {pull}."
            case "flagged":
                came_back = any("_on_the_run" in name for name in self.steering or {})
                return f"Predicted to be memorized: {pull}; {'steering came back to it' if came_back else 'nothing was changed'}."
            case "steered":
                how = (self.steering or {})["passed"]
                way = "" if how["method"] == "rewording" else f"steered by {how['method']}"
                if "share" in how:
                    way += f", {how['share']:.0%} of the way to ordinary prompts"
                if "wording" in how:
                    lost = f" (without {', '.join(how['dropped'])})" if how.get("dropped") else ""
                    way += f"{', ' if way else ''}reworded" + (f" to “{how['wording']}”{lost}" if texts else "")
                unasked = "" if how.get("alignment", 0.0) is not None else "; whether it shows what was asked for is not known"
                return f"Predicted to be memorized: {pull}; {way}, verified ahead and on the picture{unasked}."
        tried = len((self.steering or {}).get("attempts", []))
        failed = f"{tried} correction{'s' * (tried > 1)} tried and none held; " if tried else ""
        return f"Predicted to be memorized: {pull}; {failed}withheld."

    def to_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> GuardReport:
        """The report in a row that holds its fields and others beside."""
        return cls(**{field.name: row[field.name] for field in fields(cls) if field.name in row})

    @classmethod
    def from_json(cls, text: str) -> GuardReport:
        """The report a JSON object of `to_json` stands for."""
        return cls(**json.loads(text))
