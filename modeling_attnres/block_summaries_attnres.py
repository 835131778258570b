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
"""The cached block summaries of a forward: a preallocated bank of depth sources, and its gradient.

Letters: B batch, T tokens, M = B * T, D hidden size, L sublayers, n live sources, R queries read together.

Autograd sees the bank as chains of operations on two *links*, memoryless stand-ins for `sources` and for `scores`:
filing a source, reading scores and summing each take a link and hand on a new one. In backward the chains run the other
way, and the bank's gradients pass along them as one buffer each, into which every reader adds in place: no copies of the
bank are saved, no sums over its readers are left to autograd, and a source's scores are differentiated all at once.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and softmax are computed in at least fp32; fp64 stays fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(function: Callable) -> Callable:
    """Keeps autocast, which is meant for the sublayers, out of depth attention: it would round scores to half precision.

    The second argument of `function` must be a tensor: its device says which autocast.
    """

    @functools.wraps(function)
    def wrapper(first, tensor, *args, **kwargs):
        device = tensor.device.type
        # Compilers before torch 2.10 cannot read whether a device has autocast at all. What they compile for, has.
        has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
        if not (has_autocast and torch.is_autocast_enabled(device)):
            return function(first, tensor, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(first, tensor, *args, **kwargs)

    return wrapper


# An allocator maps and unmaps tensors of this size each time, which costs more than to fill them.
REUSED_BYTES = 2**24


# From so many tokens on, rows of phase 1 that lie apart are worth the calls that it takes to lay them out; in half
# precision, where smaller products are faster too, from fewer on...
MANY_TOKENS, MANY_HALF_TOKENS = 1024, 128
# ...from products over so many tokens, which stay in a processor's cache until then.
TOKENS_AT_ONCE = 64


def weighted_sum(weights: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """`[n, R, B, T]` weights and `[n, B, T, D]` sources to `[R, B, T, D]`, one small matrix product per token."""
    rows = torch.bmm(_per_token(weights), sources.flatten(1, 2).transpose(0, 1))
    return rows.transpose(0, 1).unflatten(1, sources.shape[1:3])


def _per_token(weights: torch.Tensor) -> torch.Tensor:
    return weights.flatten(2).permute(2, 1, 0).contiguous()  # [M, R, n]: batched products want it so


def _contiguous_weighted_sum(weights: torch.Tensor, sources: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """[`weighted_sum`] without gradients, for many tokens: each row `[B, T, D]` is contiguous, and faster to read.

    Args:
        out: `[R, M, D]`, memory for the result.
    """
    per_token, sources_per_token = _per_token(weights), sources.flatten(1, 2).transpose(0, 1)
    rows = sources.new_empty(weights.shape[1], *sources_per_token.shape[::2]) if out is None else out
    for start in range(0, len(per_token), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        rows[:, part].copy_(torch.bmm(per_token[part], sources_per_token[part]).transpose(0, 1))
    return rows.unflatten(1, sources.shape[1:3])


def _sum_rows(weights: torch.Tensor, sources: torch.Tensor, memory: Callable | None = None) -> torch.Tensor:
    # A compiler plans memory itself, and the number of tokens is free in its code.
    if not torch.compiler.is_compiling():
        many = MANY_HALF_TOKENS if sources.element_size() == 2 else MANY_TOKENS
        if weights.shape[2] * weights.shape[3] >= many:
            return _contiguous_weighted_sum(weights, sources, None if memory is None else memory(weights))
    return weighted_sum(weights, sources)


def own_copy(row: torch.Tensor) -> torch.Tensor:
    """A row of [`BlockSummaries.weighted_sum`] `[B, T, D]` that may be kept.

    A copy where keeping the row would keep all of its group for backward, or where the next group is written over it.
    """
    if torch.compiler.is_compiling():
        return row  # who keeps what is the compiler's affair
    if torch.is_grad_enabled() or row.untyped_storage().nbytes() >= REUSED_BYTES:
        return row.clone()
    return row


def norm_with_floor(values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
    """`sqrt(sum(v^2) + D * eps)` over the last dimension, which is kept: the RMSNorm denominator times `sqrt(D)`."""
    return hypotenuse(torch.linalg.vector_norm(values, dim=-1, keepdim=True), norm_floor)


def hypotenuse(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`sqrt(a^2 + b^2)`; in exported programs by functions that other runtimes (ONNX) have."""
    if not torch.compiler.is_exporting():
        return torch.hypot(a, b, out=out)
    result = torch.sqrt(a.square() + b.square())
    return result if out is None else out.copy_(result)


