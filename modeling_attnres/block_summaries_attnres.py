# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The cached block summaries of a forward: a preallocated bank of depth sources, and its gradient.

Letters: B batch, T tokens, M = B * T, D hidden size, L sublayers, n live sources, R queries read together.

Autograd sees the bank as chains of operations on two *links*, memoryless stand-ins for `sources` and for `scores`:
filing a source, reading scores and summing each take a link and hand on a new one. In backward the chains run the other
way, and the bank's gradients pass along them as one buffer each, into which every reader adds in place: no copies of the
bank are saved, no sums over its readers are left to autograd, and a source's scores are differentiated all at once.
"""

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .depth_weights_attnres import (
    Coefficients,
    Form,
    accumulation_dtype,
    columns,
    derives_gradients,
    first_derivative,
    merge_rows,
    product_in_fp32,
    source_norm,
    split_queries,
    without_autocast,
)


@dataclass
class BankPlan:
    """How the device wants a bank's products. Decided by [`DepthPlan`]; the defaults hold on any device.

    Attributes:
        tokens_at_once: sum the rows of phase 1 in parts of so many tokens, row by row: parts stay in a processor's cache,
            and rows that lie apart are faster to read. `None` sums them at once, token by token.
        reuses_rows: let every group write its rows over those of the group before, for an allocator that maps large
            tensors into memory afresh each time.
        in_half: score bf16 sources by products that take bf16 and accumulate in fp32.
        alignment: leading dimensions of products are multiples of it.
        floor_channels: how many channels a source gets behind its own in a decode step. The first holds the floor of its
            norm, which is then part of the norm of all channels.
    """

    tokens_at_once: int | None = None
    reuses_rows: bool = False
    in_half: bool = False
    alignment: int = 1
    floor_channels: int = 1


ANY_DEVICE = BankPlan()


def _up_to_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


# --- Rows of phase 1 -------------------------------------------------------------------------------------------------


def weighted_sum(
    weights: torch.Tensor, sources: torch.Tensor, plan: BankPlan = ANY_DEVICE, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`[n, R, B, T]` weights and `[n, B, T, D]` sources to rows `[R, B, T, D]`, one small matrix product per token.

    Args:
        out: `[R, M, D]`, memory for the rows where `plan` sums them in parts.
    """
    per_token, per_source = _per_token(weights, plan.alignment), sources.flatten(1, 2).transpose(0, 1)
    if plan.tokens_at_once is None:
        return torch.bmm(per_token, per_source).transpose(0, 1).unflatten(1, sources.shape[1:3])
    rows = sources.new_empty(weights.shape[1], *per_source.shape[::2]) if out is None else out
    for start in range(0, len(per_token), plan.tokens_at_once):
        part = slice(start, start + plan.tokens_at_once)
        rows[:, part].copy_(torch.bmm(per_token[part], per_source[part]).transpose(0, 1))
    return rows.unflatten(1, sources.shape[1:3])


def _per_token(weights: torch.Tensor, alignment: int) -> torch.Tensor:
    """`[n, R, B, T]` to `[M, R, n]`, as batched products want it."""
    per_token, n = weights.flatten(2).permute(2, 1, 0), len(weights)
    if n % alignment == 0:
        return per_token.contiguous()
    padded = per_token.new_empty(*per_token.shape[:2], _up_to_multiple(n, alignment))[..., :n]
    return padded.copy_(per_token)


def _rows_backward(weights: torch.Tensor, sources: torch.Tensor, rows_gradient: torch.Tensor):
    """The weights' gradient `[n, R, B, T]`, and the two factors of the sources': `[M, n, R]` and `[M, R, D]`."""
    per_token = rows_gradient.flatten(1, 2).transpose(0, 1)
    products = torch.bmm(per_token, sources.flatten(1, 2).permute(1, 2, 0))  # [M, R, n]
    return (
        products.permute(2, 1, 0).reshape(weights.shape),
        weights.flatten(2).permute(2, 0, 1).contiguous(),
        per_token,
    )


class _SumRows(torch.autograd.Function):
    """Phase 1's weighted sum; in backward adds every row's gradient into the bank's in one product."""

    @staticmethod
    def forward(ctx, link, weights, bank):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weights)
        ctx.sources = bank.sources
        return weighted_sum(weights, bank.sources[: len(weights)], bank.plan), link.view_as(link)

    @staticmethod
    @first_derivative
    def backward(ctx, rows_gradient, link_gradient):
        if rows_gradient is None:
            return link_gradient, None, None
        (weights,) = ctx.saved_tensors
        n = len(weights)
        weights_gradient, left, right = _rows_backward(weights, ctx.sources[:n], rows_gradient)
        if ctx.needs_input_grad[0]:
            if link_gradient is None:
                link_gradient = torch.zeros_like(ctx.sources)
            link_gradient[:n].flatten(1, 2).transpose(0, 1).baddbmm_(left, right)
        return link_gradient, weights_gradient, None


