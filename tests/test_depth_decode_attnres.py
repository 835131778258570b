# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""One pass over all sources for few tokens, one per sequence or packed into one row, against the naive reference."""

from dataclasses import replace

import pytest
import torch
from test_depth_attention_attnres import EPS, SCHEDULES, random_stack, relative_error

from modeling_attnres import BlockSummaries, attention_residuals, depth_streams_attnres
from modeling_attnres.depth_attention_attnres import DepthAttention, plan_depth
from modeling_attnres.depth_streams_attnres import DecodeStream, open_stream
from modeling_attnres.depth_weights_attnres import FORMS


@pytest.fixture(autouse=True, params=[1, 8])
def floor_channels(request, monkeypatch):
    """Every test as on a processor, and with the channels that other devices add to a source."""

    def plan(*args, **kwargs):
        found = plan_depth(*args, **kwargs)
        return replace(found, bank=replace(found.bank, floor_channels=request.param))

    monkeypatch.setattr(depth_streams_attnres, "plan_depth", plan)


def one_token(num_sublayers, query_scale, dtype):
    return few_tokens((2, 1), num_sublayers, query_scale, dtype)


def few_tokens(shape, num_sublayers, query_scale, dtype):
    """A stack over an embedding of `shape` `(B, T)`."""
    embedding, sublayers, query, key_norm, _ = random_stack(num_sublayers, query_scale, dtype)
    embedding = embedding.detach().flatten(0, 1)[: shape[0] * shape[1]].unflatten(0, shape)
    return embedding.contiguous(), sublayers, query.detach(), key_norm.detach()


def decode(stack, sublayers_per_block, depth_weights, bank=None):
    """The mix of every sublayer and of the output, their weights, and the sources of the last."""
    embedding, sublayers, query, key_norm = stack
    fold = DepthAttention(len(sublayers), embedding.shape[-1], EPS)
    with torch.no_grad():
        queries, norm_floor = torch.func.functional_call(fold, {"query": query, "key_norm": key_norm}, (embedding,))
        depth = open_stream(
            FORMS[depth_weights], embedding, queries, norm_floor, bank or BlockSummaries(), sublayers_per_block
        )
        assert isinstance(depth, DecodeStream)
        state, mixes, all_weights = depth.start(embedding), [], []
        ((first, last),) = depth.groups
        for index, read in enumerate(depth.read(first, last)):
            mix, weights = depth.mix(read, *state)
            mixes.append(mix)
            all_weights.append(depth.mix_weights(read, weights))
            state = depth.advance(read, state, sublayers[index](mix), index % sublayers_per_block == 0)
        state = depth.close(state, last)
        mix, weights = depth.mix_output(state, with_weights=True)
    return [*mixes, mix], [*all_weights, weights], depth.stacked_sources(state)


def naive(stack, sublayers_per_block, depth_weights):
    with torch.no_grad():
        return attention_residuals(*stack, EPS, sublayers_per_block, depth_weights, impl="naive")


