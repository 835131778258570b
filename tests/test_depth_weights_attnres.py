# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""How weights are formed: both forms against one softmax, written-out gradients, exactness of sums, other devices' products."""

import math

import pytest
import torch
from test_depth_attention_attnres import EPS, SCHEDULES, output_and_gradients, random_stack, relative_error
from tiny_backbones import tiny_inputs, tiny_model
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from modeling_attnres import attention_residuals, depth_streams_attnres, naive_depth_attention
from modeling_attnres.block_summaries_attnres import BankPlan
from modeling_attnres.depth_attention_attnres import DepthPlan, plan_depth
from modeling_attnres.depth_weights_attnres import (
    FORMS,
    SumWeights,
    merge_recent,
    phase_one_weights,
    product_in_fp32,
    score_source,
    split_queries,
)


FLOOR = torch.tensor(1e-3, dtype=torch.float64)


def mix_of(form, sources, query):
    """Phase 1 over all sources but the last, phase 2 over that one."""
    *earlier, recent = sources
    scores = torch.stack([_score(query, source) for source in earlier])
    weights, offset = phase_one_weights(scores, form)
    row = (weights.unsqueeze(-1) * torch.stack(earlier)).sum(0)
    base = row + torch.stack(sources).sum(0) if form.anchored else row
    return merge_recent(
        form, base, offset.unsqueeze(-1), query.unsqueeze(0), recent, FLOOR.to(query.dtype), len(sources)
    )


def _score(query, source):
    dot, norm = score_source(query.unsqueeze(0), source, FLOOR.to(query.dtype))
    return (dot / norm).squeeze(-1)