class _LinkSource(torch.autograd.Function):
    """Ties a source to its slot: in backward, what all readers left for the slot becomes the source's gradient."""

    @staticmethod
    def forward(ctx, link, score_link, source, queries, bank, slot, first_reader):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries)
        # Not saved through autograd: later slots are written while these live ones stay as they are.
        ctx.slot = (bank.sources[slot], bank.norms[slot])
        ctx.index = (slot, first_reader)
        # Not `detach()`: later slots are written under the version counter that it would share.
        return link.view_as(link), score_link.view_as(score_link), bank.sources[slot].data

    @staticmethod
    def backward(ctx, link_gradient, score_link_gradient, alias_gradient):
        slot, first_reader = ctx.index
        gradient, queries_gradient = alias_gradient, None
        if link_gradient is not None:
            gradient = link_gradient[slot] if gradient is None else link_gradient[slot] + gradient
        if score_link_gradient is not None:
            (queries,) = ctx.saved_tensors
            stored, norm = ctx.slot
            values = stored.to(queries.dtype).flatten(0, 1)
            dots_gradient = (score_link_gradient[slot, first_reader:] / norm).flatten(1)  # [R, M]
            queries_gradient = torch.zeros_like(queries)
            torch.mm(dots_gradient, values, out=queries_gradient[first_reader:])
            if ctx.needs_input_grad[2]:
                # score = (q . v) / norm(v), so d score / dv = (q - (q . v) v / norm^2) / norm
                through_dots = torch.mm(dots_gradient.T, queries[first_reader:])
                along = torch.linalg.vecdot(through_dots, values) / norm.flatten().square()
                through_scores = through_dots.addcmul_(along.unsqueeze(-1), values, value=-1)
                through_scores = through_scores.view_as(stored).to(stored.dtype)
                gradient = through_scores if gradient is None else gradient + through_scores
        return link_gradient, score_link_gradient, gradient, queries_gradient, None, None, None


class _LinkScores(torch.autograd.Function):
    """Hands on scores that `append` computed; in backward leaves their gradient where `append`'s backward finds it."""

    @staticmethod
    def forward(ctx, score_link, scores, slots, readers):
        ctx.set_materialize_grads(False)
        ctx.index, ctx.shape = (slots, readers), score_link.shape
        return scores.clone(), score_link.view_as(score_link)

    @staticmethod
    def backward(ctx, scores_gradient, score_link_gradient):
        if scores_gradient is not None:
            if score_link_gradient is None:
                score_link_gradient = scores_gradient.new_zeros(ctx.shape)
            score_link_gradient[ctx.index] += scores_gradient
        return score_link_gradient, None, None, None


class _LinkRows(torch.autograd.Function):
    """Phase 1's weighted sum; in backward adds every row's gradient into the bank's in one product."""

    @staticmethod
    def forward(ctx, link, weights, sources):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weights)
        ctx.sources = sources
        return _sum_rows(weights, sources[: len(weights)]), link.view_as(link)

    @staticmethod
    def backward(ctx, rows_gradient, link_gradient):
        if rows_gradient is None:
            return link_gradient, None, None
        (weights,) = ctx.saved_tensors
        n = len(weights)
        rows_gradient = rows_gradient.flatten(1, 2).transpose(0, 1)  # [M, R, D]
        live = ctx.sources[:n].flatten(1, 2).transpose(0, 1)  # [M, n, D]
        weights_gradient = torch.bmm(rows_gradient, live.transpose(1, 2)).permute(2, 1, 0).reshape(weights.shape)
        if ctx.needs_input_grad[0]:
            if link_gradient is None:
                link_gradient = torch.zeros_like(ctx.sources)
            gradient = link_gradient[:n].flatten(1, 2).transpose(0, 1)
            gradient.baddbmm_(weights.flatten(2).permute(2, 0, 1).contiguous(), rows_gradient)
        return link_gradient, weights_gradient, None


