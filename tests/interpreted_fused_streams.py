# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Forwards, backwards and decode steps of streams whose steps are kernels, under Triton's interpreter, on the CPU.

`test_depth_streams_attnres.py` runs this file in a process of its own. By hand:
`TRITON_INTERPRET=1 python -m pytest tests/interpreted_fused_streams.py`.
"""

from collections import Counter

import interpreted_depth_kernels  # noqa: F401  rounds to nearest, as devices do
import pytest
import torch
from test_depth_attention_attnres import output_and_gradients, random_stack, relative_error
from tiny_backbones import load_plain_weights, tiny_backbone, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

from modeling_attnres import AttnResConfig, AttnResForCausalLM, depth_triton_attnres
from modeling_attnres.depth_weights_attnres import FORMS


@pytest.fixture(autouse=True)
def _asked_for(monkeypatch):
    monkeypatch.setenv("ATTNRES_KERNELS", "on")


@pytest.fixture
def launches(monkeypatch):
    """Counts the launches of each kernel."""
    counter = Counter()

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            counter[self.name] += 1
            return self.kernel[grid]

    for name in ("merge_forward", "merge_backward", "rows_forward", "rows_backward", "decode_forward"):
        kernel = getattr(depth_triton_attnres, name)
        monkeypatch.setattr(depth_triton_attnres, name, Counted(name, kernel))
    return counter


@pytest.mark.parametrize("depth_weights", FORMS)
@pytest.mark.parametrize("sublayers_per_block", [2, 3, 8])
def test_values_and_gradients_equal_naive(sublayers_per_block, depth_weights):
    kwargs = {"sublayers_per_block": sublayers_per_block, "depth_weights": depth_weights}
    found = output_and_gradients(random_stack(8, 0.5, torch.float32), **kwargs)
    naive = output_and_gradients(random_stack(8, 0.5, torch.float32), impl="naive", **kwargs)
    for value, reference in zip(found, naive, strict=True):
        assert relative_error(value, reference) < 1e-5  # fp32 over a stack, which amplifies rounding


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("sublayers_per_block", "depth_weights"), [(4, "mean"), (3, "sum")])
def test_a_model_is_the_same(sublayers_per_block, depth_weights, checkpointing, launches, monkeypatch):
    model, inputs = tiny_model("llama", sublayers_per_block, depth_weights), tiny_inputs()
    results = {}
    for asked in ("off", "on"):
        monkeypatch.setenv("ATTNRES_KERNELS", asked)
        launches.clear()
        with torch.no_grad():
            outputs = model.eval()(inputs, use_cache=False, output_depth_weights=True)
        forward = dict(launches)
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(inputs, labels=inputs, use_cache=False).loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results[asked] = (outputs.logits, *outputs.depth_weights, *gradients)
        model.gradient_checkpointing_disable()
        assert bool(launches) == (asked == "on")
    # Every sublayer but the first merges, and so does the output mix; norms are part of it.
    assert forward["merge_forward"] == model.config.num_sublayers - 1
    for value, reference in zip(*results.values(), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)  # fp32, another order of sums


@pytest.mark.parametrize(("sublayers_per_block", "depth_weights"), [(4, "mean"), (3, "sum")])
def test_a_decode_step_is_one_launch_a_sublayer(sublayers_per_block, depth_weights, launches, monkeypatch):
    model, inputs = tiny_model("llama", sublayers_per_block, depth_weights), tiny_inputs()[:1]
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    arguments |= {"output_logits": True, "return_dict_in_generate": True}
    found = model.generate(inputs, **arguments).logits
    assert launches["decode_forward"] % (model.config.num_sublayers + 1) == 0
    assert launches["decode_forward"] > 0
    monkeypatch.setenv("ATTNRES_KERNELS", "off")
    torch.testing.assert_close(found, model.generate(inputs, **arguments).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sublayers_per_block", [2, 3])
def test_sums_with_zero_queries_are_the_plain_model_bit_for_bit(sublayers_per_block, dtype):
    plain = AutoModelForCausalLM.from_config(tiny_backbone("llama")).to(dtype).eval()
    config = AttnResConfig(
        text_config=tiny_backbone("llama"), sublayers_per_block=sublayers_per_block, depth_weights="sum"
    )
    model = AttnResForCausalLM(config).to(dtype).eval()
    load_plain_weights(model, plain)
    arguments = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    arguments |= {"output_logits": True, "return_dict_in_generate": True}
    inputs = tiny_inputs()
    found, expected = (one.generate(inputs[:1], **arguments).logits for one in (model, plain))
    assert all(map(torch.equal, found, expected))
    with torch.no_grad():
        assert torch.equal(model(inputs, use_cache=False).logits, plain(inputs, use_cache=False).logits)


def test_a_norm_that_is_hooked_is_called():
    model, seen = tiny_model("llama", 4), []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda *arguments: seen.append(arguments))
    with torch.no_grad():
        model(tiny_inputs(), use_cache=False)
    assert len(seen) == len(model.model.layers)
