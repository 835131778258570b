# Copyright 2026 The modeling-attnres maintainers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Phase 2 of depth attention: merging the one recent source into what phase 1 found (arXiv 2603.15031, Algorithm 1).

Letters: B batch, T tokens, D hidden size, n sources of the mix (the recent one included).

The formulas are small; the gradients are written out so that training keeps one more `[B, T, D]` per sublayer (the
recent source) and not the rows of phase 1: the mix itself, which the following norm keeps anyway, stands in for them.
"""

import torch
from torch.autograd.function import once_differentiable

from .block_summaries_attnres import norm_with_floor, without_autocast


def score_recent(query: torch.Tensor, recent: torch.Tensor, norm_floor: torch.Tensor):
    """The product of `query` `[D, 1]` with `recent` `[B, T, D]` and the recent's floored norm, each `[B, T, 1]`.

    Computed in the query's dtype, at least fp32; their quotient is the score.
    """
    values = recent.to(query.dtype)
    return torch.matmul(values, query), norm_with_floor(values, norm_floor)


def _writes_gradients_out() -> bool:
    # A compiler derives its own backward, and decides itself what to keep for it.
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def softmax_and_lse(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax `[n, ...]` and log-sum-exp `[...]` over the first dimension; training keeps the softmax alone."""
    if _writes_gradients_out():
        return _SoftmaxAndLse.apply(scores)
    return torch.softmax(scores, dim=0), torch.logsumexp(scores, dim=0)


@without_autocast
def merge_mean(row, lse, query, recent, norm_floor):
    """`h = r row + (1 - r) recent`, `r = sigmoid(lse - score)`: online softmax with one extra source.

    Args:
        row: `[B, T, D]`, the normalised sum over phase 1's sources.
        lse: `[B, T, 1]`, the log-sum-exp of their scores, in at least fp32.
        query: `[D, 1]` folded query, in at least fp32.
        recent: `[B, T, D]`.
        norm_floor: scalar, see [`DepthAttention`].

    Returns:
        the mix `[B, T, D]`, and the margin `lse - score` `[B, T, 1]`.
    """
    if _writes_gradients_out():
        return _MergeMean.apply(row, lse, query, recent, norm_floor)
    return _merge_mean(row, lse, query, recent, norm_floor)[:2]


def _merge_mean(row, lse, query, recent, norm_floor):
    dot, norm = score_recent(query, recent, norm_floor)
    margin = torch.addcdiv(lse, dot, norm, value=-1)
    kept = torch.sigmoid(margin)
    if kept.dtype == recent.dtype:
        mix = torch.lerp(recent, row, kept)
    else:  # the recent source's share is the small weight of the two, and rounds with less error
        mix = torch.lerp(row, recent, (1 - kept).to(recent.dtype))
    return mix, margin, kept, dot, norm


@without_autocast
def merge_sum(mix, half_offset, query, recent, norm_floor, num_sources: int):
    """`h = (1 - c) mix + c n recent`, with `x = exp(score + offset)` and `c = (x - 1) / (x - 1 + n)`.

    With `t = tanh((score + offset) / 2)` that is `c = t / (n / 2 - (n / 2 - 1) t)`: it cannot overflow, and is exactly
    0 where score + offset is, so that the mix is handed on bit for bit.

    Args:
        mix: `[B, T, D]`, the stream plus phase 1's row.
        half_offset: `[B, T, 1]`, half of minus the logarithm of phase 1's mean exponentiated score, in at least fp32.
        query, recent, norm_floor: as in [`merge_mean`].
        num_sources: n.

    Returns:
        the mix `[B, T, D]`, and `(score + offset) / 2` `[B, T, 1]`.
    """
    if _writes_gradients_out():
        return _MergeSum.apply(mix, half_offset, query, recent, norm_floor, num_sources)
    return _merge_sum(mix, half_offset, query, recent, norm_floor, num_sources)[:2]


