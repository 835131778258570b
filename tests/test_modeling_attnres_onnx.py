# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Models leave PyTorch: `torch.onnx.export` takes them, and onnxruntime gives their logits."""

import io
from contextlib import redirect_stdout

import onnxruntime
import pytest
import torch
from tiny_backbones import tiny_inputs, tiny_model
from torch import nn


# fp32, and logits of up to 0.4. Both runtimes round every operation to 2^-24 of its result and sum in other orders;
# 3e-7 were measured, of which the plain models have 1e-7.
TOLERANCE = {"rtol": 0, "atol": 1e-6}
SIZES = ((2, 12), (3, 5), (1, 30), (1, 1))  # batch and tokens; exported with the first


class Logits(nn.Module):
    """A program of ONNX takes and gives tensors only."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def session(model: nn.Module) -> onnxruntime.InferenceSession:
    """The model in onnxruntime, exported with free numbers of sequences and tokens."""
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", max=64)}
    with torch.no_grad(), redirect_stdout(io.StringIO()):  # it prints its steps
        program = torch.onnx.export(
            Logits(model).eval(),
            (tiny_inputs(*SIZES[0]),),
            dynamo=True,
            dynamic_shapes={"input_ids": sizes},
            input_names=["input_ids"],
        )
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])


# An export takes some seconds. The fast suite runs each S, both forms and both backbones once; the rest is slow.
@pytest.mark.parametrize(
    ("model_type", "sublayers_per_block", "depth_weights"),
    [
        *(("llama", 1, "sum"), ("qwen3", 2, "sum"), ("llama", 3, "mean")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *(("llama", 1, "mean"), ("llama", 2, "mean"), ("llama", 2, "sum"), ("llama", 3, "sum")),
                *(("qwen3", 1, "mean"), ("qwen3", 1, "sum"), ("qwen3", 2, "mean")),
                *(("qwen3", 3, "mean"), ("qwen3", 3, "sum")),
            )
        ),
    ],
)
def test_onnxruntime_gives_the_same_logits(model_type, sublayers_per_block, depth_weights):
    # Larger queries amplify the rounding of what they score, in PyTorch as well.
    model = tiny_model(model_type, sublayers_per_block, depth_weights, num_hidden_layers=2, query_std=0.2)
    exported = session(model)
    for batch, tokens in SIZES:
        input_ids = tiny_inputs(batch, tokens)
        with torch.no_grad():
            expected = model(input_ids, use_cache=False).logits
        (found,) = exported.run(None, {"input_ids": input_ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, **TOLERANCE)
