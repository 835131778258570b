# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Finds where the libraries around a model look something up: by its type, its class, its code, its fields.

It reads their source and runs none of it. What it finds is a superset: a class name that goes into a file is a finding
too. Messages (f-strings, exceptions, logging) are not.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


# All of a library is read but these, each a path from its root: single models' code, which asks for itself alone, and
# experiments, tests and some commands.
LEFT_OUT = {
    "transformers": ("models", "testing_utils.py", "cli/add_new_model_like.py", "utils/sentencepiece_model_pb2.py"),
    "peft": (),
    "accelerate": ("test_utils",),
    "trl": ("experimental", "scripts", "cli"),
    "lm_eval": (),
}
READ_ALL_THE_SAME = {"transformers": ("models/auto",)}
# Of this one, the model class for Transformers and what it uses.
READ_ALONE = {"lm_eval": ("models/huggingface.py", "models/utils.py", "models/utils_hf.py", "models/hf_steered.py")}

# Model types that are words as well.
WORDS = {"auto", "decision", "git", "time", "hf"}
MODEL_TYPES = set(CONFIG_MAPPING_NAMES) - WORDS
MODEL_CLASSES = {
    name
    for table, entries in vars(modeling_auto).items()
    if table.endswith("_MAPPING_NAMES")
    for entry in entries.values()
    for name in ([entry] if isinstance(entry, str) else entry)
} | set(CONFIG_MAPPING_NAMES.values())

AUTO_TABLE = re.compile(r"(MODEL|TOKENIZER|CONFIG)_(\w+_)?MAPPING(_NAMES)?|TASK_MAPPING")
SOURCE_READERS = ("getsource", "getsourcelines", "getsourcefile", "getfile", "getmodule")
STRING_METHODS = ("startswith", "endswith", "lower", "replace", "removesuffix", "removeprefix", "split")
MESSAGES = ("logger", "eval_logger", "warnings", "logging", "print")
MODEL_NAMES = ("model", "base_model", "unwrapped_model", "model_to_save", "pretrained_model", "ref_model", "student")
CONFIG_NAMES = (
    "config",
    "text_config",
    "model_config",
    "decoder_config",
    "hf_config",
    "base_config",
    "student_config",
)


class LookUp(NamedTuple):
    module: str
    symbol: str
    by: str


class Findings(NamedTuple):
    look_ups: set[LookUp]
    # Names of what is read off a config, and off a model.
    fields: set[str]
    attributes: set[str]


def _last_name(node: ast.expr) -> str | None:
    """`c` of `a.b.c`, and of `a.c()`'s function."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def _strings(node: ast.expr) -> set[str]:
    """The strings in a literal, a dictionary's keys and values among them."""
    if isinstance(node, ast.Dict):
        parts = [*node.keys, *node.values]
    elif isinstance(node, ast.List | ast.Tuple | ast.Set):
        parts = node.elts
    else:
        parts = [node]
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}


class _Reader(ast.NodeVisitor):
    def __init__(self, module: str, findings: Findings):
        self.module, self.findings = module, findings
        self.scope: list[str] = []
        self.depth_of_functions = 0

    def found(self, by: str):
        self.findings.look_ups.add(LookUp(self.module, ".".join(self.scope) or "<module>", by))

    def within(self, name: str, node: ast.AST):
        self.scope.append(name)
        self.generic_visit(node)
        self.scope.pop()

    def visit_ClassDef(self, node: ast.ClassDef):
        self.within(node.name, node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef):
        self.depth_of_functions += 1
        self.within(node.name, node)
        self.depth_of_functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign):
        name = _last_name(node.targets[0])
        if self.depth_of_functions or name is None:
            self.generic_visit(node)
        else:
            self.within(name, node)

    def visit_AnnAssign(self, node: ast.AnnAssign):
        if self.depth_of_functions or node.value is None or not isinstance(node.target, ast.Name):
            self.generic_visit(node)
        else:
            self.scope.append(node.target.id)
            self.visit(node.value)
            self.scope.pop()

    def visit_JoinedStr(self, node: ast.JoinedStr): ...

    def visit_Raise(self, node: ast.Raise): ...

    def visit_ImportFrom(self, node: ast.ImportFrom):
        module = node.module or ""
        if node.level and self.module.startswith("transformers."):
            module = f"transformers.{module}"
        of_a_model = module.startswith("transformers.models.") and not module.startswith("transformers.models.auto")
        if of_a_model or any(alias.name in MODEL_CLASSES for alias in node.names):
            self.found("class")

    def _visit_literal(self, node: ast.expr):
        names = _strings(node)
        if len(names & MODEL_TYPES) + len(names & MODEL_CLASSES) > 1:
            self.found("table")
        self.generic_visit(node)

    visit_Dict = visit_List = visit_Tuple = visit_Set = _visit_literal

    def visit_Constant(self, node: ast.Constant):
        if node.value in ("model_type", "architectures"):
            self.found(node.value)

    def visit_Name(self, node: ast.Name):
        if self.depth_of_functions and AUTO_TABLE.fullmatch(node.id):
            self.found("table")

    def visit_Compare(self, node: ast.Compare):
        for part in (node.left, *node.comparators):
            if _strings(part) & MODEL_TYPES:
                self.found("model_type")
            if _strings(part) & MODEL_CLASSES or any(_is_name(inner) for inner in ast.walk(part)):
                self.found("class name")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute):
        owner = _last_name(node.value)
        if isinstance(node.ctx, ast.Load):
            if node.attr in ("model_type", "architectures"):
                self.found(node.attr)
            elif node.attr == "__module__":
                self.found("source")
            # `type(x).__name__` is a model's, wherever it goes; `cls.__name__` may be, where it is compared or searched.
            of_an_object = _is_name(node) and not isinstance(node.value, ast.Name)
            if of_an_object or (node.attr in STRING_METHODS and _is_name(node.value)):
                self.found("class name")
            self._read_off(owner, node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call):
        if _root(node.func) in MESSAGES:
            return
        if _last_name(node.func) in SOURCE_READERS:
            self.found("source")
        if _last_name(node.func) == "_get_name":  # a torch module's own way to its class name
            self.found("class name")
        if _last_name(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
            for name in _strings(node.args[1]):
                self._read_off(_last_name(node.args[0]), name)
        self.generic_visit(node)

    def _read_off(self, owner: str | None, name: str):
        if name.startswith("__"):
            return
        if owner in CONFIG_NAMES:
            self.findings.fields.add(name)
        elif owner in MODEL_NAMES:
            self.findings.attributes.add(name)


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in ("__name__", "__qualname__")


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _files(library: str) -> Iterator[tuple[str, Path]]:
    """The files that are read, by the module they are."""
    root = Path(importlib.util.find_spec(library).origin).parent
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()

        def lies_in(places: tuple[str, ...], path: str = path) -> bool:
            return any(path == place or path.startswith(f"{place}/") for place in places)

        if lies_in(LEFT_OUT[library]) and not lies_in(READ_ALL_THE_SAME.get(library, ())):
            continue
        if file.name.startswith("convert_") or (library in READ_ALONE and not lies_in(READ_ALONE[library])):
            continue
        yield ".".join((library, *file.relative_to(root).with_suffix("").parts)), file


def scan() -> Findings:
    """Everything that is found in the installed libraries."""
    findings = Findings(set(), set(), set())
    for library in LEFT_OUT:
        for module, file in _files(library):
            _Reader(module, findings).visit(ast.parse(file.read_text(encoding="utf-8")))
    return findings
