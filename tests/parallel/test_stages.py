# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A pipeline computes what the model in one piece computes: losses, gradients, weights; and fails loudly."""

import itertools
import re

import pytest
import torch
from pipeline_workers import (
    Case,
    bytes_sent,
    forward_only,
    memory_over_steps,
    optimizer_steps,
    refusals,
    sharded_errors,
    step_refusals,
    step_until_failure,
    training_errors,
)
from processes import COMMUNICATION_TIMEOUT, run_ranks

from modeling_attnres.parallel.layout import CACHING, formula_summaries


# Relative, per tensor. Cut elsewhere, phase 1 takes its sums in another order; the gradients of one process in fp32 are
# themselves 1e-5 from those in fp64.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}

TWO_RANKS = [
    Case(1, "mean", 1, "gpipe"),
    Case(2, "sum", 1, "1f1b", dtype=torch.float32),
    Case(3, "sum", 1, "interleaved", splits=(2,), padded=True),
    Case(3, "mean", 2, "interleaved", splits=(1, 2, 4)),
    Case(2, "mean", 2, "interleaved", frozen=True),
    Case(1, "sum", 2, "looped", checkpointing="reentrant"),
    Case(2, "mean", 3, "interleaved"),  # a cached source is read by two later stages
    Case(2, "mean", 3, "interleaved", caching="received"),  # sources come back to the rank that produced them
    Case(12, "sum", 2, "interleaved", splits=(2, 3, 4)),  # one block: groups straddle the boundaries
    Case(3, "sum", 2, "interleaved", tied=True, checkpointing="plain"),
    Case(1, "mean", 2, "interleaved", dtype=torch.float32),
]
FOUR_RANKS = [
    Case(1, "mean", 2, "interleaved", num_layers=8),
    Case(3, "sum", 2, "interleaved", num_layers=9),
    Case(4, "mean", 1, "1f1b", splits=(1, 4, 5), caching="none"),
]


def check(results, cases):
    assert [result["case"] for result in results] == cases
    for result in results:
        tolerance = TOLERANCES[result["case"].dtype]
        assert result["loss"] <= tolerance, result
        assert result["gradient"] <= tolerance, result
        assert result["cached"] == 0, result