class _SumRowsOfSources(torch.autograd.Function):
    """[`_SumRows`] for a layer that is run again in backward: it is handed every source, and their gradients are apart."""

    @staticmethod
    def forward(ctx, weights, bank, *sources):
        ctx.save_for_backward(weights)
        ctx.sources = bank.sources[: len(sources)]
        if sources[0].untyped_storage()._cdata != ctx.sources.untyped_storage()._cdata:
            # Somebody moved or cast the layer's inputs. Otherwise they are views of the bank, and a stack a copy of it.
            ctx.sources = torch.stack(sources)
        return weighted_sum(weights, ctx.sources, bank.plan)

    @staticmethod
    @first_derivative
    def backward(ctx, rows_gradient):
        (weights,) = ctx.saved_tensors
        weights_gradient, left, right = _rows_backward(weights, ctx.sources, rows_gradient)
        gradients = torch.empty_like(ctx.sources)
        torch.bmm(left, right, out=gradients.flatten(1, 2).transpose(0, 1))
        return weights_gradient, None, *gradients.unbind(0)


@without_autocast
def rows_of_sources(
    weights: torch.Tensor, first_source: torch.Tensor, bank: "BlockSummaries", sources: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Phase 1's weighted sum `[R, B, T, D]` in a layer that is run again in backward.

    Args:
        weights: `[n, R, B, T]`.
        first_source: the first of `sources`, for its device.
        sources: all n finished sources `[B, T, D]`, as [`BlockSummaries.append`] returned them.
    """
    return _SumRowsOfSources.apply(weights.to(first_source.dtype), bank, *sources)


# --- Sources and scores ----------------------------------------------------------------------------------------------


class _LinkSource(torch.autograd.Function):
    """Ties a source to its slot: in backward, what all readers left for the slot becomes the source's gradient."""

    @staticmethod
    def forward(ctx, link, score_link, source, queries, bank, slot, first_reader):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries)
        # Not saved through autograd: later slots are written while these live ones stay as they are.
        ctx.slot = (bank.sources[slot], bank.norms[slot], bank.scores[slot, first_reader:])
        ctx.index, ctx.in_half = (slot, first_reader), bank.plan.in_half
        # Not `detach()`: later slots are written under the version counter that it would share.
        return link.view_as(link), score_link.view_as(score_link), bank.sources[slot].data

    @staticmethod
    @first_derivative
    def backward(ctx, link_gradient, score_link_gradient, alias_gradient):
        slot, first_reader = ctx.index
        gradient, queries_gradient = alias_gradient, None
        if link_gradient is not None:
            gradient = link_gradient[slot] if gradient is None else link_gradient[slot] + gradient
        if score_link_gradient is not None:
            (queries,) = ctx.saved_tensors
            stored, norm, scores = ctx.slot
            of_scores = score_link_gradient[slot, first_reader:]  # [R, B, T]
            scaled = (of_scores / norm).flatten(1)
            queries_gradient = torch.zeros_like(queries)
            queries_gradient[first_reader:] = _times_values(scaled, stored.flatten(0, 1), queries.dtype, ctx.in_half)
            if ctx.needs_input_grad[2]:
                # score = (q . v) / |v|, so d score / dv = q / |v| - score v / |v|^2
                along = ((of_scores * scores).sum(0) / norm.square()).unsqueeze(-1)
                dtype = stored.dtype if ctx.in_half else queries.dtype
                through_scores = torch.mm(scaled.T.to(dtype), queries[first_reader:].to(dtype)).view_as(stored)
                through_scores = through_scores.addcmul_(along.to(dtype), stored.to(dtype), value=-1).to(stored.dtype)
                gradient = through_scores if gradient is None else gradient + through_scores
        return link_gradient, score_link_gradient, gradient, queries_gradient, None, None, None


