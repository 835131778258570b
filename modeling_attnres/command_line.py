# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What the command-line tools have in common: the names of their options, their error lines and their exit codes.

A tool is a parser and a function:

    def main(argv=None):
        parser = build_parser()  # a [`ToolParser`]
        return run_tool(parser.prog, work, parser.parse_args(argv))

`work` takes the parsed arguments and gives a [`Result`]. Exit codes:

    0    done
    1    a check of the result failed
    2    wrong use: an argument, a file or a model that the tool cannot work with
    130  interrupted (128 + SIGINT)
    141  whoever read the output closed it (128 + SIGPIPE)

Errors are one line on stderr that names the argument, the rule and the value. Python's own traceback is left to
exceptions that no input should cause.
"""

import argparse
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch


DONE, CHECK_FAILED, WRONG_USE, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# Errors that inputs cause. The project's own are ValueErrors; an optional package that is missing is an ImportError.
INPUT_ERRORS = (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Result:
    """What a tool has to say.

    Attributes:
        text: for a terminal; empty if the tool has printed it on the way.
        figures: the same as plain data, for `--json`.
    """

    text: str
    figures: Any


# --- Values of options -----------------------------------------------------------------------------------------------


def dtype_name(text: str) -> str:
    """A key of `DTYPES`; the short names are understood too."""
    name = _SHORT_DTYPES.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(DTYPES)}, got {text!r}")
    return name


def whole_number(minimum: int, maximum: int = 2**63 - 1) -> Callable[[str], int]:
    """The `type` of an option that takes whole numbers from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r:.60}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum}, got {value}")
        return value

    return parse


positive_int = whole_number(1)


def positive_number(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r:.60}")
    return value


def available_device(text: str) -> torch.device:
    """A device that tensors can be made on."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device).cpu()  # `meta` makes tensors and cannot give them back
    except Exception as error:  # every backend raises what it likes where there is no such device
        raise argparse.ArgumentTypeError(
            f"must be a device of this machine, got {text!r:.60} ({_one_line(error)})"
        ) from error
    return device


# --- Parser ----------------------------------------------------------------------------------------------------------

# Options that mean the same in every tool that has them.
_SHARED: dict[str, dict[str, Any]] = {
    "--dtype": {"type": dtype_name, "metavar": "{" + ",".join(DTYPES) + "}"},
    "--device": {"type": available_device, "help": "such as cpu or cuda:0 (default: %(default)s)"},
    # NumPy, Python and torch all take these.
    "--seed": {"type": whole_number(0, 2**32 - 1)},
    "--output": {"type": Path, "metavar": "DIR"},
    "--json": {"action": "store_true", "help": "print the figures as JSON, and nothing else"},
    "--trust-remote-code": {"action": "store_true", "help": "run code that comes with a checkpoint"},
}


class ToolParser(argparse.ArgumentParser):
    """A parser with the options of every tool, whose errors are one line.

    Its subparsers are of this class too, so these options may stand before or after the name of a command.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        from . import __version__

        self.add_argument("--version", action="version", version=f"modeling-attnres {__version__}")
        # Absent unless given: a subparser's defaults would overwrite what stands before the name of its command.
        flag = {"action": "store_true", "default": argparse.SUPPRESS}
        self.add_argument("--quiet", help="print errors only (and JSON, where asked for)", **flag)
        self.add_argument("--traceback", help="also print where in the code an error came from", **flag)

    def add_shared(self, name: str, **changes):
        """Adds the option `name` as all tools have it; `changes` are its default and help here."""
        self.add_argument(name, **{**_SHARED[name], **changes})

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USE, f"{self.prog}: error: {message}; usage: {self.prog} --help\n")


# --- Optional packages -----------------------------------------------------------------------------------------------


def require(extra: str, *modules: str):
    """Checks, before work starts, that the packages of an extra are there.

    Args:
        extra: as `pip install "modeling-attnres[extra]"` names it.
        modules: top-level modules that the work imports.

    Raises:
        ImportError: if one is missing, with the command that installs it.
    """
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ImportError(f'{", ".join(missing)} must be installed: pip install "modeling-attnres[{extra}]".')


# --- Run -------------------------------------------------------------------------------------------------------------


def run_tool(
    prog: str,
    work: Callable[[argparse.Namespace], Result],
    arguments: argparse.Namespace,
    *,
    check_errors: tuple[type[Exception], ...] = (),
    interrupted: str = "interrupted; nothing was written.",
) -> int:
    """Does a tool's work, prints its result or its error line, and returns the exit code.

    Args:
        prog: the tool's name, at the start of its error lines.
        work: what the tool does. Under `--json` what it prints itself goes to stderr, under `--quiet` nowhere.
        arguments: as parsed by a [`ToolParser`].
        check_errors: exceptions that say that a check of the result failed.
        interrupted: what to say of an interruption, and of what it leaves behind.
    """
    as_json = getattr(arguments, "json", None) is True
    quiet = getattr(arguments, "quiet", False)
    try:
        with _directed(quiet, as_json):
            result = work(arguments)
        if as_json:
            print(json.dumps(result.figures, indent=2, allow_nan=False))
        elif result.text and not quiet:
            print(result.text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain about the same pipe once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except KeyboardInterrupt:
        print(f"{prog}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    except (*check_errors, *INPUT_ERRORS, RuntimeError) as error:
        failed = isinstance(error, check_errors)
        if not failed and not isinstance(error, INPUT_ERRORS) and not _is_lack_of_memory(error):
            raise
        if getattr(arguments, "traceback", False):
            traceback.print_exc()
        print(f"{prog}: error: {_one_line(error)}", file=sys.stderr)
        return CHECK_FAILED if failed else WRONG_USE
    return DONE


@contextmanager
def _directed(quiet: bool, as_json: bool) -> Iterator[None]:
    """Sends what is printed meanwhile where [`run_tool`] says."""
    with ExitStack() as stack:
        if quiet:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))  # progress bars and warnings
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.ERROR)
        elif as_json:
            stack.enter_context(redirect_stdout(sys.stderr))
        yield


def _is_lack_of_memory(error: Exception) -> bool:
    """The CPU's allocator has no exception of its own."""
    return "can't allocate memory" in str(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
