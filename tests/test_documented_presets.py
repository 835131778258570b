# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Every preset that documentation or a docstring names exists."""

import ast
import re
from pathlib import Path

import pytest

from modeling_attnres.configuration import VARIANTS, list_presets, list_recipes
from modeling_attnres.eval.bench.models import PRESETS as SHAPES


ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "configuration/*.md", "conversion/*.md", "eval/**/*.md")
    for path in ROOT.glob(pattern)
)
SOURCES = sorted(
    path
    for folder in ("configuration", "examples", "eval", "parallel", "training")
    for path in (ROOT / folder).rglob("*.py")
)
BACKBONES = {name.rsplit("-", 1)[0] for name in list_presets()}
# What a command is given, what code loads, and names that look like one of ours.
GIVEN = re.compile(r"--preset[ =]([\w.{}-]+)|load_preset\(\"([^\"]+)\"|load_recipe\(\"([^\"]+)\"")
FAMILIES = "|".join(sorted({re.match(r"[a-z]+", name).group() for name in BACKBONES}))
LOOKING = re.compile(rf"(?<![\w/.-])((?:{FAMILIES})-[\w.-]*?(?:{'|'.join(VARIANTS)}))(?![\w-])")


def documentation(path: Path) -> str:
    """A page, or the docstrings of a source file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n".join(ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds))


def named(text: str) -> set[str]:
    found = {name for match in GIVEN.findall(text) for name in match if name and name != "NAME"}
    return found | set(LOOKING.findall(text))


def test_names_are_found():
    text = '`--preset llama-1m-block` and `tiny-full`; load_preset("tiny-huge"), python x.py --preset=135M'
    assert named(text) == {"llama-1m-block", "tiny-full", "tiny-huge", "135M"}
    assert "llama-2m-block" in named(documentation(ROOT / "examples" / "pretrain.py"))
    assert "kimi-linear-48b-a3b-block" in named(documentation(ROOT / "docs" / "scaling.md"))


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_presets_exist(path):
    known = {*list_presets(), *list_recipes(), *SHAPES}
    assert named(documentation(path)) <= known
