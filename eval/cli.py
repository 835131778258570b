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
"""`attnres-eval`: runs lm-eval on AttnRes models and compares runs."""

import argparse
import sys
from pathlib import Path

from . import run
from .records import RunError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnres-eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "run",
        help="evaluate one model with lm-eval",
        description="lm-eval's `run` with AttnRes models and this project's tasks; its other options follow unchanged.",
        epilog="All options of `lm-eval run` can be given, except --output_path (use --output).",
    )
    command.add_argument("model", help="checkpoint folder or Hub name, AttnRes or any other")
    command.add_argument("--output", type=Path, required=True, help="folder to make for results and samples")

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
    command.add_argument("--resamples", type=int, default=9999, help="of the paired bootstrap (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the paired bootstrap (default: %(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    command.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    command.add_argument("--plot", type=Path, metavar="FILE", help="write a forest plot as PNG")
    command.add_argument("--model-index", type=Path, metavar="FILE", help="write the `model-index` of the last model")
    command.add_argument(
        "--card", type=Path, metavar="FILE", help="put results and `model-index` into this model card (README.md)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `attnres-eval`; returns the exit code, 2 for a request that cannot be carried out."""
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    try:
        if args.command == "run":
            run.run(args.model, args.output, others)
        else:
            if others:
                parser.error(f"unrecognized arguments: {' '.join(others)}")
            from . import compare

            compare.compare(args)
    except RunError as error:
        print(f"attnres-eval: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