def random_sources(n, dtype=torch.float64, requires_grad=False):
    generator = torch.Generator().manual_seed(n)
    sources = [torch.randn(1, 3, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(n)]
    query = 2 * torch.randn(5, generator=generator, dtype=torch.float64).to(dtype)
    return [source.requires_grad_(requires_grad) for source in sources], query.requires_grad_(requires_grad)


@pytest.mark.parametrize("n", [2, 3, 9])
@pytest.mark.parametrize("depth_weights", FORMS)
def test_both_phases_are_one_softmax_and_their_gradients_pass_gradcheck(depth_weights, n):
    form = FORMS[depth_weights]
    sources, query = random_sources(n, requires_grad=True)
    mix, _ = mix_of(form, sources, query)
    eps = FLOOR.item() ** 2 / 5
    expected, _ = naive_depth_attention(
        torch.stack(sources), query / math.sqrt(5), torch.ones(5).double(), eps, depth_weights
    )
    torch.testing.assert_close(mix, expected, rtol=1e-12, atol=1e-12)  # fp64 rounding
    assert torch.autograd.gradcheck(lambda query, *sources: mix_of(form, sources, query), (query, *sources))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", range(1, 40))
def test_equal_scores_leave_exactly_nothing_to_add(n, dtype):
    for score in (0.0, 0.3, -17.0, 88.0):
        excess, offset = SumWeights.phase_one(torch.full((n, 4), score, dtype=dtype))
        assert (excess == 0).all()
        assert (offset == -0.5 * torch.tensor(score, dtype=dtype)).all()


@pytest.mark.parametrize("depth_weights", FORMS)
def test_offsets_of_large_and_distant_scores(depth_weights):
    scores = torch.tensor([[300.0, -300.0, 1e4], [299.0, 300.0, -1e4], [0.0, -300.0, 0.0]], dtype=torch.float64)
    weights, offset = phase_one_weights(scores, FORMS[depth_weights])
    log_sum = scores.logsumexp(0)
    expected = -log_sum if depth_weights == "mean" else -0.5 * (log_sum - math.log(3))
    torch.testing.assert_close(offset, expected)
    torch.testing.assert_close(FORMS[depth_weights].shares(weights), scores.softmax(0))


def test_a_query_is_its_three_parts_exactly():
    queries = torch.randn(4, 64) * torch.logspace(-20, 20, 64)
    parts = split_queries(queries)
    assert parts.dtype == torch.bfloat16
    assert torch.equal(parts.double().sum(-2).float(), queries)
    values = torch.randn(7, 64).bfloat16()
    products = product_in_fp32(split_queries(torch.ones(64) / 3), values.T).sum(0)
    # fp32 sums of 64 terms
    torch.testing.assert_close(products.double(), values.double().sum(-1) / 3, rtol=1e-5, atol=1e-5)


# --- Products as another device wants them ---------------------------------------------------------------------------


def as_on_a_gpu(monkeypatch, in_half):
    def plan(embedding, num_sublayers, sublayers_per_block, undivided):
        found = plan_depth(embedding, num_sublayers, sublayers_per_block, undivided)
        return DepthPlan(
            False,
            found.one_pass,
            found.files_outputs,
            found.uses_bank,
            BankPlan(in_half=in_half, alignment=8, floor_channels=8),
        )

    monkeypatch.setattr(depth_streams_attnres, "plan_depth", plan)


@pytest.mark.parametrize("depth_weights", FORMS)
@pytest.mark.parametrize(("num_sublayers", "sublayers_per_block"), SCHEDULES)
def test_aligned_products_are_the_same(num_sublayers, sublayers_per_block, depth_weights, monkeypatch):
    as_on_a_gpu(monkeypatch, in_half=False)
    kwargs = {"sublayers_per_block": sublayers_per_block, "depth_weights": depth_weights}
    stack = random_stack(num_sublayers, 0.5, torch.float64)
    naive = output_and_gradients(stack, impl="naive", **kwargs)
    for value, reference in zip(output_and_gradients(stack, **kwargs), naive, strict=True):
        assert relative_error(value, reference) < 1e-12  # fp64 rounding over a stack
    with torch.no_grad():  # a decode step
        one = [stack[0].detach()[:, :1].contiguous(), stack[1], stack[2].detach(), stack[3].detach()]
        found, expected = (attention_residuals(*one, EPS, impl=impl, **kwargs) for impl in ("two_phase", "naive"))
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("depth_weights", FORMS)
@pytest.mark.parametrize("sublayers_per_block", [1, 3, 4])
def test_products_in_half_precision_lose_nothing(sublayers_per_block, depth_weights, monkeypatch):
    kwargs = {"sublayers_per_block": sublayers_per_block, "depth_weights": depth_weights}
    exact = output_and_gradients(random_stack(8, 0.5, torch.float64), impl="naive", **kwargs)
    stack = random_stack(8, 0.5, torch.bfloat16)
    expected = output_and_gradients(stack, **kwargs)
    as_on_a_gpu(monkeypatch, in_half=True)
    found = output_and_gradients(stack, **kwargs)
    for value, other, reference in zip(found, expected, exact, strict=True):
        own, others = (relative_error(one.double(), reference) for one in (value, other))
        assert own < max(2e-2, 1.5 * others)  # a few roundings of bf16, 4e-3 each; a stack amplifies them alike


# --- Second derivatives and transforms -------------------------------------------------------------------------------


@pytest.mark.parametrize(("sublayers_per_block", "depth_weights"), [(1, "mean"), (2, "sum"), (3, "mean")])
def test_transforms_differentiate_the_operations(sublayers_per_block, depth_weights):
    model = tiny_model("llama", sublayers_per_block, depth_weights=depth_weights, attn_implementation="eager").double()
    inputs, direction = tiny_inputs(), torch.randn_like(model.model.depth_attention.query)

    def loss(query):
        parameters = {"model.depth_attention.query": query}
        arguments = {"labels": inputs, "use_cache": False}
        return functional_call(model, parameters, (inputs,), arguments).loss

    query = model.model.depth_attention.query.detach()
    slope = grad(loss)(query)
    model(inputs, labels=inputs, use_cache=False).loss.backward()
    torch.testing.assert_close(slope, model.model.depth_attention.query.grad)
    with forward_ad.dual_level(), torch.no_grad():
        dual = loss(forward_ad.make_dual(query, direction))
        tangent = forward_ad.unpack_dual(dual).tangent
        torch.testing.assert_close(tangent.double(), (slope * direction).sum(), rtol=1e-4, atol=1e-6)  # a loss in fp32
    per_query = vmap(loss)(torch.stack([query, query + direction]))
    torch.testing.assert_close(per_query[1], loss(query + direction))


@pytest.mark.parametrize("depth_weights", FORMS)
@pytest.mark.parametrize("sublayers_per_block", [1, 2, 3])
def test_second_derivatives_by_transforms_are_those_of_naive(sublayers_per_block, depth_weights):
    embedding, sublayers, query, key_norm, direction = random_stack(6, 0.5, torch.float64)

    def output(query, impl):
        kwargs = {"sublayers_per_block": sublayers_per_block, "depth_weights": depth_weights, "impl": impl}
        return (attention_residuals(embedding, sublayers, query, key_norm, EPS, **kwargs) * direction).sum()

    towards = torch.randn_like(query)
    found = jvp(grad(lambda query: output(query, "two_phase")), (query.detach(),), (towards,))[1]
    slope = torch.autograd.grad(output(query, "naive"), query, create_graph=True)[0]
    expected = torch.autograd.grad((slope * towards).sum(), query)[0]
    assert relative_error(found, expected) < 1e-11  # fp64 rounding over a stack, differentiated twice


def test_a_second_backward_is_refused_with_the_way_out():
    sources, query = random_sources(3, requires_grad=True)
    for form in FORMS.values():
        with pytest.raises(RuntimeError, match=r"no second derivative, got `create_graph=True`. Use `torch.func`"):
            torch.autograd.grad(mix_of(form, sources, query)[0].sum(), query, create_graph=True)
    found = hessian(lambda query: mix_of(SumWeights, sources, query)[0].sum())(query.detach())
    torch.testing.assert_close(found, found.T)


# --- The decision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "gradients", "expected"),
    [
        ("cpu", torch.float32, (1, 8), False, BankPlan()),
        ("cpu", torch.float32, (1, 1024), True, BankPlan(tokens_at_once=64)),
        ("cpu", torch.bfloat16, (2, 64), False, BankPlan(tokens_at_once=64)),
        ("cpu", torch.float32, (1, 2048), False, BankPlan(tokens_at_once=64)),
        ("cpu", torch.float32, (1, 2048), True, BankPlan(tokens_at_once=64)),
        ("meta", torch.float32, (4, 4096), True, BankPlan(alignment=8, floor_channels=8)),
        ("meta", torch.bfloat16, (4, 4096), False, BankPlan(alignment=8, in_half=True, floor_channels=8)),
        ("meta", torch.float16, (4, 4096), False, BankPlan(alignment=8, floor_channels=8)),
    ],
)
def test_products_go_by_device_dtype_and_tokens(device, dtype, shape, gradients, expected):
    embedding = torch.empty(*shape, 512, dtype=dtype, device=device)
    with torch.set_grad_enabled(gradients):
        assert plan_depth(embedding, 8, 4, undivided=True).bank == expected


def test_one_pass_is_for_few_tokens_and_more_of_them_off_the_processor():
    with torch.no_grad():
        for device, most in (("cpu", 32), ("meta", 128)):
            for count in (most, most + 1):
                plan = plan_depth(torch.empty(count, 1, 8, device=device), 8, 4, undivided=True)
                assert plan.one_pass == (count == most)
        assert not plan_depth(torch.empty(1, 1, 8), 8, 4, undivided=False).one_pass
        assert plan_depth(torch.empty(2, 3, 8), 8, 1, undivided=True).files_outputs
        assert not plan_depth(torch.empty(2, 3, 8), 8, 1, undivided=False).files_outputs
