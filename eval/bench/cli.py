# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-bench`: the cost of attention over depth beside the PreNorm base and the paper's Figure 2."""

import argparse
import sys
from dataclasses import asdict

import torch
from transformers.utils import logging

from modeling_attnres.command_line import DTYPES, Result, ToolParser, positive_int, require, run_tool

from ..outputs import check_folder
from .clocks import clock_for
from .gpu_day import Day, run_day
from .launch_tables import launches_markdown
from .launches import launch_rows
from .models import PRESETS, VARIANTS, EqualityGateError, Lineup, build_lineup, check_equality
from .plots import plot_sweep
from .published import GROUPS, SHAPE
from .report import add_traffic, count_rows, environment, format_table, timing_rows, write_csv, write_json, write_text
from .timing import time_compiled, time_decode, time_prefill, time_training


DEFAULT_ROUNDS = {"prefill": 9, "decode": 150, "train": 9, "compiled": 15, "counts": 1, "launches": 1}


def build_parser() -> ToolParser:
    parser = ToolParser(prog="attnres-bench", description=__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default="135M", help="shape of the backbone")
    parser.add_argument("--mode", choices=list(DEFAULT_ROUNDS), nargs="+", default=["prefill"])
    parser.add_argument("--variants", choices=list(VARIANTS), nargs="+", default=["figure2", "block", "block-sum"])
    parser.add_shared("--dtype", default="float32", help="of weights and activations (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where models are timed")
    parser.add_argument("--batch", type=positive_int, default=1)
    parser.add_argument("--tokens", type=positive_int, default=512, help="prompt, sequence or KV cache length")
    parser.add_argument("--rounds", type=positive_int, default=None, help=f"default by mode: {DEFAULT_ROUNDS}")
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_shared("--seed", default=0, help="of the weights (default: %(default)s)")
    parser.add_argument(
        "--published",
        nargs="*",
        choices=list(GROUPS),
        default=None,
        metavar="GROUP",
        help=f"measure the published set, or groups of it ({', '.join(GROUPS)}), beside its bars; other options but "
        "--threads and --output are then its own",
    )
    parser.add_argument(
        "--gpu-day",
        action="store_true",
        help="all that only a GPU can answer, in less than twenty minutes; writes gpu-day.json and gpu-day.md to "
        "--output, and fails at the first inexact result",
    )
    parser.add_shared("--output", help="folder for JSON, CSV and plots")
    parser.add_shared("--json")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `attnres-bench`; returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    left = "interrupted; what was measured before is in --output, where that was given."
    arguments = parser.parse_args(argv)
    return run_tool(parser.prog, run, arguments, check_errors=(EqualityGateError,), interrupted=left)


def run(arguments: argparse.Namespace) -> Result:
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    _check(arguments)
    if arguments.output is not None:
        if arguments.published is not None and "mixer" in (arguments.published or GROUPS):
            require("eval", "matplotlib")
        check_folder(arguments.output, "--output")
    if arguments.gpu_day:
        day = Day(torch.device("cuda"), clock_for("cuda"))
        raise SystemExit(run_day(day, arguments.output))
    return run_published(arguments) if arguments.published is not None else run_case(arguments)


def _check(arguments: argparse.Namespace):
    """Raises a ValueError if what is asked for cannot be done."""
    on_gpu = arguments.gpu_day or arguments.device == "cuda"
    off_gpu = sorted({"counts", "launches"} & set(arguments.mode))
    if on_gpu and not torch.cuda.is_available():
        raise ValueError("`--device cuda` and `--gpu-day` need a CUDA device, and PyTorch finds none.")
    if arguments.gpu_day and arguments.output is None:
        raise ValueError("`--gpu-day` needs `--output`, a folder for what it finds.")
    if arguments.device == "cuda" and arguments.published is not None:
        raise ValueError("`--published` is measured on the processor: leave out `--device cuda`.")
    if arguments.device == "cuda" and off_gpu:
        raise ValueError(f"`--mode {off_gpu[0]}` is counted on the processor: leave out `--device cuda`.")


def run_published(arguments: argparse.Namespace) -> Result:
    """Measures the published set, prints it beside its bars and writes it to `--output`, group by group."""
    rows: list[dict] = []
    seconds: dict[str, dict] = {}
    for group in arguments.published or list(GROUPS):
        figures, timings = GROUPS[group]()
        rows += [figure.row() for figure in figures]
        seconds |= {
            case: {name: asdict(entry) for name, entry in entries.items()} for case, entries in timings.items()
        }
        print(format_table([figure.row() for figure in figures]), end="\n\n", flush=True)
        content = {"environment": environment(arguments.threads), "rows": rows, "seconds": seconds}
        if arguments.output is None:
            continue
        write_csv(arguments.output / "published.csv", rows)
        write_json(arguments.output / "published.json", content)
        if group == "launches":
            write_text(arguments.output / "launches.md", launches_markdown())
        if group == "mixer":
            plot_sweep(timings, arguments.output / "mixer.png", SHAPE.num_sublayers, SHAPE.sublayers_per_block)
    return Result(format_table(rows), content)


def run_case(arguments: argparse.Namespace) -> Result:
    """Measures one shape, dtype, batch and length in the chosen modes; prints and writes each when it is done."""
    shape, dtype = PRESETS[arguments.preset], DTYPES[arguments.dtype]
    results: dict = {"environment": environment(arguments.threads, arguments.device)}
    lineup = None
    if set(arguments.mode) != {"launches"}:  # these are counted without weights
        lineup = build_lineup(shape, arguments.variants, dtype, seed=arguments.seed, device=arguments.device)
        results["equality"] = errors = check_equality(lineup)
        print("equality gate passed:", ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    name = f"{arguments.preset} {arguments.dtype} b{arguments.batch} t{arguments.tokens}"
    for mode in arguments.mode:
        if mode == "launches":
            rows = launch_rows(shape, arguments.variants, arguments.batch, arguments.tokens, dtype)
        else:
            rows = _run_mode(mode, lineup, arguments, name)
        print(format_table(rows), end="\n\n", flush=True)
        results[mode] = rows
        if arguments.output is not None:
            write_csv(arguments.output / f"{mode}.csv", rows)
            write_json(arguments.output / "results.json", results)
    return Result("", results)


def _run_mode(mode: str, lineup: Lineup, arguments: argparse.Namespace, name: str) -> list[dict]:
    batch, tokens = arguments.batch, arguments.tokens
    rounds = arguments.rounds or DEFAULT_ROUNDS[mode]
    if mode == "counts":
        return count_rows(lineup, tokens, batch)
    label = clock_for(arguments.device).label
    if mode == "compiled":
        prefill, decode = time_compiled(lineup, batch, tokens, rounds, name)
        return [
            *timing_rows(f"compiled prefill {name}", prefill, label),
            *timing_rows(f"compiled decode {name}", decode, label),
        ]
    timer = {"prefill": time_prefill, "decode": time_decode, "train": time_training}[mode]
    rows = timing_rows(f"{mode} {name}", timer(lineup, batch, tokens, rounds, description=f"{mode} {name}"), label)
    if arguments.device == "cuda" and mode != "decode":
        add_traffic(rows, lineup, mode, batch, tokens)
    return rows


if __name__ == "__main__":
    sys.exit(main())
