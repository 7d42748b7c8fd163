"""Cures: steering measured on several models that memorize, with no network from outside.

``python -m benchmarks cures --models DIR [--models DIR ...]`` takes directories of the form of `benchmarks.models`; the embedded model
always takes part. Of each model, memorized captions whose picture is a memorized one and as many ordinary ones are drawn

* unguarded;
* under the guard as a user has it, from text and from embeddings alone (``prompt_embeds``);
* under every steering method and baseline alone, always on and nothing verified (the memorized ones, from text).

Copies are told in latents (`benchmarks.models.labelled`). Whether a picture that is no memorized one any more shows what its caption is
about is asked of the model itself (`benchmarks.subjects`); never-seen captions of the same make, unguarded, say what is to be expected.

Everything is kept in parts (`sdguard.files.resumable`). Writes ``results/cures.json`` (the table) and ``cures.parquet`` (a row a sample and
run: numbers, no caption), and a contact sheet a model under the working folder, which is not to be published.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import transformers
import typer
from PIL import Image
from torch import Tensor

import sdguard
from benchmarks import subjects
from benchmarks.leave_one_out import shipped_prompts
from benchmarks.models import Model, development_models, embedded_model, labelled, pictures, read_model, unpacked
from benchmarks.running import versions
from benchmarks.steering import Always, alone
from sdguard import GuardConfig, Profile
from sdguard.cli.errors import one_sentence
from sdguard.decision.calibration import calibrate, evenly
from sdguard.decision.profile import digest_of
from sdguard.denoiser.install import watched
from sdguard.denoiser.text_encoding import Encoder
from sdguard.files.atomic import write_text
from sdguard.files.inputs import BadInput
from sdguard.files.processes import processes
from sdguard.files.prompt_files import write_table
from sdguard.files.resumable import measured, parts_folder
from sdguard.steering import BASELINES, METHODS, Method

NAME = "cures"
BATCH = 20
#: channel-centred correlation with a memorized picture over which a picture is one, whatever the criterion of copies says.
RESEMBLES = 0.9
#: among how many subjects a picture's own has to be found.
SUBJECTS = 24
#: sdguard's packages and modules that what is measured hangs on.
CODE = ("correction", "decision", "denoiser", "geometry", "guarded", "observation", "signals", "steering")
#: samples on a contact sheet.
SHEET = 16
UNGUARDED, GUARD, EMBEDDINGS, NEVER_SEEN = "unguarded", "guard", "guard, embeddings alone", "never seen, unguarded"

Draw = Callable[[pd.DataFrame], pd.DataFrame]


def chosen(drawn: pd.DataFrame, count: int) -> pd.DataFrame:
    """The samples that take part: a row each, ``caption``, ``seed``, ``role``, ``case``, ``reps``; at most ``count`` of a role, evenly.

    One a caption. Memorized: the first seed that gives a memorized picture, and no templates, whose captions share theirs. Never seen and
    ordinary: the first seed.

    Args:
        drawn: what `benchmarks.models.pictures` says of a model.
    """
    memorized = (drawn.role == "memorized") & ~drawn.group.str.startswith("template") & is_memorized(drawn)
    found = []
    for of_role in (memorized, drawn.role == "ordinary", drawn.role == "never seen"):
        first = drawn[of_role].drop_duplicates("caption")
        found.append(first.iloc[evenly(range(len(first)), min(count, len(first)))])
    return pd.concat(found, ignore_index=True)[["caption", "seed", "role", "case", "reps", "latents"]]


def is_memorized(labels: pd.DataFrame) -> pd.Series:
    """Which pictures are memorized ones, by either criterion."""
    return labels["copy"] | (labels.resembles > RESEMBLES)


def profile_file(model: Model, prompts: Sequence[str], work: Path) -> Path:
    """The file of the model's profile by ``prompts``, made once and kept under ``work``."""
    key = digest_of([json.dumps(model.about), *prompts, code_digest()])
    path = work / f"profile-{model.name}-{key[:12]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        state = processes()
        profile = calibrate(model.pipe, list(prompts), work=parts_folder(path), state=state, keep_work=True)
        if state.is_main_process:
            profile.save(path)
        state.wait_for_everyone()
        shutil.rmtree(parts_folder(path), ignore_errors=True)
    return path


