"""How often a GPU would be waited for in a run of which nothing is flagged, beyond the pipeline's own waits: a few times in all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import LENIENT, build, call
from synchronisations import counted

import sdguard
from sdguard.decision.cascade import Cascade, Scale, Stage
from sdguard.decision.identity import identity
from sdguard.decision.profile import Profile
from sdguard.denoiser.families import _told, denoiser_of
from sdguard.denoiser.reference_call import _null_conditions

#: waits a run, those of telling which model it is among them.
LIMIT = 6
#: those that begin with the reference call, one told its guidance, and some that begin elsewhere.
FAMILIES = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "LatentConsistencyModelPipeline",
    "StableDiffusionImg2ImgPipeline",
    "FluxKontextPipeline",
    "FluxFillPipeline",
    "ChromaPipeline",
    "Flux2KleinPipeline",
    "PixArtSigmaPipeline",
    "SanaPipeline",
)


def profile(pipe: Any) -> Profile:
    """One under which nothing is flagged by the guidance norm."""
    norms = [50.0 + i for i in range(200)]
    values = {**LENIENT, "guidance_norm": norms, "reference_agreement": [0.99] * 100}
    cascade = Cascade((Stage(("guidance_norm",), ("guidance_norm",), None),), {"guidance_norm": Scale(False, 0.0, 1.0)})
    return Profile(identity(pipe), cascade, norms, values)


def waits(pipe: Any, run: Callable[[Any], Any], guarded: Any) -> tuple[int, dict[str, int], Any]:
    """What a guarded run waits for beyond its unguarded twin, by place too, and what it gives.

    What is done once, such as encoding the empty prompt, is done before.
    """
    _null_conditions.pop(denoiser_of(pipe), None)  # of runs that were not counted: these would not be known to lie on the device
    _told.clear()
    with counted(pipe, denoiser_of(pipe)) as found:
        run(pipe)
        run(guarded)
        found.clear()
        output = run(guarded)
        ours = found.copy()
        found.clear()
        run(pipe)
        return ours.total() - found.total(), dict(ours - found), output


@pytest.mark.parametrize("steps", [6, 30])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_clean_run_waits_a_few_times_however_long_it_is(name: str, steps: int, embedded: Any) -> None:
    pipe = build(name, embedded.tokenizer)
    guarded = sdguard.guard(pipe, sdguard.GuardConfig(profile=profile(pipe)))
    count, places, output = waits(pipe, lambda of: call(of, ["a cat"], num_inference_steps=steps), guarded)
    assert [report.verdict for report in output.guard] == ["clean"]
    assert count <= LIMIT, str(places)


@pytest.mark.parametrize("steps", [6, 30])
def test_so_does_one_of_the_embedded_model(steps: int, embedded: Any) -> None:
    def run(of: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return of("a zebra in snow", num_inference_steps=steps, output_type="latent", generator=generator)

    count, places, output = waits(embedded, run, sdguard.guard(embedded))
    (report,) = output.guard
    assert (report.verdict, report.extra_evaluations, len(report.series["guidance_norm"])) == ("clean", 0, steps)
    assert count <= LIMIT, str(places)
