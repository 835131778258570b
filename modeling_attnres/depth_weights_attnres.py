# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""How the weights of a mix over depth are formed, in both phases of the computation (arXiv 2603.15031, Algorithm 1).

Letters: B batch, T tokens, D hidden size, n sources of a mix, R queries read together, j recent sources of a mix.

A *form* is all that `depth_weights` decides: [`MeanWeights`] is the paper's softmax, [`SumWeights`] the softmax times n,
anchored at the plain residual stream. Both leave two things behind phase 1: one weight per source, and one number per
query and token, the *offset*, which puts the score of a source that comes later on the scale of those weights.

Gradients are written out, so that training keeps one more `[B, T, D]` per sublayer (the recent source) and not the rows
of phase 1: the mix itself, which the following norm keeps anyway, stands in for them. With `a` the softmax over all
sources, `d h / d score_i = a_i (v_i - h)`, or `a_i (n v_i - h)` where weights sum to n.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd import forward_ad


# --- Naive reference -------------------------------------------------------------------------------------------------


def naive_depth_attention(
    sources: torch.Tensor,
    query: torch.Tensor,
    key_norm: torch.Tensor,
    eps: float,
    depth_weights: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One mix over depth as the paper writes it: the reference every fast path is compared with.

    Args:
        sources: `[n, B, T, D]`, the raw sources in order of depth.
        query: `[D]`, the pseudo-query `w_l`.
        key_norm: `[D]`, weight of the key RMSNorm.
        eps: epsilon of the key RMSNorm.
        depth_weights: `"mean"` (weights sum to 1) or `"sum"` (weights sum to n).

    Returns:
        `[B, T, D]` the mix in the dtype of `sources`, and `[B, T, n]` the weights in at least fp32.
    """
    values = sources.to(accumulation_dtype(sources.dtype))
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * key_norm.to(values.dtype)
    weights = torch.softmax(keys @ query.to(values.dtype), dim=0)
    if depth_weights == "sum":
        weights = weights * len(sources)
    return (weights.unsqueeze(-1) * values).sum(0).to(sources.dtype), weights.movedim(0, -1)


# --- Precision and gradients -----------------------------------------------------------------------------------------


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and softmax are computed in at least fp32; fp64 stays fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_autocast(device_type: str) -> bool:
    # Compilers before torch 2.10 cannot read whether a device has autocast at all. What they compile for, has.
    has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def without_autocast(function: Callable) -> Callable:
    """Keeps autocast, which is meant for the sublayers, out of depth attention: it would round scores to half precision.

    The second argument of `function` must be a tensor: its device says which autocast.
    """

    @functools.wraps(function)
    def wrapper(first, tensor, /, *args, **kwargs):
        if not is_autocast(tensor.device.type):
            return function(first, tensor, *args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(first, tensor, *args, **kwargs)

    return wrapper


def derives_gradients() -> bool:
    """Whether gradients are derived from the operations themselves, and none may be written out or into memory.

    A compiler plans memory and recomputation itself; `torch.func` and forward mode differentiate what they see.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0  # inside `dual_level`
    )


def writes_gradients() -> bool:
    """Whether an operation leaves a backward of its own."""
    return torch.is_grad_enabled() and not derives_gradients()


def first_derivative(backward: Callable) -> Callable:
    """Marks a backward that cannot be differentiated again.

    Raises:
        RuntimeError: where `create_graph=True` asks for a second derivative.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The gradients of depth attention are written out and have no second derivative, got "
                "`create_graph=True`. Use `torch.func` (`hessian`, or `jvp` of `grad`), which differentiates the "
                "operations themselves."
            )
        return backward(ctx, *gradients)

    return wrapper


# --- Scores ----------------------------------------------------------------------------------------------------------


def split_queries(queries: torch.Tensor) -> torch.Tensor:
    """Queries `[..., D]` in fp32 as three bf16 parts `[..., 3, D]`, whose sum they are exactly (3 x 8 bits of 24).

    A product of bf16 matrices that accumulates in fp32 then gives fp32 scores without an fp32 copy of the sources.
    """
    parts, rest = [], queries.detach()
    for _ in range(3):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1]
    return torch.stack(parts, dim=-2)


@functools.cache
def has_kernel(operator: str, device_type: str) -> bool:
    """Whether a device has a kernel for an operator of PyTorch, such as `"mm.dtype"`."""
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", key)


def product_in_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product of two bf16 matrices, accumulated and returned in fp32."""
    if not has_kernel("mm.dtype", left.device.type):  # nothing is saved then, and [`plan_depth`] does not ask for it
        return torch.mm(left.float(), right.float())
    return torch.mm(left, right, out_dtype=torch.float32)


