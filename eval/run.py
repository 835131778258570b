# Copyright 2026 The modeling-attnres maintainers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`attnres-eval run`: lm-eval's own command line, with AttnRes models and this project's tasks."""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import yaml

from . import provenance
from .records import RunError
from .tasks import TASKS_PATH
from .tasks.offline.sandbox import ConfinementError


# What lm-eval reports as ValueError before any model is run; other ValueErrors keep their traceback.
REQUEST_ERRORS = ("Tasks not found", "Attempted to run task", "Need to specify task", "No tasks specified")


def parse(arguments: list[str]) -> argparse.Namespace:
    """lm-eval's own parser on `arguments`, with our tasks before the user's `--include_path`."""
    from lm_eval._cli import HarnessCLI

    harness, argv = HarnessCLI(), sys.argv
    sys.argv = ["lm-eval", "run", *arguments]  # the only place where lm-eval looks for them
    try:
        namespace = harness.parse_args()
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
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"--output must be a new or empty folder, {output} has something in it")


def check_model(model: str, namespace: argparse.Namespace):
    """Refuses a second model among lm-eval's own arguments, which would be evaluated under the first one's name."""
    given = namespace.model_args
    other = given.get("pretrained", model) if isinstance(given, dict) else model
    if other != model:
        raise RunError(f"--model_args pretrained must be left out or be the model given first, {model}; got {other}")


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


def run(model: str, output: Path, others: list[str]):
    """Evaluates `model` and makes the folder `output` with results, samples and provenance.

    Args:
        model: checkpoint folder or Hub name.
        output: folder to make; it appears when the run is complete.
        others: any further options of `lm-eval run`; `--tasks` is required.

    Raises:
        RunError: for a request that lm-eval or this function refuses, before the model runs; if lm-eval did not save
            what it computed.
    """
    check_output(output, others)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    # As JSON, a path may hold commas and equal signs. Options given later override or add to these.
    arguments = ["--model", "hf", "--model_args", json.dumps({"pretrained": model}), *others]
    namespace = parse([*arguments, "--output_path", str(partial), "--log_samples"])
    started = time.perf_counter()
    try:
        check_model(model, namespace)
        # Registers the architecture with Transformers' Auto classes, and so with lm-eval's `hf`.
        import modeling_attnres  # noqa: F401

        try:
            namespace.func(namespace)
        except ValueError as error:
            if str(error).startswith(REQUEST_ERRORS):
                raise RunError(str(error)) from error
            raise
        except ConfinementError as error:
            raise RunError(str(error)) from error
        if int(os.environ.get("RANK", "0")) == 0:  # only the first of several processes has results
            arguments = {"pretrained": model, **collect(partial)["config"]["model_args"]}
            command = ["attnres-eval", "run", model, *others]
            provenance.write(partial, arguments, command, time.perf_counter() - started, time.process_time())
            if output.exists():
                output.rmdir()
            partial.rename(output)
            print(f"results and samples: {output}")
    finally:
        if partial.exists():
            shutil.rmtree(partial)
