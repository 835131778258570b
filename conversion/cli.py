# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Command line of the conversion: `attnres-convert SOURCE OUT --num-blocks 8`."""

import argparse
import sys
from collections import Counter

from modeling_attnres.command_line import Result, ToolParser, run_tool

from .checkpoint import ConversionError
from .convert_checkpoint import convert
from .dialects import DIALECT_NAMES, DIALECTS
from .parity import ParityError
from .report import ConversionReport
from .targets import ATTNRES, PRENORM


MAX_NAMES = 8  # names printed one by one; longer lists are counted


def build_parser() -> ToolParser:
    parser = ToolParser(
        prog="attnres-convert",
        description="Turn a pretrained PreNorm model into an Attention Residuals model that computes the same.",
    )
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder, .gguf file, or model id on the Hub")
    parser.add_argument("out", metavar="OUT", help="folder to create")
    blocks = parser.add_mutually_exclusive_group()
    parser.add_shared("--num-blocks", group=blocks, help="blocks of depth (default: 8)")
    parser.add_shared("--sublayers-per-block", group=blocks, help="sublayers per block; 1 is Full AttnRes")
    parser.add_shared("--depth-weights", help="'sum' (default) is lossless, 'mean' the paper's")
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument(
        "--to-prenorm",
        dest="to",
        action="store_const",
        const=PRENORM,
        help="back to a dense model, exact where all queries are zero",
    )
    targets.add_argument("--to-dialect", dest="to", choices=list(DIALECTS), help="write another project's naming")
    parser.add_argument(
        "--dialect", choices=DIALECT_NAMES, help="what SOURCE is written in (default: found out from config and names)"
    )
    parser.add_shared("--dtype", help="cast the weights (default: as stored)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder at OUT")
    parser.add_argument("--no-check", dest="check", action="store_false", help="skip the comparison of logits")
    parser.add_argument("--check-text", metavar="TEXT", help="also compare the logits on this text")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument(
        "--drop-keys",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave out source tensors of these names (repeatable); any other unknown tensor is an error",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a SOURCE on the Hub")
    parser.add_shared("--json", help="print the report as JSON, and nothing else")
    parser.set_defaults(to=ATTNRES)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `attnres-convert`; returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    return run_tool(parser.prog, run, parser.parse_args(argv), check_errors=(ParityError,))


def run(arguments: argparse.Namespace) -> Result:
    options = ("num_blocks", "sublayers_per_block", "depth_weights", "dtype", "to", "dialect", "overwrite")
    options += ("check", "check_text", "dry_run", "revision")
    keywords = {name: getattr(arguments, name) for name in options}
    try:
        report = convert(arguments.source, arguments.out, drop_keys=tuple(arguments.drop_keys), **keywords)
    except OSError as error:  # the file system's: a full disk, a file that may not be read
        raise ConversionError(f"{error}; nothing was written.") from error
    return Result(describe(report), report.to_dict())


def describe(report: ConversionReport) -> str:
    """The report as lines for a terminal."""
    lines = [
        f"{report.source_name} ({report.source_kind}, {report.model_type}) -> {report.out_name} ({report.target})",
        f"blocks      {report.num_blocks} of {report.sublayers_per_block} sublayers ({report.num_sublayers} in all), "
        f'depth weights "{report.depth_weights}"',
        f"parameters  {report.num_parameters:,}, of which {report.parameters_added:,} added",
        f"weights     {report.weight_bytes / 1e6:,.1f} MB, {report.dtype}",
    ]
    if report.decoded_weights:
        lines.append(f"decoded     {report.decoded_weights:,} weights, from MXFP4 to bfloat16 without rounding")
    if report.dropped_keys:
        lines.append(f"left out    {summarise(report.dropped_keys)}")
    if report.unread_keys:
        lines.append(f"set aside   {', '.join(report.unread_keys)} (no model reads them)")
    lines += [f"tokenizer   {report.tokenizer}", f"check       {report.check}"]
    lines += [
        f"            {name}: max logit difference {row['max_logit_difference']}, KL {row['kl_divergence']:.3g}, "
        f"top-1 agreement {row['top1_agreement']:.1%} ({row['tokens']} tokens)"
        for name, row in report.parity.items()
    ]
    return "\n".join(lines)


def summarise(names: list[str]) -> str:
    """Names of tensors: all of a few, of many how many each top-level module has."""
    if len(names) <= MAX_NAMES:
        return ", ".join(names)
    counts = Counter(name.partition(".")[0] for name in names)
    return f"{len(names)} tensors: {', '.join(f'{module}.* ({count})' for module, count in sorted(counts.items()))}"


if __name__ == "__main__":
    sys.exit(main())
