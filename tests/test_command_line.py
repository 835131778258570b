# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What all command-line tools share: options, one line per error, exit codes, where output goes."""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from modeling_attnres import UnsupportedBackboneError, __version__
from modeling_attnres.command_line import (
    DTYPES,
    Result,
    ToolParser,
    available_device,
    dtype_name,
    positive_number,
    require,
    run_tool,
    whole_number,
)


TOOLS = {point.name: point for point in entry_points(group="console_scripts") if point.name.startswith("attnres-")}


class CheckError(RuntimeError):
    pass


def parse(*argv: str) -> argparse.Namespace:
    parser = ToolParser(prog="tool")
    for name in ("--dtype", "--device", "--seed", "--output", "--json"):
        parser.add_shared(name, **({"default": "cpu"} if name == "--device" else {}))
    return parser.parse_args(argv)


def run(work, *argv: str, **keywords) -> int:
    return run_tool("tool", work, parse(*argv), check_errors=(CheckError,), **keywords)


def raises(error: BaseException):
    def work(arguments):
        print("half a table")
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("`x` must be 1,\n  got 2."), 2, "tool: error: `x` must be 1, got 2."),
        (UnsupportedBackboneError("no"), 2, "tool: error: no"),
        (FileNotFoundError(2, "No such file", "a"), 2, "tool: error: [Errno 2] No such file: 'a'"),
        (ImportError("no matplotlib"), 2, "tool: error: no matplotlib"),
        (MemoryError(), 2, "tool: error: MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "tool: error: DefaultCPUAllocator: can't"),
        (CheckError("3 is not 4"), 1, "tool: error: 3 is not 4"),
        (KeyboardInterrupt(), 130, "tool: interrupted; nothing was written."),
    ],
)
def test_an_expected_error_is_one_line_and_an_exit_code(capsys, error, code, line):
    assert run(raises(error)) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError("a bug"), RuntimeError("another")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run(raises(error))


def test_traceback_on_request(capsys):
    assert run(raises(ValueError("wrong")), "--traceback") == 2
    captured = capsys.readouterr().err
    assert captured.startswith("Traceback")
    assert captured.endswith("tool: error: wrong\n")


def chatty(arguments):
    print("a step")
    print("a bar", file=sys.stderr)
    return Result("a table", {"figure": 1.5})


@pytest.mark.parametrize(
    ("options", "out", "err"),
    [
        ((), "a step\na table\n", "a bar\n"),
        (("--quiet",), "", ""),
        (("--json",), '{\n  "figure": 1.5\n}\n', "a step\na bar\n"),
        (("--json", "--quiet"), '{\n  "figure": 1.5\n}\n', ""),
    ],
)
def test_where_output_goes(capsys, options, out, err):
    assert run(chatty, *options) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (out, err)


def test_figures_that_json_cannot_say_are_an_error(capsys):
    assert run(lambda arguments: Result("", {"figure": float("nan")}), "--json") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "JSON" in captured.err


def test_a_reader_that_has_left_is_no_traceback():
    code = (
        "import sys; from modeling_attnres.command_line import *; import argparse\n"
        "work = lambda arguments: Result('x' * 10**6, None)\n"
        "sys.exit(run_tool('tool', work, argparse.Namespace()))"
    )
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(read)
    os.close(write)
    assert b"Broken" not in process.communicate(timeout=120)[1]
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "int4"), "argument --dtype: must be one of float32, bfloat16, float16, got 'int4'"),
        (("--device", "meta"), "argument --device: must be a device of this machine, got 'meta' ("),
        (("--device", "nonsense"), "argument --device: must be a device of this machine, got 'nonsense' ("),
        (("--seed", "-1"), "argument --seed: must be at least 0, got -1"),
        (("--seed", "4294967296"), "argument --seed: must be at most 4294967295, got 4294967296"),
        (("--seed", "one"), "argument --seed: must be a whole number, got 'one'"),
        (("--unknown",), "unrecognized arguments: --unknown"),
    ],
)
def test_wrong_options_are_one_line(capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        parse(*options)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tool: error: {message}")
    assert line.endswith("; usage: tool --help")


def test_values():
    assert [dtype_name(name) for name in ("fp32", "bf16", "fp16", *DTYPES)] == [*DTYPES, *DTYPES]
    assert available_device("cpu") == torch.device("cpu")
    assert whole_number(2)("2") == 2
    assert positive_number("1e-3") == 0.001
    with pytest.raises(argparse.ArgumentTypeError, match="must be at least 2, got 1"):
        whole_number(2)("1")


def test_options_of_all_tools_stand_before_or_after_a_command():
    parser = ToolParser(prog="tool")
    parser.add_subparsers(dest="command").add_parser("go")
    for argv in (["--quiet", "go"], ["go", "--quiet"]):
        assert parser.parse_args(argv).quiet is True
    assert not hasattr(parser.parse_args(["go"]), "quiet")


def test_the_tools_that_there_are():
    assert sorted(TOOLS) == [
        "attnres-bench",
        "attnres-convert",
        "attnres-eval",
        "attnres-inspect",
        "attnres-plan",
        "attnres-prune",
    ]


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_has_the_shared_options(name, capsys):
    main = TOOLS[name].load()
    parser = main.__globals__["build_parser"]()
    assert isinstance(parser, ToolParser)
    assert parser.prog == name
    assert {"--version", "--quiet", "--traceback"} <= {
        text for action in parser._actions for text in action.option_strings
    }
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"modeling-attnres {__version__}\n"
    with pytest.raises(SystemExit, match="2"):
        main(["--no-such-option"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: error: ")


@pytest.mark.parametrize("name", TOOLS)
def test_an_interruption_of_any_tool_is_one_line(name, capsys, monkeypatch):
    """Wherever it comes: here in the first thing that the tool's work does."""
    main = TOOLS[name].load()
    arguments = {
        "attnres-bench": ["--preset", "tiny"],
        "attnres-convert": ["a", "b"],
        "attnres-eval": ["compare", "a", "b"],
        "attnres-inspect": ["a", "--text", "b", "--output", "c"],
        "attnres-plan": ["--preset", "tiny-block"],
        "attnres-prune": ["a", "b", "--drop", "1", "--text", "c"],
    }[name]
    module = main.__globals__

    def interrupted(prog, work, parsed, **keywords):
        return run_tool(prog, raises(KeyboardInterrupt()), parsed, **keywords)

    monkeypatch.setitem(module, "run_tool", interrupted)
    assert main(arguments) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: interrupted; ")


def test_json_is_json(capsys):
    assert TOOLS["attnres-plan"].load()(["--preset", "tiny-block", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["num_layers"] == 4


def test_a_missing_extra_is_named_before_work(capsys):
    def work(arguments):
        require("eval", "json", "no_such_package", "no_such_other")

    assert run_tool("tool", work, argparse.Namespace()) == 2
    expected = 'tool: error: no_such_package, no_such_other must be installed: pip install "modeling-attnres[eval]".\n'
    assert capsys.readouterr().err == expected