class LiveSources(NamedTuple):
    """The first n sources of a bank for decoding, as views. Each carries the floor of its norm as one more channel.

    Attributes:
        rows: `[n * M, D + 1]`, the sources of the M = B * T tokens.
        per_token: `[M, n, D]`, the sources without the floor.
        dots, norms: `[n, M, 1]`, memory for products of `rows` with a query, and the norms.
        flat_dots: `[n * M]`, the same memory as `dots`.
        newest, newest_with_floor, newest_norm: `[B, T, D]`, `[B, T, D + 1]` and `[B, T]`, the last of them.
        uniform: scalar, `1 / n`.
    """

    rows: torch.Tensor
    per_token: torch.Tensor
    dots: torch.Tensor
    flat_dots: torch.Tensor
    norms: torch.Tensor
    newest: torch.Tensor
    newest_with_floor: torch.Tensor
    newest_norm: torch.Tensor
    uniform: torch.Tensor


class BlockSummaries:
    """The cached block summaries of one forward: a preallocated bank of the finished depth sources.

    Every source is written, normed and scored once, when it is finished; phase 1 then reads it once per group. The
    bank lives within a forward only: depth attention is per token, so no later token ever reads it. `generate` hands
    the same bank to every decode step to reuse its allocation.

    Attributes:
        sources: `[capacity, B, T, D]` in the model's dtype; slots `[:length]` are live.
        norms: `[capacity, B, T]` in at least fp32, `sqrt(sum(v^2) + D * eps)` of each live source: `sqrt(D)` over its
            `1/rms`, see `inv_rms`.
        scores: `[capacity, L + 1, B, T]` in at least fp32, each live source scored by every query that can read it.
        length: number of live sources.
        link: what an operation on `sources` takes and hands on with gradients enabled, `None` without.
    """

    def __init__(self):
        self.sources = self.norms = self.scores = None
        self.length = 0
        self.link = self._score_link = None
        self._live: dict[int, LiveSources] = {}
        self._rows: torch.Tensor | None = None

    def reset(self, like: torch.Tensor, capacity: int, num_queries: int):
        """Empties the bank for a forward over `like` `[B, T, D]`, keeping the allocation if it fits.

        With gradients enabled the allocation is always new: a backward may still read the old one.
        """
        shape = (capacity, *like.shape)
        if torch.is_grad_enabled() or not self._fits(like, shape, like.dtype, num_queries):
            self._allocate(like, shape, like.dtype, num_queries)
        self.length = 0
        self.link = self._score_link = None
        if torch.is_grad_enabled():
            # They carry shape and gradient from one operation on the bank to the next, without memory.
            self.link, self._score_link = (
                tensor.new_empty(()).expand(tensor.shape) for tensor in (self.sources, self.scores)
            )

    def reset_for_decode(self, like: torch.Tensor, capacity: int, norm_floor: torch.Tensor):
        """Empties the bank for a step over `like` `[B, T, D]`: sources in at least fp32 that carry `norm_floor`."""
        shape = (capacity, *like.shape[:-1], like.shape[-1] + 1)
        dtype = accumulation_dtype(like.dtype)
        if not self._fits(like, shape, dtype, num_queries=0):
            self._allocate(like, shape, dtype, num_queries=0)
        self.sources[..., -1].copy_(norm_floor)
        self.length = 0
        self.link = self._score_link = None

    def _fits(self, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, num_queries: int) -> bool:
        return (
            self.sources is not None
            and self.sources.shape == shape
            and self.sources.dtype == dtype
            and self.sources.device == like.device
            and self.scores.shape[1] == num_queries
            and self.sources.is_inference() == torch.is_inference_mode_enabled()
        )

    def _allocate(self, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, num_queries: int):
        self.sources = like.new_empty(shape, dtype=dtype)
        self.norms = like.new_empty(shape[:-1], dtype=accumulation_dtype(dtype))
        self.scores = like.new_empty((shape[0], num_queries, *shape[1:-1]), dtype=self.norms.dtype)
        self._live.clear()
        self._rows = None

    @property
    def inv_rms(self) -> torch.Tensor:
        """`[length, B, T]`, `1 / sqrt(mean(v^2) + eps)` of each live source."""
        return math.sqrt(self.sources.shape[-1]) / self.norms[: self.length]

    def live(self, length: int) -> LiveSources:
        """Views of the slots `[:length]` of a bank for decoding, which the caller fills; the last may still grow."""
        if not self._live:
            self._live = dict(enumerate(self._every_live(), 1))
        self.length = length
        return self._live[length]

    def _every_live(self) -> Iterator[LiveSources]:
        """`LiveSources` of each length, from as few operations as there can be: a server makes a bank for each step."""
        capacity, num_tokens = len(self.sources), self.norms[0].numel()
        rows, norms = self.sources.flatten(0, 2), self.norms.view(capacity, num_tokens, 1)
        without_floor = self.sources[..., :-1]
        per_token = without_floor.flatten(1, 2).transpose(0, 1)
        flat_dots = torch.empty_like(norms).flatten()
        dots = flat_dots.view_as(norms)
        uniform = torch.arange(1, capacity + 1, dtype=norms.dtype, device=norms.device).reciprocal()
        newest = zip(without_floor.unbind(), self.sources.unbind(), self.norms.unbind(), uniform.unbind())
        for length, last in enumerate(newest, 1):
            part = slice(length * num_tokens)
            yield LiveSources(rows[part], per_token[:, :length], dots[:length], flat_dots[part], norms[:length], *last)

    @without_autocast
    def append(
        self, source: torch.Tensor, queries: torch.Tensor, norm_floor: torch.Tensor, first_reader: int = 0
    ) -> torch.Tensor:
        """Writes a finished source `[B, T, D]` to the next free slot and scores it for the queries `[first_reader:]`.

        Returns:
            The source as it lies in the bank, with the gradient of `source`, so that `source` need not be kept.

        Raises:
            RuntimeError: if every slot holds a live source.
        """
        slot = self.length
        if slot == self.sources.shape[0]:
            raise RuntimeError(f"All {slot} slots of the block summaries hold a live source.")
        stored, norms = self.sources[slot], self.norms[slot]
        stored.copy_(source.detach())
        values = stored.to(norms.dtype)  # fp32 of one source at a time, never of the bank
        hypotenuse(torch.linalg.vector_norm(values, dim=-1), norm_floor, out=norms)
        dots = torch.mm(queries.detach()[first_reader:], values.flatten(0, 1).T)
        torch.div(dots.view(-1, *norms.shape), norms, out=self.scores[slot, first_reader:])
        self.length += 1
        if self.link is None:
            return stored
        self.link, self._score_link, alias = _LinkSource.apply(
            self.link, self._score_link, source, queries, self, slot, first_reader
        )
        return alias

    def score(self, first: int, last: int, slots: slice = slice(None)) -> torch.Tensor:
        """The scores `[n, R, B, T]` that the queries `[first, last)` give the live sources, or `slots` of them."""
        start, stop, _ = slots.indices(self.length)
        slots, readers = slice(start, stop), slice(first, last)
        scores = self.scores[slots, readers]
        if self._score_link is not None:
            scores, self._score_link = _LinkScores.apply(self._score_link, scores, slots, readers)
        return scores

    @without_autocast
    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums over the live sources with weights `[n, R, B, T]`: `[R, B, T, D]` in the sources' dtype."""
        weights = weights.to(self.sources.dtype)
        if self.link is None:
            return _sum_rows(weights, self.sources[: self.length], self._memory_for_rows)
        rows, self.link = _LinkRows.apply(self.link, weights, self.sources)
        return rows

    def _memory_for_rows(self, weights: torch.Tensor) -> torch.Tensor | None:
        """The same memory for every group of a forward without gradients, where rows are large: see `REUSED_BYTES`."""
        _, num_rows, batch, tokens = weights.shape
        shape = (num_rows, batch * tokens, self.sources.shape[-1])
        size = math.prod(shape)
        if size * self.sources.element_size() < REUSED_BYTES:
            return None
        if self._rows is None or len(self._rows) < size:
            self._rows = self.sources.new_empty(size)
        return self._rows[:size].view(shape)
