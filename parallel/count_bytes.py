# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Counts what a pipeline sends, at the communication layer, and compares it with the closed form.

    python -m modeling_attnres.parallel.count_bytes --ranks 4 --virtual-stages 2

runs a small model on P processes of this machine and prints one line per way of caching.
"""

import argparse
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import ScheduleInterleaved1F1B
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from modeling_attnres import AttnResConfig, AttnResForCausalLM
from modeling_attnres.command_line import Result, ToolParser, positive_int, run_tool
from modeling_attnres.parallel.layout import CACHING, formula_summaries
from modeling_attnres.parallel.stages import pipeline_stages
from modeling_attnres.tables import markdown_table


MICRO_BATCHES, BATCH, TOKENS, WIDTH = 2, 1, 8, 16


class SentBytes(TorchDispatchMode):
    """Adds up the bytes of all floating-point tensors that this process sends point to point, while it is open.

    It sees the operator `c10d::send`, in which every send of `torch.distributed` ends, whatever the backend. (Schedules
    set themselves up with a few integers.)

    Attributes:
        total: bytes sent.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d.send.default:
            self.total += sum(tensor.nbytes for tensor in args[0] if tensor.is_floating_point())
        return func(*args, **(kwargs or {}))


def count_step(stages: list, input_ids: torch.Tensor, num_micro_batches: int) -> tuple[int, int]:
    """Bytes that all ranks together send in the forwards of one training step, and in its backwards.

    Args:
        stages: from `pipeline_stages`.
        input_ids: `[num_micro_batches * B, T]`.
    """

    def loss_fn(logits, labels):
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    schedule = ScheduleInterleaved1F1B(stages, num_micro_batches, loss_fn)
    inputs = (input_ids,) if stages[0].is_first else ()
    targets = {"target": input_ids} if stages[-1].is_last else {}
    with SentBytes() as step:
        schedule.step(*inputs, **targets)
    with SentBytes() as forward:
        schedule.eval(*inputs, **targets)
    totals = torch.tensor([forward.total, step.total - forward.total])
    dist.all_reduce(totals, group=stages[0].group)
    return tuple(totals.tolist())


def count_caching(mesh, virtual_stages: int, layers_per_stage: int, sublayers_per_block: int) -> list[dict]:
    """What one rank of `mesh` finds for every way of caching: counts in vectors of D elements per token.

    Returns:
        dicts of `caching`, `forward` and `backward` (counted, the embedding included), `embedding` and `summaries`
        (its share by the closed form and the rest), `formula`, and `peak` (most vectors of one transition).
    """
    num_layers = layers_per_stage * virtual_stages * mesh.size()
    input_ids = torch.arange(MICRO_BATCHES * BATCH * TOKENS).view(-1, TOKENS) % 32
    vector = input_ids.numel() * WIDTH * torch.float32.itemsize
    found = []
    for caching in CACHING:
        backbone = LlamaConfig(
            vocab_size=32, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=num_layers, num_attention_heads=2
        )
        torch.manual_seed(0)
        model = AttnResForCausalLM(AttnResConfig(text_config=backbone, sublayers_per_block=sublayers_per_block))
        stages = pipeline_stages(model, mesh, (BATCH, TOKENS), virtual_stages, caching=caching)
        forward, backward = (total / vector for total in count_step(stages, input_ids, MICRO_BATCHES))
        layout = stages[0].layout
        embedding = (layout.num_stages if caching == "none" else mesh.size()) - 1
        blocks_per_stage = 2 * layers_per_stage // sublayers_per_block
        found.append(
            {
                "caching": caching,
                "forward": forward,
                "backward": backward,
                "embedding": embedding,
                "summaries": forward - embedding,
                "formula": formula_summaries(mesh.size(), virtual_stages, blocks_per_stage, caching),
                "peak": max(map(layout.tensors_received, range(layout.num_stages))),
            }
        )
    return found


def format_table(found: list[dict]) -> str:
    """What [`count_caching`] found as a table in Markdown."""
    header = ("caching", "block summaries sent", "closed form", "embedding", "returned in backward")
    numbers = ("summaries", "formula", "embedding", "backward", "peak")
    rows = [[f"`{row['caching']}`", *(f"{row[name]:g}" for name in numbers)] for row in found]
    return markdown_table((*header, "largest transition"), rows)


def _worker(rank: int, options: argparse.Namespace, rendezvous: str):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=options.ranks, timeout=timedelta(minutes=2)
    )
    mesh = init_device_mesh("cpu", (options.ranks,))
    found = count_caching(mesh, options.virtual_stages, options.layers_per_stage, options.sublayers_per_block)
    dist.destroy_process_group()
    if rank == 0:
        print(format_table(found))


def build_parser() -> ToolParser:
    """The options of the command."""
    parser = ToolParser(
        prog="python -m modeling_attnres.parallel.count_bytes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=positive_int, default=4, help="P (default: %(default)s)")
    parser.add_argument("--virtual-stages", type=positive_int, default=2, help="V (default: %(default)s)")
    parser.add_argument(
        "--layers-per-stage", type=positive_int, default=1, help="decoder layers (default: %(default)s)"
    )
    parser.add_shared(
        "--sublayers-per-block", default=2, help="a divisor of a stage's sublayers (default: %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if 2 * options.layers_per_stage % options.sublayers_per_block:
        parser.error(
            f"--sublayers-per-block must divide the {2 * options.layers_per_stage} sublayers of a stage, got "
            f"{options.sublayers_per_block}"
        )
    return run_tool(parser.prog, run, options)


def run(options: argparse.Namespace) -> Result:
    """Prints the table, in vectors of D elements per token."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (options, str(Path(folder) / "rendezvous")), nprocs=options.ranks)
    return Result("", None)


if __name__ == "__main__":
    sys.exit(main())
