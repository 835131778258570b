# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-prune`: drops the sublayers, layers or blocks that a text misses least, and writes what is left."""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from modeling_attnres.command_line import DTYPES, Result, ToolParser, positive_int, run_tool, whole_number

from ..conversion.companions import copy_companions, write_json
from ..conversion.writer import check_output, put_in_place, workspace
from .inspect_model import load_tokenizer, read_sequences, read_text
from .model_argument import ModelError, check_model, check_weights
from .pruned_checkpoint import PruningError, check_written, pruned_model
from .pruning import UNITS, advantage, check_unit, loss_table, measure_cut, unit_effects, units
from .pruning_report import describe, draw_table, figures, write_rows


REPORT = "pruning"  # with the endings json, csv and png, in the checkpoint's folder


def build_parser() -> ToolParser:
    parser = ToolParser(
        prog="attnres-prune",
        description="Rank the sublayers, decoder layers or blocks of an AttnRes model by what a text loses without each, "
        "drop those of least effect, and write a checkpoint that loads as before, with a table of losses on the text's "
        "next part beside random choices and the last ones.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    parser.add_argument("--drop", type=positive_int, required=True, metavar="K", help="how many units to drop")
    parser.add_argument(
        "--unit",
        choices=UNITS,
        default="sublayer",
        help="'sublayer': set its weights to zero, which saves no memory; 'layer' and 'block': take decoder layers out "
        "(default: %(default)s)",
    )
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="plain text, UTF-8")
    parser.add_argument(
        "--sequences", type=whole_number(1), default=4, help="that units are ranked on (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out",
        type=whole_number(2),
        default=8,
        help="sequences after these, for the table (default: %(default)s)",
    )
    parser.add_argument("--tokens", type=whole_number(2), default=128, help="of each sequence (default: %(default)s)")
    parser.add_argument(
        "--table", type=positive_int, nargs="+", default=[], metavar="K", help="further numbers of units for the table"
    )
    parser.add_argument(
        "--draws", type=whole_number(2), default=5, help="of random choices in the table (default: %(default)s)"
    )
    parser.add_shared("--seed", default=0, help="of the random choices (default: %(default)s)")
    parser.add_shared(
        "--dtype", default="float32", help="to measure in; the weights' own is kept (default: %(default)s)"
    )
    parser.add_shared("--device", default="cpu")
    parser.add_shared("--trust-remote-code")
    parser.add_shared("--json", help="print the numbers of pruning.json, and nothing else")
    return parser


def check(args: argparse.Namespace) -> tuple[PreTrainedConfig, torch.Tensor, torch.Tensor]:
    """Everything that can be known before work: the config, the ids to rank units on, and the held-out ones."""
    read_text(args.text)
    if not Path(args.model).is_dir():
        raise ModelError(f"MODEL must be a checkpoint folder, got {args.model!r}.")
    config = check_model(args.model, "MODEL", args.trust_remote_code)
    try:
        check_unit(config, args.unit, [args.drop, *args.table])
    except ValueError as error:
        raise ModelError(f"MODEL {args.model}: {error}") from error
    check_weights(args.model, config, "MODEL", args.trust_remote_code)
    check_output(args.out, Path(args.model), overwrite=False)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    input_ids = read_sequences(tokenizer, args.text, args.sequences + args.held_out, args.tokens, config)
    return config, *input_ids.split((args.sequences, args.held_out))


def load(args: argparse.Namespace, folder: str | Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[args.dtype], trust_remote_code=args.trust_remote_code
    )
    return model.eval().to(args.device)


def run(args: argparse.Namespace) -> Result:
    """Ranks, measures, writes, and compares what was written with what was measured."""
    logging.set_verbosity_error()
    config, ranked, held_out = check(args)
    ranked, held_out = ranked.to(args.device), held_out.to(args.device)
    with workspace(args.out) as folder:
        model = load(args, args.model)
        effects = unit_effects(model, args.unit, ranked).tolist()
        table = loss_table(model, args.unit, effects, [args.drop, *args.table], held_out, args.draws, args.seed)
        del model
        (chosen,) = [cut for cut in table if cut.choice == "least effect" and len(cut.dropped) == args.drop]

        complete = folder / "checkpoint"
        stored = AutoModelForCausalLM.from_pretrained(
            args.model, dtype="auto", trust_remote_code=args.trust_remote_code
        )
        pruned_model(stored, args.unit, chosen.dropped).save_pretrained(complete)
        del stored
        copy_companions(Path(args.model), complete, config, keep_card=True)
        saved = check_written(Path(args.model), complete, config, args.unit, chosen.dropped)
        written = measure_cut(load(args, complete), "sublayer", held_out, "written", 0, ())
        check_losses(written.losses, chosen.losses, args.dtype)

        advantages = {drop: advantage(table, drop) for drop in sorted({args.drop, *args.table})}
        found = figures(args, table, effects, advantages, chosen, saved, written)
        write_json(complete / f"{REPORT}.json", found)
        write_rows(table, complete / f"{REPORT}.csv")
        draw_table(table, f"{args.unit}s dropped of {len(units(config, args.unit))}", complete / f"{REPORT}.png")
        put_in_place(complete, args.out)
    return Result(describe(found, args.out), found)


def check_losses(written: tuple[float, ...], measured: tuple[float, ...], dtype: str):
    """Raises [`PruningError`] unless the checkpoint that was written has the losses that were measured before."""
    # Half precision: sums in another order. Of fp32 it is the mean over a sequence's tokens.
    allowed = 1e-4 if dtype == "float32" else 0.1
    difference = max(abs(after - before) for after, before in zip(written, measured, strict=True))
    if not difference <= allowed:
        raise PruningError(
            f"The checkpoint without these parts has another loss than was measured, by {difference:.3g} nats: a layer of "
            "this backbone depends on its place. Nothing was written."
        )


def main(argv: list[str] | None = None) -> int:
    """Entry point of `attnres-prune`; returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    return run_tool(parser.prog, run, parser.parse_args(argv), check_errors=(PruningError,))


if __name__ == "__main__":
    sys.exit(main())
