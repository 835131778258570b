# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Depth streams of kernels: one launch from one sublayer's output to the next one's input, one for phase 1.

Letters: B batch, T tokens, M = B * T, D hidden size, n sources of a mix.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from .depth_attention_attnres import DepthRead, DepthStream, State
from .depth_decode_kernel_attnres import decode_mix
from .depth_kernels_attnres import merge, phase_one_rows, phase_one_rows_backward
from .depth_launch_attnres import rms_norm
from .depth_weights_attnres import first_derivative


class _FusedRows(torch.autograd.Function):
    """Phase 1 in one launch, forward and backward, with the bank's gradient handed on as in [`BlockSummaries`]."""

    @staticmethod
    def forward(ctx, link, scores, bank, form):
        ctx.sources, ctx.form = bank.sources, form
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores)
        return *phase_one_rows(scores, bank.sources[: len(scores)], form, impl="triton"), link.view_as(link)

    @staticmethod
    @first_derivative
    def backward(ctx, rows_gradient, offset_gradient, link_gradient):
        (scores,) = ctx.saved_tensors
        live = ctx.sources[: len(scores)]
        if rows_gradient is None:
            rows_gradient = live.new_zeros(scores.shape[1], *live.shape[1:])
        if link_gradient is None:
            link_gradient = torch.zeros_like(ctx.sources)
        scores_gradient = phase_one_rows_backward(
            rows_gradient, offset_gradient, scores, live, ctx.form, link_gradient[: len(scores)], impl="triton"
        )
        return link_gradient, scores_gradient, None, None


class FusedSteps:
    """The steps of a stream around [`_step`]: what lies between the outputs of two sublayers, up to a norm of the mix."""

    def mix(self, read, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._step(read, None, state)[1::2]

    def mix_and_norm(self, read, norm: nn.Module, state: State):
        return self._step(read, norm, state)[1:]

    def advance_and_mix(self, read, next_read, norm: nn.Module, state: State, output, starts_block: bool):
        return self._step(next_read, norm, state, output, starts_block)

    def fused_norm(self, norm: nn.Module | None) -> dict[str, torch.Tensor | float | None]:
        """Weight and epsilon of `norm` if it goes into the launch of the mix before it; `None` for both if not.

        A kernel sums in another order than the module: where mixes are anchored, so that zero queries give the plain
        model bit for bit, the module is called.
        """
        weight, eps = (None, None) if self.form.anchored else plain_rms_norm(norm)
        return {"norm_weight": weight, "norm_eps": eps, "impl": "triton"}


class FusedStream(FusedSteps, DepthStream):
    """[`DepthStream`] in one launch from one sublayer's output to the next one's input, and one for phase 1."""

    def sum_rows(self, scores: torch.Tensor, sources: tuple[torch.Tensor, ...]):
        if sources:  # a layer that is run again in backward
            return super().sum_rows(scores, sources)
        form, bank = "sum" if self.form.anchored else "mean", self.bank
        if bank.link is None:
            rows, offset = phase_one_rows(scores, bank.sources[: len(scores)], form, impl="triton")
        else:
            rows, offset, bank.link = _FusedRows.apply(bank.link, scores, bank, form)
        return rows.unbind(0), offset

    def _step(self, read: DepthRead, norm: nn.Module | None, state: State, output=None, starts_block: bool = False):
        """The state with `output`, the mix of `read`, `norm` of it, and the recent source's logit."""
        anchor, recents = self.split(state)
        if torch.compiler.is_compiling() or (output is None and not recents):  # a layer that is compiled by itself
            if output is not None:
                state = self.advance(read, state, output, starts_block)
            mix, logit = DepthStream.mix(self, read, *state)
            return state, mix, None if norm is None else norm(mix), logit
        merged = merge(
            read.row,
            read.offset.squeeze(-1),
            read.query.squeeze(0),
            None if starts_block else recents[-1],
            read.norm_floor,
            output=output,
            stream=anchor[0] if anchor else None,
            num_sources=len(read.scores) + 1,
            **self.fused_norm(norm),
        )
        normed = norm(merged.mix) if norm is not None and merged.normed is None else merged.normed
        state = (merged.stream, merged.recent) if anchor else (merged.recent,)
        return state, merged.mix, normed, merged.logit.unsqueeze(-1)


class FusedDecodeSteps(FusedSteps):
    """A decode step in one launch from one sublayer's output to the next one's input."""

    def _step(self, read, norm: nn.Module | None, state: State, output=None, starts_block: bool = False):
        """The state with `output`, the mix of `read`, `norm` of it, and its shares `[n, M]`."""
        decoded = decode_mix(
            self.bank.sources,
            len(read.scores),
            read.queries[:, 0],
            self.norm_floor,
            output=output,
            opens_block=starts_block,
            stream=state[0] if state else None,
            dtype=self.dtype,
            **self.fused_norm(norm),
        )
        normed = norm(decoded.mix) if norm is not None and decoded.normed is None else decoded.normed
        state = () if decoded.stream is None else (decoded.stream,)
        return state, decoded.mix, normed, decoded.weights.flatten(1)


def plain_rms_norm(norm: nn.Module | None) -> tuple[torch.Tensor | None, float | None]:
    """Weight and epsilon of a norm that does what Llama's RMSNorm does, and that nothing hooks; `None` for others."""
    eps = getattr(norm, "variance_epsilon", None)
    hooks = norm is None or any((norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks))
    if hooks or not isinstance(eps, float) or "forward" in vars(norm) or not _is_llamas(type(norm).forward, eps):
        return None, None
    return norm.weight, eps


@functools.cache
def _is_llamas(forward: Callable, eps: float) -> bool:
    """Whether the `forward` of a norm gives the numbers of Llama's, bit for bit."""
    generator = torch.Generator("cpu").manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        values, weight = (torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in ((3, 8), (8,)))
        stand_in = SimpleNamespace(weight=weight, variance_epsilon=eps)
        try:
            found = forward(stand_in, values)
        except (AttributeError, TypeError):  # it is made of more than a weight and an epsilon
            return False
        if not torch.equal(found, rms_norm(values, weight, eps)):
            return False
    return True
