# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-eval run`: lm-eval's own command line, with AttnRes models and this project's tasks."""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import yaml

from modeling_attnres.command_line import available_device

from . import provenance
from .model_argument import check_model, check_weights
from .outputs import outputs
from .records import RunError
from .tasks import TASKS_PATH
from .tasks.offline.sandbox import ConfinementError


# How lm-eval's own refusals of a request begin.
REQUEST_ERRORS = ("Tasks not found", "Attempted to run task", "Need to specify task", "No tasks specified")


def lm_eval_options(args: argparse.Namespace, others: list[str]) -> list[str]:
    """`others` and, in lm-eval's words, those of our options that it has under another name."""
    ours = ["--model_args", json.dumps({"dtype": args.dtype})] if args.dtype else []
    return [*ours, *(["--trust_remote_code"] if args.trust_remote_code else []), *others]


def parse(arguments: list[str]) -> argparse.Namespace:
    """lm-eval's own parser on `arguments`, with our tasks before the user's `--include_path`.

    Raises:
        RunError: where lm-eval does not understand them.
    """
    from lm_eval._cli import HarnessCLI

    harness, argv, said = HarnessCLI(), sys.argv, io.StringIO()
    sys.argv = ["lm-eval", "run", *arguments]  # the only place where lm-eval looks for them
    try:
        with contextlib.redirect_stderr(said):
            namespace = harness.parse_args()
    except SystemExit as error:
        if not error.code:
            raise
        last = said.getvalue().strip().splitlines()[-1:] or ["it gave no reason"]
        raise RunError(f"lm-eval does not understand its options: {last[0].split('error: ', 1)[-1]}") from None
    finally:
        sys.argv = argv
    theirs = namespace.include_path
    if theirs is None and namespace.config and Path(namespace.config).is_file():
        # Ours, given as an option, would override the file's.
        theirs = (yaml.safe_load(Path(namespace.config).read_text("utf-8")) or {}).get("include_path")
    namespace.include_path = [str(TASKS_PATH), *([theirs] if theirs else [])]
    return namespace


def check_output(output: Path, others: list[str]):
    if any(option.split("=")[0] in ("--output_path", "-o") for option in others):
        raise RunError("give the folder for results as --output, not as lm-eval's --output_path")
    if output.exists() and any(output.iterdir()):
        raise RunError(f"--output must be a new or empty folder, {output} has something in it")


def check_numbers(options: dict):
    """Refuses what lm-eval takes for other numbers, or fails on after the model is loaded."""
    batch_size = str(options.get("batch_size", 1))
    if not re.fullmatch(r"auto(:\d+(\.\d+)?)?|0*[1-9]\d*", batch_size):
        raise RunError(f"--batch_size must be auto, auto:N or a whole number of at least 1, got {batch_size}")
    if (limit := options.get("limit")) is not None and not float(limit) > 0:
        raise RunError(f"--limit must be above 0, got {limit}")
    if (shots := options.get("num_fewshot")) is not None and int(shots) < 0:
        raise RunError(f"--num_fewshot must be at least 0, got {shots}")


def check_request(model: str, namespace: argparse.Namespace):
    """Refuses a model or a device that is not there, before lm-eval starts.

    Also a second model among lm-eval's own arguments, which would be evaluated under the first one's name.
    """
    options = vars(namespace)  # without those that were not given
    given = options.get("model_args") if isinstance(options.get("model_args"), dict) else {}
    other = given.get("pretrained", model)
    if other != model:
        raise RunError(f"--model_args pretrained must be left out or be the model given first, {model}; got {other}")
    check_numbers(options)
    if device := options.get("device"):
        try:
            available_device(device)  # lm-eval takes another one without a word
        except argparse.ArgumentTypeError as error:
            raise RunError(f"--device {error}") from error
    # A config elsewhere is left to lm-eval.
    if options.get("model", "hf") == "hf" and not {"revision", "subfolder", "gguf_file"} & given.keys():
        remote = bool(options.get("trust_remote_code") or given.get("trust_remote_code"))
        check_weights(model, check_model(model, "model", remote), "model", remote)


def evaluate(namespace: argparse.Namespace):
    """lm-eval's own `run`.

    Raises:
        RunError: with its reason, where it does not come to an end.
    """
    # Registers the architecture with Transformers' Auto classes, and so with lm-eval's `hf`.
    import modeling_attnres  # noqa: F401

    try:
        namespace.func(namespace)
    except ConfinementError as error:
        raise RunError(str(error)) from error
    except Exception as error:  # of lm-eval, a task, the model or the Hub
        if str(error).startswith(REQUEST_ERRORS):
            raise RunError(str(error)) from error
        raise RunError(f"lm-eval ended with {type(error).__name__}: {error} (--traceback shows where)") from error
    except SystemExit as error:
        raise RunError(f"lm-eval ended with exit status {error.code}") from error


def collect(written: Path) -> dict:
    """Moves lm-eval's files from its folder named after the model up to `written`, and checks that they are there.

    lm-eval logs a failure to save and goes on, so a missing file shows only here.

    Returns:
        the content of its `results_*.json`.
    """
    for path in sorted(written.glob("*/*.json*")):
        path.rename(written / path.name)
    for path in [path for path in written.iterdir() if path.is_dir()]:
        path.rmdir()
    results = list(written.glob("results_*.json"))
    if len(results) != 1:
        raise RunError(f"lm-eval did not write its results: expected one results_*.json, found {len(results)}")
    content = json.loads(results[0].read_text("utf-8"))
    for task in content["configs"]:
        if not list(written.glob(f"samples_{task}_*.jsonl")):
            raise RunError(f"lm-eval did not write the samples of task {task}")
    return content


def run(model: str, output: Path, others: list[str]) -> dict:
    """Evaluates `model` and makes the folder `output` with results, samples and provenance.

    Args:
        model: checkpoint folder or Hub name.
        output: folder to make; it appears when the run is complete.
        others: any further options of `lm-eval run`; `--tasks` is required.

    Returns:
        lm-eval's results; nothing in all but the first of several processes.

    Raises:
        RunError: for a request that lm-eval or this function refuses, before the model runs; if lm-eval fails, or did
            not save what it computed.
        ModelError: for a model that is not there.
        OutputError: for an output that cannot be written.
    """
    with outputs() as making:
        partial = making.folder(output, "--output")
        check_output(output, others)
        # As JSON, a path may hold commas and equal signs. Options given later override or add to these.
        arguments = ["--model", "hf", "--model_args", json.dumps({"pretrained": model}), *others]
        namespace = parse([*arguments, "--output_path", str(partial), "--log_samples"])
        started = time.perf_counter()
        check_request(model, namespace)
        evaluate(namespace)
        if int(os.environ.get("RANK", "0")) != 0:  # only the first of several processes has results
            shutil.rmtree(partial)
            return {}
        content = collect(partial)
        arguments = {"pretrained": model, **content["config"]["model_args"]}
        command = ["attnres-eval", "run", model, *others]
        provenance.write(partial, arguments, command, time.perf_counter() - started, time.process_time())
    return content["results"]
