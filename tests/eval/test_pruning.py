# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from naive_ablation import naive_gated_logits, next_token_loss
from scipy import stats
from tiny_backbones import NUM_LAYERS, NUM_SUBLAYERS, tiny_backbone, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

from modeling_attnres.eval.pruned_checkpoint import PruningError, pruned_model
from modeling_attnres.eval.pruning import (
    Cut,
    advantage,
    check_unit,
    choices,
    kept_layers,
    loss_table,
    losses_without,
    query_rows,
    unit_effects,
    units,
)


EXACT = 5e-6  # fp32: see test_causal.py
CUTS = [
    ("sublayer", (0, 3, 6)),
    ("sublayer", (4, 5)),
    ("layer", (0,)),
    ("layer", (1, 3)),
    ("block", (1,)),
    ("block", (0,)),
]
FORMS = [(4, "mean"), (2, "sum"), (3, "sum"), (1, "mean")]


@pytest.mark.parametrize(("sublayers_per_block", "depth_weights"), FORMS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "deepseek_v3"])
@torch.no_grad()
def test_a_forward_without_units_is_that_of_the_pruned_model(model_type, sublayers_per_block, depth_weights):
    fields = {"mlp_only_layers": []} if model_type == "qwen3_moe" else {}
    fields |= {"first_k_dense_replace": 0} if model_type == "deepseek_v3" else {}
    model, ids = tiny_model(model_type, sublayers_per_block, depth_weights, **fields), tiny_inputs()
    for unit, dropped in CUTS:
        if unit == "block" and sublayers_per_block % 2:
            continue
        found = losses_without(model, unit, dropped, ids).mean().item()
        pruned = pruned_model(copy.deepcopy(model), unit, dropped)
        kept = 2 * len(kept_layers(model.config, unit, dropped))
        assert pruned.config.num_sublayers == kept
        # The naive model is made of the pruned model's own weights, file or not.
        whole = type(model)(pruned.config).eval()
        whole.load_state_dict(pruned.state_dict())
        expected = next_token_loss(naive_gated_logits(whole, {}, ids), ids).item()
        assert found == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize(("unit", "dropped"), [("layer", (1, 2)), ("block", (0,)), ("sublayer", (2, 3))])
@torch.no_grad()
def test_without_layers_a_model_at_zero_queries_is_the_plain_one_without_them(unit, dropped):
    model, ids = tiny_model("llama", 4, "sum", query_std=0.0), tiny_inputs(2, 40)
    plain = AutoModelForCausalLM.from_config(tiny_backbone("llama")).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    gone = {"layer": (1, 2), "block": (0, 1), "sublayer": (1,)}[unit]
    plain.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(plain.model.layers) if index not in gone
    )
    plain.config.num_hidden_layers = len(plain.model.layers)
    expected = next_token_loss(plain(ids, use_cache=False).logits, ids).item()
    assert losses_without(model, unit, dropped, ids).mean().item() == pytest.approx(expected, abs=EXACT)


@torch.no_grad()
def test_nothing_dropped_is_the_model_and_long_texts_are_split(monkeypatch):
    model, ids = tiny_model("gpt_oss", 3, "sum"), tiny_inputs(5, 12)
    expected = [next_token_loss(model(row[None]).logits, row[None]).item() for row in ids]
    for tokens in (2048, 24, 1):
        monkeypatch.setattr("modeling_attnres.eval.pruning.TOKENS_TOGETHER", tokens)
        assert losses_without(model, "layer", (), ids).tolist() == pytest.approx(expected, abs=EXACT)


def test_units_and_what_is_left_of_the_queries():
    config = tiny_model("llama", 4).config
    assert [len(units(config, unit)) for unit in ("sublayer", "layer", "block")] == [NUM_SUBLAYERS, NUM_LAYERS, 2]
    assert query_rows(config, "layer", (0, 2)) == [2, 3, 6, 7, 8]
    assert query_rows(config, "block", (1,)) == [0, 1, 2, 3, 8]
    assert query_rows(config, "sublayer", (1, 2)) == list(range(9))


