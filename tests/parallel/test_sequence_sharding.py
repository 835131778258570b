# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism, plain and with a sharded sequence, beside one process."""

import re

import pytest
import torch
from tensor_parallel_ranks import CASES, SAVED_BY_RANK, SAVES_BY_RANK, SLOW_CASES, TOKENS
from tiny_backbones import NUM_SUBLAYERS, tiny_config
from torch import nn

from modeling_attnres import AttnResModel
from modeling_attnres.parallel import sequence_parallel_plan
from modeling_attnres.parallel.sequence_sharding import STYLES


# fp32: products are summed over ranks in another order than in one process.
TOLERANCE = 1e-5
HIDDEN_SIZE, BATCH, FP32 = 32, 2, 4


@pytest.fixture
def found(ranks):
    """By check, what each of two ranks found."""
    return {name: [rank[name] for rank in ranks["two_ranks"]] for name in ranks["two_ranks"][0]}


def assert_same(rank: dict):
    assert rank["logits"] < TOLERANCE
    assert rank["gradients"] < TOLERANCE
    assert rank["depth_gradients"] < TOLERANCE < rank["depth_gradient_size"]
    assert rank["same_tokens"]


@pytest.mark.parametrize("case", CASES)
def test_tensor_parallel_is_one_process(found, case):
    for rank in found["plain"]:
        assert_same(rank[case])


@pytest.mark.parametrize("case", CASES)
def test_sharded_sequence_is_one_process(found, case):
    for rank in found["sharded"]:
        assert_same(rank[case])


@pytest.mark.slow
def test_every_backbone_with_a_plan(run_ranks):
    for rank in run_ranks("every_backbone")["every_backbone"]:
        assert list(rank) == list(SLOW_CASES)
        for case in rank.values():
            assert_same(case)


def test_four_ranks(ranks):
    assert len(ranks["four_ranks"]) == 4
    for rank in ranks["four_ranks"]:
        assert_same(rank)


