# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The code blocks of a page, run as a reader would run them, or checked where they cannot run here.

A block that cannot run in a test stands below a comment that says why: `<!-- not run: it needs vLLM -->`.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from tiny_backbones import tiny_backbone
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?:^<!-- not run: (.+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


WORDS = ["Why", "is", "the", "sky", "blue", "?"]


def save_source(folder: Path):
    """A tiny PreNorm model and its tokenizer, for what pages call `path/to/model`."""
    AutoModelForCausalLM.from_config(tiny_backbone("llama")).save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        chat_template="{{ messages[0].content }}",
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        where: file and line, for messages.
        not_run: why it cannot run in a test, or an empty text.
    """

    where: str
    language: str
    code: str
    not_run: str


def read_blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix()
    return [
        Block(f"{name}:{text.count(chr(10), 0, match.start()) + 1}", match[2], match[3], match[1] or "")
        for match in BLOCK.finditer(text)
    ]


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, as words.

    Lines that end in a backslash go on, `&&` begins another command; comments and where output goes are left out.
    """
    for line in block.code.replace("\\\n", " ").replace("&&", "\n").splitlines():
        if words := shlex.split(line, comments=True):
            yield words[: words.index(">")] if ">" in words else words


def run_page(page: Path, shorter: dict[str, list[str]]) -> int:
    """Runs the Python and the commands of a page in order, in the working directory, and checks what they print.

    A page's Python blocks share their names. What a Python block prints must be the `text` block that follows it.

    Args:
        shorter: arguments to add to a command, by how it starts, so that it takes seconds.

    Returns:
        The number of blocks that were run.
    """
    blocks = read_blocks(page)
    namespace: dict = {}
    count = 0
    for position, block in enumerate(blocks):
        if block.not_run or block.language not in ("python", "bash"):
            continue
        count += 1
        if block.language == "bash":
            for words in commands(block):
                assert run_command(words, shorter) == 0, f"{block.where}: {' '.join(words)}"
            continue
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(block.code, block.where, "exec"), namespace)
        if "print(" in block.code:
            following = blocks[position + 1]
            assert following.language == "text", f"{block.where} prints, and the page does not say what"
            assert printed.getvalue() == following.code, f"{block.where}: {printed.getvalue()}"
    return count


def run_command(words: list[str], shorter: dict[str, list[str]]) -> int:
    """Runs an `attnres-` tool or an example in this process; returns its exit code."""
    command = " ".join(words)
    added = [word for start, more in shorter.items() if command.startswith(start) for word in more]
    if words[0] == "python":
        return example(words[1]).main([*words[2:], *added])
    return tool(words[0]).load()([*words[1:], *added])


def check_command(words: list[str]):
    """Checks a command that does not run here against what defines it: a parser, the Makefile, the extras."""
    name, *arguments = words
    if name.startswith("attnres-"):
        parsed, unknown = tool(name).load().__globals__["build_parser"]().parse_known_args(arguments)
        assert vars(parsed)
        assert not unknown or arguments[0] == "run", words  # lm-eval's own options
    elif name == "python" and arguments[0] == "-m":
        assert find_spec(arguments[1]) is not None, words
    elif name == "python":
        assert example(arguments[0]).build_parser().parse_args(arguments[1:]).output, words
    elif name == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), words
    elif name in PARSERS:
        parsed = PARSERS[name]().parse_args(arguments)
        assert vars(parsed)
    elif name == "pip":
        known = re.findall(r'^    "(\w+)": \[|^EXTRAS\["(\w+)"\]', (ROOT / "setup.py").read_text(), re.MULTILINE)
        extras = {extra for found in re.findall(r"\[([\w,]+)\]", " ".join(arguments)) for extra in found.split(",")}
        assert extras <= {extra for pair in known for extra in pair}, words
    elif name == "vllm":
        options = {word for word in arguments if word.startswith("--")}
        serving = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")  # its commands run in `make test-vllm`
        assert {option for option in options if option not in serving} == set(), words
    else:
        assert words in ALWAYS_THERE or name in OTHERS, f"no rule for the command {' '.join(words)}"


def tool(name: str):
    (found,) = entry_points(group="console_scripts", name=name)
    return found


def example(path: str):
    """The module of `examples/NAME.py`."""
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    assert Path(path).parent.as_posix() == "examples", path
    return import_module(Path(path).stem)


def _torchrun() -> argparse.ArgumentParser:
    from torch.distributed.run import get_args_parser

    return get_args_parser()


def _accelerate() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    parser = argparse.ArgumentParser()
    launch_command_parser(parser.add_subparsers())
    return parser


PARSERS = {"torchrun": _torchrun, "accelerate": _accelerate}
OTHERS = ("lm_eval", "tar", "xargs", "mkdir", "cp")
ALWAYS_THERE = (["python3.11", "-m", "venv", ".venv"], ["source", ".venv/bin/activate"])
