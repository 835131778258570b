# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest

from modeling_attnres.parallel.layout import CACHING, PipelineLayout, formula_summaries, stage_boundaries


# ranks, virtual stages, boundaries, sublayers per block
CUTS = [
    (2, 1, (0, 3, 5), 1),
    (2, 2, (0, 1, 3, 4, 7), 3),
    (4, 2, (0, 1, 2, 3, 4, 6, 7, 8, 9), 4),
    (4, 3, tuple(range(13)), 5),
    (3, 2, (0, 2, 4, 6, 8, 10, 13), 26),
]


@pytest.mark.parametrize("caching", CACHING)
@pytest.mark.parametrize(("num_ranks", "virtual_stages", "boundaries", "sublayers_per_block"), CUTS)
def test_every_stage_gets_what_it_lacks_and_no_more(
    num_ranks, virtual_stages, boundaries, sublayers_per_block, caching
):
    layout = PipelineLayout(boundaries, num_ranks, sublayers_per_block, False, caching)
    caches = [[] for _ in range(num_ranks)]
    for stage in range(num_ranks * virtual_stages):
        cache = caches[stage % num_ranks]
        held = cache + list(layout.received_sources(stage))
        if stage > 0:
            closed_blocks = 2 * boundaries[stage] // sublayers_per_block
            assert held == list(range(1 + closed_blocks))
            assert layout.tensors_received(stage) >= 1  # there is always something to wait for
        # At the stage's end it holds these, and those that closed within it.
        assert layout.kept_sources(stage).stop <= layout.sources_before(min(stage + 1, layout.num_stages - 1))
        cache += layout.kept_sources(stage)
        assert cache == list(range(len(cache)))


@pytest.mark.parametrize("caching", CACHING)
@pytest.mark.parametrize("blocks_per_stage", [1, 2])
def test_counts_equal_the_closed_form(caching, blocks_per_stage):
    for num_ranks, virtual_stages in itertools.product((2, 4, 5), (1, 2, 3)):
        stages = num_ranks * virtual_stages
        layout = PipelineLayout(tuple(range(stages + 1)), num_ranks, 2 // blocks_per_stage, True, caching)
        received = list(itertools.chain(*map(layout.received_sources, range(stages))))
        blocks = [source for source in received if source > 0]
        assert len(blocks) == formula_summaries(num_ranks, virtual_stages, blocks_per_stage, caching)
        assert received.count(0) == (stages if caching == "none" else num_ranks) - 1
        assert [layout.state_tensors(stage) for stage in range(stages)] == [0] + [1] * (stages - 1)


def test_closed_form_in_figures():
    # P = 4, V = 2, N_p = 1: C (C - 1) / 2 = 28, and 6 + 16 = 22 as the paper counts.
    assert [formula_summaries(4, 2, 1, caching) for caching in ("none", "received", "all")] == [28, 22, 18]


def test_state_is_the_open_sum_and_the_stream():
    layout = PipelineLayout((0, 1, 2, 3, 4), 2, 4, has_stream=False)
    assert [layout.state_tensors(stage) for stage in range(4)] == [0, 1, 0, 1]
    layout = PipelineLayout((0, 1, 2, 3, 4), 2, 4, has_stream=True)
    assert [layout.state_tensors(stage) for stage in range(4)] == [0, 2, 1, 2]


def test_boundaries_are_even_unless_given():
    assert stage_boundaries(8, 4) == (0, 2, 4, 6, 8)
    assert stage_boundaries(10, 4) == (0, 3, 6, 8, 10)
    assert stage_boundaries(3, 3, None) == (0, 1, 2, 3)
    assert stage_boundaries(8, 3, [1, 7]) == (0, 1, 7, 8)


@pytest.mark.parametrize("splits", [[], [1], [1, 1], [2, 1], [0, 4], [4, 8], [1, 2, 3]])
def test_splits_that_do_not_cut_are_refused(splits):
    with pytest.raises(ValueError, match="`splits` must be 2 increasing indices from 1 to 7"):
        stage_boundaries(8, 3, splits)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"pipeline of 5 stages .* and the model has 4"):
        stage_boundaries(4, 5)


def test_caching_is_checked():
    with pytest.raises(ValueError, match=r"`caching` must be one of .* got 'some'"):
        PipelineLayout((0, 1, 2), 2, 1, False, "some")
