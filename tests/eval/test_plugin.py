"""What the package declares for lm-eval to find, and what its README tells the user to type."""

import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import CONFIG_MAPPING

from modeling_attnres.eval.cli import build_parser
from modeling_attnres.eval.run import parse


README = Path(__file__).parents[2] / "eval" / "README.md"


def declared(group):
    (found,) = (entry for entry in entry_points(group=group) if entry.name == "attnres")
    return found.load()


def test_entry_points():
    assert issubclass(declared("lm_eval.models"), HFLM)
    assert "attnres" in CONFIG_MAPPING
    manager = TaskManager(include_path=str(declared("lm_eval.tasks")), include_defaults=False)
    assert {"attnres_paper", "attnres_paper_mc", "attnres_offline", "attnres_mgsm"} <= set(manager.all_groups)


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