def _merge_sum(mix, half_offset, query, recent, norm_floor, num_sources):
    dot, norm = score_recent(query, recent, norm_floor)
    half_logit = torch.addcdiv(half_offset, dot, norm, value=0.5)
    tanh = torch.tanh(half_logit)
    taken = tanh / torch.rsub(tanh, num_sources / 2, alpha=num_sources / 2 - 1)
    merged = torch.lerp(mix, recent * num_sources, taken.to(mix.dtype))
    return merged, half_logit, taken, dot, norm


class _SoftmaxAndLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores):
        weights = torch.softmax(scores, dim=0)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weights)
        return weights, torch.logsumexp(scores, dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx, weights_gradient, lse_gradient):
        (weights,) = ctx.saved_tensors
        if weights_gradient is None:
            return None if lse_gradient is None else weights * lse_gradient
        through_all = -(weights * weights_gradient).sum(0)
        if lse_gradient is not None:
            through_all += lse_gradient
        return weights * (weights_gradient + through_all)


class _MergeMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, row, lse, query, recent, norm_floor):
        mix, margin, kept, dot, norm = _merge_mean(row, lse, query, recent, norm_floor)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mix, recent, query, kept, dot, norm)
        return mix, margin

    @staticmethod
    @once_differentiable
    def backward(ctx, mix_gradient, margin_gradient):
        mix, recent, query, kept, dot, norm = ctx.saved_tensors
        row_gradient = recent_gradient = None
        if mix_gradient is not None:
            row_gradient = mix_gradient * kept.to(mix_gradient.dtype)
            recent_gradient = mix_gradient - row_gradient
            # d h / d margin = (1 - r) r (row - recent), and r (row - recent) = h - recent
            through_mix = (1 - kept) * _dot(mix_gradient, mix - recent, kept.dtype)
            margin_gradient = through_mix if margin_gradient is None else margin_gradient + through_mix
        query_gradient, recent_gradient = _score_backward(-margin_gradient, query, recent, dot, norm, recent_gradient)
        return row_gradient, margin_gradient, query_gradient, recent_gradient, None


class _MergeSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mix, half_offset, query, recent, norm_floor, num_sources):
        merged, half_logit, taken, dot, norm = _merge_sum(mix, half_offset, query, recent, norm_floor, num_sources)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(merged, recent, query, taken, dot, norm)
        ctx.num_sources = num_sources
        return merged, half_logit

    @staticmethod
    @once_differentiable
    def backward(ctx, merged_gradient, half_gradient):
        merged, recent, query, taken, dot, norm = ctx.saved_tensors
        n = ctx.num_sources
        mix_gradient = recent_gradient = None
        if merged_gradient is not None:
            taken_gradient = merged_gradient * taken.to(merged_gradient.dtype)
            mix_gradient, recent_gradient = merged_gradient - taken_gradient, n * taken_gradient
            # d c / d logit = (1 - c) (1 + (n - 1) c) / n, and (1 - c) (n recent - mix) = n recent - h
            slope = 2 * (1 + (n - 1) * taken) / n
            through_mix = slope * _dot(merged_gradient, n * recent - merged, taken.dtype)
            half_gradient = through_mix if half_gradient is None else half_gradient + through_mix
        query_gradient, recent_gradient = _score_backward(half_gradient / 2, query, recent, dot, norm, recent_gradient)
        return mix_gradient, half_gradient, query_gradient, recent_gradient, None, None


def _dot(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inner products over the last dimension, which is kept, accumulated in `dtype`."""
    return (a * b).sum(-1, keepdim=True, dtype=dtype)


def _score_backward(gradient, query, recent, dot, norm, recent_gradient):
    """Adds the gradient `[B, T, 1]` of `score = (q . v) / norm(v)` to that of the query and of the recent source.

    `d score / dv = q / norm - score v / norm^2`.
    """
    scaled = gradient / norm
    values = recent.to(query.dtype)
    query_gradient = torch.mm(values.flatten(0, 1).T, scaled.flatten(0, 1))
    through_score = torch.addcmul(scaled * query.T, values, -scaled * dot / norm.square()).to(recent.dtype)
    return query_gradient, through_score if recent_gradient is None else recent_gradient + through_score
