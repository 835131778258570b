# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import torch

from modeling_attnres.parallel.cache import CrossStageCache


def test_gradients_of_later_stages_add_up_and_return_to_the_stage_that_filed():
    cache = CrossStageCache()
    weight = torch.tensor(3.0, requires_grad=True)
    first, second = weight * 2, weight * 5
    cache.file(0, 1, [first])
    cache.file(0, 3, [second])
    cache.file(1, 1, [weight * 7])
    assert len(cache) == 3

    for factor in (10.0, 1.0):  # two later stages
        a, b = cache.read(0)
        (factor * (a + 4 * b)).backward()
    assert weight.grad is None  # cut off the graph of the stages that filed

    sources, gradients = cache.release(0, 3)
    assert sources == [second]
    assert gradients == [torch.tensor(44.0)]
    sources, gradients = cache.release(0, 1)
    assert sources == [first]
    assert gradients == [torch.tensor(11.0)]
    assert cache.read(0) == ()
    assert len(cache) == 1


def test_sources_without_a_gradient_return_none():
    cache = CrossStageCache()
    cache.file(0, 0, [torch.ones(2), torch.ones(2, requires_grad=True)])
    (frozen, _) = cache.read(0)
    assert not frozen.requires_grad
    assert cache.release(0, 0) == ([], [])
    assert len(cache) == 0


def test_dropping():
    cache = CrossStageCache()
    cache.file(0, 0, [])
    assert cache.release(0, 0) == ([], [])
    for micro_batch in (0, 1, 2):
        cache.file(micro_batch, 0, [torch.ones(2)])
    cache.drop(1)
    assert [len(cache.read(micro_batch)) for micro_batch in (0, 1, 2)] == [1, 0, 1]
    cache.clear()
    assert len(cache) == 0
