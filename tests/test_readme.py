# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The README's commands and code run, on tiny checkpoints under the README's names."""

import re
import shlex
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from tiny_backbones import tiny_backbone
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"^(attnres-[^\n]+)|`(attnres-[^`]+)`", README, re.MULTILINE)))
COMMANDS = sorted({line or cell for line, cell in COMMANDS})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with the source model of the README's commands, and its converted form."""
    folder = tmp_path_factory.mktemp("readme")
    source = folder / "path" / "to" / "model"
    AutoModelForCausalLM.from_config(tiny_backbone("llama")).save_pretrained(source)
    words = ["<unk>", "<s>", "</s>", "Why", "is", "the", "sky", "blue", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(source)
    (command,) = [command for command in COMMANDS if command.startswith("attnres-convert")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert entry_point("attnres-convert").load()(shlex.split(command)[1:]) == 0
    return folder


def entry_point(name):
    (found,) = entry_points(group="console_scripts", name=name)
    return found


@pytest.mark.parametrize("code", PYTHON_BLOCKS, ids=range(len(PYTHON_BLOCKS)))
def test_python_blocks_run(code, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    namespace = {}
    exec(compile(code, "README.md", "exec"), namespace)
    model = namespace["model"]
    assert model.config.model_type == "attnres"
    assert model.config.num_blocks == 8
    if "print(" in code:
        assert capsys.readouterr().out.startswith("Why is the sky blue")


def test_every_shown_command_exists():
    assert {command.split()[0] for command in COMMANDS} == {
        "attnres-convert",
        "attnres-eval",
        "attnres-bench",
        "attnres-inspect",
        "attnres-plan",
    }
    for command in COMMANDS:
        name, *arguments = shlex.split(command)
        module = entry_point(name).load().__globals__
        parsed, unknown = module["build_parser"]().parse_known_args(arguments)
        # `attnres-eval run` hands what it does not know itself to lm-eval.
        assert vars(parsed)
        assert unknown in ([], ["--tasks", "attnres_offline"])


def test_shown_examples_take_their_arguments(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    commands = re.findall(r"`python examples/(pretrain|finetune)\.py ([^`]+)`", README)
    assert {name for name, _ in commands} == {"pretrain", "finetune"}
    for name, arguments in commands:
        assert import_module(name).build_parser().parse_args(shlex.split(arguments)).output


def test_make_runs_the_commands_spelled_out_in_the_readme():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    demo = re.search(r"^python (examples/demo\.py [^\n]+)", README, re.MULTILINE).group(1)
    assert demo in makefile
    assert re.search(r"^make (demo)", README, re.MULTILINE)
    for target in re.findall(r"`make ([a-z-]+)`", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / path).exists(), path
