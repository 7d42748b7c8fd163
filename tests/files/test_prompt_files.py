"""Files of prompts as people have them: what is read rightly, whatever wrote it, and what is refused with its line."""

import gzip
import io
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from sdguard.files import prompt_files
from sdguard.files.prompt_files import (
    LONGEST_HEADER,
    SPARSE_CELLS,
    PromptFile,
    find_column,
    import_pandas,
    prompts_by_row,
    read_pieces,
    read_prompts,
    read_table,
    write_table,
    write_tables,
)

#: texts that a file of prompts can hold: anything but half a surrogate pair, and not blank.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(str.strip)
columns = st.lists(
    texts | st.sampled_from(['the "NA"', "null", "007", "1e5", 'a "dog", running', "a\r\ncat", "a\rcat", "x;y\tz"]), min_size=1
)


def read_bytes(content: bytes, name: str) -> list[str]:
    """What is read of a file of this name and content."""
    return read_back(lambda path: path.write_bytes(content), name)


def read_back(written: Callable[[Path], Any], name: str) -> list[str]:
    """What is read of a file of this name that ``written`` has made."""
    with TemporaryDirectory() as folder:
        written(Path(folder) / name)
        prompts = read_prompts(Path(folder) / name)
    assert prompts.index.tolist() == list(range(len(prompts)))
    return prompts.tolist()


@pytest.mark.parametrize("name", ["set.csv", "set.jsonl", "set.parquet", "SET.CSV", "Set.JsonL"])
@settings(max_examples=40, deadline=None)
@given(columns)
@example(["0", "-1", "nan"])
def test_what_was_written_is_what_is_read(name: str, prompts: list[str]) -> None:
    table = pd.DataFrame({"seed": range(len(prompts)), "prompt": pd.Series(prompts, dtype=str)})
    assert read_back(lambda path: write_table(table, path), name) == prompts
    assert read_back(lambda path: write_table(table[["prompt"]], path), name) == prompts


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@settings(max_examples=40, deadline=None)
@given(columns)
def test_what_a_spreadsheet_writes_is_what_is_read(separator: str, prompts: list[str]) -> None:
    text = pd.DataFrame({"id": range(len(prompts)), "size, cm": 1, "Prompt": prompts}).to_csv(
        sep=separator, index=False, lineterminator="\r\n"
    )
    content = f"\ufeff{text}".encode()
    assert read_bytes(content, "set.csv") == prompts
    assert read_bytes(gzip.compress(content), "set.CSV.gz") == prompts
    if separator == "\t":
        assert read_bytes(content, "set.tsv") == prompts


@settings(max_examples=40, deadline=None)
@given(columns)
def test_json_lines_are_read_whatever_their_letters(prompts: list[str]) -> None:
    for escaped in (True, False):
        content = "".join(json.dumps({"prompt": prompt}, ensure_ascii=escaped) + "\n" for prompt in prompts).encode()
        for name, written in (("a.jsonl", content), ("a.ndjson", b"\xef\xbb\xbf" + content), ("a.jsonl.gz", gzip.compress(content))):
            assert read_bytes(written, name) == prompts


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\ufeff"), max_size=20).map(str.strip).filter(bool),
        min_size=1,
    )
)
def test_lines_of_text_are_read_compressed_or_not(prompts: list[str]) -> None:
    content = "\n".join(prompts).encode()
    for name, written in (("a.txt", content), ("a", content), ("a.TXT", b"\xef\xbb\xbf" + content), ("a.txt.gz", gzip.compress(content))):
        assert read_bytes(written, name) == prompts


