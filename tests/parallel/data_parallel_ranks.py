# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What [`test_data_parallel`] runs on several ranks: DDP and FSDP2 as accelerate's configurations ask for them."""

import os
import shutil
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env


sys.path.insert(0, str(Path(__file__).parents[1]))
from torch.distributed.tensor import DTensor
from train_with_accelerate import NUM_STEPS, build, make_accelerator, train, whole_weights

from modeling_attnres.configuration import presets


ACCELERATE = presets.TRAINING / "accelerate"


def configure(name: str):
    """Sets the environment that `accelerate launch --config_file NAME.yaml` gives its ranks."""
    arguments = ["--config_file", str(ACCELERATE / f"{name}.yaml"), "--main_process_port", "0", "script.py"]
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    environment = prepare_multi_gpu_env(launch)
    kept = ("ACCELERATE_", "FSDP_")
    os.environ.update({name: value for name, value in environment.items() if name.startswith(kept)})


def trained(recompute: bool = False) -> tuple:
    accelerator = make_accelerator()
    model, optimizer = build(accelerator, recompute)
    losses = train(accelerator, model, optimizer)
    found = {
        "type": accelerator.distributed_type.value,
        "losses": losses,
        "weights": whole_weights(accelerator, model),
    }
    local = sum((part.to_local() if isinstance(part, DTensor) else part).numel() for part in model.parameters())
    return found | {"local_parameters": local}, accelerator, model, optimizer


def one_process(folder: Path) -> dict:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    return trained()[0]


def data_parallel(folder: Path) -> dict:
    configure("ddp")
    return trained()[0]


def fully_sharded(folder: Path) -> dict:
    """Saves after the usual steps, then takes two more."""
    configure("fsdp2")
    found, accelerator, model, optimizer = trained()
    accelerator.save_state(folder / "state")
    found["next_losses"] = train(accelerator, model, optimizer, NUM_STEPS, 2)
    return found


def fully_sharded_recomputing(folder: Path) -> dict:
    configure("fsdp2")
    return trained(recompute=True)[0]


def resume(folder: Path) -> dict:
    configure("fsdp2")
    accelerator = make_accelerator()
    model, optimizer = build(accelerator)
    # Each number of ranks wants a random state for each of its own.
    state = folder / f"state-for-{accelerator.num_processes}-{accelerator.process_index}"
    shutil.copytree(folder / "state", state)
    accelerator.load_state(state)
    weights = whole_weights(accelerator, model)
    return {"weights": weights, "next_losses": train(accelerator, model, optimizer, NUM_STEPS, 2)}


def resumed_by_one(folder: Path) -> dict:
    return resume(folder)


def resumed_by_four(folder: Path) -> dict:
    return resume(folder)


SCENARIOS = (
    (one_process, 1),
    (data_parallel, 2),
    (fully_sharded, 2),
    (fully_sharded_recomputing, 2),
    (resumed_by_one, 1),
    (resumed_by_four, 4),
)