@torch.no_grad()
def test_effects_and_choices():
    model, ids = tiny_model("llama", 2, "sum"), tiny_inputs()
    model.model.layers[2].mlp.down_proj.weight.zero_()
    effects = unit_effects(model, "sublayer", ids)
    assert effects[5] == 0  # bit for bit: its output is 0 already
    assert int(effects.count_nonzero()) == NUM_SUBLAYERS - 1
    for number in (0, 7):
        without = losses_without(model, "sublayer", (number,), ids).mean()
        assert effects[number] == without - losses_without(model, "sublayer", (), ids).mean()
    least, *drawn, last = choices([0.3, -0.1, 0.2, 0.0], 2, 3, seed=1)
    assert (least, last) == (("least effect", 0, (1, 3)), ("last", 0, (2, 3)))
    assert [draw[:2] for draw in drawn] == [("random", 0), ("random", 1), ("random", 2)]
    assert all(len(set(draw[2])) == 2 for draw in drawn)
    assert drawn == choices([0.3, -0.1, 0.2, 0.0], 2, 3, seed=1)[1:-1]


@torch.no_grad()
def test_the_table_has_every_choice_for_every_number():
    model, ids = tiny_model("llama", 2), tiny_inputs(3, 9)
    table = loss_table(model, "layer", [0.1, 0.0, 0.3, 0.2], [3, 1, 3], ids, draws=2, seed=0)
    assert [(len(cut.dropped), cut.choice) for cut in table] == [
        (0, "nothing"),
        *((drop, choice) for drop in (1, 3) for choice in ("least effect", "random", "random", "last")),
    ]
    assert table[1].dropped == (1,)
    assert list(table[1].losses) == losses_without(model, "layer", (1,), ids).tolist()


def test_intervals_are_students_over_draws_and_over_sequences():
    least = Cut("least effect", 0, (1,), (1.0, 2.0, 3.0), 0.0)
    drawn = [Cut("random", draw, (draw,), (1.5, 2.0 + draw, 3.25), 0.0) for draw in range(4)]
    found = advantage([least, *drawn], 1)
    differences = torch.tensor([[0.5, draw, 0.25] for draw in range(4)], dtype=torch.float64)
    assert found.value == pytest.approx(differences.mean().item())
    for interval, values in ((found.draws, differences.mean(1)), (found.sequences, differences.mean(0))):
        spread = stats.sem(values)
        assert interval == pytest.approx(stats.t.interval(0.95, len(values) - 1, values.mean(), spread))


def test_layers_that_depend_on_their_place_are_refused():
    model = tiny_model("qwen3_moe", 2)  # its second decoder layer alone is dense
    with pytest.raises(PruningError, match="A model of the decoder layers that are left has other weights"):
        pruned_model(model, "layer", (0,))


@pytest.mark.parametrize(
    ("sublayers_per_block", "unit", "drop", "message"),
    [
        (2, "sublayer", 8, "`drop` must be from 1 to 7 of the model's 8 sublayers, got 8"),
        (2, "layer", 0, "`drop` must be from 1 to 3 of the model's 4 layers, got 0"),
        (8, "block", 1, "`drop` must be from 1 to 0 of the model's 1 blocks, got 1"),
        (
            3,
            "block",
            1,
            "needs blocks of whole decoder layers, an even number of sublayers; got sublayers_per_block=3",
        ),
        (2, "head", 1, "`unit` must be one of 'sublayer', 'layer', 'block', got 'head'"),
    ],
)
def test_numbers_of_units_that_there_are_not(sublayers_per_block, unit, drop, message):
    with pytest.raises(ValueError, match=message):
        check_unit(tiny_model("llama", sublayers_per_block).config, unit, [1, drop])