@pytest.mark.parametrize("depth_weights", FORMS)
@pytest.mark.parametrize(("num_sublayers", "sublayers_per_block"), SCHEDULES)
@pytest.mark.parametrize("query_scale", [0.0, 0.5, 5.0], ids=["zero", "random", "near-one-hot"])
@pytest.mark.parametrize("shape", [(2, 1), (1, 5)], ids=["rows", "packed"])
def test_one_pass_equals_naive(num_sublayers, sublayers_per_block, depth_weights, query_scale, shape):
    exact = naive(few_tokens(shape, num_sublayers, query_scale, torch.float64), sublayers_per_block, depth_weights)
    for dtype in (torch.float64, torch.float32):
        stack = few_tokens(shape, num_sublayers, query_scale, dtype)
        mixes, weights, sources = decode(stack, sublayers_per_block, depth_weights)
        if dtype == torch.float64:
            tolerance = 1e-12  # rounding over a stack: the two are equal in exact arithmetic
        else:  # naive's own error sets the scale; the anchored sum cancels the stream against what it suppresses
            own = relative_error(naive(stack, sublayers_per_block, depth_weights), exact)
            tolerance = max(1e-5 if depth_weights == "mean" else 1e-4, 4 * own)
        assert relative_error(mixes[-1], exact) < tolerance
        # The weights of the output mix are those behind it.
        torch.testing.assert_close(torch.einsum("btn,btnd->btd", weights[-1], sources), mixes[-1])
        total = 1.0 if depth_weights == "mean" else float(sources.shape[2])
        torch.testing.assert_close(weights[-1].sum(-1), torch.full(shape, total, dtype=dtype))
        assert weights[0].shape == (*shape, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_sublayers", "sublayers_per_block"), [*SCHEDULES, (100, 1), (98, 2)])
def test_sum_with_zero_queries_is_the_residual_stream_bit_for_bit(num_sublayers, sublayers_per_block, dtype):
    stack = one_token(num_sublayers, 0.0, dtype)
    assert_plain_stream(stack, sublayers_per_block)
    packed = few_tokens((1, 5), num_sublayers, 0.0, dtype)
    assert_plain_stream(packed, sublayers_per_block)


def assert_plain_stream(stack, sublayers_per_block):
    mixes, _, _ = decode(stack, sublayers_per_block, "sum")
    stream = stack[0]
    for mix, sublayer in zip(mixes, stack[1]):
        assert torch.equal(mix, stream)
        stream = stream + sublayer(stream)
    assert torch.equal(mixes[-1], stream)


@pytest.mark.parametrize("depth_weights", FORMS)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_packed_tokens_are_mixed_as_in_rows_of_their_own(depth_weights, strided):
    embedding, *rest = few_tokens((1, 5), 12, 0.5, torch.float64)
    if strided:  # sublayers of a model may hand on views
        embedding = embedding.expand(2, 5, -1).transpose(1, 2).contiguous().transpose(1, 2)[:1]
        rest[0] = [lambda x, sublayer=sublayer: sublayer(x.mT.contiguous().mT) for sublayer in rest[0]]
    packed = decode((embedding, *rest), 5, depth_weights)
    rows = decode((embedding.transpose(0, 1), *rest), 5, depth_weights)
    for in_one, in_own in zip([*packed[0], *packed[1], packed[2]], [*rows[0], *rows[1], rows[2]], strict=True):
        torch.testing.assert_close(in_one, in_own.transpose(0, 1), rtol=1e-13, atol=1e-13)  # fp64 rounding


@pytest.mark.parametrize("depth_weights", FORMS)
def test_bf16_scores_and_sources_are_fp32(depth_weights):
    stack = one_token(12, 0.5, torch.bfloat16)
    bank = BlockSummaries()
    mixes, weights, sources = decode(stack, 4, depth_weights, bank)
    assert bank.sources.dtype == weights[-1].dtype == torch.float32
    assert mixes[-1].dtype == sources.dtype == torch.bfloat16
    # The mix is rounded once to bf16, 2^-9 of itself at most; so is the stream of "sum", 12 times.
    expected = torch.einsum("btn,bnd->btd", weights[-1], bank.decode_reads[-1][-1].per_token)
    assert relative_error(mixes[-1].float(), expected) < (2**-8 if depth_weights == "mean" else 12 * 2**-8)


@pytest.mark.parametrize("depth_weights", FORMS)
def test_a_used_bank_leaves_no_trace(depth_weights):
    bank = BlockSummaries()
    expected, _, _ = decode(one_token(8, 0.5, torch.float32), 3, depth_weights)
    for _ in range(2):
        decode(one_token(12, 2.0, torch.float32), 4, depth_weights, bank)  # the same number of sources
        again, _, sources = decode(one_token(8, 0.5, torch.float32), 3, depth_weights, bank)
        kept = sources.clone()
        assert all(map(torch.equal, again, expected))
        decode(one_token(12, 2.0, torch.float32), 4, depth_weights, bank)
        assert torch.equal(sources, kept)


def is_one_pass(embedding):
    return plan_depth(embedding, 8, 4, undivided=True).one_pass


def test_what_counts_as_a_decode_step():
    embedding = torch.zeros(2, 1, 8)
    assert not is_one_pass(embedding)  # with gradients
    with torch.no_grad():
        assert is_one_pass(embedding)
        assert is_one_pass(embedding.transpose(0, 1))
        assert not is_one_pass(embedding.expand(2, 2, 8))
        for too_many in (embedding[:1].expand(33, 1, 8), embedding[:1].expand(1, 33, 8)):
            assert not is_one_pass(too_many)
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_one_pass(embedding)


def test_a_bank_serves_rows_and_packed_tokens_in_turn():
    bank = BlockSummaries()
    for shape in ((2, 1), (1, 2), (1, 5), (2, 1)):
        stack = few_tokens(shape, 8, 0.5, torch.float32)
        mixes, _, _ = decode(stack, 3, "sum", bank)
        assert all(map(torch.equal, mixes, decode(stack, 3, "sum")[0]))


def test_a_read_is_one_leaf_to_whoever_replaces_the_tensors_of_arguments():
    embedding = torch.zeros(2, 1, 8)
    with torch.no_grad():
        depth = open_stream(FORMS["mean"], embedding, torch.zeros(5, 8), torch.tensor(1e-3), BlockSummaries(), 2)
        depth.start(embedding)
        reads = depth.read(0, 4)
    cast = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.bfloat16, {"reads": reads})
    assert all(one is other for one, other in zip(cast["reads"], reads))
