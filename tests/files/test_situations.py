"""Files of prompts as they were met with, each by its name: every one gives the right prompts, or one sentence."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from sdguard.files.prompt_files import prompts_by_row, read_prompts

CATS = ["a cat", "a dog"]


def rows(*prompts: Any, name: str = "prompt") -> str:
    """JSON lines of these prompts."""
    return "".join(json.dumps({name: prompt}) + "\n" for prompt in prompts)


def frame(**options: Any) -> Callable[[Path], None]:
    """Writes a parquet file by pandas."""
    return lambda path: pd.DataFrame(**options).to_parquet(path)


def table(**columns: Any) -> Callable[[Path], None]:
    """Writes a parquet file by Arrow."""
    return lambda path: parquet.write_table(pa.table(columns), path)


#: by name: the file's name, what is in it, and its prompts, or how the sentence about it goes on after the file's name.
SITUATIONS: dict[str, tuple[str, str | bytes | Callable[[Path], None], list[str] | str]] = {
    "unquoted commas in every row": ("a.csv", "prompt\na cat, sitting on a mat\na dog, running in snow\n", "line 2 has 2 fields"),
    "unquoted commas in some rows": ("a.csv", "prompt\na cat on a mat\na dog, running in snow\n", "line 3 has 2 fields"),
    "unquoted commas in the first row": ("a.csv", "prompt\na dog, running in snow\na cat on a mat\n", "line 2 has 2 fields"),
    "a comma behind every row": ("a.csv", "prompt,seed\na cat on a mat,1,\na dog in snow,2,\n", "line 2 has 3 fields"),
    "two columns and unquoted commas": ("a.csv", "id,prompt\n1,a cat, sitting\n2,a dog, running\n", "line 2 has 3 fields"),
    "unquoted commas of a sticker": ("a.csv", "prompt\npanda at zoulpeith canyon, sticker\na cat at sky, poster\n", "line 2 has 2 fields"),
    "no header": ("a.csv", "a cat on a mat\na dog in snow\na fox\n", "does not tell whether its first line is a head"),
    "no header and commas": ("a.csv", "a cat, sitting\na dog, running\na fox, asleep\n", "does not tell which column holds the prompts"),
    "a first line of Excel's": ("a.csv", "sep=;\nprompt;seed\na cat;1\na dog;2\n", CATS),
    "semicolons": ("a.csv", "prompt;seed\na cat, sitting;1\na dog;2\n", ["a cat, sitting", "a dog"]),
    "a byte-order mark and semicolons": ("a.csv", b"\xef\xbb\xbfprompt;seed\r\na cat;1\r\n", ["a cat"]),
    "Latin-1": ("a.csv", "prompt\ncaf\xe9 au lait\n".encode("latin-1"), "is no .csv file that can be read: 'utf-8' codec"),
    "UTF-16": ("a.csv", "prompt\na cat\n".encode("utf-16"), "is no .csv file that can be read: 'utf-8' codec"),
    "newlines and quotes in quotes": ("a.csv", 'prompt,seed\n"a cat\nwith a hat",1\n"a ""dog""",2\n', ["a cat\nwith a hat", 'a "dog"']),
    "blanks around a line": ("a.txt", "a cat\n a dog \n", CATS),
    "two columns of one name": ("a.csv", "prompt,prompt\na cat,b\na dog,c\n", "has 2 columns 'prompt'"),
    "words that pandas takes for nothing": ("a.csv", "prompt\nnull\nNA\nnan\nNone\n", ["null", "NA", "nan", "None"]),
    "numbers": ("a.csv", "prompt\n42\n1984\n", ["42", "1984"]),
    "a text and a number": ("a.csv", "prompt\na cat\n1984\n", ["a cat", "1984"]),
    "an empty caption": ("a.csv", "prompt,seed\na cat,1\n,2\na dog,3\n", "holds no text in row 1 of column 'prompt'"),
    "emoji and writing from the right": ("a.csv", "prompt\n🐱 a cat\nقطة على حصيرة\n", ["🐱 a cat", "قطة على حصيرة"]),
    "a huge field": ("a.csv", "prompt\n" + "a " * 200_000 + "\nb\n", "line 2: field larger than field limit"),
    "an upper-case suffix": ("a.CSV", "prompt\na cat\n", ["a cat"]),
    "an upper-case suffix of text": ("a.TXT", "a cat\n", ["a cat"]),
    "compressed": ("a.csv.gz", gzip.compress(b"prompt\na cat\n", mtime=0), ["a cat"]),
    "an array of JSON": ("a.json", json.dumps([{"prompt": "a cat"}]), "has a suffix that is not known"),
    "JSON lines with a byte-order mark": ("a.jsonl", "\ufeff" + rows(*CATS), CATS),
    "JSON lines with a blank one": ("a.jsonl", rows("a cat") + "\n" + rows("a dog"), CATS),
    "JSON lines without a text": ("a.jsonl", rows("a cat", None), "holds no text in row 1 of column 'prompt'"),
    "a null in place of an object": ("a.jsonl", rows("a") + "null\n", "line 2: it holds null, and no object"),
    "a number in place of an object": ("a.jsonl", rows("a") + "5\n", "line 2: it holds a number, and no object"),
    "a text inside an object": ("a.jsonl", rows({"text": "a cat"}), "holds no text in row 0 of column 'prompt'"),
    "texts that look like dates": ("a.jsonl", rows("2023-01-05", "1970"), ["2023-01-05", "1970"]),
    "the other suffix of JSON lines": ("a.ndjson", rows("a cat"), ["a cat"]),
    "half a surrogate pair": ("a.jsonl", '{"prompt": "a \\ud83d cat"}\n', "line 1: a character of it is half a surrogate pair"),
    "an escaped slash": ("a.jsonl", '{"prompt": "a\\/b"}\n', ["a/b"]),
    "LAION": ("a.parquet", table(URL=["u", "v"], TEXT=CATS, NSFW=["UNLIKELY", None]), CATS),
    "LAION with an empty caption": ("a.parquet", table(URL=["u", "v"], TEXT=["a cat", None]), "holds no text in row 1 of column"),
    "DiffusionDB": ("a.parquet", table(image_name=["a.png", "b.png"], prompt=CATS, part_id=[1, 1], seed=[1, 2], cfg=[7.0, 7.0]), CATS),
    "DiffusionDB with an empty caption": ("a.parquet", table(seed=[1, 2], prompt=["a cat", ""]), "holds no text in row 1 of column"),
    "categories": ("a.parquet", table(prompt=pa.array(CATS).dictionary_encode()), CATS),
    "lists of captions": ("a.parquet", table(caption=[["a cat", "cat"], ["a dog"]]), "holds no text in row 0 of column 'caption'"),
    "bytes in place of text": ("a.parquet", table(prompt=pa.array([b"a cat", b"a dog"])), "holds no text in row 0 of column 'prompt'"),
    "large strings": ("a.parquet", table(caption=pa.array(CATS, pa.large_string())), CATS),
    "views of strings": ("a.parquet", table(caption=pa.array(CATS, pa.string_view())), CATS),
    "an index that repeats": ("a.parquet", frame(data={"prompt": CATS}, index=[0, 0]), CATS),
    "an index of texts": ("a.parquet", frame(data={"prompt": CATS}, index=["x", "y"]), CATS),
    "an index that begins later, after a filter": ("a.parquet", frame(data={"prompt": CATS}, index=[1, 2]), CATS),
    "the prompt is the index": ("a.parquet", frame(data={"seed": [1, 2]}, index=pd.Index(CATS, name="prompt")), CATS),
}  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_people_have_is_read_rightly_or_refused_in_one_sentence(situation: str, tmp_path: Path) -> None:
    name, content, expected = SITUATIONS[situation]
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, list):
        assert read_prompts(path).tolist() == expected
        assert prompts_by_row(path) == dict(enumerate(expected))
        return
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}\b.*{re.escape(expected)}[^\n]*\.$"):
        read_prompts(path)
