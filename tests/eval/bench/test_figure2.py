# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from modeling_attnres import attention_residuals
from modeling_attnres.eval.bench.figure2 import figure2_mix, figure2_stack


@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
@pytest.mark.parametrize("sublayers_per_block", [1, 2, 3, 6])
def test_stack_is_the_naive_reference(sublayers_per_block, depth_weights):
    torch.manual_seed(0)
    num_sublayers, dim = 6, 8
    matrices = torch.randn(num_sublayers, dim, dim, dtype=torch.float64) / dim
    sublayers = [lambda hidden_states, matrix=matrix: torch.tanh(hidden_states @ matrix) for matrix in matrices]
    embedding = torch.randn(2, 3, dim, dtype=torch.float64)
    query, key_norm = torch.randn(num_sublayers, dim).double(), torch.rand(num_sublayers, dim).double() + 0.5
    arguments = (embedding, sublayers, query, key_norm, 1e-6, sublayers_per_block)

    stack = figure2_stack(*arguments, sums_to_n=depth_weights == "sum")

    torch.testing.assert_close(stack, attention_residuals(*arguments, depth_weights, impl="naive"))


def test_mix_of_a_zero_query_is_the_mean():
    sources = torch.randn(3, 2, 4, 8)

    mix = figure2_mix(tuple(sources), torch.zeros(8), torch.ones(8), eps=1e-6)

    torch.testing.assert_close(mix, sources.mean(0))
