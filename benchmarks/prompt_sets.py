"""Published sets of memorized and ordinary prompts in one schema, and the embedded model's own.

``python -m benchmarks prompt-sets FOLDER`` reads every set of `SETS` that lies in a folder and prints its rows and near-duplicate clusters.
The sets are data of others and no part of this project; their paths are given. A file of one's own is read as well where it has the
column ``kind`` of the schema, and may have ``source``. The schema, one row a prompt:

| column | content |
|---|---|
| ``prompt`` | the text |
| ``set`` | name of the set |
| ``kind`` | ``verbatim``, ``template``, the embedded model's other kinds, ``memorized`` where the source tells none, ``ordinary`` |
| ``source`` | where an ordinary prompt comes from; empty for the others |
| ``cluster`` | label of its near-duplicates within the set (`near_duplicates`); in the embedded model's, of the captions of one picture |
| ``target`` | URL or path of the training image it belongs to; empty where there is none |
| ``repetitions`` | how often training showed it; missing where that is not known |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.table import Table
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer

from benchmarks.zoo.world import Kind
from sdguard import testbed
from sdguard.files.prompt_files import prompt_column, read_table

COLUMNS = ("prompt", "set", "kind", "source", "cluster", "target", "repetitions")
#: rows whose overlap with all others is held in memory at a time.
BLOCK = 256


@dataclass(frozen=True)
class PromptSet:
    """A published set: what its file does not say itself.

    Attributes:
        kind: of all its prompts, or the name of the column that tells it.
        kinds: what that column's entries mean.
        source: where its ordinary prompts come from.
        origin: repository the file was taken from.
        licence: under which it is published.
        column: that holds the prompts; by default as in `sdguard.files.prompt_files.prompt_column`.
        target: the column that refers to the training image, if any.
    """

    kind: str
    kinds: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    origin: str = ""
    licence: str = ""
    column: str | None = None
    target: str | None = None


#: a file that says itself what its prompts are.
KINDS = (*get_args(Kind), "memorized", "ordinary")
OWN = PromptSet("kind", {kind: kind for kind in KINDS}, "ordinary prompt")

LOCALIZING, MEMATTN = "ml-research/localizing_memorization_in_diffusion_models", "renjie3/MemAttn"
IMAGE_KINDS = {"VM": "verbatim", "TM": "template"}

#: file name -> set; origins and licences are those recorded where the files lie.
SETS: dict[str, PromptSet] = {
    "memorized_laion_prompts.csv": PromptSet("type", IMAGE_KINDS, "", LOCALIZING, "MIT", "Caption", "URL"),
    "unmemorized_laion_prompts.csv": PromptSet("ordinary", {}, "web caption", LOCALIZING, "MIT", "Caption", "URL"),
    "coco2014_val_10000.csv": PromptSet("ordinary", {}, "COCO", LOCALIZING, "MIT; captions CC-BY-4.0", "Caption"),
    "sd2_mem219.txt": PromptSet("memorized", {}, "", MEMATTN, "MIT"),
    "group_nomem500.txt": PromptSet("ordinary", {}, "generated", MEMATTN, "MIT"),
}


def read_set(path: Path, about: PromptSet | None = None) -> pd.DataFrame:
    """A set in the schema of this module, in the order of its file.

    Args:
        path: a text, CSV, JSON lines or parquet file.
        about: what the file does not say; by default what `SETS` has under its name, or `OWN`.

    Raises:
        ValueError: the file cannot be used, or nothing is known about it; one sentence naming the file and what is wrong.
    """
    table = read_table(path)
    about = about or SETS.get(path.name, OWN)
    if about is OWN and "kind" not in table:
        raise ValueError(f"{path} is none of the known sets ({', '.join(SETS)}) and has no column 'kind' that says what it holds.")
    prompts = prompt_column(table, path, about.column)
    if missing := [name for name in (about.target, about.kind if about.kinds else None) if name and name not in table]:
        raise ValueError(f"{path} has no column {missing[0]!r}.")
    kind = table[about.kind].map(about.kinds) if about.kinds else pd.Series(about.kind, table.index)
    if kind.isna().any():
        row = kind.index[kind.isna()][0]
        raise ValueError(
            f"{path} has {table[about.kind][row]!r} in row {row} of column {about.kind!r}: not one of {', '.join(about.kinds)}."
        )
    source = table["source"] if about is OWN and "source" in table else about.source
    return pd.DataFrame(
        {
            "prompt": prompts,
            "set": path.stem,
            "kind": kind,
            "source": np.where(kind == "ordinary", source, ""),
            "cluster": near_duplicates(prompts.tolist()),
            "target": table[about.target] if about.target else "",
            "repetitions": pd.Series(pd.NA, table.index, dtype="Int64"),
        }
    ).reset_index(drop=True)


def embedded_set() -> pd.DataFrame:
    """The captions of the embedded model in the schema of this module; never-seen captions of the same make are ordinary ones.

    Its clusters are the groups its world was drawn in. By their words all captions, which come of one grammar, are one cluster.
    """
    table = pd.read_parquet(testbed.path() / "prompts.parquet")
    sources = {"unseen": "never-seen caption of the same make", "ordinary": "ordinary caption"}
    return pd.DataFrame(
        {
            "prompt": table.text,
            "set": "embedded",
            "kind": table.kind.replace("unseen", "ordinary"),
            "source": table.kind.map(sources).fillna(""),
            "cluster": table.group,
            "target": [str(testbed.path() / targets[0]) if len(targets) else "" for targets in table.targets],
            "repetitions": table.repetitions.astype("Int64"),
        }
    )


def words(prompt: str) -> list[str]:
    """Maximal runs of letters, digits and underscores in the lower-cased prompt; one empty word where there are none."""
    return re.findall(r"\w+", prompt.lower()) or [""]


def near_duplicates(prompts: Sequence[str]) -> np.ndarray:
    """Label of the cluster of each of n prompts, ``[n]``, integers from 0: two prompts are linked where the Jaccard index of their sets of
    `words` is at least .3, and a cluster is whatever links join (single linkage).

    Labels count clusters by their alphabetically first prompt, so that they do not depend on the order of the prompts. Memory grows with
    n times `BLOCK`, time with n squared.
    """
    holds = CountVectorizer(analyzer=words, binary=True, dtype=np.int32).fit_transform(prompts)
    count, sizes = len(prompts), np.diff(holds.indptr)
    component = np.arange(count)
    for start in range(0, count, BLOCK):
        shared = (holds[start : start + BLOCK] @ holds.T).tocoo()
        one, other = shared.row + start, shared.col
        linked = 10 * shared.data >= 3 * (sizes[one] + sizes[other] - shared.data)
        # what earlier blocks have joined is kept as one link a prompt, to the prompt its component is named after
        links = np.concatenate([one[linked], np.arange(count)]), np.concatenate([other[linked], component])
        _, labels = connected_components(coo_array((np.ones(len(links[0]), bool), links), shape=(count, count)), directed=False)
        component = np.unique(labels, return_index=True)[1][labels]
    first = pd.Series(list(prompts)).groupby(component).transform("min")
    return pd.factorize(first, sort=True)[0]


def main(folder: Annotated[Path, typer.Argument(help="Where the published sets lie.")]) -> None:
    """Print rows and near-duplicate clusters of the sets in a folder, and of the embedded model's."""
    shown = Table("set", "rows", "clusters", "kinds", "source", "licence")
    here = {name: about for name, about in SETS.items() if (folder / name).exists()}
    for table, licence in [*((read_set(folder / name), about.licence) for name, about in here.items()), (embedded_set(), "Apache-2.0")]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in table.kind.value_counts().items())
        sources = ", ".join(filter(None, table.source.unique()))
        shown.add_row(table["set"].iloc[0], str(len(table)), str(table.cluster.nunique()), kinds, sources, licence)
    Console().print(shown)
