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

Autograd sees the bank as a chain of operations on one *link*, a memoryless stand-in for `sources`: filing a source,
scoring and summing each take the link and hand on a new one. In backward the chain runs the other way, and the bank's
gradient passes along it as one buffer into which every operation adds in place: no copies of the bank are saved, and
no sums over its readers are left to autograd.
"""

import functools
import math
from collections.abc import Callable

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and softmax are computed in at least fp32; fp64 stays fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(function: Callable) -> Callable:
    """Keeps autocast, which is meant for the sublayers, out of depth attention: it would round scores to half precision."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        device = next(argument.device.type for argument in args if isinstance(argument, torch.Tensor))
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def weighted_sum(weights: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """`[n, R, B, T]` weights and `[n, B, T, D]` sources to `[B, T, R, D]`, one small matrix product per token."""
    per_token = weights.flatten(2).permute(2, 1, 0).contiguous()  # [M, R, n]: batched products want it so
    rows = torch.bmm(per_token, sources.flatten(1, 2).transpose(0, 1))
    return rows.view(*sources.shape[1:3], -1, sources.shape[-1])


def norm_with_floor(values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
    """`sqrt(sum(v^2) + D * eps)` over the last dimension, which is kept: the RMSNorm denominator times `sqrt(D)`."""
    return torch.hypot(torch.linalg.vector_norm(values, dim=-1, keepdim=True), norm_floor)


class _LinkSource(torch.autograd.Function):
    """Ties a source to its slot: in backward the slot of the bank's gradient is the source's gradient."""

    @staticmethod
    def forward(ctx, link, source, stored, slot):
        ctx.slot = slot
        ctx.set_materialize_grads(False)
        # Not `detach()`: later slots are written under the version counter that it would share.
        return link.view_as(link), stored.data

    @staticmethod
    def backward(ctx, link_gradient, alias_gradient):
        if link_gradient is None:
            return None, alias_gradient, None, None
        gradient = link_gradient[ctx.slot]
        return link_gradient, gradient if alias_gradient is None else gradient + alias_gradient, None, None


class _LinkScores(torch.autograd.Function):
    """Hands on scores that `append` computed; in backward sends their gradient to the queries and into the bank's."""

    @staticmethod
    def forward(ctx, link, queries, scores, sources, norms):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries)
        # Not saved through autograd: later slots are written while these live ones stay as they are.
        ctx.bank = (sources, norms, scores)
        return scores.clone(), link.view_as(link)

    @staticmethod
    def backward(ctx, scores_gradient, link_gradient):
        if scores_gradient is None:
            return link_gradient, None, None, None, None
        (queries,) = ctx.saved_tensors
        sources, norms, scores = ctx.bank
        live, norms = sources[: len(scores)], norms[: len(scores)]
        # score = (q . v) / norm, so d score / dv = q / norm - score * v / norm^2
        dots_gradient = scores_gradient / norms.unsqueeze(1)  # [n, R, B, T]
        per_source = dots_gradient.flatten(2).to(sources.dtype)  # [n, R, M]
        queries_gradient = torch.bmm(per_source, live.flatten(1, 2)).to(queries.dtype).sum(0)
        if ctx.needs_input_grad[0]:
            if link_gradient is None:
                link_gradient = torch.zeros_like(sources)
            gradient = link_gradient[: len(scores)]
            through_norm = (dots_gradient * scores).sum(1) / norms  # [n, B, T]
            gradient.addcmul_(live, through_norm.unsqueeze(-1).to(live.dtype), value=-1)
            gradient.flatten(1, 2).baddbmm_(
                per_source.transpose(1, 2), queries.to(sources.dtype).expand(len(scores), *queries.shape)
            )
        return link_gradient, queries_gradient, None, None, None


class _LinkRows(torch.autograd.Function):
    """Phase 1's weighted sum; in backward adds every row's gradient into the bank's in one product."""

    @staticmethod
    def forward(ctx, link, weights, sources):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weights)
        ctx.sources = sources
        return weighted_sum(weights, sources[: len(weights)]), link.view_as(link)

    @staticmethod
    def backward(ctx, rows_gradient, link_gradient):
        if rows_gradient is None:
            return link_gradient, None, None
        (weights,) = ctx.saved_tensors
        n = len(weights)
        rows_gradient = rows_gradient.flatten(0, 1)  # [M, R, D]
        live = ctx.sources[:n].flatten(1, 2).transpose(0, 1)  # [M, n, D]
        weights_gradient = torch.bmm(rows_gradient, live.transpose(1, 2)).permute(2, 1, 0).reshape(weights.shape)
        if ctx.needs_input_grad[0]:
            if link_gradient is None:
                link_gradient = torch.zeros_like(ctx.sources)
            gradient = link_gradient[:n].flatten(1, 2).transpose(0, 1)
            gradient.baddbmm_(weights.flatten(2).permute(2, 0, 1).contiguous(), rows_gradient)
        return link_gradient, weights_gradient, None


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
    """

    def __init__(self):
        self.sources = self.norms = self.scores = None
        self.length = 0
        self._gradient_link = None

    def reset(self, like: torch.Tensor, capacity: int, num_queries: int):
        """Empties the bank for a forward over `like` `[B, T, D]`, keeping the allocation if it fits.

        With gradients enabled the allocation is always new: a backward may still read the old one.
        """
        shape = (capacity, *like.shape)
        reusable = (
            self.sources is not None
            and not torch.is_grad_enabled()
            and self.sources.shape == shape
            and self.sources.dtype == like.dtype
            and self.sources.device == like.device
        )
        if not reusable:
            dtype = accumulation_dtype(like.dtype)
            self.sources = like.new_empty(shape)
            self.norms = like.new_empty(shape[:-1], dtype=dtype)
            self.scores = like.new_empty((capacity, num_queries, *like.shape[:-1]), dtype=dtype)
        self.length = 0
        # Carries the shape and the gradient of `sources` from one operation on the bank to the next, without memory.
        self._gradient_link = like.new_empty(()).expand(shape) if torch.is_grad_enabled() else None

    @property
    def inv_rms(self) -> torch.Tensor:
        """`[length, B, T]`, `1 / sqrt(mean(v^2) + eps)` of each live source."""
        return math.sqrt(self.sources.shape[-1]) / self.norms[: self.length]

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
        torch.hypot(torch.linalg.vector_norm(values, dim=-1), norm_floor, out=norms)
        dots = torch.mm(queries.detach()[first_reader:], values.flatten(0, 1).T)
        torch.div(dots.view(-1, *norms.shape), norms, out=self.scores[slot, first_reader:])
        self.length += 1
        if self._gradient_link is None:
            return stored
        self._gradient_link, alias = _LinkSource.apply(self._gradient_link, source, stored, slot)
        return alias

    @without_autocast
    def score(self, queries: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """The scores `[n, R, B, T]` that the queries `[first, last)` of `[L + 1, D]` give the live sources."""
        scores = self.scores[: self.length, first:last]
        if self._gradient_link is not None:
            scores, self._gradient_link = _LinkScores.apply(
                self._gradient_link, queries[first:last], scores, self.sources, self.norms
            )
        return scores

    @without_autocast
    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums over the live sources with weights `[n, R, B, T]`: `[B, T, R, D]` in the sources' dtype."""
        weights = weights.to(self.sources.dtype)
        if self._gradient_link is None:
            return weighted_sum(weights, self.sources[: self.length])
        rows, self._gradient_link = _LinkRows.apply(self._gradient_link, weights, self.sources)
        return rows
