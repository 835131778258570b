# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Full AttnRes by groups: the schedule, what it keeps for backward, weights, and where it steps aside."""

from unittest import mock

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from test_depth_attention_attnres import EPS, output_and_gradients, random_stack, relative_error
from test_depth_kernels_attnres import needs_triton, run_tests
from tiny_backbones import tiny_inputs, tiny_model
from torch.distributed.utils import _apply_to_tensors
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modeling_attnres import BlockSummaries
from modeling_attnres.decoder_layer_attnres import AttnResDecoderLayer
from modeling_attnres.depth_attention_attnres import DepthAttention, DepthStream
from modeling_attnres.depth_fused_attnres import plain_rms_norm
from modeling_attnres.depth_streams_attnres import FullStream, full_groups, open_stream
from modeling_attnres.depth_weights_attnres import FORMS, MeanWeights, SumWeights


def open_full(stack, depth_weights):
    embedding, sublayers, query, key_norm, _ = stack
    fold = DepthAttention(len(sublayers), embedding.shape[-1], EPS)
    queries, norm_floor = torch.func.functional_call(fold, {"query": query, "key_norm": key_norm}, (embedding,))
    depth = open_stream(FORMS[depth_weights], embedding, queries, norm_floor, BlockSummaries(), 1)
    assert isinstance(depth, FullStream)
    return depth


@pytest.mark.parametrize("depth_weights", FORMS)
@pytest.mark.parametrize("num_sublayers", [2, 6, 8, 10, 30])
def test_values_and_gradients_equal_naive(num_sublayers, depth_weights):
    stack = random_stack(num_sublayers, 0.5, torch.float64)
    kwargs = {"sublayers_per_block": 1, "depth_weights": depth_weights}
    naive = output_and_gradients(stack, impl="naive", **kwargs)
    for name, value, reference in zip(
        ("output", "embedding", "query", "key_norm"), output_and_gradients(stack, **kwargs), naive
    ):
        assert relative_error(value, reference) < 1e-11, name  # fp64 rounding, amplified by a stack of thirty


@pytest.mark.parametrize("depth_weights", FORMS)
def test_weights_behind_a_mix_reproduce_it(depth_weights):
    stack = random_stack(20, 1.0, torch.float64)
    depth = open_full(stack, depth_weights)
    state = depth.start(stack[0])
    for first, last in depth.groups:
        for index, read in enumerate(depth.read(first, last), start=first):
            mix, scores = depth.mix(read, *state)
            weights = depth.mix_weights(read, scores)
            assert weights.shape == (2, 5, index + 1)
            torch.testing.assert_close(torch.einsum("btn,btnd->btd", weights, depth.stacked_sources(state)), mix)
            state = depth.advance(read, state, stack[1][index](mix), True)
        state = depth.close(state, last)
    mix, weights = depth.mix_output(state, with_weights=True)
    torch.testing.assert_close(torch.einsum("btn,btnd->btd", weights, depth.stacked_sources(state)), mix)
    torch.testing.assert_close(depth.split(state)[1][-1], depth.sources[-1])


@pytest.mark.parametrize("form", [MeanWeights, SumWeights])
@pytest.mark.parametrize("scale", [1.0, 200.0], ids=["moderate", "would overflow"])
def test_coefficients_are_those_of_one_softmax(form, scale):
    earlier, own = torch.randn(5, 2, 3).double(), scale * torch.randn(4, 2, 3).double()
    expected = torch.softmax(torch.cat([earlier, own]), dim=0)
    if form is MeanWeights:
        parts = form.merge_several(-earlier.logsumexp(0), own, 9)
        taken = expected[5:]
        kept = expected[:5].sum(0)
    else:
        parts = form.merge_several(-0.5 * (earlier.logsumexp(0) - torch.tensor(5.0).double().log()), own, 9)
        kept = 9 / 5 * expected[:5].sum(0)
        taken = 9 * expected[5:] - kept
    for part, reference in zip(parts, (kept, taken, expected[5:]), strict=True):
        torch.testing.assert_close(part, reference)


@pytest.mark.parametrize("num_sublayers", [2, 4, 6, 8, 20, 60])
def test_groups_cover_every_sublayer_and_never_outgrow_what_is_earlier(num_sublayers):
    groups = full_groups(num_sublayers)
    assert [index for first, last in groups for index in range(first, last)] == list(range(num_sublayers))
    for first, last in groups:
        assert first % 2 == 0
        earlier, own = first + 1, last - 1 - first  # sources that its last sublayer finds
        assert own <= min(earlier, 7)