@pytest.mark.parametrize(
    "index",
    [
        [0, 0, 1],
        ["x", "y", "x"],
        pd.Index(["x", "y", "z"], name="id"),
        pd.MultiIndex.from_tuples([("a", 1), ("a", 1), ("b", 2)]),
        [5, 3, 9],
    ],
)
def test_of_a_parquet_file_rows_are_numbered_as_they_stand_whatever_pandas_index_it_has(index: Any, tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    pd.DataFrame({"prompt": ["one", "two", "three"]}, index=index).to_parquet(path)
    assert prompts_by_row(path) == {0: "one", 1: "two", 2: "three"}
    pd.DataFrame({"seed": [1, 2, 3]}, index=pd.Index(["one", "two", "three"], name="prompt")).to_parquet(path)
    assert prompts_by_row(path) == {0: "one", 1: "two", 2: "three"}


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.large_string())],
)
def test_every_kind_of_text_in_parquet_is_text(kind: pa.DataType, tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    parquet.write_table(pa.table({"size": [1, 2, 3], "about": pa.array(["a cat", "a dog", "a cat"]).cast(kind)}), path)
    assert read_prompts(path).tolist() == ["a cat", "a dog", "a cat"]


def test_in_a_table_of_one_column_a_blank_line_is_an_empty_row_and_none_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("\nprompt\na cat\n\n\na dog\n\n\n")
    for read in (prompts_by_row, read_prompts):
        with pytest.raises(ValueError, match="no text in row 1 of column 'prompt', the first of 2 such rows"):
            read(path)
    assert prompts_by_row(path, skip_empty=True) == {0: "a cat", 3: "a dog"}
    path.write_text("prompt,size\na cat,1\n\na dog,2\n")
    assert prompts_by_row(path) == {0: "a cat", 1: "a dog"}


@pytest.mark.parametrize("header", ["NA,a cat", "#1,a cat", "null,a cat", "3,a cat"])
def test_a_first_line_that_may_be_a_row_is_refused_as_a_header(header: str, tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(f"{header}\n3,a dog\n4,an owl\n")
    with pytest.raises(ValueError, match="does not tell whether its first line is a header"):
        prompts_by_row(path)
    path.write_text(",beschreibung\n3,a dog\n4,an owl\n")
    assert prompts_by_row(path) == {0: "a dog", 1: "an owl"}


@pytest.mark.parametrize("name", ["set.csv", "set.jsonl"])
def test_two_columns_that_differ_in_case_alone_are_told_apart_by_a_name_only(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("Prompt,prompt\na,b\n" if name == "set.csv" else '{"Prompt": "a", "prompt": "b"}\n')
    with pytest.raises(ValueError, match="has 2 columns 'Prompt' and 'prompt': it does not tell which"):
        prompts_by_row(path)
    assert prompts_by_row(path, "Prompt") == {0: "a"}


def test_a_quote_in_a_raw_table_of_tabs_does_not_take_in_the_rows_after_it(tmp_path: Path) -> None:
    path = tmp_path / "set.tsv"
    path.write_text('caption\turl\n"hello\thttp://1\nfoo\thttp://2\nworld"\thttp://3\n')
    with pytest.raises(ValueError, match="line 2 begins a text in quotes that goes on over tabs and lines"):
        prompts_by_row(path)


def test_text_in_parquet_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    path, offsets = tmp_path / "set.parquet", np.array([0, 2, 6], dtype=np.int32)
    text = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(b"okcaf\xe9")])
    parquet.write_table(pa.table({"prompt": text}), path)
    for read in (prompts_by_row, read_prompts):
        with pytest.raises(ValueError, match=r"set.parquet is no .parquet file that can be read: .*UTF8"):
            read(path)


def test_of_a_parquet_file_no_other_column_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, held = tmp_path / "set.parquet", list[tuple[int, list[str]]]()
    parquet.write_table(pa.table({"prompt": ["a cat"] * 600, "image": [b"0" * 100] * 600}), path)
    plain = prompt_files.plain_table

    def noted(table: pa.Table) -> pd.DataFrame:
        held.append((len(table), table.column_names))
        return plain(table)

    monkeypatch.setattr(prompt_files, "plain_table", noted)
    assert len(prompts_by_row(path)) == 600
    assert max(rows for rows, names in held if "image" in names) <= prompt_files.COLUMN_ROWS


def test_a_first_line_that_names_the_separator_is_none_of_the_table(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("\nsep=;\nprompt;a,b,c\n\na cat, sitting;1\na dog;2;3\n")
    with pytest.raises(ValueError, match="line 6 has 3 fields, and the header 2: a text that has ';' in it must stand in quotes"):
        read_table(path)
    path.write_text("\nsep=;\nprompt;a,b,c\n\na cat, sitting;1\na dog;2\n")
    assert read_prompts(path).tolist() == ["a cat, sitting", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "prompt\na cat, on a mat\n", "line 2 has 2 fields, and the header 1: a text that has ',' in it must stand in quotes"),
        ("a.csv", 'id,prompt\n1,"a\n\ncat"\n2,a cat, asleep\n', "line 5 has 3 fields, and the header 2: a text that has ',' in it"),
        ("a.csv", "id,prompt\n1,a cat\n2\n", "line 3 has 1 field, and the header 2."),
        ("a.csv", 'prompt\na cat\n"a "dog""\n', "line 3: ',' expected after '\"'"),
        ("a.csv", 'prompt\na cat\n"a dog\na fox\n', "line 3: unexpected end of data"),
        ("a.csv", "a cat\na dog\n", "does not tell whether its first line is a header: it has a cat; name the column, or write 'prompt'"),
        ("a.csv", "1,a cat\n2,a dog\n", "does not tell whether its first line is a header: it has 1, a cat; name the column, or write"),
        ("a.csv", "a cat,5\na dog,6\n", "does not tell whether its first line is a header"),
        (
            "a.csv",
            "prompt," + "x" * LONGEST_HEADER + "\na cat,1\n",
            f"its first line is no header: it has more than {LONGEST_HEADER:,} char",
        ),
        ("a.csv", "prompt\n" + "x" * 200_000, "line 2: field larger than field limit (131072)"),
        ("a.csv", "id, of it;prompt\n1;a cat\n", "its header has ',' as often as ';': a first line 'sep=,' would tell which of them"),
        ("a.csv", "prompt,prompt\na cat,a dog\n", "has 2 columns 'prompt': it does not tell which of them holds the prompts"),
        ("a.csv", f"{','.join(['name'] * 999)}\n{','.join('x' * 999)}\n", "name, name, n...; name one."),
        ("a.jsonl", '{"prompt": "a"}\nnull\n', "line 2: it holds null, and no object"),
        ("a.jsonl", '{"prompt": "a"}\n\n5\n', "line 3: it holds a number, and no object"),
        ("a.jsonl", '[{"prompt": "a"}]', "line 1: it holds an array, and no object"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b', "line 2: Unterminated string"),
        ("a.jsonl", '{"prompt": "half a \\ud83d cat"}', "line 1: a character of it is half a surrogate pair"),
        ("a.jsonl", '{"prompt": ' + "[" * 100_000, "line 1: it is nested too deep"),
        ("a.jsonl", '{"prompt": {"text": "a cat"}}', "holds no text in row 0 of column 'prompt'."),
        ("a.jsonl", '{"prompt": "a cat", "n": 1' + "0" * 5000 + "}", "line 1: Exceeds the limit"),
        ("a.csv.gz", "prompt\na cat\n", "cannot be read: Not a gzipped file"),
        ("a.csv.gz", gzip.compress(b"prompt\na cat\n", mtime=0)[:-9], "is no .csv.gz file that can be read: Compressed file ended"),
        (
            "a.gz",
            gzip.compress(b"a cat", mtime=0),
            "has a suffix that is not known: .txt, .csv, .tsv, .jsonl, .ndjson, .parquet are, and .gz of",
        ),
        ("a.parquet.gz", gzip.compress(b"a cat", mtime=0), "has a suffix that is not known"),
        (
            "a.csv",
            "prompt\na cat\n".encode("utf-16"),
            "is no .csv file that can be read: 'utf-8' codec can't decode byte 0xff in position 0",
        ),
    ],
)
def test_what_cannot_be_read_rightly_is_refused_with_its_line(name: str, content: str | bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"\.$") as refused:
        read_prompts(path)
    said = str(refused.value)
    assert says in said
    assert said.startswith(str(path))
    assert said.endswith(".")
    assert "\n" not in said
    assert len(said) < 500


def test_lists_and_two_columns_of_one_name_in_parquet_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    parquet.write_table(pa.table({"prompt": [["a cat", "a dog"], []]}), path)
    with pytest.raises(ValueError, match="holds no text in row 0 of column 'prompt'"):
        read_prompts(path)
    parquet.write_table(pa.Table.from_arrays([pa.array(["a cat"]), pa.array(["a dog"])], ["prompt", "prompt"]), path)
    with pytest.raises(ValueError, match="has 2 columns 'prompt'"):
        read_prompts(path)


def test_a_damaged_page_of_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    write_table(pd.DataFrame({"prompt": ["a cat that nobody has seen"]}), path)
    path.write_bytes(path.read_bytes().replace(b"cat that", b"cut that", 1))
    with pytest.raises(ValueError, match="checksum"):
        read_prompts(path)


@pytest.mark.parametrize("name", ["set.csv", "set.jsonl", "set.parquet"])
def test_rows_without_text_are_refused_or_left_out_and_counted(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / name
    write_table(pd.DataFrame({"url": list("abcde"), "TEXT": ["a cat", None, "a dog", " \n", "NA"]}), path)
    says = "holds no text in row 1 of column 'TEXT', the first of 2 such rows: --skip-empty leaves such rows out."
    with pytest.raises(ValueError, match=says):
        prompts_by_row(path)
    assert prompts_by_row(path, skip_empty=True) == {0: "a cat", 2: "a dog", 4: "NA"}
    assert f"{path}: 2 of 5 rows hold no text in column 'TEXT' and are left out" in caplog.text
    write_table(pd.DataFrame({"url": ["a"], "TEXT": [""]}), path)
    with pytest.raises(ValueError, match=r"holds no prompt\."):
        prompts_by_row(path, skip_empty=True)


def test_what_is_no_text_is_refused_where_empty_rows_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a cat"}\n{"prompt": null}\n{"prompt": 5}\n{"prompt": false}\n')
    with pytest.raises(ValueError, match="holds no text in row 2 of column 'prompt'"):
        read_prompts(path, skip_empty=True)


@pytest.mark.parametrize("start", ['prompt,"a', '",', '" ', 'prompt,"a""b"c,', ",;\t", "sep=", "\n \n"])
def test_time_is_linear_in_a_hostile_header(start: str, tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(start * (60_000 // len(start)) + "\na\n")
    began = time.process_time()
    with pytest.raises(ValueError, match=r"\.$"):
        read_prompts(path)
    assert time.process_time() - began < 5


def test_objects_that_have_nothing_in_common_make_no_table(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    count = int(SPARSE_CELLS**0.5) + 1
    path.write_text("".join(f'{{"{i}": 1}}\n' for i in range(count)))
    with pytest.raises(ValueError, match=f"its {count:,} objects have {count:,} different names between them"):
        read_table(path)


def test_everything_of_a_csv_file_is_the_text_that_stands_there() -> None:
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        path = Path(folder) / "set.csv"
        path.write_text("index,text\n01,007\n1e5,NA\n")
        table = read_table(path)
    assert table.to_dict("list") == {"index": ["01", "1e5"], "text": ["007", "NA"]}
    assert import_pandas().read_csv(io.StringIO("a\n1"))["a"].tolist() == [1]


# in pieces


def in_pieces(path: Path, rows: int, column: str | None = None, skip_empty: bool = False) -> list[dict[int, str]]:
    """The pieces of a file of prompts, as a scan of a file reads them."""
    return list(PromptFile(path, find_column(read_pieces(path, rows), path, column), skip_empty, rows).pieces())


@pytest.mark.parametrize("name", ["set.csv", "set.jsonl", "set.parquet", "set.txt.gz"])
@settings(max_examples=30, deadline=None)
@given(
    st.lists(texts | st.sampled_from(["", " ", "7"]), min_size=1).filter(lambda prompts: any(map(str.strip, prompts))), st.integers(1, 9)
)
def test_pieces_are_what_the_whole_file_is(name: str, prompts: list[str], rows: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        if name.endswith(".txt.gz"):
            path.write_bytes(gzip.compress("\n".join(prompts).encode()))
        else:
            write_table(pd.DataFrame({"seed": range(len(prompts)), "about": prompts}), path)
        column = None if name.endswith(".txt.gz") else "about"
        whole, pieces = prompts_by_row(path, column, skip_empty=True), in_pieces(path, rows, column, skip_empty=True)
    assert {row: prompt for piece in pieces for row, prompt in piece.items()} == whole
    assert [row for piece in pieces for row in piece] == list(whole)
    assert all(0 < len(piece) <= rows for piece in pieces)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.jsonl", '{"text": "a cat"}\n{"caption": "a dog", "text": "b"}\n{"prompt": "a fox"}\n', "prompt"),
        ("a.jsonl", '{"a": null, "b": 1}\n{"a": "x", "b": 2}\n{"b": 3, "c": "y"}\n{"c": 4}\n', "a"),
        ("a.csv", "a,b\n1,2\n3,x\n4,5\n", "b"),
    ],
)
def test_the_column_is_told_by_all_pieces(name: str, content: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert find_column(read_pieces(path, 1), path) == find_column(read_pieces(path, None), path) == found


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "prompt\na\nb\nc,d\n", "line 4 has 2 fields, and the header 1: a text that has ',' in it must stand in quotes"),
        ("a.csv", "prompt,b\na,1\n ,2\nc,3\n ,4\n", "holds no text in row 1 of column 'prompt', the first of 2 such rows: --skip-empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n[]\n', "line 3: it holds an array, and no object"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": 5}\n', "holds no text in row 2 of column 'prompt'."),
        ("a.jsonl", '{"prompt": "a"}\n{"a": "b"}\n', "holds no text in row 1 of column 'prompt': --skip-empty leaves such rows out."),
        ("a.csv", "a,b\n1,x\n2,3\ny,4\n", "does not tell which column holds the prompts: it has a, b; name one."),
        ("a.csv", "prompt\n\n\n", "holds no prompt."),
    ],
)
def test_what_is_wrong_in_a_late_piece_is_refused_as_in_the_whole(name: str, content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    said = []
    for read in (lambda: in_pieces(path, 1), lambda: read_prompts(path)):
        with pytest.raises(ValueError, match=r"\.$") as refused:
            read()
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert says in said[0]


def test_of_parquet_only_the_column_of_prompts_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.parquet"
    parquet.write_table(pa.table({"caption": ["a", "b", "c"], "picture": [b"x"] * 3, "caption.id": [1, 2, 3]}), path, row_group_size=2)
    seen = [list(table) for table in read_pieces(path, 2, "caption")]
    assert seen == [["caption"]] * 2
    assert in_pieces(path, 2) == [{0: "a", 1: "b"}, {2: "c"}]


@pytest.mark.parametrize("name", ["set.csv", "set.jsonl", "set.parquet"])
@settings(max_examples=25, deadline=None)
@given(columns, st.integers(1, 5))
def test_a_table_written_in_pieces_is_the_same(name: str, prompts: list[str], rows: int) -> None:
    scores = [None if i % 3 == 2 else 0.1 * i for i in range(len(prompts))]
    table = pd.DataFrame(
        {"row": range(len(prompts)), "prompt": prompts, "p": pd.Series(scores, dtype=float), "told": [True] * len(prompts)}
    )
    with TemporaryDirectory() as folder:
        one, other = Path(folder) / f"one-{name}", Path(folder) / f"other-{name}"
        write_table(table, one)
        write_tables((table[start : start + rows] for start in range(0, len(table), rows)), other)
        if not name.endswith(".parquet"):  # whose row groups they are
            assert one.read_bytes() == other.read_bytes()
        pd.testing.assert_frame_equal(read_table(one), read_table(other))
