"""README and documentation: their code runs and prints what stands there, their commands exist, their links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import notebooks
from benchmarks.__main__ import app as benchmarks_app
from benchmarks.documents import ROOT, documents
from benchmarks.examples import PRINTED, Block, blocks, elsewhere, filled, run
from sdguard.cli.main import app as sdguard_app

WORDS = 1000
PAGES = {str(path.relative_to(ROOT)): path for path in documents()}
#: what people read of each, notebooks among them.
TEXTS = {name: path.read_text() for name, path in PAGES.items()} | {
    str(path.relative_to(ROOT)): notebooks.prose(notebooks.read(path)) for path in notebooks.files()
}
PYTHON = [(name, block) for name, path in PAGES.items() for block in blocks(path.read_text()) if block.language == "python"]
RUN = list(dict.fromkeys(name for name, block in PYTHON if not block.why_not_run))
NOT_RUN = [(name, block) for name, block in PYTHON if block.why_not_run]
#: how commands begin, and whose they are.
APPLICATIONS = {r"^sdguard ": sdguard_app, r"-m sdguard\.cli ": sdguard_app, r"-m benchmarks ": benchmarks_app}


@pytest.mark.parametrize("name", RUN)
def test_the_code_of_a_page_runs_and_prints_what_stands_below_it(name: str) -> None:
    text = PAGES[name].read_text()
    with elsewhere():
        printed = run(text, name)
    assert filled(text, printed) == text, "python -m benchmarks examples writes it anew"


@pytest.mark.parametrize(("name", "block"), NOT_RUN, ids=[f"{name}:{block.line}" for name, block in NOT_RUN])
def test_code_that_does_not_run_says_why(name: str, block: Block) -> None:
    compile(block.code, name, "exec")
    pytest.skip(block.why_not_run)


def test_every_block_of_python_runs_or_says_why_not() -> None:
    assert [(name, block.note) for name, block in PYTHON if block.note and not block.why_not_run] == []
    assert RUN
    assert len(NOT_RUN) < len(PYTHON) / 3


def test_what_a_block_prints_is_compared_and_a_block_that_fails_fails() -> None:
    page = "```python\nx = 2\nprint(x)\n```\n\n```text printed\n2\n```\n\n```python not run: no\n1 / 0\n```\n\n```text printed\n```\n"
    with elsewhere():
        assert filled(page, run(page, "page")) == page
        wrong = page.replace("print(x)", "print(x + 1)")
        assert filled(wrong, run(wrong, "page")) == wrong.replace("\n2\n", "\n3\n")
        with pytest.raises(ZeroDivisionError):
            run(page.replace(" not run: no", ""), "page")


def test_what_is_printed_stands_behind_what_prints_it() -> None:
    for name, path in PAGES.items():
        before = None
        for block in blocks(path.read_text()):
            if block.note == PRINTED:
                assert before is not None, name
                assert before.language == "python", f"{name}, line {block.line}"
                assert not before.why_not_run, f"{name}, line {block.line}"
            before = block


def test_the_readme_has_at_most_a_thousand_words() -> None:
    assert len([word for word in PAGES["README.md"].read_text().split() if re.search(r"\w", word)]) <= WORDS


def commands_of_page(text: str) -> Iterator[str]:
    """What stands as a command in a page: lines of blocks without a language, code within lines, and what markers name."""
    for block in blocks(text):
        if not block.language and not block.note:
            yield from block.code.splitlines()
    prose = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))
    yield from re.findall(r"<!-- [\w-]+: (.+?) -->", text)


def commands(text: str) -> Iterator[tuple[Typer, list[str]]]:
    """The commands of sdguard and of the benchmarks that a page names: whose it is, and its words, without comments."""
    for line in commands_of_page(text):
        for beginning, app in APPLICATIONS.items():
            if found := re.search(beginning, line):
                yield app, shlex.split(line[found.end() :].replace("...", ""), comments=True)


@pytest.mark.parametrize("name", TEXTS)
def test_the_commands_of_a_page_exist_with_their_options(name: str) -> None:
    for app, words in commands(TEXTS[name]):
        # help is printed where all before it can be read: the command and the names of its options
        result = CliRunner().invoke(app, [*words, "--help"])
        assert result.exit_code == 0, f"{' '.join(words)}: {result.output}"


def test_a_command_that_does_not_exist_would_be_seen() -> None:
    lines = (
        "```",
        "sdguard scan captions.csv --nothing   # a comment",
        "accelerate launch -m sdguard.cli nothing",
        "```",
        "`python -m benchmarks",
        "no`",
    )
    found = list(commands("\n".join(lines)))
    assert [words for _, words in found] == [["scan", "captions.csv", "--nothing"], ["nothing"], ["no"]]
    assert [CliRunner().invoke(app, [*words, "--help"]).exit_code for app, words in found] == [2, 2, 2]


@pytest.mark.parametrize("name", TEXTS)
def test_modules_extras_and_targets_that_a_page_names_exist(name: str) -> None:
    lines = list(commands_of_page(TEXTS[name]))
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    for line in lines:
        for module in re.findall(r"python3? -m ([\w.]+)", line):
            assert importlib.util.find_spec(module), line
        for target in re.findall(r"^make ([\w-]+)", line):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
        for extras in re.findall(r"pip install '\S*sdguard\[([\w,-]+)\]", line):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", project, re.MULTILINE), line


@pytest.mark.parametrize("name", TEXTS)
def test_links_within_the_repository_lead_to_files(name: str) -> None:
    made = ROOT / "docs" / "generated"
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[\w-]+)?\)", TEXTS[name]):
        if "://" not in target:
            path = (ROOT / name).parent.joinpath(target).resolve()
            assert path.exists() or made in path.parents, target


def test_every_page_has_its_place_in_the_documentation() -> None:
    """Sphinx warns of a page in no list; a list by pattern takes in what is new."""
    listed = [
        line for path in PAGES.values() for block in blocks(path.read_text()) if "{toctree}" in block.note for line in block.code.split()
    ]
    for name in TEXTS:
        page = Path(name).relative_to("docs").with_suffix("") if name.startswith("docs/") else None
        assert page is None or str(page) == "index" or any(page.match(pattern) for pattern in listed), name