@functools.cache
def code_digest() -> str:
    """A hash of the source of `CODE`, as it is when it is first asked for: what was measured of another is measured again."""
    package = Path(sdguard.__file__).parent
    files = [path for room in CODE for path in (sorted((package / room).rglob("*.py")) or [package / f"{room}.py"])]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def call(pipe: Any, inputs: Mapping[str, Any], seeds: Sequence[int], setting: Mapping[str, Any]) -> Any:
    """The pipeline's output in latents, a seed an image."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return pipe(**inputs, generator=generators, output_type="latent", **setting)


def as_rows(latents: Tensor, **columns: Any) -> pd.DataFrame:
    """Latents as fp32 bytes, a row each, and what else is known of them."""
    return pd.DataFrame({"latents": [row.cpu().float().numpy().tobytes() for row in latents], **columns})


def from_rows(latents: Sequence[bytes], like: Tensor) -> Tensor:
    """The inverse of `as_rows`, ``[n, C, h, w]``, of the shape of ``like``'s."""
    return torch.from_numpy(np.stack([np.frombuffer(row, np.float32) for row in latents])).clone().view(-1, *like.shape[1:])


def as_embeddings(pipe: Any, texts: list[str]) -> dict[str, Tensor]:
    """The arguments by which a pipeline's call takes ``texts`` as embeddings."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, subjects.encoded(pipe, texts, guided=True), strict=False))


def unguarded(model: Model, part: pd.DataFrame) -> pd.DataFrame:
    """A batch of samples as they come."""
    latents = call(model.pipe, {"prompt": part.caption.tolist()}, part.seed, model.setting).images
    return as_rows(latents, verdict="clean", evaluations=0.0)


def under_guard(model: Model, profile: Profile, embeddings: bool, part: pd.DataFrame) -> pd.DataFrame:
    """A batch of samples under the guard as a user has it, called with their texts or with ``embeddings`` alone."""
    texts = part.caption.tolist()
    inputs: dict[str, Any] = {"prompt": texts}
    if embeddings:
        inputs = as_embeddings(model.pipe, texts)
    output = call(sdguard.guard(model.pipe, GuardConfig(profile=profile)), inputs, part.seed, model.setting)
    return as_rows(
        output.images,
        verdict=[report.verdict for report in output.guard],
        evaluations=[float(report.extra_evaluations) for report in output.guard],
    )


def under_method(model: Model, profile: Profile, method: Method, part: pd.DataFrame) -> pd.DataFrame:
    """A batch of samples under one method, always on and nothing verified: ``applied``, or ``clean`` where it has no correction."""
    texts = part.caption.tolist()
    watcher = Always(partial(alone, method, model.pipe, profile, texts))
    with watched(Encoder(model.pipe), watcher):
        latents = call(model.pipe, {"prompt": texts}, part.seed, model.setting).images
    verdicts = ["applied" if applied else "clean" for applied in watcher.applied]
    return as_rows(latents, verdict=verdicts, evaluations=[float(n) for n in watcher.evaluations.tolist()])


def subjects_shown(model: Model, asked: Sequence[str], latents: Mapping[str, bytes], part: pd.DataFrame) -> pd.DataFrame:
    """At which place each picture's own subject comes (`subjects.places`); ``latents`` by the ``picture``'s digest."""
    x = from_rows([latents[digest] for digest in part.picture], model.targets)
    return part[[]].assign(place=subjects.places(model.pipe, x, part.offered.map(json.loads).tolist(), asked).tolist())


@dataclass(frozen=True)
class Measured:
    """What is known of a model: ``samples``, a row a sample of `chosen`; ``runs``, by name a row each of those it was made of.

    A run's rows say what `as_rows` and `benchmarks.models.labelled` do, and: ``row`` in ``samples``; ``was_copy``, of the unguarded
    picture; ``identical``, whether it is that picture, bit by bit; ``memorized``, shown and either kind of memorized picture; ``place`` of
    its subject among so many ``subjects``, nan where it was not asked for.
    """

    model: Model
    samples: pd.DataFrame
    subjects: list[str]
    frames: list[str]
    runs: dict[str, pd.DataFrame]
    about: dict[str, Any]


def measure(model: Model, prompts: str, count: int, work: Path, only: Sequence[str] = ()) -> Measured:
    """Draw and judge everything on a model, or find it among the parts under ``work``.

    Args:
        prompts: what the profile is made of, ``"own"`` ordinary captions or those ``"shipped"``.
        count: memorized captions at most, and ordinary and never-seen ones.
        only: these runs and the unguarded one; by default all.
    """
    samples = chosen(pictures(model, work), count)
    path = profile_file(model, model.ordinary if prompts == "own" else shipped_prompts(), work)
    profile = Profile.load(path)
    made = model.cases[model.cases.role != "ordinary"].drop_duplicates("caption")
    subject_of = dict(zip(made.caption, subjects.subjects(made.caption.tolist()), strict=True))
    ordinary = [*model.cases.caption[model.cases.role == "ordinary"], *model.ordinary]
    asked = subjects.frames(ordinary, made.caption, subject_of.values())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    profiled = {**model.about, "profile": digest, "code": code_digest()}
    both, memorized = (samples[samples.role.isin(roles)] for roles in (["memorized", "ordinary"], ["memorized"]))
    work_on: dict[str, tuple[Draw, pd.DataFrame, Mapping[str, Any]]] = {
        UNGUARDED: (partial(unguarded, model), both, model.about),
        GUARD: (partial(under_guard, model, profile, False), both, profiled),
        EMBEDDINGS: (partial(under_guard, model, profile, True), both, profiled),
    }
    for method in {**METHODS, **BASELINES}.values():
        work_on[method.name] = (partial(under_method, model, profile, method), memorized, profiled)
    runs = {}
    for name, (draw, rows, about) in work_on.items():
        if name == UNGUARDED or not only or name in only:
            found = measured(f"cures-{name}-{model.name}", rows[["caption", "seed"]], draw, work, about, BATCH)
            runs[name] = found[["latents", "verdict", "evaluations"]].assign(row=rows.index)
    never_seen = samples[samples.role == "never seen"]
    seen = unpacked(never_seen.latents, model.targets)
    runs[NEVER_SEEN] = as_rows(seen, verdict="clean", evaluations=0.0, row=never_seen.index)
    found = Measured(model, samples.drop(columns="latents"), [subject_of.get(c, "") for c in samples.caption], asked, runs, profiled)
    return judged(labelled_runs(found), work)


def labelled_runs(found: Measured) -> Measured:
    """The runs with what their pictures are, compared with the unguarded ones."""
    base = found.runs[UNGUARDED].set_index("row")
    was_copy = labelled(from_rows(base.latents, found.model.targets), found.model.targets, found.model.families)["copy"].to_numpy()
    runs = {}
    for name, run in found.runs.items():
        latents = from_rows(run.latents, found.model.targets)
        run = run.join(labelled(latents, found.model.targets, found.model.families))
        run["memorized"] = is_memorized(run) & (run.verdict != "withheld")
        run["role"] = found.samples.role[run.row].to_numpy()
        if name == NEVER_SEEN:
            run["was_copy"], run["identical"] = run["copy"], True
        else:
            run["was_copy"] = pd.Series(was_copy, base.index)[run.row].to_numpy()
            run["identical"] = (run.latents.to_numpy() == base.latents[run.row].to_numpy()).tolist()
        runs[name] = run
    return Measured(**{**vars(found), "runs": runs})


def judged(found: Measured, work: Path) -> Measured:
    """The runs with the `place` of each picture's own subject among as many others, of memorized and never-seen captions' pictures.

    Of the unguarded pictures, all; else of those that are shown and no memorized ones.
    """
    groups = {role: found.samples.index[found.samples.role == role] for role in ("memorized", "never seen")}
    about = {role: [found.subjects[row] for row in rows] for role, rows in groups.items()}
    count = min(SUBJECTS, *(len(set(each)) for each in about.values()))
    offered = {row: each for role, rows in groups.items() for row, each in zip(rows, subjects.choices(about[role], count), strict=True)}
    runs = {}
    for name, run in found.runs.items():
        wanted = run.row.isin(list(offered)) & ((name in (UNGUARDED, NEVER_SEEN)) | (run.verdict != "withheld") & ~run.memorized)
        rows = run[wanted]
        digests = [hashlib.sha256(latents).hexdigest()[:16] for latents in rows.latents]
        asked = pd.DataFrame({"picture": digests, "offered": [json.dumps(offered[row]) for row in rows.row]})
        look = partial(subjects_shown, found.model, found.frames, dict(zip(digests, rows.latents, strict=True)))
        run = run.assign(place=math.nan)
        if len(rows):
            settings = {**found.model.about, "frames": json.dumps(found.frames), "levels": json.dumps(subjects.LEVELS)}
            placed = measured(f"cures-shown-{name}-{found.model.name}", asked, look, work, settings, BATCH)
            run.loc[wanted, "place"] = placed.place.to_numpy(float)
        runs[name] = run.assign(subjects=count)
    return Measured(**{**vars(found), "runs": runs})


@dataclass(frozen=True)
class Share:
    """A share, how many it is of, and its standard error: of one more success and one more failure, so that none is sure of 0 or 1."""

    share: float
    of: int
    error: float

    @classmethod
    def of_true(cls, found: Any) -> Share:
        """The share of true ones; nan of none."""
        hits = np.asarray(found, bool)
        count = len(hits)
        expected = (hits.sum() + 1) / (count + 2)
        error = math.sqrt(expected * (1 - expected) / count) if count else math.nan
        return cls(float(hits.mean()) if count else math.nan, count, error)

    def __str__(self) -> str:
        return "-" if not self.of else f"{self.share:.2f}"

    @property
    def in_full(self) -> str:
        """With its error, and how many it is of."""
        return "-" if not self.of else f"{self.share:.2f}±{self.error:.2f} of {self.of}"


def summary(run: pd.DataFrame) -> dict[str, Any]:
    """One row of the table for one model: what became of the memorized samples of a run, and of its ordinary ones.

    * ``copies``: of those that were copies and ``memorized``: of all, the share that is shown and still one; ``called steered``: how many
      of the latter the guard calls steered; ``withheld``.
    * ``aligned``, ``in three``: of the shown ones that are no memorized pictures, how many show their subject: at the first place, among
      the first three; ``cured``: the share of all that is shown, none, and shows it. ``aligned, all`` is of all that were asked for,
      memorized or not. Each among so many ``subjects``.
    * ``evaluations``: extra ones, mean of those the guard flagged or the method applied to.
    * ``ordinary flagged``, and ``identical``: of the ordinary ones that were not flagged, bit by bit.
    """
    of = run[run.role != "ordinary"]
    shown = of[(of.verdict != "withheld") & ~of.memorized]
    acted = of[of.verdict != "clean"]
    ordinary = run[run.role == "ordinary"]
    flagged = ordinary.verdict != "clean"
    return {
        "copies": Share.of_true((of["copy"] & (of.verdict != "withheld"))[of.was_copy]),
        "memorized": Share.of_true(of.memorized),
        "called steered": int((of.memorized & (of.verdict == "steered")).sum()),
        "withheld": Share.of_true(of.verdict == "withheld"),
        "acted on": Share.of_true(of.verdict != "clean"),
        "aligned": Share.of_true(shown.place == 0),
        "in three": Share.of_true(shown.place < 3),
        "aligned, all": Share.of_true(of.place.dropna() == 0),
        "in three, all": Share.of_true(of.place.dropna() < 3),
        "cured": Share.of_true((of.verdict != "withheld") & ~of.memorized & (of.place == 0)),
        "subjects": int(run.subjects.max()),
        "evaluations": float(acted.evaluations.mean()) if len(acted) else 0.0,
        "ordinary flagged": Share.of_true(flagged),
        "identical": Share.of_true(ordinary.identical[~flagged]),
    }


def table(models: Mapping[str, Mapping[str, pd.DataFrame]]) -> list[dict[str, Any]]:
    """A row a run, and in it a summary a model."""
    names = dict.fromkeys(name for runs in models.values() for name in runs)
    return [{"run": name} | {model: summary(runs[name]) for model, runs in models.items() if name in runs} for name in names]


#: of a summary, what is shown of every run, and of the guard's.
SHOWN = ("copies", "memorized", "called steered", "withheld", "cured", "aligned", "in three", "evaluations")
ORDINARY = ("ordinary flagged", "identical")
#: shown with its error, since few pictures may be left to ask of.
ASKED = ("cured", "aligned", "in three")


def readable(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as people read it: a group of columns a model; what ordinary prompts pay; how much alignment is to be expected."""

    def cell(summary: Mapping[str, Any], name: str) -> str:
        value = summary[name]
        if isinstance(value, Share):
            return value.in_full if name in ASKED else str(value)
        return str(value) if isinstance(value, int) else f"{value:.1f}"

    def shown(names: Sequence[str], some: Sequence[Mapping[str, Any]]) -> str:
        cells = {row["run"]: {(model, name): cell(row[model], name) for model in row if model != "run" for name in names} for row in some}
        return pd.DataFrame.from_dict(cells, orient="index").fillna("-").to_string(line_width=10_000)

    def expected(row: Mapping[str, Any], model: str) -> str:
        asked = row[model]
        first, among_three = asked["aligned, all"].in_full, asked["in three, all"].in_full
        return f"all pictures, {row['run']}, {model}: aligned {first}, in three {among_three}, among {asked['subjects']} subjects"

    guards = [row for row in rows if row["run"] in (GUARD, EMBEDDINGS)]
    plain = [expected(row, model) for row in rows if row["run"] in (UNGUARDED, NEVER_SEEN) for model in row if model != "run"]
    return "\n\n".join([shown(SHOWN, rows), *([shown(ORDINARY, guards)] if guards else []), "\n".join(plain)])


