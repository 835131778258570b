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
"""Depth attention in few launches: functions that are a reference in PyTorch, and with `impl="triton"` one kernel each.

Letters: M tokens, `*` the dimensions of the tokens ([B, T] or [M]), D hidden size, n sources of a mix (the recent one
included), R queries read together.

Nothing here imports Triton before a kernel is asked for, and a kernel that cannot run is an error that says why, never
another path: ask [`available`] first. The kernels take launch configurations from one table and are never tuned, so that
the same inputs give the same bits on every device of a kind.
"""

import functools
import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HIDDEN_SIZE = 8192

# Fixed launch configurations. A program of the merge holds one token, a thread of it 16 elements of each tensor: two loads
# of 16 bytes in half precision.
MERGE_ELEMENTS = 16
# The merge's backward has more tensors and two sums over tokens in registers. A thread holds 16 bytes of each, a program a
# slice of at most 8 KB of a token: more threads would leave each fewer registers than it needs.
SLICE_BYTES, THREAD_BYTES = 8192, 16
# Programs that share the tokens in backward: several for each multiprocessor, few sums over tokens to add up at the end.
BACKWARD_PROGRAMS = 512


class Tile(NamedTuple):
    """Columns of a tile, a power of two, and warps (of 32 threads) of the program that holds it."""

    width: int
    warps: int


