# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What [`test_device_map`] runs in a process of its own: a model over two devices that do not exist.

Shapes, dtypes and devices are followed, nothing is computed; where tensors of two devices meet in one operation it fails.
"""

import sys
from pathlib import Path

import torch
from accelerate import infer_auto_device_map
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration


sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_backbones import tiny_model

from modeling_attnres import BlockSummaries


FIRST, SECOND = "pretend:0", "pretend:1"
# A backend that torch has for tests: as many devices as one likes, and autograd accepts them (fake GPUs it does not).
pretend_backend = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)


def auto_device_map(model, first_bytes: int) -> dict[str, str]:
    """What `device_map="auto"` comes to, if the first device has so much memory."""
    sizes = {"cpu": first_bytes, "disk": 10**9}
    device_map = infer_auto_device_map(model, max_memory=sizes, no_split_module_classes=model._no_split_modules)
    return {name: {"cpu": FIRST, "disk": SECOND}[place] for name, place in device_map.items()}


def place(model, device_map: dict[str, str]):
    """As `dispatch_model` does: tensors on their devices, and hooks that bring the inputs there."""

    def device(name: str) -> str:
        return device_map[max((key for key in device_map if f"{name}.".startswith(f"{key}.")), key=len)]

    for module_name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:  # no bias
                    continue
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device(f"{module_name}.{name}"))
                is_parameter = tensors is module._parameters
                tensors[name] = torch.nn.Parameter(empty) if is_parameter else empty
    attach_align_device_hook_on_blocks(
        model,
        execution_device={"": FIRST, **device_map},
        offload=dict.fromkeys(device_map, False),
        skip_keys=model._skip_keys_device_placement,
    )


def forward(
    sublayers_per_block: int, depth_weights: str, first_bytes: int, with_gradients: bool, recompute: bool
) -> dict:
    model = tiny_model("llama", sublayers_per_block, depth_weights)
    if recompute:
        model.gradient_checkpointing_enable()
        model.train()
    device_map = auto_device_map(model, first_bytes)
    summaries = BlockSummaries()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(with_gradients):
        place(model, device_map)
        inputs = torch.ones(2, 12, dtype=torch.long, device=FIRST)
        output = model(
            inputs,
            use_cache=False,  # a cache begins with an empty literal, which pretended devices cannot hold
            block_summaries=summaries,
            output_depth_weights=True,
            output_block_summaries=True,
        )
    return {
        "map": device_map,
        "logits": str(output.logits.device),
        "bank": str(summaries.sources.device),
        "returned_summaries": str(output.block_summaries.device),
        "layers": [device_map[f"model.layers.{index}"] for index in range(4)],
        "weights": [str(weights.device) for weights in output.depth_weights],
    }


CASES = {
    # name: sublayers per block, form, bytes of the first device (where the layers are cut), with gradients, recomputing
    "prefill": (2, "mean", 80_000, False, False),
    "prefill-odd-sum": (3, "sum", 140_000, False, False),
    "training": (8, "sum", 80_000, True, False),
    "training-full": (1, "mean", 140_000, True, False),
    "recomputing": (2, "sum", 80_000, True, True),
}


def two_devices(folder: Path) -> dict:
    pretend_backend("pretend")
    return {name: forward(*case) for name, case in CASES.items()}


SCENARIOS = ((two_devices, 1),) if pretend_backend else ()