@torch.no_grad()
def contact_sheet(found: Measured, path: Path) -> None:
    """Rows: unguarded, under the guard from text and from embeddings (what was withheld is grey), nearest memorized picture."""
    of = found.runs[UNGUARDED].role == "memorized"
    show = np.flatnonzero(of)[:SHEET]
    if not len(show):
        return
    vae, targets = found.model.pipe.vae, found.model.targets
    names = [name for name in (UNGUARDED, GUARD, EMBEDDINGS) if name in found.runs]
    rows = [from_rows(found.runs[name].latents.iloc[show], targets) for name in names]
    rows.append(targets[found.runs[UNGUARDED].nearest.iloc[show].tolist()])
    images = [vae.decode(row / vae.config.scaling_factor).sample.add(1).mul(127.5).clamp(0, 255).permute(0, 2, 3, 1) for row in rows]
    for name, image in zip(names, images, strict=False):
        image[torch.from_numpy((found.runs[name].verdict.iloc[show] == "withheld").to_numpy(copy=True))] = 127
    grid = torch.cat([torch.cat(list(row), dim=1) for row in images]).byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(path, quality=90)


def numbers(found: Measured) -> pd.DataFrame:
    """A row a sample and run; no caption, since those of a directory may not be ours to publish, and no picture."""
    samples = found.samples[["case", "reps", "seed"]]
    parts = [run.drop(columns="latents").join(samples, on="row").assign(run=name) for name, run in found.runs.items()]
    return pd.concat(parts, ignore_index=True).assign(model=found.model.name)