def test_sums_of_equal_scores_are_anchored_exactly():
    kept, taken, _ = SumWeights.merge_several(torch.zeros(2, 3), torch.zeros(7, 2, 3), 20)
    assert (kept == 1).all()
    assert (taken == 0).all()


@pytest.mark.parametrize("depth_weights", FORMS)
def test_a_merge_passes_gradcheck(depth_weights):
    sources = [torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    base = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    stat = torch.randn(1, 2, 1, dtype=torch.float64, requires_grad=True)

    def merge_twice(base, stat, queries, *sources):
        bank = BlockSummaries()
        bank.reset(sources[0], 3, 2)
        mixes = []
        for count, source in enumerate(sources):
            bank.append(source, queries, torch.tensor(1e-3).double())
            if count > 0:
                scores = bank.score(count - 1, count, slice(1, None)).squeeze(1)
                mixes.append(bank.merge(base, stat, scores, FORMS[depth_weights], 1))
        return tuple(mixes)

    assert torch.autograd.gradcheck(merge_twice, (base, stat, queries, *sources))


def stream_of(model, training=False):
    streams = []
    original = AttnResDecoderLayer.forward

    def spy(*args, **kwargs):
        streams.append(type(kwargs["depth"]))
        return original(*args, **kwargs)

    # Of the class: one layer's own `forward`, replaced, would be a reason to step aside.
    with mock.patch.object(AttnResDecoderLayer, "forward", spy):
        model.train(training)(tiny_inputs())
    return streams[0]


def test_steps_aside_for_layers_that_are_run_apart():
    assert stream_of(tiny_model("llama", 1)) is FullStream
    assert stream_of(tiny_model("llama", 2)) is DepthStream
    hooked = tiny_model("llama", 1)
    add_hook_to_module(hooked.model.layers[1], ModelHook())
    assert stream_of(hooked) is DepthStream
    recomputing = tiny_model("llama", 1)
    recomputing.gradient_checkpointing_enable()
    assert stream_of(recomputing) is FullStream
    assert stream_of(recomputing, training=True) is DepthStream


@pytest.mark.parametrize("sublayers_per_block", [1, 4])
def test_reads_stay_in_fp32_and_move_with_a_layers_inputs(sublayers_per_block):
    """FSDP casts every tensor that it finds in a layer's arguments, accelerate moves them to the layer's device."""
    stack = random_stack(8, 0.5, torch.float32)
    fold = DepthAttention(8, stack[0].shape[-1], EPS)
    queries, norm_floor = fold(stack[0])
    form, bank = FORMS["mean"], BlockSummaries()
    depth = open_stream(form, stack[0], queries, norm_floor, bank, sublayers_per_block, undivided=False)
    depth.start(stack[0])
    reads = depth.read(*depth.groups[0])
    cast = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.bfloat16, {"reads": reads})["reads"]
    assert all(one is other for one, other in zip(cast, reads, strict=True))
    cast = _apply_to_tensors(torch.Tensor.bfloat16, {"reads": reads})["reads"]
    assert all(one is other for one, other in zip(cast, reads, strict=True))
    (moved, *_) = send_to_device(reads, "meta")
    assert {tensor.device.type for tensor in vars(moved).values() if torch.is_tensor(tensor)} == {"meta"}
    assert moved.position == reads[0].position


# --- Kernels ---------------------------------------------------------------------------------------------------------


@needs_triton
def test_streams_of_kernels_under_the_interpreter():
    run_tests("interpreted_fused_streams.py", TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("on", "`ATTNRES_KERNELS=on` asks for kernels, which cannot run here: "),
        ("yes", "`ATTNRES_KERNELS` must be one of 'auto', 'off' and 'on', got 'yes'"),
    ],
)
def test_kernels_that_cannot_run_are_an_error_before_work_starts(asked, message, monkeypatch):
    model = tiny_model("llama", 4)
    monkeypatch.setenv("ATTNRES_KERNELS", asked)
    with pytest.raises(ValueError, match=message):
        model(tiny_inputs())


def test_norms_that_are_llamas_and_those_that_are_not():
    class Other(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    norm = LlamaRMSNorm(8, eps=1e-5)
    assert plain_rms_norm(norm) == (norm.weight, 1e-5)
    assert plain_rms_norm(GemmaRMSNorm(8)) == plain_rms_norm(Other(8)) == (None, None)
    assert plain_rms_norm(torch.nn.LayerNorm(8)) == plain_rms_norm(None) == (None, None)
    norm.register_forward_hook(lambda *arguments: None)
    assert plain_rms_norm(norm) == (None, None)
