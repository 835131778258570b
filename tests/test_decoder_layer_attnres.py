# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A decoder layer as others see it: what hooks read and replace, wrappers that run it again, compilation by itself."""

import functools

import pytest
import torch
from tiny_backbones import load_plain_weights, tiny_backbone, tiny_inputs, tiny_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import AutoModelForCausalLM

from modeling_attnres import AttnResConfig, AttnResForCausalLM
from modeling_attnres.decoder_layer_attnres import AttnResDecoderLayer, is_run_apart


FORMS = [(1, "mean"), (1, "sum"), (3, "mean"), (3, "sum"), (4, "sum")]


def pair(sublayers_per_block: int):
    """A plain model and its lossless AttnRes model."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_backbone("llama")).eval()
    config = AttnResConfig(text_config=plain.config, sublayers_per_block=sublayers_per_block, depth_weights="sum")
    model = AttnResForCausalLM(config).eval()
    load_plain_weights(model, plain)
    return plain, model


def first(value):
    return value[0] if isinstance(value, tuple) else value


def with_first(value, replaced):
    return (replaced, *value[1:]) if isinstance(value, tuple) else replaced


# --- Hooks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("sublayers_per_block", [1, 2, 3, 8])
def test_hooks_read_and_steer_the_stream(sublayers_per_block, index):
    direction = torch.linspace(-1, 1, 32)
    results = []
    for model in pair(sublayers_per_block):
        layer, seen = model.model.layers[index], []
        with torch.no_grad():
            unsteered = model(tiny_inputs()).logits
            handles = [
                layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])),
                layer.register_forward_hook(lambda _, args, output: with_first(output, first(output) + direction)),
                layer.register_forward_hook(lambda _, args, output, seen=seen: seen.append(first(output))),
            ]
            seen.append(model(tiny_inputs()).logits)
            seen.append(model.generate(tiny_inputs(), max_new_tokens=4, do_sample=False, eos_token_id=None))
            for handle in handles:
                handle.remove()
            assert not torch.allclose(seen[2], unsteered, atol=1e-2)
            handle = layer.register_forward_pre_hook(lambda _, args: with_first(args, args[0] * 2))
            seen.append(model(tiny_inputs()).logits)
            handle.remove()
        results.append(seen)
    assert len(results[0]) == len(results[1])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("sublayers_per_block", [1, 3])
def test_backward_hooks_see_the_streams_gradient(sublayers_per_block):
    results = []
    for model in pair(sublayers_per_block):
        gradients = []
        for layer in model.model.layers:
            layer.register_full_backward_hook(lambda _, inputs, outputs, seen=gradients: seen.append(outputs[0]))
        model.train()(tiny_inputs(), labels=tiny_inputs(), use_cache=False).loss.backward()
        results.append(gradients)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)  # fp32, other order of sums


@pytest.mark.parametrize("sublayers_per_block", [1, 3])
def test_a_hook_under_mean_steers_the_newest_source(sublayers_per_block):
    model = tiny_model("llama", sublayers_per_block)
    before = model(tiny_inputs()).logits
    layer = model.model.layers[1]
    handle = layer.register_forward_hook(lambda _, args, output: with_first(output, output[0] + 1.0))
    assert not torch.allclose(model(tiny_inputs()).logits, before, atol=1e-2)
    handle.remove()
    assert torch.equal(model(tiny_inputs()).logits, before)


def test_what_counts_as_a_hand_in_a_layer():
    layer = tiny_model("llama", 1).model.layers[0]
    assert not is_run_apart(layer, training=True)

    def gathers(*args): ...

    gathers.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    layer.register_forward_pre_hook(gathers)
    assert not is_run_apart(layer, training=True)
    handle = layer.register_forward_pre_hook(lambda *args: None)
    assert is_run_apart(layer, training=False)
    handle.remove()
    assert is_run_apart(nn.Sequential(layer), training=False)


# --- Wrappers and compilation ----------------------------------------------------------------------------------------


def gradients(model) -> dict:
    model.zero_grad()
    model(tiny_inputs(), labels=tiny_inputs(), use_cache=False).loss.backward()
    return {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("implementation", list(CheckpointImpl))
@pytest.mark.parametrize(("sublayers_per_block", "depth_weights"), FORMS)
def test_torchs_checkpoint_wrapper(sublayers_per_block, depth_weights, implementation):
    model = tiny_model("llama", sublayers_per_block, depth_weights).train()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    apply_activation_checkpointing(
        model,
        functools.partial(checkpoint_wrapper, checkpoint_impl=implementation),
        lambda module: isinstance(module, AttnResDecoderLayer),
    )
    model.enable_input_require_grads()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)  # fp32, other order of sums


@pytest.mark.parametrize(("sublayers_per_block", "depth_weights"), [(1, "mean"), (1, "sum"), (3, "sum")])
def test_layers_compiled_one_by_one(sublayers_per_block, depth_weights):
    torch._dynamo.reset()
    model = tiny_model("llama", sublayers_per_block, depth_weights)
    inputs = [tiny_inputs(), tiny_inputs(1, 7)]
    expected = [model(tokens).logits.detach() for tokens in inputs]
    for layer in model.model.layers:
        layer.compile(backend="eager")
    for tokens, logits in zip(inputs, expected, strict=True):
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled):
                torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-5)  # fp32


def test_only_the_last_layers_can_be_taken_away():
    inputs, whole = tiny_inputs(), tiny_model("llama", 2)
    whole.config.num_hidden_layers -= 1  # an early exit
    expected = whole(inputs, use_cache=False).logits
    for take_away in (lambda layers: layers.__delitem__(-1), lambda layers: layers.pop(-1)):
        model = tiny_model("llama", 2)
        take_away(model.model.layers)
        assert torch.equal(model(inputs, use_cache=False).logits, expected)
    layers = tiny_model("llama", 2).model.layers
    for index in (0, slice(0, 2)):
        with pytest.raises(ValueError, match=r"Only the last of 4 decoder layers can be taken away: .* got"):
            del layers[index]
    with pytest.raises(ValueError, match=r"No decoder layer can be inserted: .* got 1"):
        layers.insert(1, layers[0])
