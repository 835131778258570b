# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Gradients, gradient checkpointing, and that the model learns."""

import pytest
import torch
from tiny_backbones import (
    BACKBONES,
    NUM_SUBLAYERS,
    load_plain_weights,
    tiny_backbone,
    tiny_config,
    tiny_inputs,
    tiny_model,
)
from transformers import AutoModelForCausalLM

from modeling_attnres import AttnResForCausalLM


def gradients(model, input_ids: torch.Tensor, **kwargs) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(input_ids, labels=input_ids, **kwargs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def training_model(model_type: str, sublayers_per_block: int, depth_weights: str):
    return tiny_model(model_type, sublayers_per_block, depth_weights).train()


def check_checkpointed_gradients(model, use_reentrant: bool):
    expected = gradients(model, tiny_inputs())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    recomputed = gradients(model, tiny_inputs())
    assert recomputed.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:  # an expert without a token
            assert recomputed[name] is None, name
        else:
            torch.testing.assert_close(
                recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    for name in ("model.depth_attention.query", "model.depth_attention.key_norm"):
        assert (expected[name].abs().amax(dim=-1) > 0).all()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
@pytest.mark.parametrize("sublayers_per_block", [1, 2, 3, NUM_SUBLAYERS])
def test_checkpointed_gradients_equal_the_plain_runs(sublayers_per_block, depth_weights, use_reentrant):
    check_checkpointed_gradients(training_model("llama", sublayers_per_block, depth_weights), use_reentrant)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_checkpointed_gradients_of_every_backbone(model_type):
    for use_reentrant in (True, False):
        check_checkpointed_gradients(training_model(model_type, 3, "mean"), use_reentrant)


def test_checkpointing_every_other_layer():
    """Plain and checkpointed layers meet in one forward, also within one group of a long block."""
    model = training_model("llama", NUM_SUBLAYERS, "mean")
    expected = gradients(model, tiny_inputs())
    model.gradient_checkpointing_enable(every_n_layers=2)
    assert len({layer.gradient_checkpointing for layer in model.model.layers}) == 2
    for name, gradient in gradients(model, tiny_inputs()).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_block_summaries_and_weights_carry_gradients():
    """An auxiliary loss on what the model returns reaches the embedding and the queries."""
    for checkpointed in (False, True):
        model = training_model("llama", 3, "mean")
        if checkpointed:
            model.gradient_checkpointing_enable()
        outputs = model(tiny_inputs(), output_block_summaries=True, output_depth_weights=True)
        entropy = -sum((weights * weights.log()).sum(-1).mean() for weights in outputs.depth_weights[1:])
        (entropy + outputs.block_summaries.square().mean()).backward()
        assert model.get_input_embeddings().weight.grad.abs().sum() > 0
        assert (model.model.depth_attention.query.grad.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
@pytest.mark.parametrize("model_type", BACKBONES)
def test_every_parameter_is_reached(model_type, depth_weights):
    model = training_model(model_type, 3, depth_weights)
    # Many tokens, so that every expert is chosen by some.
    for name, gradient in gradients(model, tiny_inputs(batch=8, tokens=32)).items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        # A bias of keys shifts all scores alike, and softmax does not see it.
        if not name.endswith("k_proj.bias"):
            assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("sublayers_per_block", [1, 2, 3])
@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
def test_learns_one_sequence_and_generates_it(sublayers_per_block, depth_weights):
    model = AttnResForCausalLM(tiny_config("llama", sublayers_per_block, depth_weights)).train()
    sequence = tiny_inputs(batch=1, tokens=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(sequence, labels=sequence).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    # They start at zero and have to leave it.
    assert (model.model.depth_attention.query.abs().amax(-1) > 1e-3).all()
    generated = model.eval().generate(sequence[:, :3], max_new_tokens=13, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, sequence)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(dtype):
    model = training_model("llama", 3, "mean")
    expected = gradients(model, tiny_inputs())
    model.to(dtype)
    for name, gradient in gradients(model, tiny_inputs()).items():
        assert gradient.dtype == dtype
        similarity = torch.cosine_similarity(gradient.float().flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.99, name


def test_frozen_backbone_trains_depth_attention_alone():
    model = training_model("llama", 2, "sum")
    model.requires_grad_(False)
    model.model.depth_attention.requires_grad_(True)
    found = gradients(model, tiny_inputs())
    assert {name for name, gradient in found.items() if gradient is not None} == {
        "model.depth_attention.query",
        "model.depth_attention.key_norm",
    }
    expected = gradients(training_model("llama", 2, "sum"), tiny_inputs())
    for name in ("model.depth_attention.query", "model.depth_attention.key_norm"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


def test_gradient_accumulation_divides_by_all_items():
    model = training_model("llama", 2, "mean")
    input_ids = tiny_inputs(batch=4)
    whole = gradients(model, input_ids)
    whole = {name: gradient.clone() for name, gradient in whole.items()}
    model.zero_grad()
    items = input_ids[:, 1:].numel()
    for half in input_ids.split(2):
        model(half, labels=half, num_items_in_batch=items).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sublayers_per_block", [1, 2, 3, NUM_SUBLAYERS])
@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
def test_gradients_under_autocast(sublayers_per_block, depth_weights):
    """Sources stay as wide as the stream and scores are fp32, so depth attention adds no rounding of its own."""
    model = training_model("llama", sublayers_per_block, depth_weights)
    expected = {name: gradient.clone() for name, gradient in gradients(model, tiny_inputs()).items()}
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(
                tiny_inputs(), labels=tiny_inputs(), output_depth_weights=True, output_block_summaries=True
            )
        assert outputs.logits.dtype == torch.bfloat16
        assert outputs.block_summaries.dtype == torch.float32
        assert {weights.dtype for weights in outputs.depth_weights} == {torch.float32}
        model.zero_grad()
        outputs.loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.dtype == torch.float32
            similarity = torch.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0)
            assert similarity > 0.99, name


@pytest.mark.parametrize("model_type", BACKBONES)
def test_zero_queries_are_the_prenorm_model_under_autocast(model_type):
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(tiny_backbone(model_type))
    model = AttnResForCausalLM(tiny_config(model_type, 3, "sum"))
    load_plain_weights(model, dense)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.eval()(tiny_inputs()).logits, dense.eval()(tiny_inputs()).logits)
