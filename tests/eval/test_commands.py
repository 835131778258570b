# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What the README of evaluation tells the user to type is understood."""

import shlex
from pathlib import Path

import pytest
from tiny_backbones import tiny_model
from words import random_text, word_tokenizer

from modeling_attnres.eval import inspect_model, prune
from modeling_attnres.eval.cli import build_parser
from modeling_attnres.eval.run import parse


README = Path(__file__).parents[2] / "eval" / "README.md"


def readme_commands(tool="attnres-eval"):
    text = README.read_text("utf-8").replace("\\\n", " ")
    blocks = text.split("```bash\n")[1:]
    return [line for block in blocks for line in block.split("```")[0].splitlines() if line.startswith(tool)]


def test_readme_has_commands():
    assert {command.split()[1] for command in readme_commands()} == {"run", "compare"}


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_understood(command):
    args, others = build_parser().parse_known_args(shlex.split(command, comments=True)[1:])
    if args.command == "run":
        assert parse(others).tasks
    else:
        assert not others


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the model and the text that the commands name."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_model("llama", 2, "sum").save_pretrained(folder / "path/to/model")
    word_tokenizer().save_pretrained(folder / "path/to/model")
    (folder / "text.txt").write_text(random_text(1000))
    return folder


@pytest.mark.parametrize("command", [*readme_commands("attnres-inspect"), *readme_commands("attnres-prune")])
def test_readme_commands_run(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    tool, *arguments = shlex.split(command)
    assert {"attnres-inspect": inspect_model.main, "attnres-prune": prune.main}[tool](arguments) == 0
    kept = {"attnres-inspect": "causal.csv", "attnres-prune": "pruning.csv"}[tool]
    place = arguments[arguments.index("--output") + 1] if "--output" in arguments else arguments[1]
    assert (folder / place / kept).is_file()


def test_readme_shows_both_tools():
    assert len(readme_commands("attnres-inspect")) == 2
    assert {"--unit"} <= set(" ".join(readme_commands("attnres-prune")).split())