@pytest.mark.parametrize(("num_ranks", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["2 ranks", "4 ranks"])
def test_losses_and_gradients_equal_the_single_process(num_ranks, cases, tmp_path):
    check(run_ranks(training_errors, num_ranks, tmp_path, cases)[0], cases)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_and_gradients_in_every_combination(num_ranks, dtype, tmp_path):
    uneven = {2: (3,), 4: (1, 4, 6)}[num_ranks]
    uneven_virtual = {2: (1, 4, 7), 4: (1, 2, 4, 5, 6, 7, 8)}[num_ranks]
    schedules = {1: ("gpipe", "1f1b", "interleaved"), 2: ("interleaved", "looped")}
    cases = [
        Case(block, form, virtual, schedule, splits, dtype=dtype, num_layers=9)
        for virtual, splits in ((1, None), (1, uneven), (2, None), (2, uneven_virtual))
        for schedule in schedules[virtual]
        for block, form in itertools.product((1, 2, 3, 4, 5, 8), ("mean", "sum"))
    ]
    check(run_ranks(training_errors, num_ranks, tmp_path, cases, timeout=1800)[0], cases)


@pytest.mark.parametrize(
    ("num_ranks", "virtual_stages", "sublayers_per_block"),
    [(2, 3, 1), *(pytest.param(4, *rest, marks=pytest.mark.slow) for rest in ((2, 1), (2, 2), (3, 2)))],
)
def test_bytes_sent_equal_the_closed_form(num_ranks, virtual_stages, sublayers_per_block, tmp_path):
    stages = num_ranks * virtual_stages
    aligned = [
        Case(sublayers_per_block, "mean", virtual_stages, "interleaved", caching=caching, num_layers=stages)
        for caching in CACHING
    ]
    # Blocks that end elsewhere, and a stream: the layout alone knows the counts.
    others = [Case(3, "sum", virtual_stages, "interleaved", num_layers=stages + 1)]
    counts = run_ranks(bytes_sent, num_ranks, tmp_path, aligned + others)[0]
    for case, (forward, backward, states, sources) in zip(aligned + others, counts, strict=True):
        assert forward == backward == states + sources, case
        if case in aligned:
            embedding = (stages if case.caching == "none" else num_ranks) - 1
            blocks = formula_summaries(num_ranks, virtual_stages, 2 // case.sublayers_per_block, case.caching)
            assert (states, sources) == (0, blocks + embedding), case
        else:
            assert states >= stages - 1, case  # the stream at every boundary


@pytest.mark.parametrize("steps", [40, pytest.param(50, marks=pytest.mark.slow)])
def test_caches_are_empty_and_memory_is_flat(steps, tmp_path):
    case = Case(1, "sum", 2, "interleaved", dtype=torch.float32, num_layers=4)
    for result in run_ranks(memory_over_steps, 2, tmp_path, case, steps):
        assert result["filed"] >= 4 * steps
        assert result["cached"] == 0
        assert result["alive"] == 0
        # A leak of the cached sources alone would have cost four fifths of `filed_bytes`.
        assert result["grown"] < 0.4 * result["filed_bytes"], result


def test_forward_only(tmp_path):
    case = Case(3, "mean", 2, "interleaved", padded=True)
    assert max(run_ranks(forward_only, 2, tmp_path, case)) <= TOLERANCES[case.dtype]


def test_weights_after_steps_of_an_optimizer_are_gathered(tmp_path):
    # AdamW divides by gradients that may be tiny: errors grow, though only from rounding.
    error, _ = run_ranks(optimizer_steps, 2, tmp_path, Case(3, "mean", 2, "interleaved", tied=True), 2)
    assert error < 1e-6


@pytest.mark.slow
def test_stages_shard_under_fsdp(tmp_path):
    case = Case(3, "sum", 2, "interleaved", tied=True)
    errors = run_ranks(sharded_errors, 4, tmp_path, case)
    assert [error for error in errors if error is not None] == pytest.approx([0, 0], abs=TOLERANCES[case.dtype])


REFUSALS = [
    ({"virtual_stages": 3}, "pipeline of 6 stages .* has 4"),
    ({"virtual_stages": 0}, "`virtual_stages` must be a positive integer, got 0"),
    ({"splits": [1, 2]}, r"`splits` must be 1 increasing .* got \[1, 2\]"),
    ({"splits": [4]}, r"`splits` must be 1 increasing indices from 1 to 3.* got \[4\]"),
    ({"virtual_stages": 2, "splits": [2, 1, 3]}, "`splits` must be 3 increasing"),
    ({"micro_batch_shape": (2, 0)}, r"`micro_batch_shape` .* got \(2, 0\)"),
    ({"caching": "some"}, "`caching` must be one of .* got 'some'"),
    ({"base_model": True}, "`model` must be an AttnResForCausalLM, got AttnResModel"),
    ({"other_depth_attention": True}, "plain `DepthAttention`, and the model's is a Sequential"),
    ({"tied": True}, "tied to its embedding.*shared_embeddings=True"),
    ({"router_loss": True}, "output_router_logits=True"),
    ({"mixed_dtypes": True}, "must have one dtype, got .*float32.*float64"),
    ({"splits": "rank"}, r"different splits.*rank 0.*\(0, 1, 4\).*rank 1.*\(0, 2, 4\)"),
]


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    for messages in run_ranks(refusals, 2, tmp_path, [attempt for attempt, _ in REFUSALS]):
        for message, (_, expected) in zip(messages, REFUSALS, strict=True):
            assert re.search(expected, message), message


def test_steps_that_do_not_fit_are_refused(tmp_path):
    first, *rest = run_ranks(step_refusals, 2, tmp_path)
    assert "shape (2, 6) that `pipeline_stages` was given as `micro_batch_shape`, got (3, 6)" in first[0]
    assert any("zero bubble" in message for messages in (first[1:], *rest) for message in messages)


@pytest.mark.parametrize(("num_ranks", "victim"), [(2, 1), (4, 2)])
def test_a_killed_rank_ends_the_others_with_an_error(num_ranks, victim, tmp_path):
    results = run_ranks(step_until_failure, num_ranks, tmp_path, Case(dtype=torch.float32), victim, may_fail=True)
    assert results[victim] is None
    for result in results[:victim] + results[victim + 1 :]:
        assert result["step"] == 2
        assert result["message"]
        assert result["seconds"] < COMMUNICATION_TIMEOUT


@pytest.mark.slow
def test_a_stalled_rank_ends_the_others_when_the_timeout_does(tmp_path):
    case = Case(dtype=torch.float32)
    results = run_ranks(step_until_failure, 2, tmp_path, case, 1, 10.0, may_fail=True, communication_timeout=4.0)
    assert results[0]["step"] == 2
    assert "imed out" in results[0]["message"]
    assert results[0]["seconds"] < 8
