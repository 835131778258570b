# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The bank of depth sources: what it stores, when it reuses its allocation, and that no live source is overwritten."""

import pytest
import torch

from modeling_attnres import BlockSummaries
from modeling_attnres.depth_attention_attnres import DepthAttention


FLOOR = torch.tensor(1e-3)


def filled_bank(sources, queries, capacity=None):
    bank = BlockSummaries()
    bank.reset(sources[0], capacity or len(sources), num_queries=len(queries))
    for source in sources:
        bank.append(source, queries, FLOOR)
    return bank


def test_stores_sources_norms_and_scores():
    sources = [torch.randn(2, 3, 8) for _ in range(3)]
    queries = torch.randn(5, 8)
    with torch.no_grad():
        bank = filled_bank(sources, queries, capacity=4)
    stacked = torch.stack(sources)
    assert bank.length == 3
    assert torch.equal(bank.sources[:3], stacked)
    torch.testing.assert_close(bank.norms[:3], (stacked.square().sum(-1) + FLOOR**2).sqrt())
    torch.testing.assert_close(bank.inv_rms, (stacked.square().mean(-1) + FLOOR**2 / 8).rsqrt())
    expected = (stacked @ queries.T / bank.norms[:3].unsqueeze(-1)).movedim(-1, 1)
    torch.testing.assert_close(bank.score(0, 5), expected)
    weights = torch.rand(3, 2, 2, 3)  # [n, R, B, T]
    torch.testing.assert_close(
        torch.stack(bank.weighted_sum(weights)), torch.einsum("nrbt,nbtd->rbtd", weights, stacked)
    )


def test_low_precision_sources_are_scored_in_fp32():
    source = torch.randn(1, 4, 64).bfloat16()
    queries = torch.randn(2, 64)
    with torch.no_grad():
        bank = filled_bank([source], queries)
    assert bank.sources.dtype == torch.bfloat16
    expected = source.float() @ queries.T / source.float().norm(dim=-1, keepdim=True)
    torch.testing.assert_close(bank.score(0, 2)[0].movedim(0, -1), expected, rtol=1e-5, atol=1e-5)


def test_reset_keeps_an_allocation_that_fits_and_replaces_one_that_does_not():
    like, queries = torch.randn(1, 4, 8), torch.randn(3, 8)
    with torch.no_grad():
        bank = filled_bank([like], queries, capacity=3)
        address = bank.sources.data_ptr()
        bank.reset(torch.randn(1, 4, 8), 3, 3)
        assert bank.sources.data_ptr() == address
        assert bank.length == 0
        for other in (torch.randn(1, 5, 8), torch.randn(2, 4, 8), torch.randn(1, 4, 8).double()):
            bank.reset(other, 3, 3)
            assert bank.sources.shape == (3, *other.shape)
            assert bank.sources.dtype == other.dtype


def test_reset_with_gradients_never_reuses_an_allocation():
    # A backward that is still to come reads the old one.
    like, queries = torch.randn(1, 4, 8), torch.randn(3, 8)
    bank = filled_bank([like], queries)
    address = bank.sources.data_ptr()
    old = bank.sources
    bank.reset(like, 1, 3)
    assert bank.sources.data_ptr() != address
    assert torch.equal(old[0], like)


def test_a_live_source_is_never_overwritten():
    queries = torch.randn(3, 8)
    with torch.no_grad():
        bank = filled_bank([torch.randn(1, 4, 8) for _ in range(2)], queries)
        before = bank.sources.clone()
        with pytest.raises(RuntimeError, match="All 2 slots of the block summaries hold a live source"):
            bank.append(torch.randn(1, 4, 8), queries, FLOOR)
    assert torch.equal(bank.sources, before)


def test_an_earlier_forward_keeps_its_sources_through_a_later_one():
    # Two forwards through the same bank object before either backward: gradients must be those of separate banks.
    queries = torch.randn(2, 8, requires_grad=True)
    inputs = [torch.randn(1, 3, 8, requires_grad=True) for _ in range(2)]
    bank = BlockSummaries()
    losses = []
    for value in inputs:
        bank.reset(value, 1, 2)
        bank.append(value, queries, FLOOR)
        scores = bank.score(0, 2)
        losses.append(torch.stack(bank.weighted_sum(scores.sigmoid())).square().sum())
    shared = torch.autograd.grad(sum(losses), inputs)
    for value, gradient in zip(inputs, shared):
        scores = (value @ queries.T / (value.square().sum(-1, keepdim=True) + FLOOR**2).sqrt()).unsqueeze(-1)
        loss = (scores.sigmoid() * value.unsqueeze(-2)).square().sum()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss, value)[0], rtol=1e-4, atol=1e-5)


def test_gradients_pass_gradcheck():
    sources = [torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    queries = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def read_twice(queries, *sources):
        bank = BlockSummaries()
        bank.reset(sources[0], 3, 3)
        alias = bank.append(sources[0], queries, FLOOR.double())
        bank.append(sources[1], queries, FLOOR.double())
        early = bank.weighted_sum(bank.score(0, 2).softmax(0))
        bank.append(sources[2], queries, FLOOR.double())
        late = bank.weighted_sum(bank.score(1, 3).softmax(0))
        return *early, *late, alias * 2

    assert torch.autograd.gradcheck(read_twice, (queries, *sources))


@torch.no_grad()
def test_queries_are_folded_again_only_when_they_may_have_changed():
    module, embedding, bank = DepthAttention(4, 8, 1e-6), torch.zeros(1, 1, 8), BlockSummaries()
    folded = bank.fold_queries(module, embedding)
    assert bank.fold_queries(module, embedding) is folded
    module.query.add_(1)
    changed = bank.fold_queries(module, embedding)
    assert torch.equal(changed[0], module(embedding)[0])
    assert bank.fold_queries(module, embedding.double())[0].dtype == torch.float64
    module.query = torch.nn.Parameter(2 * module.query)
    assert torch.equal(bank.fold_queries(module, embedding)[0], module(embedding)[0])
    stand_in = torch.nn.Sequential(module)
    assert bank.fold_queries(stand_in, embedding) is not bank.fold_queries(stand_in, embedding)
    with torch.enable_grad():
        assert bank.fold_queries(module, embedding)[0].requires_grad
    module.register_forward_hook(lambda module, inputs, output: (output[0] + 1, output[1]))
    assert torch.equal(bank.fold_queries(module, embedding)[0], module(embedding)[0])
