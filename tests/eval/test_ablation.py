# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
from naive_ablation import naive_gated_logits, next_token_loss
from tiny_backbones import NUM_SUBLAYERS, tiny_backbone, tiny_config, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

from modeling_attnres.eval.ablation import (
    connections,
    forward_gated,
    forward_without,
    num_sources,
    open_gated_stream,
    run_layers,
)


BACKBONES = ("llama", "qwen3_moe", "kimi_linear", "gpt_oss")
FORMS = [(1, "mean"), (3, "mean"), (4, "mean"), (1, "sum"), (3, "sum"), (4, "sum")]


def assert_close(found, expected):
    # fp32: two phases sum in another order, and random queries magnify what they differ by.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_connections_are_what_the_model_reports():
    for sublayers_per_block in (1, 3, 4, 8):
        model = tiny_model("llama", sublayers_per_block)
        weights = model(tiny_inputs(), output_depth_weights=True).depth_weights
        assert [mix.shape[-1] for mix in weights] == [
            num_sources(model.config, sublayer) for sublayer in range(NUM_SUBLAYERS + 1)
        ]
        assert len(connections(model.config)) == sum(mix.shape[-1] for mix in weights[1:])


@pytest.mark.parametrize(("sublayers_per_block", "depth_weights"), FORMS)
@pytest.mark.parametrize("model_type", BACKBONES)
@torch.no_grad()
def test_several_connections_at_once_against_brute_force(model_type, sublayers_per_block, depth_weights):
    model, ids = tiny_model(model_type, sublayers_per_block, depth_weights), tiny_inputs()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    last = num_sources(model.config, NUM_SUBLAYERS) - 1
    removed = [(1, 0), (4, 0), (4, num_sources(model.config, 4) - 1), (7, 1), (NUM_SUBLAYERS, last)]
    removed = [(sublayer, source) for sublayer, source in removed if num_sources(model.config, sublayer) > 2 or source]
    for ablate in ("remove", "plain") if depth_weights == "sum" else ("remove",):
        found = forward_without(model, removed, ablate=ablate, input_ids=ids, attention_mask=mask)
        expected = naive_gated_logits(model, dict.fromkeys(removed, 0.0), ids, mask, ablate)
        assert_close(found[mask.bool()], expected[mask.bool()])
        partly = {(3, 1): 0.25, (6, 0): 2.0, (NUM_SUBLAYERS, 0): 0.5}
        found = forward_gated(model, partly, ablate=ablate, input_ids=ids)
        assert_close(found, naive_gated_logits(model, partly, ids, ablate=ablate))


@pytest.mark.parametrize(("sublayers_per_block", "depth_weights"), FORMS)
@pytest.mark.parametrize("shape", [(1, 5), (2, 12), (1, 48)])
@torch.no_grad()
def test_nothing_removed_is_the_model_bit_for_bit(sublayers_per_block, depth_weights, shape):
    model, ids = tiny_model("qwen3", sublayers_per_block, depth_weights), tiny_inputs(*shape)
    expected = model(ids).logits
    assert torch.equal(forward_without(model, [], input_ids=ids), expected)
    assert torch.equal(forward_gated(model, {(3, 1): 1.0}, input_ids=ids), expected)


@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
@torch.no_grad()
def test_a_mix_without_a_gate_other_than_1_is_the_models_bit_for_bit(depth_weights):
    model, ids = tiny_model("llama", 4, depth_weights), tiny_inputs(2, 40)
    decoder = model.get_decoder()
    embedding = decoder.embed_tokens(ids)
    ones = torch.ones(num_sources(model.config, 5), 2, 1)
    for ablate in ("remove", "plain") if depth_weights == "sum" else ("remove",):
        depth = open_gated_stream(decoder, embedding, {5: ones}, ablate)
        state = run_layers(decoder, depth, depth.start(embedding), embedding)
        logits = model.lm_head(decoder.norm(depth.mix_output(state)[0]))
        assert torch.equal(logits, model(ids).logits)


@torch.no_grad()
def test_a_weight_that_is_1_already_changes_nothing_under_plain():
    model, ids = tiny_model("llama", 4, "sum", query_std=0.0), tiny_inputs(2, 40)
    removed = connections(model.config)
    assert torch.equal(forward_without(model, removed, ablate="plain", input_ids=ids), model(ids).logits)


