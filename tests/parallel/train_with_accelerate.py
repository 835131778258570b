# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny model through accelerate, in whatever way the launcher's environment asks for.

    accelerate launch --config_file ... train_with_accelerate.py FOLDER

Rank 0 writes `FOLDER/trained.pt`: the losses of every step and the final weights, whole.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict


sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_backbones import tiny_inputs, tiny_model


NUM_STEPS = 3
BATCH = 4  # over all ranks


def make_accelerator() -> Accelerator:
    """An accelerator on the CPU where there is no GPU. Accelerate then knows data parallelism only, FSDP is forced."""
    if torch.cuda.is_available():
        return Accelerator()
    accelerator = Accelerator(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # from the launcher's environment
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
    return accelerator


def build(accelerator: Accelerator, recompute: bool = False):
    model = tiny_model("qwen3_moe", 3, "sum").train()
    if recompute:
        model.gradient_checkpointing_enable()
    depth = {id(parameter) for parameter in model.model.depth_attention.parameters()}
    # Momentum is a state to save; an adaptive step would turn rounding of tiny gradients into whole steps.
    groups = [
        {"params": [parameter for parameter in model.parameters() if id(parameter) not in depth], "lr": 0.1},
        {"params": list(model.model.depth_attention.parameters()), "lr": 0.5},
    ]
    return accelerator.prepare(model, torch.optim.SGD(groups, momentum=0.9))


def train(accelerator: Accelerator, model, optimizer, first_step: int = 0, num_steps: int = NUM_STEPS) -> list[float]:
    """Losses over the whole batch, of which each rank computes its rows."""
    losses = []
    for step in range(first_step, first_step + num_steps):
        rows = tiny_inputs(BATCH, tokens=11, seed=step).to(accelerator.device)
        rows = rows.chunk(accelerator.num_processes)[accelerator.process_index]
        loss = model(rows, labels=rows, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


def whole_weights(accelerator: Accelerator, model) -> dict[str, torch.Tensor]:
    """Copies of the weights as plain tensors, on rank 0 (some on the others too)."""
    model = accelerator.unwrap_model(model)
    if accelerator.distributed_type == DistributedType.FSDP:
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        weights = model.state_dict()
    return {name: tensor.clone() for name, tensor in weights.items()}


def main(folder: Path):
    torch.set_num_threads(1)
    accelerator = make_accelerator()
    model, optimizer = build(accelerator)
    record = {"type": accelerator.distributed_type.value, "losses": train(accelerator, model, optimizer)}
    record["weights"] = whole_weights(accelerator, model)
    if accelerator.is_main_process:
        torch.save(record, folder / "trained.pt")
    accelerator.wait_for_everyone()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