def main(
    models: Annotated[
        list[Path] | None, typer.Option(help="Model directories. [default: the zoo's and ../shared/models' that memorize]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(__file__).parent / "results",
    work: Annotated[Path, typer.Option(help="Where what is done is kept, so that a stopped run goes on.")] = Path("build/benchmarks"),
    samples: Annotated[int, typer.Option(min=1, help="Memorized captions a model, at most, and ordinary and never-seen ones.")] = 40,
    prompts: Annotated[
        str, typer.Option(help="What profiles are calibrated on: 'own' ordinary captions of each model, or 'shipped'.")
    ] = "own",
    only: Annotated[list[str] | None, typer.Option(help="These runs alone, and the unguarded one.")] = None,
) -> None:
    """Measure the guard's steering and every method alone on models that memorize; under 'accelerate launch', processes share the work."""
    transformers.logging.set_verbosity_error()
    with one_sentence():
        if prompts not in ("own", "shipped"):
            raise BadInput(f"--prompts is {prompts!r}; it must be 'own' or 'shipped'.")
        runs = (GUARD, EMBEDDINGS, *METHODS, *BASELINES)
        if unknown := [run for run in only or () if run not in runs]:
            raise BadInput(f"--only is {unknown[0]!r}; there are {', '.join(runs)}.")
        named = [*(read_model(folder) for folder in models or development_models()), embedded_model()]
        named = [model for model in named if "memorized" in set(model.cases.role)]
        if len({model.name for model in named}) < len(named):
            raise BadInput(f"Two models have the same name: {', '.join(model.name for model in named)}.")
        found = [measure(model, prompts, samples, work, only or ()) for model in named]
    if not processes().is_main_process:
        return
    rows = table({each.model.name: each.runs for each in found})
    counts = {each.model.name: {**each.about, "frames": len(each.frames), **each.samples.role.value_counts()} for each in found}
    about = {"prompts": prompts, "samples": samples, "models": counts, **versions()}
    out.mkdir(parents=True, exist_ok=True)
    write_table(pd.concat([numbers(each) for each in found], ignore_index=True), out / f"{NAME}.parquet")
    write_text(out / f"{NAME}.json", json.dumps({"about": about, "rows": rows}, indent=1, default=as_json))
    for each in found:
        contact_sheet(each, work / NAME / f"{each.model.name}.jpg")
    typer.echo(readable(rows))


def as_json(value: Any) -> Any:
    """What JSON itself cannot hold."""
    return asdict(value) if isinstance(value, Share) else int(value)