@torch.no_grad()
def test_all_weights_set_back_to_1_are_the_plain_model():
    model, ids = tiny_model("llama", 3, "sum"), tiny_inputs()
    plain = AutoModelForCausalLM.from_config(tiny_backbone("llama")).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    found = forward_without(model, connections(model.config), ablate="plain", input_ids=ids)
    assert_close(found, plain(ids).logits)


@torch.no_grad()
def test_a_source_with_nearly_all_the_weight_is_removed_exactly():
    model, ids = tiny_model("llama", 4, query_std=30.0), tiny_inputs()
    expected = naive_gated_logits(model.double(), {(6, 0): 0.0, (6, 1): 0.0}, ids)
    # In fp64, where the naive renormalisation still has something to divide by.
    torch.testing.assert_close(forward_without(model, [(6, 0), (6, 1)], input_ids=ids), expected, rtol=1e-6, atol=1e-9)
    assert forward_without(model.float(), [(6, 0), (6, 1)], input_ids=ids).isfinite().all()


@torch.no_grad()
def test_embeddings_and_positions_are_the_models_inputs():
    model, ids = tiny_model("llama", 2), tiny_inputs()
    positions = torch.arange(12).expand(2, 12) + 3
    expected = forward_without(model, [(5, 1)], input_ids=ids, position_ids=positions)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(forward_without(model, [(5, 1)], inputs_embeds=embeds, position_ids=positions), expected)
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds`"):
        forward_without(model, [(5, 1)], input_ids=ids, inputs_embeds=embeds)


def test_gradients_flow_through_what_is_left():
    model, ids = tiny_model("llama", 3, "sum"), tiny_inputs()
    parameters = list(model.model.depth_attention.parameters())
    logits = (forward_without(model, [(4, 1)], input_ids=ids), naive_gated_logits(model, {(4, 1): 0.0}, ids))
    found, expected = (torch.autograd.grad(next_token_loss(each, ids), parameters) for each in logits)
    for gradient, naive in zip(found, expected):
        torch.testing.assert_close(gradient, naive, rtol=1e-3, atol=1e-6)  # fp32, through eight sublayers


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([(9, 0)], "sublayer must be from 1 to 8 \\(the output mix\\), got \\(9, 0\\)"),
        ([(-1, 0)], "sublayer must be from 1 to 8 \\(the output mix\\), got \\(-1, 0\\)"),
        ([(3, 2)], "Sublayer 3 has the sources 0 to 1, got \\(3, 2\\)"),
        ([(3, -1)], "Sublayer 3 has the sources 0 to 1, got \\(3, -1\\)"),
        ([(0, 0)], "Sublayer 0 reads the embedding alone, which cannot be removed; got \\(0, 0\\)"),
        ([(3, 0), (3, 1)], "Sublayer 3 must keep at least one of its sources, got all of them removed"),
        ([(3, 0.0)], "must be a pair \\(sublayer, source\\) of whole numbers, got \\(3, 0.0\\)"),
        ([3], "must be a pair \\(sublayer, source\\) of whole numbers, got 3"),
    ],
)
def test_connections_that_there_are_not(removed, message):
    with pytest.raises(ValueError, match=message):
        forward_without(tiny_model("llama", 4), removed, input_ids=tiny_inputs())


def test_what_cannot_be_removed():
    model, ids = tiny_model("llama", 4), tiny_inputs()
    with pytest.raises(ValueError, match="depth_weights 'sum' is anchored at; got a model with 'mean'"):
        forward_without(model, [(3, 0)], ablate="plain", input_ids=ids)
    with pytest.raises(ValueError, match="`ablate` must be one of 'remove', 'plain', got 'zero'"):
        forward_without(model, [(3, 0)], ablate="zero", input_ids=ids)
    with pytest.raises(ValueError, match="gate of connection \\(3, 0\\) must be a number of at least 0, got -1"):
        forward_gated(model, {(3, 0): -1}, input_ids=ids)
    plain = AutoModelForCausalLM.from_config(tiny_backbone("llama"))
    with pytest.raises(ValueError, match="must have attention over depth, got one of type 'llama'"):
        forward_without(plain, [(3, 0)], input_ids=ids)
    for variant in ("static", "sigmoid", "no_key_norm", "input_dependent"):
        model = tiny_model(depth_attention_type=variant)
        with pytest.raises(ValueError, match=re.escape(f"got '{variant}', for whose weights gates are not defined")):
            forward_without(model, [(3, 0)], input_ids=ids)
    assert tiny_config().depth_attention_type == "softmax"
