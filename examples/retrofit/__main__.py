# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning with and without AttnRes on equal terms: the study of docs/evidence.md.

    python -m examples.retrofit plan   --model build/prenorm --domain NAME='PATTERN' ... --output build/retrofit
    python -m examples.retrofit run    --model build/prenorm --domain NAME='PATTERN' ... --output build/retrofit
    python -m examples.retrofit report --output build/retrofit --report docs/evidence

`--model` is a PreNorm model; conversions are made in memory. `plan` measures a step of every arm and prints what the
study costs. `run` does the runs that are not done; several processes may share a folder, and one that was interrupted
is started again with the same arguments. `report` writes tables and pictures of the runs that are done.
"""

import argparse
import functools
import os
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from modeling_attnres.command_line import SHARED, Result, ToolParser, positive_int, run_tool

from .arms import ARMS, count_trained, load_base, prepare
from .report import report
from .schedule import SEEDS, Run, Study, form_of, write_json
from .texts import Blocks, load_domain
from .training import Settings, Stopwatch, block_losses, draw_batches, train


class Worker:
    """Does runs, one after the other, with one copy of the model and the tokens in memory."""

    def __init__(self, model: Path, domains: dict[str, str], settings: Settings):
        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.splits = {
            name: load_domain(pattern, self.tokenizer, settings.tokens) for name, pattern in domains.items()
        }
        for splits in self.splits.values():
            draw_batches(splits["train"], settings, 0)  # raises before the work
        self.base = functools.lru_cache(maxsize=2)(lambda form: load_base(model, form))

    def held_out(self, run: Run) -> Blocks:
        splits, settings = self.splits[run.domain], self.settings
        if run.stage == "sweep":
            return splits["validation"].spread(settings.validation_blocks)
        return splits["test"].spread(settings.test_blocks)

    def do(self, run: Run, rates: tuple[float, float | None] | None) -> tuple[dict, torch.nn.Module]:
        """The record of a run, and the trained model."""
        record = {**asdict(run)}
        model = self.base(run.form)
        if run.arm:
            rate, query_rate = rates
            batches = draw_batches(self.splits[run.domain]["train"], self.settings, run.seed)
            set_seed(run.seed)  # before the adapter draws its weights
            model = prepare(model, ARMS[run.arm])
            watch = Stopwatch()
            record |= {"rate": rate, "query_rate": query_rate, "trained_parameters": count_trained(model)}
            record["train_losses"] = train(model, batches, self.settings, rate, query_rate, run.seed)
            record["train_seconds"] = watch.seconds()
        held_out, watch = self.held_out(run), Stopwatch()
        # Rates are chosen by losses of half precision; reported losses are of full.
        record["losses"] = block_losses(model, held_out, autocast=run.stage == "sweep")
        record["eval_seconds"] = watch.seconds()
        record["num_bytes"] = held_out.num_bytes.tolist()
        record["documents"] = held_out.documents
        return record, model

    def save(self, model: torch.nn.Module, folder: Path):
        """Writes a model, its adapter merged, as a folder that is complete or not there."""
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        model = model.merge_and_unload() if isinstance(model, PeftModel) else model
        model.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        partial.rename(folder)


def run_study(study: Study, worker: Worker, keep: bool):
    """Does what is not done, and waits for what other processes do."""
    while pending := [run for run in study.runs if study.read(run) is None]:
        if not any(do_one(study, worker, run, keep, len(pending)) for run in pending):
            time.sleep(5)


def do_one(study: Study, worker: Worker, run: Run, keep: bool, pending: int) -> bool:
    """Whether the run was done: not if it waits for a sweep, or another process has it."""
    rates = study.rates(run) if run.arm else None
    if run.arm and rates is None:
        return False
    with study.claim(run) as mine:
        if not mine:
            return False
        watch = Stopwatch()
        record, model = worker.do(run, rates)
        folder = study.folder / "models" / run.name
        if keep and run.stage == "seeds" and run.seed == 0 and not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            worker.save(model, folder)
        write_json(study.path(run), record)
    nats = sum(record["losses"]) / len(record["losses"]) / (worker.settings.tokens - 1)
    seconds = watch.seconds()
    clock = time.strftime("%H:%M:%S")
    print(
        f"{clock} {run.name}: {nats:.4f} nats, {seconds['cpu']:.0f} s CPU, {seconds['wall']:.0f} s; {pending - 1} left",
        flush=True,
    )
    return True


def print_plan(study: Study, worker: Worker):
    """What is left, with times measured on two steps of every arm."""
    seconds = {"": 0.0}
    short = replace(worker.settings, steps=3, warmup_steps=1)
    domain = next(iter(study.domains))
    watch = Stopwatch()
    block_losses(worker.base(form_of("lora")), worker.splits[domain]["test"].spread(4))
    block_seconds = watch.seconds()["cpu"] / 4
    for name, arm in ARMS.items():
        model = prepare(worker.base(form_of(name)), arm)
        watch = Stopwatch()
        train(model, draw_batches(worker.splits[domain]["train"], short, 0), short, arm.rates[0], None, 0)
        seconds[name] = watch.seconds()["cpu"] / short.steps * worker.settings.steps
        print(
            f"{name}: {count_trained(model):,} parameters learn, {seconds[name] / worker.settings.steps:.2f} s a step"
        )
    total = 0.0
    for stage in ("before", "sweep", "seeds"):
        runs = [run for run in study.runs if run.stage == stage and study.read(run) is None]
        cost = sum(seconds[run.arm] + len(worker.held_out(run)) * block_seconds for run in runs)
        total += cost
        print(f"{stage}: {len(runs)} runs left, {cost / 60:.0f} minutes of CPU time")
    print(f"all: {total / 3600:.1f} hours of CPU time")


def parse_domain(value: str) -> tuple[str, str]:
    name, found, pattern = value.partition("=")
    if not found or not name.isalnum():
        raise argparse.ArgumentTypeError(f"`--domain` takes NAME=PATTERN with letters and digits, got {value!r}")
    return name, pattern


SETTINGS_HELP = {
    "steps": "of the optimizer in every run",
    "batch_size": "blocks per step",
    "tokens": "of a block",
    "validation_blocks": "to choose rates by",
    "test_blocks": "to report",
    "warmup_steps": "of these, with a rising rate",
}


def build_parser() -> ToolParser:
    parser = ToolParser(
        prog="examples.retrofit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["plan", "run", "report"], help="count the cost, train, or draw")
    parser.add_shared("--output", required=True, help="folder of the study")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a PreNorm model, for `plan` and `run`")
    parser.add_argument(
        "--domain", type=parse_domain, action="append", default=[], dest="domains", help="NAME='PATTERN' of text files"
    )
    parser.add_argument("--seeds", type=positive_int, default=SEEDS, help="of every arm (default: %(default)s)")
    parser.add_argument("--keep-models", action="store_true", help="save the models of seed 0 below models/")
    parser.add_argument("--report", type=Path, metavar="DIR", help="folder for tables and pictures, for `report`")
    for field in fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        text = f"{SETTINGS_HELP[field.name]} (default: %(default)s)"
        if name in SHARED:
            parser.add_shared(name, default=field.default, help=text)
        else:
            parser.add_argument(name, type=positive_int, default=field.default, help=text)
    return parser


def work(args: argparse.Namespace) -> Result:
    """Does what `action` says."""
    if args.action == "report":
        if args.report is None:
            raise ValueError("`report` needs --report, which is not given.")
        report(Study.open(args.output, args.seeds), args.report)
        return Result("", None)
    if args.model is None or not args.domains:
        raise ValueError(f"`{args.action}` needs --model and --domain, which are not both given.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    study = Study(args.output, settings, dict(args.domains), args.seeds)
    worker = Worker(args.model, study.domains, settings)
    if args.action == "plan":
        print_plan(study, worker)
    else:
        run_study(study, worker, args.keep_models)
    return Result("", None)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    return run_tool(parser.prog, work, parser.parse_args(argv), interrupted="interrupted; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