@pytest.mark.parametrize("case", CASES)
def test_a_rank_keeps_its_part_of_the_summaries(found, case):
    num_sources = -(-NUM_SUBLAYERS // CASES[case][1]) + 1
    per_token = num_sources * BATCH * HIDDEN_SIZE * FP32
    for rank in found["sharded"]:
        assert rank[case]["bytes"] == TOKENS * per_token
        assert rank[case]["sharded_bytes"] == -(-TOKENS // 2) * per_token  # an odd length is padded


def test_the_part_is_one_of_p(ranks):
    per_token = (NUM_SUBLAYERS // 2 + 1) * BATCH * HIDDEN_SIZE * FP32
    assert [rank["sharded_bytes"] for rank in ranks["four_ranks"]] == [16 * per_token // 4] * 4


def test_any_length(found, ranks):
    two = [difference for rank in found["sharded"] for difference in rank["lengths"].values()]
    four = [difference for rank in ranks["four_ranks"] for difference in rank["lengths"].values()]
    assert (len(two), len(four)) == (8, 8)
    assert max(two + four) < TOLERANCE


def test_chunked_prefill(found):
    assert [rank["chunked"] for rank in found["sharded"]] == [True, True]


def test_outputs_are_whole(found):
    for rank in found["sharded"]:
        assert max(rank["outputs"].values()) < TOLERANCE
        assert rank["base_model"] < TOLERANCE


def test_reduce_scatter_takes_the_place_of_all_reduce(found):
    for rank in found["collectives"]:
        plain, sharded = rank["plain"], rank["sharded"]
        # The embedding's, which some versions of Transformers call where nothing counts it.
        embedding = sharded.pop("c10d_functional.all_reduce", 0)
        assert embedding in (0, 1)
        # One per sublayer; the head gathers its logits.
        assert plain == {
            "c10d_functional.all_reduce": embedding + NUM_SUBLAYERS,
            "c10d_functional.all_gather_into_tensor": 1,
        }
        # The output is gathered too.
        assert sharded == {
            "c10d_functional.reduce_scatter_tensor": NUM_SUBLAYERS,
            "c10d_functional.all_gather_into_tensor": NUM_SUBLAYERS + 2,
        }


def test_gradient_checkpointing(found):
    for rank in found["gradient_checkpointing"]:
        assert rank["gradients"] < TOLERANCE
        assert re.search("a multiple of the 2 ranks as the number of tokens, got 13", rank["odd_length"])


def test_the_documented_code_runs(found):
    for rank in found["documented"]:
        assert len(rank["differences"]) == 2
        assert max(rank["differences"]) < TOLERANCE


def test_bad_arguments_are_refused_on_every_rank(found):
    for rank in found["refusals"]:
        assert "requires 4 processes, but world_size is 2" in rank["too_many_ranks"]
        assert "['model.nothing'] match nothing in AttnResForCausalLM" in rank["unknown_module"]
        assert re.search(r"Unsupported .* styles: \{'attnres_nothing'\}", rank["unknown_style"])
        assert "`distributed_config` or the standalone `tp_plan`" in rank["both_arguments"]


@pytest.mark.parametrize("name", [*SAVED_BY_RANK, "sharded-gathered"])
@pytest.mark.parametrize("number", ["one", "four"])
def test_a_checkpoint_of_two_ranks_loads_on(ranks, number, name):
    if name in SAVED_BY_RANK and not SAVES_BY_RANK:
        pytest.skip("this Transformers saves no tensor-parallel model rank by rank")
    assert [rank[name] for rank in ranks[f"load_on_{number}"]] == [0.0] * {"one": 1, "four": 4}[number]


def test_a_killed_rank_is_an_error_of_the_others(ranks):
    (survivor,) = ranks["killed_rank"]
    assert re.search(r"[Cc]onnection (reset|closed)", survivor["error"])
    assert survivor["seconds"] < 30


def test_the_plan_of_a_dense_backbone():
    base, layers = "model", "model.layers.*"
    assert sequence_parallel_plan(tiny_config("llama")) == {
        base: "attnres_whole_outputs",
        f"{base}.depth_input": "attnres_shard_tokens",
        f"{base}.depth_attention": "attnres_partial_gradient",
        layers: "attnres_sharded_layer",
        f"{layers}.input_layernorm": "attnres_partial_gradient",
        f"{layers}.post_attention_layernorm": "attnres_partial_gradient",
        f"{layers}.self_attn.o_proj": "attnres_rowwise_scatter",
        f"{layers}.mlp.down_proj": "attnres_rowwise_scatter",
        f"{base}.norm": "attnres_partial_gradient",
    }


def test_backbones_without_a_plan_are_refused():
    config = tiny_config("gpt_oss")
    config.text_config.base_model_tp_plan = None  # as it was up to Transformers 5.23
    with pytest.raises(ValueError, match="Backbone 'gpt_oss' has no tensor parallel plan"):
        sequence_parallel_plan(config)


def test_a_plan_needs_a_head():
    with pytest.raises(ValueError, match=r"`model_class` must be one with a head.*got AttnResModel"):
        sequence_parallel_plan(tiny_config("llama"), AttnResModel)


def test_a_plan_that_rules_the_same_modules_is_refused():
    config = tiny_config("llama")
    config.text_config.base_model_tp_plan = {"layers.*.input_layernorm": "sequence_parallel"}
    with pytest.raises(ValueError, match=r"rules of its own for model\.layers\.\*\.input_layernorm"):
        sequence_parallel_plan(config)


def test_a_last_projection_of_flattened_tokens_is_refused():
    with pytest.raises(ValueError, match=r"to take `\[B, T, F\]`, got \[26, 4\] at a Linear"):
        STYLES["attnres_rowwise_scatter"].transform_inputs_pre_forward(nn.Linear(4, 4), (torch.ones(26, 4),), {}, None)