def _times_values(rows: torch.Tensor, values: torch.Tensor, dtype: torch.dtype, in_half: bool) -> torch.Tensor:
    """`[R, M]` in `dtype`, at least fp32, times `[M, D]`: `[R, D]` in `dtype`, without rounding `rows` to half precision."""
    if not in_half:
        return torch.mm(rows, values.to(dtype))
    parts = split_queries(rows)  # [R, 3, M]
    return product_in_fp32(parts.flatten(0, 1), values).unflatten(0, parts.shape[:2]).sum(1)


class _LinkScores(torch.autograd.Function):
    """Hands on scores that `append` computed; in backward leaves their gradient where `append`'s backward finds it."""

    @staticmethod
    def forward(ctx, score_link, scores, slots, readers):
        ctx.set_materialize_grads(False)
        ctx.index, ctx.shape = (slots, readers), score_link.shape
        return scores.clone(), score_link.view_as(score_link)

    @staticmethod
    @first_derivative
    def backward(ctx, scores_gradient, score_link_gradient):
        if scores_gradient is not None:
            if score_link_gradient is None:
                score_link_gradient = scores_gradient.new_zeros(ctx.shape)
            score_link_gradient[ctx.index] += scores_gradient
        return score_link_gradient, None, None, None


class _MergeSlots(torch.autograd.Function):
    """Keeps the mix, which the following norm keeps anyway, and small coefficients; the sources are the bank's."""

    @staticmethod
    def forward(ctx, link, base, offset, scores, form, bank, start):
        parts = form.merge_several(offset.squeeze(-1), scores, bank.length)
        # Not saved through autograd: later slots are written while these live ones stay as they are.
        ctx.sources, ctx.slots = bank.sources[start : bank.length], slice(start, bank.length)
        mix = merge_rows(base, parts, ctx.sources)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mix, *parts)
        ctx.form, ctx.total, ctx.link_shape = form, form.total(bank.length), link.shape
        return mix, link.view_as(link)

    @staticmethod
    @first_derivative
    def backward(ctx, mix_gradient, link_gradient):
        if mix_gradient is None:
            return link_gradient, None, None, None, None, None, None
        mix, kept, taken, weights = ctx.saved_tensors
        gradient_per_token = mix_gradient.flatten(0, 1).unsqueeze(-1)  # [M, D, 1]
        dots = torch.bmm(ctx.sources.flatten(1, 2).transpose(0, 1), gradient_per_token)  # [M, j, 1]
        dots = dots.squeeze(-1).T.reshape(weights.shape).to(weights.dtype)
        through_mix = (mix_gradient * mix).sum(-1, dtype=weights.dtype)
        scores_gradient = weights * (ctx.total * dots - through_mix)
        offset_gradient = ctx.form.offset_slope * scores_gradient.sum(0).unsqueeze(-1)
        base_gradient = mix_gradient * kept.unsqueeze(-1).to(mix.dtype)
        if link_gradient is None:
            link_gradient = mix_gradient.new_zeros(ctx.link_shape)
        in_slots = link_gradient[ctx.slots].flatten(1, 2).transpose(0, 1)
        in_slots.baddbmm_(columns(taken, mix.dtype), gradient_per_token.transpose(1, 2))
        return link_gradient, base_gradient, offset_gradient, scores_gradient, None, None, None


