# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The README of the conversion says what the code says."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import modeling_attnres
from modeling_attnres.conversion import checkpoint
from modeling_attnres.conversion.cli import build_parser


PACKAGE = Path(checkpoint.__file__).parent
README = (PACKAGE / "README.md").read_text(encoding="utf-8")


def string_constants() -> str:
    """All literal text in the code, f-strings up to their placeholders."""
    model = Path(modeling_attnres.__file__).parent
    files = [*PACKAGE.glob("*.py"), model / "backbone_attnres.py", model / "command_line.py"]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def error_rows() -> list[tuple[str, str]]:
    table = README.split("## Errors")[1].split("|---|---|\n")[1].split("\n\n")[0]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()]


@pytest.mark.parametrize(("situation", "message"), error_rows())
def test_documented_messages_are_the_codes(situation, message):
    fragments = re.findall(r"`([^`]+)`", message)
    assert len(error_rows()) > 25
    text = string_constants()
    assert situation == "SIGKILL" or [fragment for fragment in fragments if fragment not in text] == []
    assert fragments


def test_documented_commands_parse():
    commands = [line for line in README.splitlines() if line.startswith("attnres-convert")]
    assert len(commands) == 6
    for command in commands:
        build_parser().parse_args(shlex.split(command, comments=True)[1:])


def test_every_option_is_documented():
    options = {option for action in build_parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert [option for option in sorted(options) if option not in README] == []
