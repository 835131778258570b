# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-eval`: runs lm-eval on AttnRes models and compares runs."""

import argparse
import sys
from pathlib import Path

from modeling_attnres.command_line import Result, ToolParser, positive_int, require, run_tool

from . import run


def build_parser() -> ToolParser:
    parser = ToolParser(prog="attnres-eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "run",
        help="evaluate one model with lm-eval",
        description="lm-eval's `run` with AttnRes models and this project's tasks; its other options follow unchanged.",
        epilog="All options of `lm-eval run` can be given, except --output_path (use --output).",
        allow_abbrev=False,  # an option of lm-eval's is not a short form of one here
    )
    command.add_argument("model", help="checkpoint folder or Hub name, AttnRes or any other")
    command.add_shared("--output", required=True, help="folder to make for results and samples")
    command.add_shared("--dtype", help="of the model (default: as stored)")
    command.add_shared("--trust-remote-code")
    command.add_shared("--json", help="print lm-eval's results as JSON, and nothing else")

    command = commands.add_parser(
        "compare",
        help="compare finished runs item by item",
        description="Paired comparison of runs on the same items. The first model is the baseline.",
    )
    command.add_argument(
        "runs",
        nargs="+",
        metavar="DIR",
        help="one model's run; commas join runs of the same model trained with other seeds: DIR,DIR",
    )
    command.add_argument("--names", nargs="+", metavar="NAME", help="the models' names, in the order of DIR")
    command.add_argument("--tasks", help="compare only these tasks, comma-separated")
    command.add_argument("--all-metrics", action="store_true", help="every metric and filter, not each task's first")
    command.add_argument(
        "--resamples", type=positive_int, default=9999, help="of the paired bootstrap (default: %(default)s)"
    )
    command.add_shared("--seed", default=0, help="of the paired bootstrap (default: %(default)s)")
    command.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=True,
        metavar="FILE",
        help="write all figures as JSON; without FILE print them, and nothing else",
    )
    command.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    command.add_argument("--plot", type=Path, metavar="FILE", help="write a forest plot as PNG")
    command.add_argument("--model-index", type=Path, metavar="FILE", help="write the `model-index` of the last model")
    command.add_argument(
        "--card", type=Path, metavar="FILE", help="put results and `model-index` into this model card (README.md)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `attnres-eval`; returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    if others and args.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(others)}")

    def work(args: argparse.Namespace) -> Result:
        if args.command == "run":
            require("eval", "lm_eval")
            results = run.run(args.model, args.output, run.lm_eval_options(args, others))
            return Result(f"results and samples: {args.output}" if results else "", results)
        require("eval", "scipy", "statsmodels", *(["matplotlib"] if args.plot else []))
        from . import compare

        return compare.compare(args)

    return run_tool(parser.prog, work, args)


if __name__ == "__main__":
    sys.exit(main())
