# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What quantisation costs an AttnRes model, beside what it costs the PreNorm model that it was made from.

    attnres-convert path/to/model my-attnres-model --num-blocks 8
    python examples/quantise.py --pair converted path/to/model my-attnres-model --text path/to/texts --output build/quantised

Both models are quantised by torchao while Transformers loads them, and read the same blocks out of the end of every text,
which finetune.py does not train on. Writes `quantised.csv` to the output folder and prints it as a table:

    cost   mean loss of the quantised model minus that of the model in full precision, in nats per predicted token
    extra  the AttnRes model's cost minus the PreNorm model's, with the 95 % interval of a paired t-test over blocks
"""

import argparse
import csv
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from modeling_attnres import AttnResConfig
from modeling_attnres.command_line import DTYPES, dtype_name, whole_number
from modeling_attnres.eval.outputs import outputs
from modeling_attnres.eval.paired import compare


HELD_OUT = 0.05  # the share at the end of every text's tokens, which finetune.py does not train on

# Weights alone in 8 bits by output channel; these and activations by token; weights alone in 4 bits by group. torchao's
# `Int4WeightOnlyConfig` has no kernel for a CPU, `IntxWeightOnlyConfig` runs anywhere.
METHODS = {
    "int8": Int8WeightOnlyConfig,
    "int8-activations": Int8DynamicActivationInt8WeightConfig,
    "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


@dataclass
class Row:
    """One line of the table. Losses in nats per predicted token, means over the same blocks."""

    pair: str
    method: str
    prenorm_loss: float
    attnres_loss: float
    prenorm_cost: float
    attnres_cost: float
    extra: float
    low: float
    high: float
    blocks: int
    tokens: int


def held_out_blocks(tokenizer, path: Path, tokens: int, count: int) -> torch.Tensor:
    """Token ids `[count, tokens]`, spread evenly over the ends of a text file, or of every `*.txt` below a folder.

    Raises:
        ValueError: if the ends are shorter.
    """
    texts = [file.read_text("utf-8", errors="replace") for file in (sorted(path.rglob("*.txt")) or [path])]
    ends = []
    for ids in tokenizer(texts).input_ids:
        ids = [*ids, tokenizer.eos_token_id]
        ends += ids[len(ids) - round(HELD_OUT * len(ids)) :]
    blocks = torch.tensor(ends[: len(ends) // tokens * tokens], dtype=torch.long).view(-1, tokens)
    if len(blocks) < count:
        raise ValueError(
            f"`--text` must hold {count} blocks of {tokens} tokens in the last {HELD_OUT:.0%} of its texts, got {len(blocks)}."
        )
    return blocks[torch.arange(count) * len(blocks) // count]


def check_pairs(pairs: list[list[str]]):
    """
    Raises:
        ValueError: if two pairs have one name, or a pair is not a PreNorm and an AttnRes model with one tokenizer.
    """
    names = [name for name, _, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"`--pair` must have a name of its own each time, got {names}.")
    vocabulary = AutoTokenizer.from_pretrained(pairs[0][1]).get_vocab()
    for name, *folders in pairs:
        types = [AutoConfig.from_pretrained(folder).model_type for folder in folders]
        if [kind == AttnResConfig.model_type for kind in types] != [False, True]:
            raise ValueError(f"`--pair {name}` must name a PreNorm and then an AttnRes model, got {types}.")
        for folder in folders:
            if AutoTokenizer.from_pretrained(folder).get_vocab() != vocabulary:
                raise ValueError(f"`--pair` must name models with one tokenizer, got another in {folder}.")


@torch.no_grad()
def block_losses(folder: str, method: str | None, blocks: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """The loss of every block, the mean over its predicted tokens, `[blocks]` in fp64.

    Args:
        method: a key of `METHODS`, or `None` for the model as it is.
        blocks: token ids `[blocks, T]`.
    """
    config = None if method is None else TorchAoConfig(quant_type=METHODS[method]())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config).eval()
    losses = [model(block[None], labels=block[None]).loss.double().item() for block in blocks]
    if not np.isfinite(losses).all():
        raise ValueError(f"`--pair`: the loss of {folder} is not finite ({method or 'not quantised'}).")
    return np.array(losses)


def measure(pairs: list[list[str]], methods: list[str], blocks: torch.Tensor, dtype: torch.dtype) -> list[Row]:
    """A row for every pair as it is, and one for every method."""
    rows, known = [], {}
    for name, *folders in pairs:
        full = None
        for method in (None, *methods):
            for folder in folders:
                if (folder, method) not in known:
                    known[folder, method] = block_losses(folder, method, blocks, dtype)
            losses = [known[folder, method] for folder in folders]
            full = losses if full is None else full
            costs = [quantised - plain for quantised, plain in zip(losses, full)]
            extra = compare(*costs, np.ones(len(blocks)))
            means = [float(values.mean()) for values in (*losses, *costs)]
            row = Row(name, method or "none", *means, extra.value, extra.low, extra.high, len(blocks), blocks.numel())
            print(describe(row), flush=True)
            rows.append(row)
    return rows


HEADER = (
    f"{'pair':12} {'method':17} {'PreNorm':>8} {'AttnRes':>8} {'cost':>9} {'cost':>9} {'extra':>10}  95 % interval"
)


def describe(row: Row) -> str:
    return (
        f"{row.pair:12} {row.method:17} {row.prenorm_loss:8.4f} {row.attnres_loss:8.4f} {row.prenorm_cost:+9.5f} "
        f"{row.attnres_cost:+9.5f} {row.extra:+10.6f}  {row.low:+.6f} to {row.high:+.6f}"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "PRENORM", "ATTNRES"),
        help="folders of a PreNorm model and of the AttnRes model that stands beside it (repeatable)",
    )
    parser.add_argument("--text", type=Path, required=True, help="a text file, or a folder of *.txt files")
    parser.add_argument("--output", type=Path, required=True, help="folder for quantised.csv")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--tokens", type=whole_number(2), default=256, help="of each block (default: %(default)s)")
    parser.add_argument("--blocks", type=whole_number(2), default=32, help="to measure on (default: %(default)s)")
    parser.add_argument("--dtype", type=dtype_name, default="float32", help="of what is not quantised")
    return parser


def main(argv: list[str] | None = None) -> list[Row]:
    arguments = build_parser().parse_args(argv)
    check_pairs(arguments.pair)
    tokenizer = AutoTokenizer.from_pretrained(arguments.pair[0][1])
    blocks = held_out_blocks(tokenizer, arguments.text, arguments.tokens, arguments.blocks)
    print(HEADER)
    with outputs() as making:
        folder = making.folder(arguments.output, "--output")
        rows = measure(arguments.pair, arguments.methods, blocks, DTYPES[arguments.dtype])
        with open(folder / "quantised.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])), lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    print(f"wrote {arguments.output / 'quantised.csv'}")
    return rows


if __name__ == "__main__":
    main()