def times_values(rows: torch.Tensor, values: torch.Tensor, in_half: bool) -> torch.Tensor:
    """`[R, K]` in at least fp32 times `[K, N]`: `[R, N]` in the dtype of `rows`, which are not rounded to half precision.

    Args:
        in_half: multiply `values` in bf16, see [`split_queries`].
    """
    if not in_half:
        return torch.mm(rows, values.to(rows.dtype))
    parts = split_queries(rows)  # [R, 3, K]
    return product_in_fp32(parts.flatten(0, 1), values).unflatten(0, parts.shape[:2]).sum(1)


def source_norm(source: torch.Tensor, norm_floor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`sqrt(sum(v^2) + D * eps)` over the last dimension, which is kept: the RMSNorm denominator times `sqrt(D)`.

    Args:
        source: `[..., D]`.
        norm_floor: scalar `sqrt(D * eps)`, see [`DepthAttention`], in at least fp32, as is the result.
        out: memory for the result.
    """
    if derives_gradients():  # a compiler fuses this sum with the other passes over the source
        norm = torch.sqrt(source.to(norm_floor.dtype).square().sum(-1, keepdim=True) + norm_floor.square())
        return norm if out is None else out.copy_(norm)
    norm = torch.linalg.vector_norm(source, dim=-1, keepdim=True, dtype=norm_floor.dtype)
    return torch.hypot(norm, norm_floor, out=out)


def score_source(
    query: torch.Tensor, source: torch.Tensor, norm_floor: torch.Tensor, query_parts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A source's product with a query, and its floored norm: their quotient is the score.

    Args:
        query: `[1, D]`, folded, in at least fp32; or copies of it `[P, D]`, see [`DepthPlan`].
        source: `[B, T, D]`.
        query_parts: `[3, D]`, the query by [`split_queries`], where the device multiplies bf16 matrices into fp32.

    Returns:
        two tensors `[B, T, 1]` in the query's dtype.
    """
    if derives_gradients():  # a compiler fuses this sum, but no matrix product, with the other passes over the source
        values = source.to(query.dtype)
        dot = (values * query).sum(-1, keepdim=True) if len(query) == 1 else _CompiledDot.apply(values, query)
        return dot, source_norm(values, norm_floor)
    if query_parts is not None:
        dot = product_in_fp32(query_parts, source.flatten(0, 1).T).sum(0).view(*source.shape[:-1], 1)
        return dot, source_norm(source, norm_floor)
    values = source.to(query.dtype)
    return nn.functional.linear(values, query), source_norm(values, norm_floor)


class _CompiledDot(torch.autograd.Function):
    """A source's product `[B, T, 1]` with P copies `[P, D]` of a query, each of which gets the gradient of its share of tokens."""

    @staticmethod
    def forward(ctx, values, query):
        ctx.save_for_backward(values, query)
        return (values * query[0]).sum(-1, keepdim=True)

    @staticmethod
    def backward(ctx, gradient):
        values, query = ctx.saved_tensors
        shares = (values * gradient).flatten(0, 1).unflatten(0, (len(query), -1))
        return gradient * query[0], shares.sum(1)


def source_gradient(source, scaled, queries, along, in_half: bool, gradient: torch.Tensor | None = None):
    """`[B, T, D]`, what the scores `(q_r . v) / |v|` leave for v, `sum_r (q_r / |v| - (q_r . v) v / |v|^3)`.

    Args:
        source: `[B, T, D]`.
        scaled: `[R, M]`, the scores' gradients over the source's norm.
        queries: `[R, D]`, in at least fp32.
        along: `[B, T, 1]`, the sum over r of `scaled (q_r . v) / |v|^2`.
        in_half: whether to multiply in bf16.
        gradient: `[B, T, D]` to add to, in place if its dtype allows.
    """
    dtype = source.dtype if in_half else queries.dtype
    if gradient is not None and gradient.dtype == dtype:
        gradient.flatten(0, 1).addmm_(scaled.T.to(dtype), queries.to(dtype))
        return gradient.addcmul_(source, along.to(dtype), value=-1)
    found = torch.mm(scaled.T.to(dtype), queries.to(dtype)).view_as(source)
    found = found.addcmul_(source.to(dtype), along.to(dtype), value=-1).to(source.dtype)
    return found if gradient is None else gradient + found


# --- The two forms ---------------------------------------------------------------------------------------------------


class MeanWeights:
    """Weights that sum to 1: the paper's form, `h = sum_i a_i v_i` with `a = softmax(scores)`.

    Attributes:
        stream: the class of stream that the form needs; `None` for those that [`open_stream`] chooses from.
        anchored: how many tensors of the depth state come before the recent sources: none, or the plain stream.
        offset_slope: of the logit of a recent source, which is `offset_slope * offset + score`, by the offset.
    """

    stream = None
    anchored = 0
    offset_slope = 1

    @staticmethod
    def total(num_sources: int) -> int:
        """What the weights of a mix sum to."""
        return 1

    @staticmethod
    def phase_one(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[n, ...]` scores to the sources' weights `[n, ...]` and the offset `[...]`, minus the log-sum-exp."""
        weights = torch.softmax(scores, dim=0)
        return weights, torch.log(weights.amax(0)) - scores.amax(0)

    @staticmethod
    def shares(weights: torch.Tensor) -> torch.Tensor:
        """The softmax `[n, ...]` behind the weights of phase 1."""
        return weights

    @staticmethod
    def merge_one(offset, dot, norm, num_sources: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """For the one recent source, with score `dot / norm`, each `[B, T, 1]`.

        Returns:
            its logit over `offset_slope`, `offset + score / offset_slope`; and `taken`, the `c` of `h = (1 - c) base +
            c total v`, in `dtype`. Here `c = sigmoid(score - lse)`: online softmax with one extra source.
        """
        logit = torch.addcdiv(offset, dot, norm)
        return logit, _in_dtype(torch.sigmoid, logit, dtype)

    @staticmethod
    def recent_share(logit: torch.Tensor, num_sources: int) -> torch.Tensor:
        """The one recent source's share of the softmax over everything, from what [`merge_one`] returns."""
        return torch.sigmoid(logit)

    @staticmethod
    def merge_several(offset: torch.Tensor, scores: torch.Tensor, num_sources: int) -> tuple[torch.Tensor, ...]:
        """For j recent sources with `scores` `[j, B, T]`, and the `offset` `[B, T]`: online softmax.

        Returns:
            `kept` `[B, T]` and `taken` `[j, B, T]` of `h = kept base + sum_i taken_i v_i`; and the sources' shares
            `[j, B, T]` of the softmax over everything.
        """
        weights = torch.softmax(torch.cat([-offset.unsqueeze(0), scores]), dim=0)
        return weights[0], weights[1:], weights[1:]


class SumWeights(MeanWeights):
    r"""Weights that sum to the number of sources n, anchored at the plain residual stream.

    `stream` is the running total of all sources, kept by the same additions as in a PreNorm model. Phase 1 weighs its
    sources by `e_i = exp(s_i) / mean(exp(s))`, which are exactly 1 for zero queries, and sums `D = sum (e_i - 1) v_i`.
    With `x = exp(score + offset)` the recent source's weight on that scale (the offset kept is half of minus the
    logarithm of `mean(exp(s))`), the mix is

        h = (1 - c) (stream + D) + c n recent,    c = (x - 1) / (x - 1 + n)

    For zero queries D and c are exactly 0: the mix is the stream bit for bit. No coefficient exceeds n, so the
    rounding of the stream is not amplified where one source has most of the weight.
    """

    anchored = 1
    offset_slope = 2

    @staticmethod
    def total(num_sources: int) -> int:
        return num_sources

    @staticmethod
    def phase_one(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[n, ...]` scores to `e - 1` `[n, ...]` and half of minus the logarithm of `mean(exp(s))` `[...]`."""
        n, largest = len(scores), scores.amax(0)
        exponentials = torch.exp(scores - largest)
        total = exponentials.sum(0)
        # For equal scores `e n` and the sum are the same whole number: the excess is 0 with any division.
        excess = (exponentials * n - total) / total
        return excess, (torch.log1p((n - total) / total) - largest) * 0.5

    @staticmethod
    def shares(weights: torch.Tensor) -> torch.Tensor:
        return (weights + 1) / len(weights)

    @staticmethod
    def merge_one(offset, dot, norm, num_sources: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """With `t = tanh((score + offset) / 2)`, `c = t / (n / 2 - (n / 2 - 1) t)`: it cannot overflow, and is 0 where
        score + offset is 0.
        """
        half = torch.addcdiv(offset, dot, norm, value=0.5)
        tanh = torch.tanh(half)
        rest = torch.rsub(tanh, num_sources / 2, alpha=num_sources / 2 - 1)
        return half, _in_dtype(torch.div, tanh, dtype, rest)

    @staticmethod
    def recent_share(logit: torch.Tensor, num_sources: int) -> torch.Tensor:
        return torch.sigmoid(2 * logit - math.log(num_sources - 1))

    @staticmethod
    def merge_several(offset: torch.Tensor, scores: torch.Tensor, num_sources: int) -> tuple[torch.Tensor, ...]:
        """With `x_i = exp(score_i + offset)` and `Z = n - j + sum_i x_i`: `kept = n / Z`, `taken_i = n (x_i - 1) / Z`.

        They are exactly 1 and 0 where `score + offset` is 0. All is divided by the largest `x` (or 1): no overflow.
        """
        logits = scores + 2 * offset
        largest = logits.amax(0).clamp_min(0)
        one, exponentials = torch.exp(-largest), torch.exp(logits - largest)
        total = (num_sources - len(scores)) * one + exponentials.sum(0)
        taken = num_sources * (exponentials - one) / total
        return num_sources * one / total, taken, exponentials / total


FORMS = {"mean": MeanWeights, "sum": SumWeights}
Form = type[MeanWeights]


def _in_dtype(function: Callable, first: torch.Tensor, dtype: torch.dtype, *others: torch.Tensor) -> torch.Tensor:
    """`function(first, *others)` rounded to `dtype`, without a pass of its own where nothing is differentiated."""
    if dtype == first.dtype or torch.is_grad_enabled() or derives_gradients():
        return function(first, *others).to(dtype)
    return function(first, *others, out=first.new_empty(first.shape, dtype=dtype))


# --- Phase 1: softmax over the finished sources ----------------------------------------------------------------------


def phase_one_weights(scores: torch.Tensor, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """The sources' weights `[n, ...]` and the offset `[...]` of `scores` `[n, ...]`, see [`MeanWeights.phase_one`]."""
    return _PhaseOneWeights.apply(scores, form) if writes_gradients() else form.phase_one(scores)


class _PhaseOneWeights(torch.autograd.Function):
    """Keeps the weights alone."""

    @staticmethod
    def forward(ctx, scores, form):
        weights, offset = form.phase_one(scores)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weights)
        ctx.form = form
        return weights, offset

    @staticmethod
    @first_derivative
    def backward(ctx, weights_gradient, offset_gradient):
        (weights,) = ctx.saved_tensors
        shares, gradient = ctx.form.shares(weights), 0
        if weights_gradient is not None:
            gradient = (weights_gradient - (shares * weights_gradient).sum(0)) * ctx.form.total(len(weights))
        if offset_gradient is not None:
            gradient = gradient - offset_gradient / ctx.form.offset_slope
        return shares * gradient, None


# --- Phase 2: merging one recent source ------------------------------------------------------------------------------


@without_autocast
def merge_recent(form: Form, base, offset, query, recent, norm_floor, num_sources: int, query_parts=None):
    """Merges the one recent source into what phase 1 left.

    Args:
        base: `[B, T, D]`, the row of phase 1; if anchored, on top of the plain stream.
        offset: `[B, T, 1]`, of phase 1, in at least fp32.
        query, recent, norm_floor, query_parts: see [`score_source`].
        num_sources: n, the recent source included.

    Returns:
        the mix `[B, T, D]`, and the recent source's logit `[B, T, 1]` (see [`MeanWeights.merge_one`]).
    """
    arguments = (form, base, offset, query, recent, norm_floor, num_sources, query_parts)
    return _MergeRecent.apply(*arguments) if writes_gradients() else _merge_recent(*arguments)[:2]


def _merge_recent(form, base, offset, query, recent, norm_floor, num_sources, query_parts):
    dot, norm = score_source(query, recent, norm_floor, query_parts)
    # In half precision the recent source's coefficient, the smaller of the two, is the one that is rounded.
    logit, taken = form.merge_one(offset, dot, norm, num_sources, base.dtype)
    total = form.total(num_sources)
    return torch.lerp(base, recent if total == 1 else recent * total, taken), logit, taken, dot, norm


class _MergeRecent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, base, offset, query, recent, norm_floor, num_sources, query_parts):
        mix, logit, taken, dot, norm = _merge_recent(
            form, base, offset, query, recent, norm_floor, num_sources, query_parts
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mix, recent, query, logit, taken, dot, norm)
        ctx.form, ctx.num_sources, ctx.in_half = form, num_sources, query_parts is not None
        return mix, logit

    @staticmethod
    @first_derivative
    def backward(ctx, mix_gradient, logit_gradient):
        if mix_gradient is None and logit_gradient is None:
            return (None,) * 8
        mix, recent, query, logit, taken, dot, norm = ctx.saved_tensors
        total, slope = ctx.form.total(ctx.num_sources), ctx.form.offset_slope
        base_gradient, recent_gradient, offset_gradient = None, None, logit_gradient
        if mix_gradient is not None:
            base_gradient, recent_gradient = mix_gradient * (1 - taken), mix_gradient * (total * taken)
            # The mix is kept and the base is not, so the difference is the mix's.
            away = torch.sub(mix, recent, alpha=total).mul_(mix_gradient).sum(-1, keepdim=True, dtype=norm.dtype)
            through_mix = away * ctx.form.recent_share(logit, ctx.num_sources) * -slope
            offset_gradient = through_mix if logit_gradient is None else through_mix + logit_gradient
        scaled = offset_gradient / (slope * norm)
        along, row = scaled * (dot / norm.square()), scaled.flatten().unsqueeze(0)
        query_gradient = times_values(row, recent.flatten(0, 1), ctx.in_half)
        recent_gradient = source_gradient(recent, row, query, along, ctx.in_half, recent_gradient)
        return None, base_gradient, offset_gradient, query_gradient, recent_gradient, None, None, None


# --- Phase 2: merging the recent sources that lie in the bank --------------------------------------------------------


def merge_rows(base: torch.Tensor, kept: torch.Tensor, taken: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """`kept base + sum_i taken_i v_i` `[B, T, D]` over sources `[j, B, T, D]`, in one product."""
    own = torch.bmm(columns(taken, base.dtype).transpose(1, 2), sources.flatten(1, 2).transpose(0, 1))
    # In half precision `kept` and its product are not rounded.
    return torch.addcmul(own.view_as(base), base, kept.unsqueeze(-1)).to(base.dtype)


def columns(coefficients: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[j, B, T]` to `[M, j, 1]`, as a view whose transpose batched products take without a copy."""
    return coefficients.to(dtype).flatten(1).unsqueeze(-1).transpose(0, 1)
