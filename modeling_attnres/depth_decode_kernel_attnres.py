# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""One mix of a decode step in one launch: a reference in PyTorch, and with `impl="triton"` a kernel.

Letters: `*` the dimensions of the tokens ([B, T] or [M]), D hidden size, n sources of the mix.
"""

from typing import NamedTuple

import torch

from .depth_kernels_attnres import phase_one_weights
from .depth_launch_attnres import (
    check_no_gradients,
    check_tensor,
    check_written_in_place,
    contiguous,
    decode_chunk,
    decode_tile,
    power_of_two,
    rms_norm,
    uses_kernel,
)


class Decoded(NamedTuple):
    """What [`decode_mix`] returns.

    Attributes:
        mix: `[*, D]`, what the sublayer reads.
        weights: `[n, *]` in the sources' dtype, sum to 1.
        stream: `[*, D]`, the stream with `output` added; `None` for "mean".
        normed: `[*, D]`, the RMSNorm of the mix; `None` if not asked for.
    """

    mix: torch.Tensor
    weights: torch.Tensor
    stream: torch.Tensor | None
    normed: torch.Tensor | None


def decode_mix(
    sources: torch.Tensor,
    num_sources: int,
    query: torch.Tensor,
    norm_floor: torch.Tensor,
    *,
    output: torch.Tensor | None = None,
    opens_block: bool = False,
    stream: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "torch",
) -> Decoded:
    """One mix of a decode step over all sources where they lie, and what leads to it and from it, in one launch.

    The output of the sublayer before is written to the newest slot or added to it (and to the stream). The scores are
    `q . v / sqrt(|v|^2 + floor^2)`. Without `stream` the weights sum to 1; with it the mix is `stream + sum_i (n a_i - 1)
    v_i`, with n `a_i - 1` computed as `(n e_i - sum(e)) / sum(e)`: zero queries hand on the stream bit for bit.
    Without gradients, because the sources are written in place.

    Args:
        sources: `[capacity, *, D]`, at least fp32 (the kernel: fp32), contiguous; no channel for the norm's floor.
        num_sources: n, the sources of this mix, counting one that `output` opens.
        query: `[D]` folded query, in the sources' dtype.
        norm_floor: scalar tensor, `sqrt(D eps)` of the key norm, in the sources' dtype.
        output: `[*, D]`, the output of the sublayer before, if it is not in `sources` and `stream` yet.
        opens_block: whether `output` is the first of a block; slot n - 1 may then hold anything.
        stream: `[*, D]`, the running total of all sources; asks for "sum".
        norm_weight, norm_eps: `[D]` weight and epsilon of an RMSNorm of the mix.
        dtype: of the mix; if not given, that of `output`, of `stream` or of `sources`, the first that is given.
        impl: "torch" or "triton".

    Raises:
        ValueError: for arguments that do not fit one another or require gradients, or a kernel that cannot run.
    """
    shape, hidden_size = sources.shape[1:], sources.shape[-1]
    dtype = dtype or next(tensor.dtype for tensor in (output, stream, sources) if tensor is not None)
    if not 1 <= num_sources <= len(sources):
        raise ValueError(f"`num_sources` must be between 1 and the {len(sources)} slots, got {num_sources}.")
    if opens_block and output is None:
        raise ValueError("`output` must be given with `opens_block`, got None.")
    if (norm_weight is None) != (norm_eps is None):
        raise ValueError(f"`norm_weight` and `norm_eps` must be given together, got norm_eps={norm_eps}.")
    check_no_gradients(
        "decode_mix", sources=sources, query=query, output=output, stream=stream, norm_weight=norm_weight
    )
    wide = torch.promote_types(dtype, torch.float32)
    check_tensor("sources", sources, sources.shape, wide, sources.device)
    check_tensor("query", query, (hidden_size,), wide, sources.device)
    check_tensor("norm_floor", norm_floor, (), wide, sources.device)
    check_tensor("output", output, shape, dtype, sources.device)
    check_tensor("stream", stream, shape, dtype, sources.device)
    check_tensor("norm_weight", norm_weight, (hidden_size,), dtype, sources.device)
    check_written_in_place("sources", sources)
    arguments = (query, norm_floor, output, stream, norm_weight)
    if not uses_kernel(impl, sources, num_sources):
        return _decode_reference(sources, num_sources, *arguments, norm_eps, opens_block, dtype)
    return _decode_kernel(sources, num_sources, *contiguous(*arguments), norm_eps, opens_block, dtype)


def _decode_reference(
    sources, num_sources, query, norm_floor, output, stream, norm_weight, norm_eps, opens_block, dtype
) -> Decoded:
    """The reference of [`decode_mix`], with its arguments and results."""
    if output is not None:
        newest = sources[num_sources - 1]
        newest.copy_(output) if opens_block else newest.add_(output)
        stream = None if stream is None else stream + output
    live = sources[:num_sources]
    scores = (live * query).sum(-1) / torch.sqrt(live.square().sum(-1) + norm_floor.square())
    softmax, weights, _ = phase_one_weights(scores, "mean" if stream is None else "sum")
    mix = (weights.unsqueeze(-1) * live).sum(0)
    mix = (mix if stream is None else mix + stream).to(dtype)
    normed = None if norm_weight is None else rms_norm(mix, norm_weight, norm_eps)
    return Decoded(mix, softmax, stream, normed)


def _decode_kernel(
    sources, num_sources, query, norm_floor, output, stream, norm_weight, norm_eps, opens_block, dtype
) -> Decoded:
    from .depth_triton_attnres import decode_forward

    mix = torch.empty_like(sources[0], dtype=dtype)
    weights = sources.new_empty(num_sources, *mix.shape[:-1])
    new_stream = None if stream is None or output is None else torch.empty_like(mix)
    normed = None if norm_weight is None else torch.empty_like(mix)
    hidden_size, num_tokens = mix.shape[-1], weights[0].numel()
    tile = decode_tile(hidden_size)
    with torch.cuda.device_of(sources):
        decode_forward[(num_tokens,)](
            *(sources, query, norm_floor, output, stream, norm_weight, mix, weights, new_stream, normed),
            *(num_tokens, num_sources, norm_eps or 0.0),
            OPENS=opens_block,
            SUM=stream is not None,
            D=hidden_size,
            WIDTH=tile.width,
            CHUNK=decode_chunk(hidden_size, num_sources),
            SOURCES=power_of_two(num_sources),
            **tile.options(),
        )
    return Decoded(mix, weights, stream if new_stream is None else new_stream, normed)
