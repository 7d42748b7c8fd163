"""The folder of the Space: what it says of itself, what it asks for, and that it builds the page on the embedded model."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

tomllib: Any = pytest.importorskip("tomllib")  # from Python 3.11 on
ROOT = Path(__file__).parents[2]
SPACE = ROOT / "space"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    return [Requirement(line) for line in (SPACE / "requirements.txt").read_text().splitlines()]


def wanted(extra: str) -> set[str]:
    """What the package asks for with an extra, those that this one names of its own among them."""
    found: set[str] = set()
    for line in PROJECT["optional-dependencies"][extra]:
        one = Requirement(line)
        found |= {each for inner in one.extras for each in wanted(inner)} if one.name == "sdguard" else {line}
    return found


def test_it_asks_for_what_the_package_asks_for_and_names_no_address() -> None:
    text = (SPACE / "requirements.txt").read_text()
    assert set(text.splitlines()) == {*PROJECT["dependencies"], *wanted("demo")}
    assert not re.search(r"//|@|^-", text, re.MULTILINE)
    assert all(one.url is None for one in requirements())


def brought(names: set[str]) -> set[str]:
    """Distributions by name, and all that they need where nothing more is asked of them."""
    found: set[str] = set()
    while names:
        name = names.pop()
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                names.add(canonical(need.name))
    return found


def canonical(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def test_what_the_page_imports_comes_with_what_it_asks_for() -> None:
    here = brought({canonical(one.name) for one in requirements()})
    distributions = importlib.metadata.packages_distributions()
    sources = [SPACE / "app.py", *(ROOT / "sdguard" / "demo").glob("*.py")]
    modules: set[str] = set()
    for node in (node for path in sources for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])
    foreign = modules - sys.stdlib_module_names - {"sdguard", "__future__"}
    assert {"gradio", "torch", "starlette"} <= foreign
    assert {module for module in foreign if not here & {canonical(name) for name in distributions[module]}} == set()


def test_its_card_says_what_runs_it() -> None:
    _, front, _ = (SPACE / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    assert (card["sdk"], card["sdk_version"]) == ("gradio", pinned["gradio"])
    assert (SPACE / card["app_file"]).is_file()
    assert card["license"] == PROJECT["license"].lower()
    assert len(card["short_description"]) <= 60


@pytest.mark.parametrize(("space", "address"), [("someone/sdguard", "0.0.0.0"), (None, "127.0.0.1")])
def test_a_space_serves_the_page_on_the_embedded_model_to_whoever_comes_and_anything_else_to_its_own_machine(
    space: str | None, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = pytest.importorskip("sdguard.demo.app")
    monkeypatch.delenv("SPACE_ID", raising=False)
    if space:
        monkeypatch.setenv("SPACE_ID", space)
    served: list[Any] = []
    monkeypatch.setattr(app, "launch", lambda *given, **named: served.append((*given, named)))
    monkeypatch.setattr(app, "few_heaps", lambda: None)
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    ((model, host, port, named),) = served
    assert (model.name, host, port, named) == ("embedded", address, 7860, {"frames": "'self' https://huggingface.co"})
    page = app.build(model)
    assert [block.label for block in page.blocks.values() if block.get_block_name() == "tabitem"] == [
        "Generate", "Why", "Geometry", "Scan", "Calibrate",
    ]  # fmt: skip


def test_the_folder_that_is_pushed_has_the_package_beside_it(tmp_path: Path) -> None:
    subprocess.run(["make", "--silent", "space", f"SPACE={tmp_path}"], cwd=ROOT, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {*(path.name for path in SPACE.iterdir()), "sdguard", "LICENSE", "NOTICE"}
    assert (tmp_path / "sdguard" / "testbed" / "model" / "model_index.json").is_file()
    assert list(tmp_path.rglob("__pycache__")) == []
    found = subprocess.run(
        [sys.executable, "-c", "from importlib.util import find_spec; print(find_spec('sdguard').origin)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(found.stdout.strip()) == tmp_path / "sdguard" / "__init__.py"
