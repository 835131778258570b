# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import itertools
import math
import re

import pytest
import torch
from tiny_backbones import tiny_inputs, tiny_model

from modeling_attnres import BlockSummaries
from modeling_attnres.configuration import load_preset
from modeling_attnres.parallel.layout import CACHING
from modeling_attnres.parallel.plan import (
    DepthShape,
    Hardware,
    Transition,
    peak_elements_per_token,
    pipeline_elements_per_token,
    pipeline_transitions,
    predict_overhead,
    residual_elements,
    summary_memory,
)


# --- Pipeline parallelism --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caching", "ranks", "virtual", "blocks"),
    [
        ("none", 4, 2, 28),  # 8 * 7 / 2
        ("received", 4, 2, 22),  # 4 * 3 / 2 + 4^2
        ("all", 4, 2, 18),  # 4 * 3 / 2 + 4 * 3
        ("none", 4, 1, 6),
        ("received", 4, 1, 6),  # without virtual stages nothing is kept for later
        ("none", 1, 4, 6),
        ("received", 1, 4, 3),
        ("all", 1, 4, 0),  # one rank lacks nothing
    ],
)
def test_equations_7_and_8(caching, ranks, virtual, blocks):
    assert pipeline_elements_per_token(ranks, virtual, 1, 1, caching) == blocks
    assert pipeline_elements_per_token(ranks, virtual, 3, 64, caching) == blocks * 3 * 64


@pytest.mark.parametrize("caching", CACHING)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("virtual", [1, 2, 3])
@pytest.mark.parametrize("per_stage", [1, 2])
def test_transitions_add_up_to_the_equations_where_blocks_end_with_stages(caching, ranks, virtual, per_stage):
    stages = ranks * virtual
    shape = DepthShape(2 * stages * per_stage, hidden_size=5, sublayers_per_block=4)
    transitions = pipeline_transitions(shape, ranks, virtual, caching)
    assert len(transitions) == stages - 1
    assert not any(step.state for step in transitions)
    # The embedding, which the equations leave out: to every stage, or to every rank but the first once.
    embeddings = [1 if caching == "none" or step.stage < ranks else 0 for step in transitions]
    blocks = [step.sources - embedding for step, embedding in zip(transitions, embeddings)]
    assert sum(blocks) * 5 == pipeline_elements_per_token(ranks, virtual, per_stage, 5, caching)
    if transitions:
        assert max(blocks) * 5 == peak_elements_per_token(ranks, virtual, per_stage, 5, caching)


def simulate(num_layers, per_block, first_layers, ranks, caching):
    """Sources that each stage's rank lacks, by playing the schedule: who has seen, and who has made, which source."""
    ends = [*first_layers[1:], num_layers]
    held = [set() for _ in range(ranks)]
    held[0].add(0)
    lacking = []
    for stage, (begin, end) in enumerate(zip(first_layers, ends)):
        needed = {0} | {1 + block for block in range(2 * num_layers) if (block + 1) * per_block <= 2 * begin}
        own = held[stage % ranks] if caching != "none" else set()
        if stage:
            lacking.append(len(needed - own))
        made = {1 + block for block in range(2 * num_layers) if 2 * begin < (block + 1) * per_block <= 2 * end}
        held[stage % ranks] |= needed | (made if caching == "all" else set())
    return lacking


