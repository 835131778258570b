# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import re
import shlex
import socket
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from test_explorer import tokenizer
from tiny_backbones import tiny_backbone, tiny_model
from transformers import AutoModelForCausalLM

from modeling_attnres.eval.explore import cli


DOCUMENT = Path(__file__).parents[3] / "docs" / "explore.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models, each with a tokenizer."""
    folder = tmp_path_factory.mktemp("explore")
    tiny_model("llama", 2).save_pretrained(folder / "attnres")
    tiny_model("llama", 2, depth_attention_type="static").save_pretrained(folder / "static")
    AutoModelForCausalLM.from_config(tiny_backbone("llama")).save_pretrained(folder / "prenorm")
    for name in ("attnres", "static", "prenorm"):
        tokenizer().save_pretrained(folder / name)
    tiny_model("llama", 2).save_pretrained(folder / "no_tokenizer")
    return folder


@pytest.fixture
def _with_gradio(monkeypatch):
    """Nothing gets as far as to use it."""
    stand_in = ModuleType("gradio")
    stand_in.__spec__ = ModuleSpec("gradio", None)
    monkeypatch.setitem(sys.modules, "gradio", stand_in)


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("nowhere", [], "MODEL 'nowhere' is no existing folder, and could not be fetched from the Hub: "),
        ("{}/nowhere/at/all", [], "MODEL is neither an existing folder nor a name on the Hub: "),
        ("{}/prenorm", [], "MODEL .*prenorm: `model` must have attention over depth, got one of type 'llama'"),
        ("{}/static", [], "MODEL .*static: `model` must mix by one softmax over depth"),
        ("{}/no_tokenizer", [], "MODEL: the tokenizer of .*no_tokenizer does not load: "),
        ("{}/attnres", ["--max-tokens", "129"], "--max-tokens must be at most what the model reads, 128, got 129"),
    ],
)
@pytest.mark.usefixtures("_with_gradio")
def test_one_line_before_anything_is_served(folder, capsys, model, options, message):
    capsys.readouterr()
    assert cli.main([model.format(folder), "--port", str(free_port()), *options]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert re.match(f"attnres-explore: error: {message}", line)
    assert captured.out == ""


@pytest.mark.usefixtures("_with_gradio")
def test_a_port_that_is_taken(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main([str(folder / "attnres"), "--port", str(port)]) == 2
    assert f"attnres-explore: error: --port must be free on 127.0.0.1, got {port} (" in capsys.readouterr().err


def test_a_missing_extra_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main([str(folder / "attnres")]) == 2
    assert capsys.readouterr().err == (
        'attnres-explore: error: gradio must be installed: pip install "modeling-attnres[explore]".\n'
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "example.org", "::"])
def test_other_machines_are_not_served(capsys, host):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["model", "--host", host])
    assert f"argument --host: must be an address of this machine alone, such as 127.0.0.1 or ::1, got '{host}'" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_addresses_of_this_machine(host):
    assert cli.local_host(host) == host


def test_the_explorer_has_what_was_asked_for(folder):
    arguments = cli.build_parser().parse_args([str(folder / "attnres"), "--dtype", "bf16", "--max-tokens", "20"])
    shown = cli.load_explorer(arguments)
    assert str(shown.model.dtype) == "torch.bfloat16"
    assert shown.max_tokens == 20
    assert not shown.model.training
    run = shown.run(shown.read("w5 w6 w7"))
    assert len(shown.next_tokens([run], 2)) == 10


def test_shown_commands_are_understood():
    commands = re.findall(r"^(attnres-explore [^\n]+)$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert commands
    for command in commands:
        assert cli.build_parser().parse_args(shlex.split(command)[1:]).model