class LiveSources(NamedTuple):
    """The first n sources of a bank for decoding, as views. Each has `D'` channels: its own, the floor of its norm and
    zeros, see [`BankPlan`].

    Attributes:
        rows: `[n * M, D']`, the sources of the M = B * T tokens.
        per_token: `[M, n, D]`, the sources without the floor.
        dots, norms: `[n, M, 1]`, memory for products of `rows` with a query, and the norms.
        flat_dots: `[n * M]`, the same memory as `dots`.
        newest, newest_with_floor, newest_norm: `[B, T, D]`, `[B, T, D']` and `[B, T]`, the last of them.
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
        self.length, self.plan = 0, ANY_DEVICE
        self.link = self._score_link = None
        self._live: dict[int, LiveSources] = {}
        self._rows: torch.Tensor | None = None
        self._folded: tuple | None = None

    def reset(self, like: torch.Tensor, capacity: int, num_queries: int, plan: BankPlan = ANY_DEVICE):
        """Empties the bank for a forward over `like` `[B, T, D]`, keeping the allocation if it fits.

        With gradients enabled the allocation is always new: a backward may still read the old one.
        """
        shape = (capacity, *like.shape)
        if torch.is_grad_enabled() or not self._fits(like, shape, like.dtype, num_queries):
            self._allocate(like, shape, like.dtype, num_queries)
        self.length, self.plan = 0, plan
        self.link = self._score_link = None
        if torch.is_grad_enabled():
            # They carry shape and gradient from one operation on the bank to the next, without memory.
            self.link, self._score_link = (
                tensor.new_empty(()).expand(tensor.shape) for tensor in (self.sources, self.scores)
            )

    def reset_for_decode(self, like: torch.Tensor, capacity: int, norm_floor: torch.Tensor, plan: BankPlan):
        """Empties the bank for a step over `like` `[B, T, D]`: sources in at least fp32 that carry `norm_floor`."""
        width = like.shape[-1]
        shape = (capacity, *like.shape[:-1], width + plan.floor_channels)
        dtype = accumulation_dtype(like.dtype)
        if not self._fits(like, shape, dtype, num_queries=0):
            self._allocate(like, shape, dtype, num_queries=0)
        if plan.floor_channels > 0:
            self.sources[..., width].copy_(norm_floor)
        if plan.floor_channels > 1:
            self.sources[..., width + 1 :].zero_()
        self.length, self.width, self.plan = 0, width, plan
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

    def fold_queries(self, depth_attention: nn.Module, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `depth_attention` gives for `embedding` `[B, T, D]`, from the step before while its parameters are the same.

        A module that stands in for it (an adapter's) may give something else with the same parameters, and is called.
        """
        if torch.is_grad_enabled() or derives_gradients():
            return depth_attention(embedding)
        parameters = tuple(depth_attention.parameters())
        hooked = depth_attention._forward_hooks or depth_attention._forward_pre_hooks
        stands_in = not hasattr(type(depth_attention), "init_weights")
        unversioned = any(parameter.is_inference() for parameter in parameters)
        if hooked or stands_in or unversioned:
            return depth_attention(embedding)
        versions = (embedding.dtype, embedding.device, *(parameter._version for parameter in parameters))
        if (
            self._folded is None
            or self._folded[0] != versions
            or any(map(operator.is_not, self._folded[1], parameters))
        ):
            self._folded = (versions, parameters, depth_attention(embedding))
        return self._folded[2]

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
        without_floor = self.sources[..., : self.width]
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
        readers = queries.detach()[first_reader:]
        if self.plan.in_half:
            dots = _times_values(readers, stored.flatten(0, 1).T, readers.dtype, in_half=True)
            source_norm(stored, norm_floor, out=norms.unsqueeze(-1))
        else:
            values = stored.to(norms.dtype)  # fp32 of one source at a time, never of the bank
            source_norm(values, norm_floor, out=norms.unsqueeze(-1))
            dots = torch.mm(readers, values.flatten(0, 1).T)
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
            return weighted_sum(weights, self.sources[: self.length], self.plan, self._memory_for_rows(weights))
        rows, self.link = _SumRows.apply(self.link, weights, self)
        return rows

    @without_autocast
    def merge(self, base: torch.Tensor, offset: torch.Tensor, scores: torch.Tensor, form: Form, start: int):
        """Phase 2 over several recent sources, which are the live ones from slot `start` on.

        Args:
            base: `[B, T, D]`, see [`MeanWeights.base`].
            offset: `[B, T, 1]`, of phase 1, in at least fp32.
            scores: `[j, B, T]`, of the sources from `start` on.

        Returns:
            the mix `[B, T, D]`.
        """
        if self.link is None:
            parts: Coefficients = form.merge_several(offset.squeeze(-1), scores, self.length)
            return merge_rows(base, parts, self.sources[start : self.length])
        mix, self.link = _MergeSlots.apply(self.link, base, offset, scores, form, self, start)
        return mix

    def row_to_keep(self, row: torch.Tensor) -> torch.Tensor:
        """`row` `[B, T, D]` of [`weighted_sum`], as it may be kept beyond its group.

        A copy where keeping the row would keep all of its group for backward, or where the next group is written over it.
        """
        if torch.compiler.is_compiling():
            return row  # the compiler decides what to keep
        return row.clone() if torch.is_grad_enabled() or self.plan.reuses_rows else row

    def _memory_for_rows(self, weights: torch.Tensor) -> torch.Tensor | None:
        """Memory for rows where every group of a forward without gradients writes over those of the group before."""
        if not self.plan.reuses_rows:
            return None
        _, num_rows, batch, tokens = weights.shape
        shape = (num_rows, batch * tokens, self.sources.shape[-1])
        size = math.prod(shape)
        if self._rows is None or len(self._rows) < size:
            self._rows = self.sources.new_empty(size)
        return self._rows[:size].view(shape)
