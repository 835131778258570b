# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from pipeline_workers import Case, generation_matches, generation_refusals
from processes import run_ranks
from tiny_backbones import BACKBONES, tiny_backbone

from modeling_attnres.parallel.generation import StageKVCache


CASES = [
    Case(3, "sum", 1, num_layers=4),
    Case(1, "mean", 2, num_layers=5),
    Case(2, "mean", 2, num_layers=4, caching="none", model_type="mistral"),  # sliding windows
    Case(3, "mean", 1, num_layers=4, model_type="kimi_linear"),  # states instead of keys and values
    Case(4, "mean", 1, num_layers=4, model_type="kimi_k3_text"),
]


def test_tokens_equal_those_of_generate(tmp_path):
    for results in run_ranks(generation_matches, 2, tmp_path, CASES, 2):
        assert results == [True] * 2 * len(CASES)


@pytest.mark.slow
def test_tokens_equal_those_of_generate_for_every_backbone(tmp_path):
    cases = [Case(3, "sum", 1, num_layers=4, model_type=name) for name in BACKBONES]
    for results in run_ranks(generation_matches, 4, tmp_path, cases, 4):
        assert results == [True] * 2 * len(cases)


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    for messages in run_ranks(generation_refusals, 2, tmp_path):
        micro_batches, length, training = messages
        assert "`num_micro_batches` must divide the batch of 4 prompts, got 3" in micro_batches
        assert "`max_new_tokens` must be positive, got 0" in length
        assert "`stages` must be in evaluation mode" in training


def test_a_stage_cache_knows_the_length_of_other_stages_layers():
    config = tiny_backbone("gpt_oss")  # alternating sliding windows and full attention
    cache = StageKVCache(config, range(2, 4))
    key = torch.zeros(1, 2, 5, 8)
    for index in (2, 3):
        cache.update(key, key, index)
    assert cache.get_seq_length(0) == cache.get_seq_length(1) == 5
    assert len({id(layer) for layer in cache.layers}) == 2
