"""Hostile files and arguments, made from seeds: what is read is read rightly, and all else is refused in one sentence.

``python -m benchmarks fuzz --count N`` makes N cases in turn of each kind (`KINDS`): prompt files as many programs write them, misshapen or
damaged; profiles, parts of long work and logs of scores that were damaged or changed; full disks; arguments of whatever takes some
(`hostile_arguments`), on the embedded model. A case is known by its number: ``--first 41 --count 1`` makes case 41 again; ``--add`` puts a
run of cases behind those that were run before. Writes ``results/fuzz.json`` and the docs' sentence, and ends with exit code 1 if any
outcome is one of `BAD`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import resource
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import hostile_arguments
from benchmarks.documents import put
from benchmarks.hostile_arguments import shipped
from benchmarks.outcomes import (
    BAD,
    CRASHED,
    LEFT,
    READ,
    REFUSED,
    STRANGE,
    UNKNOWN,
    WRONG,
    Misread,
    Needless,
    NoSentence,
    checked_sentence,
    expect,
    refused_or,
)
from benchmarks.running import versions
from sdguard import Profile
from sdguard.decision.cache import name_of
from sdguard.decision.known_profiles import read_profile
from sdguard.decision.profile import FORMAT, ProfileError
from sdguard.decision.traffic import append_scores, logged_scores
from sdguard.files.atomic import CannotWrite, write_text
from sdguard.files.prompt_files import read_prompts, write_table
from sdguard.files.resumable import Parts, run_pieces

NAME = "fuzz"
RESULTS = Path(__file__).parent / "results"

#: what texts are made of.
SNIPPETS = (
    "a cat", "sitting", ",", ";", "\t", "\n", "\r", "\r\n", '"', '""', "'", " ", "  ", "\\", "/", "{", "}", "[", "=1+1", "007", "1e5",
    "-1", "NA", "null", "nan", "None", "true", "#", "\x00", "\x1f", "\x85", "\u2028", "é", "日本語", "قطة", "🐱", "e\u0301", "\u200f",
    "\ufffd", "x" * 300,
)  # fmt: skip


def text_of(rng: Random) -> str:
    """A text that is not blank."""
    return "".join(rng.choices(SNIPPETS, k=rng.randint(0, 6))) + rng.choice(("a dog", "7", "雨", '"q"', "NA"))


def damaged(content: bytes, rng: Random) -> bytes:
    """Bytes after an accident."""
    at, until = sorted(rng.choices(range(len(content) + 1), k=2))
    flipped = bytearray(content)
    flipped[at % len(content)] ^= 1 << rng.randrange(8)
    return rng.choice([
        content[:at],
        bytes(flipped),
        content[:at] + rng.randbytes(until - at) + content[until:],
        content[:at] + content[until:],
        content[:until] + content[at:],
        content[:at] + rng.randbytes(rng.randint(1, 40)) + content[at:],
        content[:at] + bytes(len(content) - at),
        rng.randbytes(rng.randint(0, 400)),
        content[:at] + b"[" * 100_000,
        content[:at] + b"9" * 5000 + content[at:],
        content + b"\n" + content[:at],
    ])  # fmt: skip


# prompt files


def csv_bytes(rows: Sequence[Sequence[Any]], separator: str, rng: Random) -> bytes:
    """Rows as some spreadsheet writes them."""
    file = io.StringIO()
    csv.writer(file, delimiter=separator, quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), lineterminator="\r\n").writerows(rows)
    mark = rng.choice(["", "\ufeff", "\n", f"sep={separator}\r\n"])
    return f"{mark}{file.getvalue()}".encode()


def prompt_file(folder: Path, rng: Random) -> tuple[Path, list[str]]:
    """A sound file of prompts in one of the many forms, and its prompts."""
    prompts = [text_of(rng) for _ in range(rng.randint(1, 8))]
    name, kind = (
        rng.choice(("prompt", "Caption", "TEXT", "text")),
        rng.choice(("txt", "csv", "tsv", "jsonl", "ndjson", "parquet", "written")),
    )
    columns: dict[str, Sequence[Any]] = {"id": range(len(prompts)), name: prompts, "url": [text_of(rng) for _ in prompts]}
    columns = {column: columns[column] for column in rng.sample(list(columns), 3) if column == name or rng.random() < 0.7}
    table = pd.DataFrame(columns)
    path = folder / f"set.{kind}"
    if kind == "txt":
        prompts = [" ".join(prompt.split()).lstrip("\ufeff") for prompt in prompts]
        path.write_bytes(rng.choice(["", "\ufeff"]).encode() + rng.choice(["\n", "\r\n"]).join(prompts).encode())
    elif kind in ("csv", "tsv"):
        separator = "\t" if kind == "tsv" else rng.choice(",;\t")
        if len(columns) == 1 and kind == "csv":
            separator = ","  # a header of one column names no other
        if separator == "\t":
            # a text over several lines with tabs in it is refused there, since such tables are mostly written without quotes
            columns = {column: [str(entry).replace("\t", " ") for entry in entries] for column, entries in columns.items()}
            prompts = list(columns[name])
        path.write_bytes(csv_bytes([list(columns), *zip(*columns.values(), strict=True)], separator, rng))
    elif kind in ("jsonl", "ndjson"):
        rows, plain = table.to_dict("records"), rng.random() < 0.5
        path.write_bytes(b"".join(json.dumps(row, ensure_ascii=plain).encode() + rng.choice([b"\n", b"\r\n", b"\n\n"]) for row in rows))
    elif kind == "parquet":
        index = rng.choice([None, rng.choices(range(3), k=len(table)), rng.choices("xyz", k=len(table))])
        table = table if index is None else table.set_index(pd.Index(index, name=rng.choice([None, "key"])))
        table.to_parquet(path, compression=rng.choice(["snappy", "none", "zstd"]), write_page_checksum=True)
    else:
        path = folder / f"set.{rng.choice(['csv', 'jsonl', 'parquet', 'CSV', 'Parquet'])}"
        write_table(table, path)
    if path.suffix.lower() != ".parquet" and rng.random() < 0.3:
        packed = path.with_name(f"{path.name}.{rng.choice(['gz', 'GZ'])}")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    return path, prompts


def sound_prompts(folder: Path, rng: Random) -> str:
    """A prompt file as programs write it: it has to be read rightly."""
    path, prompts = prompt_file(folder, rng)
    try:
        found = read_prompts(path)
    except ValueError as error:
        raise Needless(str(error)) from None
    expect(found.index.tolist(), list(range(len(prompts))))
    return expect(found.tolist(), prompts)


def misshapen_prompts(folder: Path, rng: Random) -> str:
    """A prompt file that tells too little, or two things: it has to be refused."""
    plain = str.maketrans(',;"', "   ")
    texts = [" ".join(text_of(rng).translate(plain).split()) or "x" for _ in range(rng.randint(1, 6))]
    rows = [f"{i},{text}" for i, text in enumerate(texts)]
    at, spoilt = rng.randrange(len(rows)), list(rows)
    spoilt[at] += rng.choice([", and more", ",", '\n"'])
    objects = [json.dumps({"prompt": text}) for text in texts]
    values = ("null", "5", "{}", "[]", '""', '" "', "NaN", '"\\ud83d"')
    no_object = rng.choice(["null", "5", '"a"', "[]", "{", "[" * 100_000, *(f'{{"prompt": {value}}}' for value in values), '{"other": 1}'])
    cases = {
        "more.csv": "\n".join(["id,prompt", *spoilt]),
        "fewer.csv": "\n".join(["id,prompt,seed", *(f"{row},1" for row in rows[:at]), *rows[at:]]),
        "headless.csv": "\n".join(rows),
        "alone.csv": "\n".join(f'"{row}"' for row in rows),
        "blank.csv": "\n".join(["id,prompt", *rows[:at], f"{at}, ", *rows[at:]]),
        "twice.csv": "\n".join([rng.choice(["prompt,prompt", "Prompt,prompt"]), *rows]),
        "header.csv": "\n".join([rng.choice(["NA,a cat", "#1,a cat", "-1,a cat"]), *rows]),
        "empty.csv": "\n".join(["prompt", *(f'"{text}"' for text in texts[:at]), "", *(f'"{text}"' for text in texts[at:])]),
        "raw.tsv": "\n".join(["prompt\turl", '"a\tu', *(f"{text}\tu" for text in texts), 'b"\tu']),
        "long.csv": "prompt," + "a" * 70_000 + "\n" + "\n".join(rows),
        "quotes.csv": "\n".join(["prompt" + ',"' * 9999, *rows]),
        "none.csv": "id,prompt\n",
        "object.jsonl": "\n".join([*objects[:at], no_object, *objects[at:]]),
        "array.jsonl": f"[{', '.join(objects)}]",
        "unknown.xlsx": "\n".join(rows),
        "plain.csv.gz": "\n".join(["id,prompt", *rows]),
        "plain.parquet": "\n".join(["id,prompt", *rows]),
    }
    name = rng.choice(list(cases))
    (folder / name).write_bytes(cases[name].encode())
    return refused_or(lambda: read_prompts(folder / name).tolist(), ValueError, lambda found: expect(found, None))


def damaged_prompts(folder: Path, rng: Random) -> str:
    """A prompt file after an accident; what has checksums is read rightly or refused."""
    path, prompts = prompt_file(folder, rng)
    path.write_bytes(damaged(path.read_bytes(), rng))
    known = path.suffix.lower() == ".gz"
    return refused_or(lambda: read_prompts(path).tolist(), ValueError, lambda found: expect(found, prompts) if known else UNKNOWN)


# what sdguard writes itself


def use(profile: Profile) -> str:
    """All that is asked of a profile without a model; raises whatever it raises."""
    name_of(profile)
    json.dumps(asdict(profile))
    profile.check(profile.model)
    _ = profile.p_value(0.5), profile.threshold(0.5), profile.frequency, profile.limits()
    for name in profile.series:
        profile.at(name, 500.0)
    return UNKNOWN


def damaged_profile(folder: Path, rng: Random) -> str:
    """A profile after an accident: it is refused, or what it was."""
    path, profile = folder / "profile.json", shipped()
    profile.save(path)
    path.write_bytes(damaged(path.read_bytes(), rng))
    return refused_or(lambda: read_profile(path), ProfileError, lambda found: expect(found, profile))


def changed_profile(folder: Path, rng: Random) -> str:
    """A profile of which somebody changed a value, without its hash: it is refused, or can be used."""
    fields = json.loads(json.dumps(asdict(shipped())))
    places = list(places_in(fields, 4))
    for _ in range(rng.randint(1, 2)):
        inner, key = rng.choice([place for place in places if place[1] != "format"])
        inner[key] = rng.choice(STRANGE)
    path = folder / "profile.json"
    path.write_text(json.dumps(fields))
    return refused_or(lambda: read_profile(path), ProfileError, use)


def places_in(value: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """The places of a value read from JSON, each as what holds it and its key there; of a long list some."""
    if depth and isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(0, len(value), max(1, len(value) // 3)):
            yield value, key
            yield from places_in(value[key], depth - 1)


def other_format(folder: Path, rng: Random) -> str:
    """A profile of another format, whatever else is in it: it is called that, and not damaged."""
    fields = {**asdict(shipped()), "format": rng.choice([n for n in range(-1, 99) if n != FORMAT]), rng.choice(("scores", "new")): 5}
    path = folder / "profile.json"
    path.write_text(json.dumps(fields))
    try:
        read_profile(path)
    except ProfileError as error:
        if "another version of sdguard" not in str(error):
            raise Misread(str(error)) from None
        return checked_sentence(error)
    raise Misread("it was read")


def damaged_part(folder: Path, rng: Random) -> str:
    """A part of long work after an accident: the work's result is what it would have been."""
    suffix = rng.choice((".json", ".parquet"))

    def work(number: int) -> Any:
        made = Random(number)
        rows = [{"row": number, "prompt": text_of(made), "score": made.random()} for _ in range(made.randint(1, 5))]
        return pd.DataFrame(rows) if suffix == ".parquet" else rows

    pieces = {f"{i}": rng.randrange(10**6) for i in range(3)}
    before = run_pieces(parts := Parts(folder, "work", pieces, suffix), pieces, work)
    path = parts.path(rng.choice(list(pieces)))
    assert path is not None
    path.write_bytes(damaged(path.read_bytes(), rng))
    after = run_pieces(Parts(folder, "work", pieces, suffix), pieces, work)
    plain = [[table.to_dict("records") if suffix == ".parquet" else table for table in results] for results in (before, after)]
    return expect(plain[1], plain[0])


