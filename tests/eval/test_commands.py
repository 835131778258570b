# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What the README of evaluation tells the user to type is understood."""

import shlex
from pathlib import Path

import pytest

from modeling_attnres.eval.cli import build_parser
from modeling_attnres.eval.run import parse


README = Path(__file__).parents[2] / "eval" / "README.md"


def readme_commands():
    text = README.read_text("utf-8").replace("\\\n", " ")
    blocks = text.split("```bash\n")[1:]
    return [line for block in blocks for line in block.split("```")[0].splitlines() if line.startswith("attnres-eval")]


def test_readme_has_commands():
    assert {command.split()[1] for command in readme_commands()} == {"run", "compare"}


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_understood(command):
    args, others = build_parser().parse_known_args(shlex.split(command, comments=True)[1:])
    if args.command == "run":
        assert parse(others).tasks
    else:
        assert not others
