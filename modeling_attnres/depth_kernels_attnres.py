# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Depth attention in few launches: functions that are a reference in PyTorch, and with `impl="triton"` one kernel each.

Letters: `*` the dimensions of the tokens ([B, T] or [M]), D hidden size, n sources of a mix (the recent one included),
R queries read together.

Triton is optional: a function imports its kernel when it is to launch it. Where a kernel cannot run, asking for it is an
error that says why, and never takes another path: ask [`available`] first.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .depth_launch_attnres import (
    BACKWARD_PROGRAMS,
    Tile,
    available,
    check_no_gradients,
    check_tensor,
    check_written_in_place,
    contiguous,
    merge_backward_tile,
    merge_tile,
    power_of_two,
    rms_norm,
    rows_backward_tile,
    rows_tile,
    uses_kernel,
)


# --- Phase 1 ---------------------------------------------------------------------------------------------------------


def phase_one_rows(
    scores: torch.Tensor, sources: torch.Tensor, form: str, impl: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the scores of finished sources to the rows of a group of sublayers, in one launch.

    "mean": the rows are sums with weights `softmax(s)`, the offset is minus the log-sum-exp. "sum": the weights are the excess
    `exp(s_i) / mean(exp(s)) - 1`, computed as `(n e_i - sum(e)) / sum(e)`, which is exactly 0 for equal scores; the offset
    is half of minus the logarithm of `mean(exp(s))`. Not differentiable by itself: see [`phase_one_rows_backward`].

    Args:
        scores: `[n, R, *]`, at least fp32 (the kernel: fp32).
        sources: `[n, *, D]`.
        form: "mean" or "sum".
        impl: "torch" or "triton".

    Returns:
        rows `[R, *, D]` in the sources' dtype, and offset `[R, *]` in the scores'.

    Raises:
        ValueError: for arguments that do not fit one another, or a kernel that cannot run.
    """
    _check_phase_one("phase_one_rows", scores, sources, form)
    num_sources, num_rows = scores.shape[:2]
    if not uses_kernel(impl, sources, num_sources, num_rows):
        return _phase_one_reference(scores, sources, form)
    from .depth_triton_attnres import rows_forward

    scores, sources = contiguous(scores, sources)
    rows, offset = sources.new_empty(num_rows, *sources.shape[1:]), scores.new_empty(scores.shape[1:])
    tile, num_tokens = rows_tile(sources.shape[-1], num_rows), offset[0].numel()
    with torch.cuda.device_of(sources):
        rows_forward[(num_tokens, -(-sources.shape[-1] // tile.width))](
            *(scores, sources, rows, offset, num_tokens, num_sources, num_rows),
            **_phase_one_constants(scores, sources, form, tile),
        )
    return rows, offset


def phase_one_rows_backward(
    rows_gradient: torch.Tensor,
    offset_gradient: torch.Tensor | None,
    scores: torch.Tensor,
    sources: torch.Tensor,
    form: str,
    sources_gradient: torch.Tensor | None = None,
    impl: str = "torch",
) -> torch.Tensor:
    """The backward of [`phase_one_rows`], in one launch.

    Args:
        rows_gradient, offset_gradient: of the results, `[R, *, D]` and `[R, *]` (`None` for zeros).
        scores, sources, form, impl: as in [`phase_one_rows`].
        sources_gradient: `[n, *, D]`, contiguous; the gradient of the sources is added to it. `None` if not wanted.

    Returns:
        the gradient of the scores, `[n, R, *]`.

    Raises:
        ValueError: for arguments that do not fit one another, or a kernel that cannot run.
    """
    _check_phase_one("phase_one_rows_backward", scores, sources, form)
    num_sources, num_rows = scores.shape[:2]
    check_tensor("rows_gradient", rows_gradient, (num_rows, *sources.shape[1:]), sources.dtype, sources.device)
    check_tensor("offset_gradient", offset_gradient, scores.shape[1:], scores.dtype, scores.device)
    check_tensor("sources_gradient", sources_gradient, sources.shape, sources.dtype, sources.device)
    check_written_in_place("sources_gradient", sources_gradient)
    arguments = (rows_gradient, offset_gradient, scores, sources)
    if not uses_kernel(impl, sources, num_sources, num_rows):
        return _phase_one_backward_reference(*arguments, form, sources_gradient)
    from .depth_triton_attnres import rows_backward

    rows_gradient, offset_gradient, scores, sources = contiguous(*arguments)
    scores_gradient, num_tokens = torch.empty_like(scores), scores[0, 0].numel()
    tile = rows_backward_tile(sources.shape[-1], num_rows)
    with torch.cuda.device_of(sources):
        rows_backward[(num_tokens,)](
            *(scores, sources, rows_gradient, offset_gradient, scores_gradient, sources_gradient),
            *(num_tokens, num_sources, num_rows),
            **_phase_one_constants(scores, sources, form, tile),
        )
    return scores_gradient


def _check_phase_one(function: str, scores: torch.Tensor, sources: torch.Tensor, form: str):
    check_no_gradients(function, scores=scores, sources=sources)
    if form not in ("mean", "sum"):
        raise ValueError(f'`form` must be "mean" or "sum", got {form!r}.')
    wide = torch.promote_types(sources.dtype, torch.float32)
    shape = (len(sources), *scores.shape[1:2], *sources.shape[1:-1])
    check_tensor("scores", scores, shape, wide, sources.device)


def _phase_one_constants(scores: torch.Tensor, sources: torch.Tensor, form: str, tile: Tile) -> dict:
    num_sources, num_rows = (power_of_two(size) for size in scores.shape[:2])
    constants = {"SUM": form == "sum", "D": sources.shape[-1], "WIDTH": tile.width}
    return {**constants, "SOURCES": num_sources, "ROWS": num_rows, **tile.options()}


def phase_one_weights(scores: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax and weights `[n, ...]`, and offset `[...]`, of scores `[n, ...]`: see [`phase_one_rows`]."""
    largest = scores.amax(0)
    exponentials = torch.exp(scores - largest)
    total = exponentials.sum(0)
    softmax = exponentials / total
    if form == "mean":
        return softmax, softmax, -(largest + torch.log(total))
    excess = (exponentials * len(scores) - total) / total
    return softmax, excess, -(largest + torch.log(total / len(scores))) / 2


def _phase_one_reference(scores, sources, form) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference of [`phase_one_rows`], with its arguments and results."""
    _, weights, offset = phase_one_weights(scores, form)
    rows = sum(weight.unsqueeze(-1) * source for weight, source in zip(weights, sources))
    return rows.to(sources.dtype), offset


def _phase_one_backward_reference(
    rows_gradient, offset_gradient, scores, sources, form, sources_gradient
) -> torch.Tensor:
    """The reference of [`phase_one_rows_backward`], with its arguments and results."""
    softmax, weights, _ = phase_one_weights(scores, form)
    rows_gradient = rows_gradient.to(scores.dtype)
    weights_gradient = torch.stack([(rows_gradient * source).sum(-1) for source in sources])
    if sources_gradient is not None:
        for weight, total in zip(weights, sources_gradient):
            total += (weight.unsqueeze(-1) * rows_gradient).sum(0).to(total.dtype)
    if form == "sum":
        weights_gradient = weights_gradient * len(sources)
    through_all = (softmax * weights_gradient).sum(0)
    if offset_gradient is not None:
        through_all = through_all + offset_gradient * (1 if form == "mean" else 0.5)
    return softmax * (weights_gradient - through_all)


# --- Phase 2 ---------------------------------------------------------------------------------------------------------


class Merged(NamedTuple):
    """What [`merge`] returns.

    Attributes:
        mix: `[*, D]`, what the sublayer reads.
        logit: `[*]` in at least fp32, the recent source's logit: `score + offset` ("mean"), or half of it ("sum").
        recent: `[*, D]`, the recent source with `output` added.
        stream: `[*, D]`, the stream with `output` added; `None` for "mean".
        normed: `[*, D]`, the RMSNorm of the mix; `None` if not asked for.
    """

    mix: torch.Tensor
    logit: torch.Tensor
    recent: torch.Tensor
    stream: torch.Tensor | None
    normed: torch.Tensor | None


def merge(
    row: torch.Tensor | None,
    offset: torch.Tensor,
    query: torch.Tensor,
    recent: torch.Tensor | None,
    norm_floor: torch.Tensor,
    *,
    output: torch.Tensor | None = None,
    stream: torch.Tensor | None = None,
    num_sources: int | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float | None = None,
    impl: str = "torch",
) -> Merged:
    """From one sublayer's output to the next one's input: add, score, merge and norm, in one launch.

    The output is added to the recent source (and to the stream), rounded, and scored by `q . v / sqrt(|v|^2 + floor^2)`.
    Online softmax (arXiv 2603.15031, Algorithm 1) then merges it into what phase 1 found. Without `stream`, weights sum
    to 1: `mix = (1 - c) row + c recent`, `c = sigmoid(score + offset)`. With it they sum to n and are anchored at the plain
    stream: `mix = (1 - c) (stream + row) + c n recent` with `c = t / (n / 2 - (n / 2 - 1) t)`, `t = tanh(score / 2 +
    offset)`; where row and `score / 2 + offset` are 0 the mix is the stream bit for bit.

    Differentiable in all tensors but `norm_floor`. The kernel keeps the mix, the recent source and four scalars a token
    for backward, not the row.

    Args:
        row: `[*, D]`, phase 1's weighted sum; for "sum" `None` means 0.
        offset: `[*]`, minus the log-sum-exp of phase 1's scores, or half of minus the logarithm of their mean
            exponential ("sum"); in the query's dtype.
        query: `[D]` folded query, in at least fp32 (the kernel: in fp32).
        recent: `[*, D]`; `None` where `output` opens a block, and so is the recent source.
        norm_floor: scalar tensor, `sqrt(D eps)` of the key norm, in the query's dtype.
        output: `[*, D]`, the output of the sublayer before, if it is not in `recent` and `stream` yet.
        stream: `[*, D]`, the running total of all sources; asks for "sum".
        num_sources: n, at least 2; needed with `stream`.
        norm_weight, norm_eps: `[D]` weight and epsilon of an RMSNorm of the mix.
        impl: "torch" or "triton".

    Raises:
        ValueError: for arguments that do not fit one another, or a kernel that cannot run.
    """
    like = output if recent is None else recent
    if like is None:
        raise ValueError("`recent` or `output` must be given, got neither.")
    if stream is None and row is None:
        raise ValueError('`row` must be given for "mean", got None.')
    if stream is not None and (num_sources is None or num_sources < 2):
        raise ValueError(f"`num_sources` must be at least 2 with `stream`, got {num_sources}.")
    if (norm_weight is None) != (norm_eps is None):
        raise ValueError(f"`norm_weight` and `norm_eps` must be given together, got norm_eps={norm_eps}.")
    for name, tensor in {"row": row, "output": output, "stream": stream}.items():
        check_tensor(name, tensor, like.shape, like.dtype, like.device)
    wide = torch.promote_types(like.dtype, torch.float32)
    check_tensor("query", query, like.shape[-1:], wide, like.device)
    check_tensor("offset", offset, like.shape[:-1], wide, like.device)
    check_tensor("norm_floor", norm_floor, (), wide, like.device)
    check_tensor("norm_weight", norm_weight, like.shape[-1:], like.dtype, like.device)
    if not uses_kernel(impl, like):
        return _merge_reference(
            row, offset, query, recent, norm_floor, output, stream, num_sources, norm_weight, norm_eps
        )
    if recent is None and stream is None:
        recent, output = output, None
    results = _Merge.apply(row, offset, query, recent, norm_floor, output, stream, num_sources, norm_weight, norm_eps)
    mix, logit, new_recent, new_stream, normed = results
    recent = (output if recent is None else recent) if new_recent is None else new_recent
    return Merged(mix, logit, recent, stream if new_stream is None else new_stream, normed)


def _merge_reference(
    row, offset, query, recent, norm_floor, output, stream, num_sources, norm_weight, norm_eps
) -> Merged:
    """The reference of [`merge`], with its arguments and results."""
    if output is not None:
        recent = output if recent is None else recent + output
        stream = None if stream is None else stream + output
    values = recent.to(query.dtype)
    score = (values * query).sum(-1) / torch.sqrt(values.square().sum(-1) + norm_floor.square())
    if stream is None:
        logit = offset + score
        taken = torch.sigmoid(logit).unsqueeze(-1)
        mix = (1 - taken) * row + taken * values
    else:
        logit = offset + score / 2
        tanh = torch.tanh(logit).unsqueeze(-1)
        taken = tanh / (num_sources / 2 - (num_sources / 2 - 1) * tanh)
        base = stream.to(query.dtype) if row is None else stream.to(query.dtype) + row
        mix = (1 - taken) * base + taken * num_sources * values
    mix = mix.to(recent.dtype)
    normed = None if norm_weight is None else rms_norm(mix, norm_weight, norm_eps)
    return Merged(mix, logit, recent, stream, normed)


class _Merge(torch.autograd.Function):
    """[`merge`] by kernels. A source or stream that nothing was added to is returned as `None`, not as an alias."""

    @staticmethod
    def forward(ctx, row, offset, query, recent, norm_floor, output, stream, num_sources, norm_weight, norm_eps):
        from .depth_triton_attnres import merge_forward

        row, offset, query, recent, output, stream, weight = contiguous(
            row, offset, query, recent, output, stream, norm_weight
        )
        like = output if recent is None else recent
        mix, logit = torch.empty_like(like), torch.empty_like(offset)
        new_recent = torch.empty_like(like) if recent is not None and output is not None else None
        new_stream = torch.empty_like(like) if stream is not None and output is not None else None
        normed = None if weight is None else torch.empty_like(like)
        saved = offset.new_empty(3, offset.numel())
        tile = merge_tile(like.shape[-1])
        with torch.cuda.device_of(like):
            merge_forward[(offset.numel(),)](
                *(row, offset, query, norm_floor, recent, output, stream, weight),
                *(mix, logit, new_recent, new_stream, normed, saved),
                *(offset.numel(), num_sources or 1, norm_eps or 0.0),
                SUM=stream is not None,
                D=like.shape[-1],
                WIDTH=tile.width,
                **tile.options(),
            )
        ctx.set_materialize_grads(False)
        values = like if new_recent is None else new_recent
        ctx.save_for_backward(mix, values, query, weight, logit, saved)
        ctx.given = {"row": row is not None, "recent": recent is not None, "output": output is not None}
        ctx.num_sources = None if stream is None else num_sources
        return mix, logit, new_recent, new_stream, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, mix_gradient, logit_gradient, values_gradient, stream_gradient, normed_gradient):
        from .depth_triton_attnres import merge_backward

        mix, values, query, weight, logit, saved = ctx.saved_tensors
        is_sum, given = ctx.num_sources is not None, ctx.given
        gradients = contiguous(mix_gradient, normed_gradient, logit_gradient, values_gradient, stream_gradient)

        def new(needed: bool) -> torch.Tensor | None:
            return torch.empty_like(mix) if needed else None

        # Without a gradient of its own the stream has the row's. Under "mean" the output has the recent source's.
        to_row = new(not is_sum or given["row"])
        to_stream = new(is_sum and (to_row is None or stream_gradient is not None))
        to_values = new(given["recent"])
        to_output = new(is_sum and given["output"])
        to_offset = torch.empty_like(logit)
        num_tokens, hidden_size = logit.numel(), mix.shape[-1]
        tile = merge_backward_tile(hidden_size, mix.element_size())
        num_programs = min(num_tokens, BACKWARD_PROGRAMS)
        partial = query.new_empty(1 if normed_gradient is None else 2, num_programs, hidden_size)
        with torch.cuda.device_of(mix):
            merge_backward[(num_programs, -(-hidden_size // tile.width))](
                *(mix, values, query, weight, logit, saved, *gradients),
                *(to_row, to_offset, to_values, to_stream, to_output, partial, num_tokens, ctx.num_sources or 1),
                SUM=is_sum,
                D=hidden_size,
                WIDTH=tile.width,
                **tile.options(),
            )
        to_query, *to_weight = partial.sum(1).unbind()
        if not is_sum and given["output"]:
            to_output = to_values
        if is_sum and to_stream is None:
            to_stream = to_row
        to_weight = to_weight[0].to(weight.dtype) if to_weight else None
        return to_row, to_offset, to_query, to_values, None, to_output, to_stream, None, to_weight, None


__all__ = ["Merged", "available", "merge", "phase_one_rows", "phase_one_rows_backward"]