def damaged_log(folder: Path, rng: Random) -> str:
    """A log of scores after an accident: it is refused by its line, or all that is read of it are scores."""
    path, profile = folder / "log.jsonl", shipped()
    append_scores(path, [{"profile": name_of(profile), "score": rng.gauss(0, 1)} for _ in range(120)])
    path.write_bytes(damaged(path.read_bytes(), rng))
    return refused_or(
        lambda: logged_scores(path, [profile])[1],
        ProfileError,
        lambda scores: UNKNOWN if all(isinstance(score, float) and abs(score) < float("inf") for score in scores) else expect(scores, None),
    )


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Within the block no file of this process can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def on_a_full_disk(folder: Path, rng: Random) -> str:
    """A file that does not fit: what was there stays, one sentence says so, and nothing else is left."""
    table = pd.DataFrame({"prompt": [text_of(rng) for _ in range(rng.randint(1, 400))]})
    parts = Parts(folder, "work", 1)
    writers: dict[Path, Callable[[Path], Any]] = {
        **{folder / f"a{suffix}": lambda path: write_table(table, path) for suffix in (".csv", ".jsonl", ".parquet")},
        folder / "profile.json": lambda path: shipped().save(path),
        folder / "a.txt": lambda path: write_text(path, "".join(table.prompt)),
        parts.path("one") or folder: lambda path: parts.keep("one", table.prompt.tolist()),
    }
    path = rng.choice(list(writers))
    path.parent.mkdir(exist_ok=True)
    path.write_text("before")
    try:
        with full_disk(int(10 ** rng.uniform(0, 5))):
            writers[path](path)
    except CannotWrite as error:
        expect(path.read_text(), "before")
        expect(str(path) in str(error), True)
        return checked_sentence(error)
    return expect(path.read_bytes() != b"before", True)


