# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""How the modules of the conversion hang together."""

import ast
import graphlib
from inspect import isfunction
from pathlib import Path

import modeling_attnres.conversion as conversion


PACKAGE = Path(conversion.__file__).parent


def imports_of(file: Path) -> set[str]:
    """Modules of the package that a file imports, those for type checkers included."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1}


def test_modules_import_in_one_direction():
    graph = {file.stem: imports_of(file) for file in PACKAGE.glob("*.py")}
    assert graph["model_card"] == {"report"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_functions_do_not_hide_modules():
    assert isfunction(conversion.convert)
    modules = {file.stem for file in PACKAGE.glob("*.py")}
    assert not modules.intersection(conversion.__all__)
