"""Prompt files and published prompt sets: what is read, what is refused, and near-duplicate clusters."""

import re
from pathlib import Path
from random import Random

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.prompt_sets import COLUMNS, KINDS, SETS, PromptSet, embedded_set, near_duplicates, read_set
from sdguard.files.prompt_files import read_prompts, read_table, write_table

PUBLISHED = Path(__file__).parents[3] / "shared" / "prompts"
PROMPTS = ["a cat; a dog, both", 'the "NA" in snow', "null"]


def frame(name: str = "caption") -> pd.DataFrame:
    return pd.DataFrame({"index": [7, 8, 9], name: PROMPTS, "url": ["u7", "u8", "u9"]})


@pytest.mark.parametrize("name", ["prompt", "caption", "text", "TEXT", "Caption"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_each_format_gives_its_prompts_as_they_are(suffix: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"set.{suffix}"
    write_table(frame(name), path)
    assert read_prompts(path).tolist() == PROMPTS
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_is_read_whatever_separates_it(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    frame().to_csv(path, sep=separator)
    assert read_prompts(path).tolist() == PROMPTS


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "set.txt"
    path.write_text("\ufeffa cat\n\n  a dog \u2028 in two parts\r\nNA", encoding="utf-8")
    prompts = read_prompts(path)
    assert prompts.tolist() == ["a cat", "a dog \u2028 in two parts", "NA"]
    assert prompts.index.tolist() == [0, 2, 3]


def test_the_column_may_be_named_or_be_the_only_one_of_text(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    frame("anything").to_csv(path, index=False)
    assert read_prompts(path, "url").tolist() == ["u7", "u8", "u9"]
    frame("anything").drop(columns="url").to_csv(path, index=False)
    assert read_prompts(path).tolist() == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "column", "says"),
    [
        ("none.csv", None, None, "none.csv cannot be read: No such file or directory."),
        (
            "set.xlsx",
            "x",
            None,
            "set.xlsx has a suffix that is not known: .txt, .csv, .tsv, .jsonl, .ndjson, .parquet are, and .gz of those that are text.",
        ),
        ("set.txt", "\n \n", None, "set.txt holds no prompt."),
        ("set.csv", "caption\n", None, "set.csv holds no prompt."),
        ("set.csv", "", None, "set.csv is no .csv file that can be read: No columns to parse from file."),
        ("set.csv", "a,b\nx,y\n", None, "set.csv does not tell which column holds the prompts: it has a, b; name one."),
        ("set.csv", "a,b\nx,y\n", "c", "set.csv has no column 'c': it has a, b."),
        ("set.csv", "caption,b\nx,y\n,z\n", None, "set.csv holds no text in row 1 of column 'caption': --skip-empty leaves such rows out."),
        ("set.csv", 'caption\n"x\n', None, "set.csv is no .csv file that can be read:"),
        ("set.jsonl", '{"caption": "x"}\n{"caption": 3}\n', None, "set.jsonl holds no text in row 1 of column 'caption'."),
        ("set.jsonl", '{"caption": "x"}\n{"capt', None, "set.jsonl is no .jsonl file that can be read:"),
        ("set.parquet", "caption", None, "set.parquet is no .parquet file that can be read:"),
        ("set.txt", b"caf\xe9", None, "set.txt is no .txt file that can be read: 'utf-8' codec"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_file(
    name: str, content: str | bytes | None, column: str | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        read_prompts(path, column)
    assert str(refused.value).startswith(f"{tmp_path}/{says}")
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


def test_a_table_is_written_in_known_formats_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"table\.xlsx cannot be written: its suffix must be one of \.csv, \.jsonl, \.parquet\."):
        write_table(frame(), tmp_path / "table.xlsx")


def test_a_set_comes_in_one_schema(tmp_path: Path) -> None:
    path = tmp_path / "ours.jsonl"
    write_table(frame().assign(type=["VM", "TM", "TM"]), path)
    table = read_set(path, PromptSet("type", {"VM": "verbatim", "TM": "template"}, target="url"))
    assert tuple(table.columns) == COLUMNS
    assert table.kind.tolist() == ["verbatim", "template", "template"]
    assert table.target.tolist() == ["u7", "u8", "u9"]
    assert set(table["set"]) == {"ours"}
    assert table.repetitions.isna().all()


def test_a_file_of_ones_own_says_what_its_prompts_are(tmp_path: Path) -> None:
    path = tmp_path / "ours.csv"
    kinds = ["verbatim", "ordinary", "template"]
    write_table(frame().assign(kind=kinds), path)
    table = read_set(path)
    assert tuple(table.columns) == COLUMNS
    assert table.kind.tolist() == kinds
    assert table.source.tolist() == ["", "ordinary prompt", ""]
    write_table(frame().assign(kind=kinds, source="COCO"), path)
    assert read_set(path).source.tolist() == ["", "COCO", ""]
    write_table(frame().assign(kind="cat"), path)
    with pytest.raises(ValueError, match=f"has 'cat' in row 0 of column 'kind': not one of {', '.join(KINDS)}"):
        read_set(path)


@pytest.mark.parametrize(
    ("about", "says"),
    [
        (None, "is none of the known sets .* and has no column 'kind' that says what it holds"),
        (PromptSet("type", {"VM": "verbatim"}), "has no column 'type'"),
        (PromptSet("ordinary", target="picture"), "has no column 'picture'"),
        (PromptSet("url", {"u7": "verbatim", "u8": "template"}), "has 'u9' in row 2 of column 'url': not one of u7, u8"),
    ],
)
def test_a_set_that_is_not_what_it_should_be_is_refused(about: PromptSet | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "ours.csv"
    write_table(frame(), path)
    with pytest.raises(ValueError, match=says) as refused:
        read_set(path, about)
    assert str(path) in str(refused.value)


def test_the_embedded_set_has_the_schema() -> None:
    table = embedded_set()
    assert tuple(table.columns) == COLUMNS
    assert set(table.kind) == {"verbatim", "several pictures", "template", "fixed object", "shared caption", "ordinary"}
    assert (table.repetitions[table.kind != "ordinary"] > 0).all()
    assert ((table.source == "") == (table.kind != "ordinary")).all()
    assert all(Path(target).is_file() for target in table.target if target)


def test_near_duplicates_are_joined_through_others() -> None:
    prompts = [
        "one two three",
        "Two, three four!",  # 2 of 4 words with the first
        "four five six seven",  # 1 of 6 with the second
        "seven eight",  # 1 of 5 with the third
        "six seven eight",  # 2 of 5 with the third, 2 of 3 with the fourth
        "???",
        "...",  # no word at all either
    ]
    assert near_duplicates(prompts).tolist() == [1, 1, 2, 2, 2, 0, 0]  # by their alphabetically first: "...", "Two", "four"


TEXTS = st.lists(st.lists(st.sampled_from("a b c d e f g h é 7 ?".split()), max_size=5).map(" ".join), min_size=1, max_size=12)


@given(TEXTS, st.randoms())
def test_clusters_do_not_depend_on_the_order_of_the_prompts(texts: list[str], random: Random) -> None:
    order = list(range(len(texts)))
    random.shuffle(order)
    labels = near_duplicates(texts)
    assert near_duplicates([texts[i] for i in order]).tolist() == labels[order].tolist()
    assert all(labels[i] == labels[j] for i in order for j in order if texts[i] == texts[j])


@given(TEXTS, TEXTS)
def test_more_prompts_only_join_clusters(texts: list[str], more: list[str]) -> None:
    few, many = near_duplicates(texts), near_duplicates([*texts, *more])
    assert all(many[i] == many[j] for i in range(len(texts)) for j in range(len(texts)) if few[i] == few[j])


def test_blocks_are_joined() -> None:
    chain = [f"w{i} w{i + 1}" for i in range(700)]  # each shares one word of three with the next
    assert set(near_duplicates(chain)) == {0}
    assert len(set(near_duplicates([*chain[:300], *chain[400:]]))) == 2


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"the published prompt sets are not at {PUBLISHED}")
@pytest.mark.parametrize(
    ("name", "kinds", "clusters"),
    [
        ("memorized_laion_prompts.csv", {"verbatim": 112, "template": 388}, 205),
        ("unmemorized_laion_prompts.csv", {"ordinary": 500}, None),
        ("coco2014_val_10000.csv", {"ordinary": 10_000}, None),
        ("sd2_mem219.txt", {"memorized": 219}, 64),
        ("group_nomem500.txt", {"ordinary": 500}, None),
    ],
)
def test_published_sets_have_their_published_counts(name: str, kinds: dict[str, int], clusters: int | None) -> None:
    table = read_set(PUBLISHED / name)
    assert table.kind.value_counts().to_dict() == kinds
    assert (table.source == SETS[name].source).all()
    assert clusters in (None, table.cluster.nunique())
    assert len(read_table(PUBLISHED / name)) == sum(kinds.values())
