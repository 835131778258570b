# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from naive_ablation import naive_gated_logits, next_token_loss
from test_modeling_attnres_naive import plain_model
from tiny_backbones import NUM_SUBLAYERS, tiny_inputs, tiny_model

from modeling_attnres.eval import causal
from modeling_attnres.eval.ablation import connections, forward_gated
from modeling_attnres.eval.causal import causal_effects, causal_estimates


# fp32: nats of single tokens are rounded to 2e-7 of about 5, and the two sides sum in another order.
EXACT = 5e-6
SHAPE = (2, 9)


def brute_force(model, ids, ablate="remove"):
    """By connection, the loss of one full naive forward without it, minus that of one with it."""
    plain = plain_model(model)

    def loss(gates):
        return next_token_loss(naive_gated_logits(model, gates, ids, None, ablate, plain), ids).item()

    return {connection: loss({connection: 0.0}) - loss({}) for connection in connections(model.config)}


@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
@pytest.mark.parametrize("sublayers_per_block", [1, 3, 4])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "deepseek_v3"])
@torch.no_grad()
def test_every_effect_against_brute_force(model_type, sublayers_per_block, depth_weights):
    model, ids = tiny_model(model_type, sublayers_per_block, depth_weights), tiny_inputs(*SHAPE)
    expected = brute_force(model, ids)
    effects, loss = causal_effects(model, ids)
    assert loss == pytest.approx(next_token_loss(model(ids).logits, ids).item(), abs=EXACT)
    assert int(effects.isfinite().sum()) == len(expected)
    assert effects[0].isnan().all()
    for connection, effect in expected.items():
        assert effects[connection].item() == pytest.approx(effect, abs=EXACT)
    assert max(map(abs, expected.values())) > 1000 * EXACT


@pytest.mark.parametrize(
    ("model_type", "ablate"),
    [("gpt_oss", "plain"), ("kimi_linear", "remove")],  # sliding windows; linear attention
)
@torch.no_grad()
def test_layers_of_several_kinds_against_brute_force(model_type, ablate):
    model, ids = tiny_model(model_type, 4, "sum"), tiny_inputs(*SHAPE)
    effects, _ = causal_effects(model, ids, ablate=ablate)
    for connection, effect in brute_force(model, ids, ablate).items():
        assert effects[connection].item() == pytest.approx(effect, abs=EXACT)


@torch.no_grad()
def test_splitting_changes_nothing_but_memory(monkeypatch):
    model, ids = tiny_model("llama", 3, "sum"), tiny_inputs(*SHAPE)
    expected, loss = causal_effects(model, ids)
    monkeypatch.setattr(causal, "LOGITS_TOGETHER", 1)
    found, same_loss = causal_effects(model, ids, tokens_together=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT, equal_nan=True)
    assert same_loss == pytest.approx(loss, abs=EXACT)


@torch.no_grad()
def test_a_part_of_the_connections():
    model, ids = tiny_model("llama", 3), tiny_inputs(*SHAPE)
    wanted = [(NUM_SUBLAYERS, 1), (3, 0), (4, 2), (3, 0)]
    found, _ = causal_effects(model, ids, wanted=wanted)
    expected, _ = causal_effects(model, ids)
    assert found.isfinite().nonzero().tolist() == [[3, 0], [4, 2], [NUM_SUBLAYERS, 1]]
    for connection in wanted:
        assert found[connection].item() == pytest.approx(expected[connection].item(), abs=EXACT)
    with pytest.raises(ValueError, match="Sublayer 3 has the sources 0 to 1, got \\(3, 2\\)"):
        causal_effects(model, ids, wanted=[(3, 2)])


@pytest.mark.parametrize(
    ("sublayers_per_block", "depth_weights", "ablate"),
    [(1, "mean", "remove"), (3, "sum", "remove"), (4, "mean", "remove"), (4, "sum", "plain")],
)
def test_estimates_are_the_derivatives_by_the_gates(sublayers_per_block, depth_weights, ablate):
    model, ids = tiny_model("llama", sublayers_per_block, depth_weights), tiny_inputs(*SHAPE)
    estimates = causal_estimates(model, ids, ablate=ablate)
    assert all(parameter.grad is None for parameter in model.parameters())
    step = 0.01
    with torch.no_grad():
        for connection in connections(model.config):
            high, low = (
                next_token_loss(forward_gated(model, {connection: gate}, ablate=ablate, input_ids=ids), ids)
                for gate in (1 + step, 1 - step)
            )
            # Central differences: rounding of the losses over the step, and the third derivative.
            assert estimates[connection].item() == pytest.approx((low - high).item() / (2 * step), abs=1e-4)
    assert int(estimates.isfinite().sum()) == len(connections(model.config))
    assert estimates[estimates.isfinite()].abs().max() > 3e-3


def test_estimates_of_parts_of_the_logits(monkeypatch):
    model, ids = tiny_model("qwen3_moe", 4), tiny_inputs(3, 9)
    expected = causal_estimates(model, ids)
    monkeypatch.setattr(causal, "LOGITS_TOGETHER", 1)
    torch.testing.assert_close(causal_estimates(model, ids), expected, rtol=1e-3, atol=1e-6, equal_nan=True)


@torch.no_grad()
def test_nothing_is_lost_where_a_source_weighs_nothing():
    """The last sublayer's output is zero: its block's partial sum, without it, is what the output mix reads."""
    model, ids = tiny_model("llama", 1, "sum", query_std=0.0), tiny_inputs(*SHAPE)
    model.model.layers[-1].mlp.down_proj.weight.zero_()
    effects, _ = causal_effects(model, ids)
    assert effects[NUM_SUBLAYERS, NUM_SUBLAYERS].item() == pytest.approx(0, abs=EXACT)
    assert effects[NUM_SUBLAYERS, 0].abs() > 1e-3


def test_models_that_have_no_effects():
    with pytest.raises(ValueError, match="depth_attention_type 'softmax'\\), got 'static'"):
        causal_effects(tiny_model(depth_attention_type="static"), tiny_inputs())
    with pytest.raises(ValueError, match="only a model with depth_weights 'sum' is anchored at"):
        causal_estimates(tiny_model(), tiny_inputs(), ablate="plain")
