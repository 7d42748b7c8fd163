"""How Sphinx builds the documentation: ``make docs``. Nothing is fetched."""

from __future__ import annotations

import inspect
import pydoc
import sys
from contextlib import suppress
from itertools import takewhile
from operator import attrgetter
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402

import sdguard  # noqa: E402

project = "sdguard"
author = copyright = "sdguard contributors"
version = release = sdguard.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = [f"generated/{name}" for name in generate.write(HERE / "generated")]
html_theme = "furo"
html_title = "sdguard"

myst_heading_anchors = 3
# a notebook is shown with the outputs that it was committed with, so that a build needs no model
nb_execution_mode = "off"

default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_use_ivar = True

# types in signatures are those of torch, numpy and Python too, whose documentation is elsewhere
nitpick_ignore_regex = [("py:(class|exc|data)", ".*"), ("py:obj", r"typing\..*")]


def exists(name: str, module: str | None) -> bool:
    """Whether a name is something in a module, of a library, or a file of the repository, though it has no entry of its own."""
    with suppress(AttributeError):
        attrgetter(name)(sys.modules.get(module or ""))
        return True
    libraries = ("", "diffusers.", "transformers.")
    return any(pydoc.locate(library + name) is not None for library in libraries) or (HERE.parent / name).is_file()


def shared(name: str, module: str) -> int:
    """How many parts the paths of a name and of a module begin with in common."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(name.split("."), module.split("."), strict=False))))


def resolve(app: Sphinx, env: BuildEnvironment, node: Any, contnode: Any) -> Any:
    """What a name in a docstring that is no whole path is of: the nearest that has this name. What has no entry but exists is no link."""
    if node.get("refdomain") != "py":
        return None
    target, module = node["reftarget"].removesuffix("()"), node.get("py:module") or ""
    objects = env.get_domain("py").data["objects"]
    found = [name for name in objects if name == target or name.endswith(f".{target}")]
    if found:
        nearest = min(found, key=lambda name: (-shared(name, module), name.count("."), name))
        entry = objects[nearest]
        return make_refnode(app.builder, node.get("refdoc", entry.docname), entry.docname, entry.node_id, contnode, nearest)
    return contnode if exists(target, module) else None


def skip(app: Sphinx, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out what a guarded pipeline's class only hands on to diffusers'."""
    return True if inspect.isroutine(thing) and (thing.__module__ or "").startswith("diffusers.") else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-skip-member", skip)