# running


KINDS: dict[str, Callable[[Path, Random], str]] = {
    "prompt file, sound": sound_prompts,
    "prompt file, misshapen": misshapen_prompts,
    "prompt file, damaged": damaged_prompts,
    "profile, damaged": damaged_profile,
    "profile, changed": changed_profile,
    "profile, another format": other_format,
    "part of long work, damaged": damaged_part,
    "log of scores, damaged": damaged_log,
    "a full disk": on_a_full_disk,
    **hostile_arguments.KINDS,
}


def run_case(number: int) -> dict[str, Any]:
    """One case by its number: its kind, its outcome, and what was wrong if that is `BAD`."""
    kind = list(KINDS)[number % len(KINDS)]
    what = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            outcome = KINDS[kind](folder, Random(number))
        except (Misread, Needless, NoSentence) as error:
            outcome, what = WRONG[type(error)], str(error)
        except Exception as error:  # what is looked for
            outcome, what = CRASHED, f"{type(error).__name__}: {error}"
        if left := [path.name for path in folder.rglob("*.partial")]:
            outcome, what = LEFT, ", ".join(left)
    return {"case": number, "kind": kind, "outcome": outcome, "what": what[:500]}


def summary(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a kind: how many of its cases had each outcome."""
    counts = {kind: Counter(case["outcome"] for case in cases if case["kind"] == kind) for kind in KINDS}
    outcomes = [outcome for outcome in (READ, REFUSED, UNKNOWN, *BAD) if any(count[outcome] for count in counts.values())]
    return [{"kind": kind, "cases": count.total(), **{outcome: count[outcome] for outcome in outcomes}} for kind, count in counts.items()]


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block nothing is logged of what is passed over."""
    logger = logging.getLogger("sdguard")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def added(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Results of cases that come right after those of other results, together; raises `typer.BadParameter` where they do not."""
    if (before["first"] + before["count"], before["versions"]) != (now["first"], now["versions"]):
        raise typer.BadParameter("the cases in the file do not end where these begin, or are of other versions", param_hint="--add")
    counts = [{name: value for name, value in row.items() if name != "kind"} for row in (*before["rows"], *now["rows"])]
    half, columns = len(now["rows"]), list(dict.fromkeys(name for row in counts for name in row))
    rows = [
        {"kind": row["kind"], **{name: one.get(name, 0) + other.get(name, 0) for name in columns}}
        for row, one, other in zip(now["rows"], counts[:half], counts[half:], strict=True)
    ]
    return {**now, "first": before["first"], "count": before["count"] + now["count"], "rows": rows, "bad": before["bad"] + now["bad"]}


def sentence(found: dict[str, Any]) -> str:
    """What the documentation says of the results."""
    totals = {name: sum(row.get(name, 0) for row in found["rows"]) for name in (READ, REFUSED, UNKNOWN)}
    wrong = len(found["bad"])
    return (
        f"Of {found['count']:,} hostile files, profiles, arguments and requests from seeds, in {len(found['rows'])} kinds, "
        f"{totals[READ]:,} were read rightly, {totals[REFUSED]:,} refused in one sentence, and {totals[UNKNOWN]:,} damaged ones read as "
        f"something whose truth nobody can tell; {wrong or 'none'} came out otherwise."
    )


def main(
    count: Annotated[int, typer.Option(min=1, help="How many cases.")] = 10_000,
    first: Annotated[int, typer.Option(min=0, help="The number of the first one.")] = 0,
    add: Annotated[bool, typer.Option("--add", help="Add to the results that are there, of the cases before these.")] = False,
    out: Annotated[Path, typer.Option(help="Where fuzz.json goes.")] = RESULTS,
) -> None:
    """Try hostile files and arguments."""
    path = out / f"{NAME}.json"
    before = json.loads(path.read_text()) if add else None
    with quiet():
        cases = [run_case(number) for number in track(range(first, first + count), NAME)]
    rows, bad = summary(cases), [case for case in cases if case["outcome"] in BAD]
    written: dict[str, Any] = {"first": first, "count": count, "rows": rows, "bad": bad, "versions": versions()}
    written = added(before, written) if before else written
    write_text(path, json.dumps(written, indent=1) + "\n")
    if out == RESULTS:
        put(NAME, sentence(written))
    table = Table(*written["rows"][0], title=f"{written['count']} cases from number {written['first']}")
    for row in written["rows"]:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    for case in bad:
        Console().print(f"case {case['case']}, {case['kind']}: {case['outcome']}: {case['what']}", markup=False, highlight=False)
    if bad:
        raise typer.Exit(1)
