"""Trains a tiny model through accelerate, in whatever way the launcher's environment asks for.

    accelerate launch --config_file ... train_with_accelerate.py FOLDER [CHECKPOINT_TO_LOAD]

Rank 0 writes `FOLDER/trained.pt`: the losses of every step and the final weights, whole. Under FSDP every rank writes
its part of `FOLDER/state`.
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


def build(accelerator: Accelerator):
    model = tiny_model("qwen3_moe", 3, "sum").train()
    depth = {id(parameter) for parameter in model.model.depth_attention.parameters()}
    groups = [
        {"params": [parameter for parameter in model.parameters() if id(parameter) not in depth], "lr": 1e-2},
        {"params": list(model.model.depth_attention.parameters()), "lr": 3e-2, "weight_decay": 0.0},
    ]
    return accelerator.prepare(model, torch.optim.AdamW(groups, eps=1e-4))


def train(accelerator: Accelerator, model, optimizer) -> list[float]:
    """Losses over the whole batch, of which each rank computes its rows."""
    losses = []
    for step in range(NUM_STEPS):
        rows = tiny_inputs(BATCH, tokens=11, seed=step).to(accelerator.device)
        rows = rows.chunk(accelerator.num_processes)[accelerator.process_index]
        loss = model(rows, labels=rows).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


def whole_weights(accelerator: Accelerator, model) -> dict[str, torch.Tensor]:
    model = accelerator.unwrap_model(model)
    if accelerator.num_processes == 1:
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def main(folder: Path, checkpoint: Path | None = None):
    torch.set_num_threads(1)
    accelerator = make_accelerator()
    model, optimizer = build(accelerator)
    losses = []
    if checkpoint is None:
        losses = train(accelerator, model, optimizer)
    else:
        accelerator.load_state(checkpoint)
    sharded = [name for name, parameter in model.named_parameters() if hasattr(parameter, "placements")]
    weights = whole_weights(accelerator, model)
    if accelerator.is_main_process:
        record = {"type": str(accelerator.distributed_type), "losses": losses, "weights": weights, "sharded": sharded}
        torch.save(record, folder / "trained.pt")
    if checkpoint is None and accelerator.distributed_type == DistributedType.FSDP:
        accelerator.save_state(folder / "state")
    accelerator.wait_for_everyone()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