@pytest.mark.parametrize("caching", CACHING)
def test_transitions_where_blocks_do_not_end_with_stages(caching):
    for num_layers, per_block, ranks, virtual in itertools.product((5, 8, 13), (1, 2, 3, 7, 10), (1, 2, 3), (1, 2)):
        if ranks * virtual > num_layers:
            continue
        shape = DepthShape(num_layers, 4, per_block, "sum")
        transitions = pipeline_transitions(shape, ranks, virtual, caching)
        stages = ranks * virtual
        lengths = [num_layers // stages + (stage < num_layers % stages) for stage in range(stages)]
        first_layers = [sum(lengths[:stage]) for stage in range(stages)]
        assert [step.sources for step in transitions] == simulate(num_layers, per_block, first_layers, ranks, caching)
        # The stream, and the partial sum of a block that is cut in two.
        assert [step.state for step in transitions] == [1 + (2 * first % per_block != 0) for first in first_layers[1:]]


def test_splits_by_hand():
    shape = DepthShape(8, 4, sublayers_per_block=4)
    assert pipeline_transitions(shape, 3, splits=[1, 6]) == [Transition(1, 1, 1), Transition(2, 4, 0)]
    assert Transition(1, 1, 1).tensors == 2


# --- Memory and traffic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sublayers_per_block", [1, 3, 8])
def test_memory_is_what_the_bank_allocates(sublayers_per_block, dtype):
    model = tiny_model("llama", sublayers_per_block).to(dtype)
    summaries = BlockSummaries()
    with torch.no_grad():
        model(tiny_inputs(2, 12), block_summaries=summaries)
    shape = DepthShape(4, 32, sublayers_per_block)
    memory = summary_memory(shape, 2 * 12, str(dtype).removeprefix("torch."))
    assert memory.sources == summaries.sources.nbytes
    assert memory.norms == summaries.norms.nbytes
    assert memory.scores == summaries.scores.nbytes
    assert memory.total == memory.sources + memory.norms + memory.scores


def test_memory_of_shards_and_chunks():
    shape = DepthShape(4, 32, 2)
    whole = summary_memory(shape, 4096)
    assert summary_memory(shape, 4096, tensor_parallel=8).total == whole.total / 8
    assert summary_memory(shape, 4096, chunk=1024).total == whole.total / 4
    assert summary_memory(shape, 4096, tensor_parallel=8, chunk=1024).total == whole.total / 32
    assert summary_memory(shape, 100, chunk=1024) == summary_memory(shape, 100)
    assert summary_memory(shape, 13, tensor_parallel=2) == summary_memory(shape, 7)  # padded


def test_the_papers_prefill():
    # 128K tokens and 8 blocks: 15 GB, and under 0.3 GB a device in chunks of 16K.
    shape = DepthShape(93, 7168, 24)
    without_embedding = summary_memory(shape, 131_072).sources * shape.num_blocks / (shape.num_blocks + 1)
    assert without_embedding == pytest.approx(15.03e9, rel=1e-3)
    assert summary_memory(shape, 131_072, tensor_parallel=8, chunk=16_384).total < 0.3e9


def test_the_papers_traffic():
    # L = 128, N = 8: 5.5 D reads and writes per sublayer.
    assert residual_elements(DepthShape(64, 1, 16)) == 5.5


def test_overhead():
    shape = DepthShape(8, hidden_size=10, sublayers_per_block=4)  # L = 16, N = 4
    hardware = Hardware(flops=1e6, memory_bandwidth=1e5, link_bandwidth=1e4)
    transitions = [Transition(1, 2, 0), Transition(2, 3, 1)]
    overhead = predict_overhead(shape, hardware, 5e3, 100, transitions)
    assert overhead.compute == 2 * 5e3 * 100 / 1e6
    assert overhead.depth == pytest.approx(16 * (4 / 4 + 2) * 10 * 100 * 2 / 1e5)
    assert overhead.transfers == pytest.approx((1 + 3) * 10 * 100 * 2 / 1e4)
    assert overhead.lowest == pytest.approx(overhead.depth / overhead.compute)
    assert overhead.highest == pytest.approx((overhead.depth + overhead.transfers) / overhead.compute)
    assert not overhead.hidden  # 0.8 s, and a stage computes for a third of one
    fast = Hardware(flops=1e6, memory_bandwidth=1e5, link_bandwidth=1e5)
    assert predict_overhead(shape, fast, 5e3, 100, transitions).hidden


def test_the_large_preset():
    config = load_preset("kimi-linear-48b-a3b-block")
    shape = DepthShape(config.num_hidden_layers, config.hidden_size, config.sublayers_per_block)
    assert (shape.num_sublayers, shape.num_blocks, shape.hidden_size) == (54, 9, 2304)
    # Three stages of nine layers: blocks end with stages.
    assert [step.tensors for step in pipeline_transitions(shape, 3)] == [4, 7]
    assert math.isclose(summary_memory(shape, 4096).sources, 10 * 4096 * 2304 * 2)


# --- Faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DepthShape(0, 4, 1), "`num_layers` must be positive, got 0"),
        (lambda: DepthShape(4, 4, 9), "`sublayers_per_block` must be from 1 to the 8 sublayers .* got 9"),
        (lambda: DepthShape(4, 4, 2, "max"), "`depth_weights` must be 'mean' or 'sum', got 'max'"),
        (lambda: pipeline_elements_per_token(0, 1, 1, 1), "`num_ranks` must be positive, got 0"),
        (lambda: peak_elements_per_token(2, 1, 1, 1, "some"), "`caching` must be one of .* got 'some'"),
        (
            lambda: pipeline_transitions(DepthShape(4, 4, 2), 3, 2),
            "pipeline of 6 stages .* needs as many decoder layers.* 4",
        ),
        (
            lambda: pipeline_transitions(DepthShape(4, 4, 2), 3, splits=[2, 2]),
            "`splits` must be 2 increasing .* [2, 2]",
        ),
        (lambda: pipeline_transitions(DepthShape(4, 4, 2), 2, splits=[4]), "`splits` must be 1 increasing"),
        (lambda: summary_memory(DepthShape(4, 4, 2), 0), "`num_tokens` must be positive, got 0"),
        (lambda: summary_memory(DepthShape(4, 4, 2), 8, chunk=0), "`chunk` must be positive, got 0"),
        (lambda: summary_memory(DepthShape(4, 4, 2), 8, "int8"), "`dtype` must be one of .* got 'int8'"),
        (lambda: Hardware(1, 1, 0), "`link_bandwidth` must be positive, got 0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message.replace("[2, 2]", re.escape("[2, 2]"))):
        call()