def merge_tile(hidden_size: int) -> Tile:
    width = max(64, 1 << (hidden_size - 1).bit_length())
    return Tile(width, max(1, width // (32 * MERGE_ELEMENTS)))


def merge_backward_tile(hidden_size: int, element_size: int) -> Tile:
    width = min(merge_tile(hidden_size).width, SLICE_BYTES // element_size)
    return Tile(width, max(1, width * element_size // (32 * THREAD_BYTES)))


def available(device: torch.device, dtype: torch.dtype, hidden_size: int) -> str | None:
    """Why the kernels cannot run on tensors of `device` and `dtype` with D = `hidden_size`; `None` if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'modeling-attnres[triton]')"
    if dtype not in DTYPES:
        return f"they compute in fp32, and {dtype} is none of fp32, bf16 and fp16"
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        return f"a hidden size of {hidden_size} is more than {MAX_HIDDEN_SIZE}"
    return _why_not_on(torch.device(device))


@functools.cache
def _why_not_on(device: torch.device) -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter runs on any device
    if device.type != "cuda":
        return f"{device} is not a CUDA device"
    if torch.version.hip is not None:
        return "they were compiled for NVIDIA devices alone"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


@functools.cache
def _kernels() -> ModuleType:
    from . import depth_triton_attnres

    return depth_triton_attnres


def _uses_kernel(impl: str, like: torch.Tensor) -> bool:
    if impl not in ("torch", "triton"):
        raise ValueError(f'`impl` must be "torch" or "triton", got {impl!r}.')
    if impl == "triton" and (reason := available(like.device, like.dtype, like.shape[-1])):
        raise ValueError(f'`impl="triton"` needs tensors that the kernels can run on: {reason}.')
    return impl == "triton"


def _check(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != device):
        got = f"{list(tensor.shape)}, {tensor.dtype}, {tensor.device}"
        raise ValueError(f"`{name}` must be {list(shape)}, {dtype}, {device}, got {got}.")


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _rms_norm(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm as Llama's: statistics in fp32 at least, rounded, then times `weight`."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(values.dtype)


# --- Phase 2 ---------------------------------------------------------------------------------------------------------


class Merged(NamedTuple):
    """What [`merge`] returns.

    Attributes:
        mix: `[*, D]`, what the sublayer reads.
        relative: `[*]` in at least fp32, the recent source's score relative to phase 1's: `lse - score` ("mean"),
            `(score + offset) / 2` ("sum").
        recent: `[*, D]`, the recent source with `output` added.
        stream: `[*, D]`, the stream with `output` added; `None` for "mean".
        normed: `[*, D]`, the RMSNorm of the mix; `None` if not asked for.
    """

    mix: torch.Tensor
    relative: torch.Tensor
    recent: torch.Tensor
    stream: torch.Tensor | None
    normed: torch.Tensor | None


def merge(
    row: torch.Tensor | None,
    stat: torch.Tensor,
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
    to 1: `mix = r row + (1 - r) recent`, `r = sigmoid(lse - score)`. With it they sum to n and are anchored at the plain
    stream: `mix = (1 - c) (stream + row) + c n recent` with `c = t / (n / 2 - (n / 2 - 1) t)`, `t = tanh((score +
    offset) / 2)`; where row and `score + offset` are 0 the mix is the stream bit for bit.

    Differentiable in all tensors but `norm_floor`. The kernel keeps the mix, the recent source and four scalars a token
    for backward, not the row.

    Args:
        row: `[*, D]`, phase 1's weighted sum; for "sum" `None` means 0.
        stat: `[*]`, the log-sum-exp of phase 1's scores, or half of minus the logarithm of their mean exponential
            ("sum"); in the query's dtype.
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
        _check(name, tensor, like.shape, like.dtype, like.device)
    wide = torch.promote_types(like.dtype, torch.float32)
    _check("query", query, like.shape[-1:], wide, like.device)
    _check("stat", stat, like.shape[:-1], wide, like.device)
    _check("norm_floor", norm_floor, (), wide, like.device)
    _check("norm_weight", norm_weight, like.shape[-1:], like.dtype, like.device)
    if not _uses_kernel(impl, like):
        return _merge_reference(
            row, stat, query, recent, norm_floor, output, stream, num_sources, norm_weight, norm_eps
        )
    if recent is None and stream is None:
        recent, output = output, None
    results = _Merge.apply(row, stat, query, recent, norm_floor, output, stream, num_sources, norm_weight, norm_eps)
    mix, relative, new_recent, new_stream, normed = results
    recent = (output if recent is None else recent) if new_recent is None else new_recent
    return Merged(mix, relative, recent, stream if new_stream is None else new_stream, normed)


def _merge_reference(
    row, stat, query, recent, norm_floor, output, stream, num_sources, norm_weight, norm_eps
) -> Merged:
    """The reference of [`merge`], with its arguments and results."""
    if output is not None:
        recent = output if recent is None else recent + output
        stream = None if stream is None else stream + output
    values = recent.to(query.dtype)
    score = (values * query).sum(-1) / torch.sqrt(values.square().sum(-1) + norm_floor.square())
    if stream is None:
        relative = stat - score
        kept = torch.sigmoid(relative).unsqueeze(-1)
        mix = kept * row + (1 - kept) * values
    else:
        relative = stat + score / 2
        tanh = torch.tanh(relative).unsqueeze(-1)
        taken = tanh / (num_sources / 2 - (num_sources / 2 - 1) * tanh)
        base = stream.to(query.dtype) if row is None else stream.to(query.dtype) + row
        mix = (1 - taken) * base + taken * num_sources * values
    mix = mix.to(recent.dtype)
    normed = None if norm_weight is None else _rms_norm(mix, norm_weight, norm_eps)
    return Merged(mix, relative, recent, stream, normed)


class _Merge(torch.autograd.Function):
    """[`merge`] by kernels. What is the same tensor before and after it is returned as `None`."""

    @staticmethod
    def forward(ctx, row, stat, query, recent, norm_floor, output, stream, num_sources, norm_weight, norm_eps):
        row, stat, query, recent, output, stream, weight = _contiguous(
            row, stat, query, recent, output, stream, norm_weight
        )
        like = output if recent is None else recent
        mix, relative = torch.empty_like(like), torch.empty_like(stat)
        new_recent = torch.empty_like(like) if recent is not None and output is not None else None
        new_stream = torch.empty_like(like) if stream is not None and output is not None else None
        normed = None if weight is None else torch.empty_like(like)
        saved = stat.new_empty(3, stat.numel())
        tile = merge_tile(like.shape[-1])
        with torch.cuda.device_of(like):
            _kernels().merge_forward[(stat.numel(),)](
                *(row, stat, query, norm_floor, recent, output, stream, weight),
                *(mix, relative, new_recent, new_stream, normed, saved),
                *(stat.numel(), num_sources or 1, norm_eps or 0.0),
                SUM=stream is not None,
                D=like.shape[-1],
                WIDTH=tile.width,
                num_warps=tile.warps,
            )
        ctx.set_materialize_grads(False)
        values = like if new_recent is None else new_recent
        ctx.save_for_backward(mix, values, query, weight, relative, saved)
        ctx.given = {"row": row is not None, "recent": recent is not None, "output": output is not None}
        ctx.num_sources = None if stream is None else num_sources
        return mix, relative, new_recent, new_stream, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, mix_gradient, relative_gradient, values_gradient, stream_gradient, normed_gradient):
        mix, values, query, weight, relative, saved = ctx.saved_tensors
        is_sum, given = ctx.num_sources is not None, ctx.given
        gradients = _contiguous(mix_gradient, normed_gradient, relative_gradient, values_gradient, stream_gradient)

        def new(needed: bool) -> torch.Tensor | None:
            return torch.empty_like(mix) if needed else None

        # Without a gradient of its own the stream's is the row's; under "mean" the output's is the recent source's.
        to_row = new(not is_sum or given["row"])
        to_stream = new(is_sum and (to_row is None or stream_gradient is not None))
        to_values = new(given["recent"])
        to_output = new(is_sum and given["output"])
        to_stat = torch.empty_like(relative)
        num_tokens, hidden_size = relative.numel(), mix.shape[-1]
        tile = merge_backward_tile(hidden_size, mix.element_size())
        num_programs = min(num_tokens, BACKWARD_PROGRAMS)
        partial = query.new_empty(1 if normed_gradient is None else 2, num_programs, hidden_size)
        with torch.cuda.device_of(mix):
            _kernels().merge_backward[(num_programs, -(-hidden_size // tile.width))](
                *(mix, values, query, weight, relative, saved, *gradients),
                *(to_row, to_stat, to_values, to_stream, to_output, partial, num_tokens, ctx.num_sources or 1),
                SUM=is_sum,
                D=hidden_size,
                WIDTH=tile.width,
                num_warps=tile.warps,
            )
        to_query, *to_weight = partial.sum(1).unbind()
        if not is_sum and given["output"]:
            to_output = to_values
        if is_sum and to_stream is None:
            to_stream = to_row
        to_weight = to_weight[0].to(weight.dtype) if to_weight else None
        return to_row, to_stat, to_query, to_values, None, to_output, to_stream, None, to_weight, None
