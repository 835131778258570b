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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .depth_weights_attnres import (
    Form,
    accumulation_dtype,
    columns,
    derives_gradients,
    first_derivative,
    merge_rows,
    source_gradient,
    source_norm,
    times_values,
    without_autocast,
)


@dataclass
class BankPlan:
    """How the device wants a bank's products. Decided by [`DepthPlan`]; the defaults hold on any device.

    Attributes:
        tokens_at_once: sum the rows of phase 1 in parts of so many tokens, row by row: parts stay in a processor's cache,
            and rows that lie apart are faster to read. `None` sums them at once, token by token.
        in_half: score bf16 sources by products that take bf16 and accumulate in fp32.
        alignment: leading dimensions of products are multiples of it.
        floor_channels: how many channels a source gets behind its own in a decode step. The first holds the floor of its
            norm, which is then part of the norm of all channels.
    """

    tokens_at_once: int | None = None
    in_half: bool = False
    alignment: int = 1
    floor_channels: int = 1


ANY_DEVICE = BankPlan()


# --- Rows of phase 1 -------------------------------------------------------------------------------------------------


def weighted_sum(
    weights: torch.Tensor, sources: torch.Tensor, plan: BankPlan = ANY_DEVICE
) -> tuple[torch.Tensor, ...] | list[torch.Tensor]:
    """`[n, R, B, T]` weights and `[n, B, T, D]` sources to R rows `[B, T, D]`, one small matrix product per token."""
    n, num_rows = weights.shape[:2]
    per_token, per_source = weights.flatten(2).permute(2, 1, 0), sources.flatten(1, 2).transpose(0, 1)
    # Products want `[M, R, n]`, with an aligned leading dimension.
    aligned = -(-n // plan.alignment) * plan.alignment
    if aligned == n:
        per_token = per_token.contiguous()
    else:
        per_token = per_token.new_empty(*per_token.shape[:2], aligned)[..., :n].copy_(per_token)
    if plan.tokens_at_once is None:
        return torch.bmm(per_token, per_source).transpose(0, 1).unflatten(1, sources.shape[1:3]).unbind(0)
    rows = [torch.empty_like(sources[0]) for _ in range(num_rows)]
    parts = zip(*(row.flatten(0, 1).split(plan.tokens_at_once) for row in rows))
    factors = zip(per_token.split(plan.tokens_at_once), per_source.split(plan.tokens_at_once))
    for part, (weights_of_part, sources_of_part) in zip(parts, factors):
        torch._foreach_copy_(part, torch.bmm(weights_of_part, sources_of_part).unbind(1))
    return rows


class _SumRows(torch.autograd.Function):
    """Phase 1's weighted sum; in backward adds every row's gradient into the bank's in one product.

    A layer that is run again in backward is handed the `sources`, and their gradients are apart.
    """

    @staticmethod
    def forward(ctx, link, weights, bank, *sources):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weights)
        ctx.sources = bank.sources
        if sources and sources[0].untyped_storage()._cdata != bank.sources.untyped_storage()._cdata:
            # Somebody moved or cast the layer's inputs. Otherwise they are views of the bank, and a stack a copy of it.
            ctx.sources = torch.stack(sources)
        rows = weighted_sum(weights, ctx.sources[: len(weights)], bank.plan)
        return None if sources else link.view_as(link), *rows

    @staticmethod
    @first_derivative
    def backward(ctx, gradient, *rows_gradients):
        (weights,) = ctx.saved_tensors
        n, known = len(weights), [one for one in rows_gradients if one is not None]
        if not known:
            return gradient, *(None,) * (len(ctx.needs_input_grad) - 1)
        none = torch.zeros_like(known[0]) if len(known) < len(rows_gradients) else None
        rows_gradient = torch.stack([none if one is None else one for one in rows_gradients])
        per_source = ctx.sources[:n].flatten(1, 2).permute(1, 2, 0)
        per_token = rows_gradient.flatten(1, 2).transpose(0, 1)
        weights_gradient = torch.bmm(per_token, per_source).permute(2, 1, 0).reshape(weights.shape)
        left = weights.flatten(2).permute(2, 0, 1).contiguous()
        if len(ctx.needs_input_grad) > 3:
            gradients = torch.empty_like(ctx.sources[:n])
            torch.bmm(left, per_token, out=gradients.flatten(1, 2).transpose(0, 1))
            return None, weights_gradient, None, *gradients.unbind(0)
        if ctx.needs_input_grad[0]:
            gradient = torch.zeros_like(ctx.sources) if gradient is None else gradient
            gradient[:n].flatten(1, 2).transpose(0, 1).baddbmm_(left, per_token)
        return gradient, weights_gradient, None


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
    def backward(ctx, link_gradient, score_link_gradient, gradient):
        slot, first_reader = ctx.index
        queries_gradient = None
        if link_gradient is not None:  # no reader is left that would add to it
            gradient = link_gradient[slot] if gradient is None else link_gradient[slot].add_(gradient)
        elif gradient is not None:
            gradient = gradient.clone()
        if score_link_gradient is not None:
            (queries,) = ctx.saved_tensors
            stored, norm, scores = ctx.slot
            of_scores = score_link_gradient[slot, first_reader:]  # [R, B, T]
            scaled = (of_scores / norm).flatten(1)
            queries_gradient = torch.zeros_like(queries)
            queries_gradient[first_reader:] = times_values(scaled, stored.flatten(0, 1), ctx.in_half)
            if ctx.needs_input_grad[2]:
                along = ((of_scores * scores).sum(0) / norm.square()).unsqueeze(-1)
                gradient = source_gradient(stored, scaled, queries[first_reader:], along, ctx.in_half, gradient)
        return link_gradient, score_link_gradient, gradient, queries_gradient, None, None, None


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
        kept, taken, shares = form.merge_several(offset.squeeze(-1), scores, bank.length)
        # Not saved through autograd: later slots are written while these live ones stay as they are.
        ctx.sources, ctx.slots = bank.sources[start : bank.length], slice(start, bank.length)
        mix = merge_rows(base, kept, taken, ctx.sources)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mix, kept, taken, shares)
        ctx.form, ctx.total, ctx.link_shape = form, form.total(bank.length), link.shape
        return mix, link.view_as(link)

    @staticmethod
    @first_derivative
    def backward(ctx, mix_gradient, link_gradient):
        if mix_gradient is None:
            return link_gradient, None, None, None, None, None, None
        mix, kept, taken, shares = ctx.saved_tensors
        gradient_per_token = mix_gradient.flatten(0, 1).unsqueeze(-1)  # [M, D, 1]
        dots = torch.bmm(ctx.sources.flatten(1, 2).transpose(0, 1), gradient_per_token)  # [M, j, 1]
        dots = dots.squeeze(-1).T.reshape(shares.shape).to(shares.dtype)
        through_mix = (mix_gradient * mix).sum(-1, dtype=shares.dtype)
        scores_gradient = shares * (ctx.total * dots - through_mix)
        offset_gradient = ctx.form.offset_slope * scores_gradient.sum(0).unsqueeze(-1)
        base_gradient = mix_gradient * kept.unsqueeze(-1).to(mix.dtype)
        if link_gradient is None:
            link_gradient = mix_gradient.new_zeros(ctx.link_shape)
        in_slots = link_gradient[ctx.slots].flatten(1, 2).transpose(0, 1)
        in_slots.baddbmm_(columns(taken, mix.dtype), gradient_per_token.transpose(1, 2))
        return link_gradient, base_gradient, offset_gradient, scores_gradient, None, None, None


class BlockSummaries:
    """The cached block summaries of one forward: a preallocated bank of the finished depth sources.

    Every source is written, normed and scored once, when it is finished; phase 1 then reads it once per group. The
    bank lives within a forward only: depth attention is per token, so no later token ever reads it. `generate` hands
    the same bank to every decode step to reuse its allocation.

    Attributes:
        sources: `[capacity, B, T, D]` in the model's dtype; slots `[:length]` are live.
        norms: `[capacity, B, T]` in at least fp32, `sqrt(sum(v^2) + D * eps)` of each live source: `sqrt(D)` over its
            `1/rms`, see `inv_rms`.
        scores: `[capacity, L + 1, B, T]` in at least fp32, each live source scored by every query that can read it. A decode
            step takes this memory for `[L + 1, capacity, M]`.
        length: number of live sources.
        link: what an operation on `sources` takes and hands on with gradients enabled, `None` without.
        decode_reads: what a decode step made of the allocation, for the next one.
    """

    def __init__(self):
        self.sources = self.norms = self.scores = self.decode_reads = None
        self.length, self.plan = 0, ANY_DEVICE
        self.link = self._score_link = None
        self._folded: tuple | None = None

    def reset(
        self,
        like: torch.Tensor,
        capacity: int,
        num_queries: int,
        plan: BankPlan = ANY_DEVICE,
        norm_floor: torch.Tensor | None = None,
    ):
        """Empties the bank for a forward over `like` `[B, T, D]`, keeping the allocation if it fits.

        With gradients enabled the allocation is always new: a backward may still read the old one.

        Args:
            norm_floor: for a decode step, whose sources are in at least fp32 and carry it, see [`BankPlan`].
        """
        width, wide = like.shape[-1], accumulation_dtype(like.dtype)
        dtype, extra = (like.dtype, 0) if norm_floor is None else (wide, plan.floor_channels)
        shape = (capacity, *like.shape[:-1], width + extra)
        if torch.is_grad_enabled() or not self._fits(like, shape, dtype, num_queries):
            self.sources = like.new_empty(shape, dtype=dtype)
            self.norms = like.new_empty(shape[:-1], dtype=wide)
            self.scores = like.new_empty((capacity, num_queries, *shape[1:-1]), dtype=wide)
            self.decode_reads = None
        if extra > 0:
            self.sources[..., width].copy_(norm_floor)
        if extra > 1:
            self.sources[..., width + 1 :].zero_()
        self.length, self.plan = 0, plan
        self.link = self._score_link = None
        if torch.is_grad_enabled():
            # They carry shape and gradient from one operation on the bank to the next, without memory.
            self.link, self._score_link = (
                tensor.new_empty(()).expand(tensor.shape) for tensor in (self.sources, self.scores)
            )

    def _fits(self, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, num_queries: int) -> bool:
        return (
            self.sources is not None
            and (self.sources.shape, self.sources.dtype, self.sources.device) == (shape, dtype, like.device)
            and self.scores.shape[1] == num_queries
            and self.sources.is_inference() == torch.is_inference_mode_enabled()
        )

    def fold_queries(self, depth_attention: nn.Module, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `depth_attention` gives for `embedding` `[B, T, D]`, from the step before while its parameters are the same.

        A module that stands in for it (an adapter's) may give something else with the same parameters, and is called.
        """
        parameters = tuple(depth_attention.parameters())
        if (
            torch.is_grad_enabled()
            or derives_gradients()
            or (depth_attention._forward_hooks or depth_attention._forward_pre_hooks)
            or not hasattr(type(depth_attention), "init_weights")
            or any(parameter.is_inference() for parameter in parameters)  # they have no version
        ):
            return depth_attention(embedding)
        # The parameters are kept, so that no other object can have their identity.
        key = (embedding.dtype, embedding.device, *((id(parameter), parameter._version) for parameter in parameters))
        if self._folded is None or self._folded[0] != key:
            self._folded = (key, parameters, depth_attention(embedding))
        return self._folded[2]

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
        readers = queries.detach()[first_reader:]
        if self.plan.in_half:
            dots = times_values(readers, stored.flatten(0, 1).T, in_half=True)
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
    def weighted_sum(self, weights: torch.Tensor, sources: Sequence[torch.Tensor] = ()) -> Sequence[torch.Tensor]:
        """Sums over the live sources with weights `[n, R, B, T]`: R rows `[B, T, D]` in the sources' dtype.

        Args:
            sources: all of them `[B, T, D]`, as [`append`] returned them, in a layer that is run again in backward.
        """
        weights = weights.to(sources[0].dtype if sources else self.sources.dtype)
        if sources:
            return _SumRows.apply(None, weights, self, *sources)[1:]
        if self.link is None:
            return weighted_sum(weights, self.sources[: self.length], self.plan)
        self.link, *rows = _SumRows.apply(self.link, weights, self)
        return rows

    @without_autocast
    def merge(self, base: torch.Tensor, offset: torch.Tensor, scores: torch.Tensor, form: Form, start: int):
        """Phase 2 over several recent sources, which are the live ones from slot `start` on.

        Args:
            base: `[B, T, D]`, see [`DepthStream.base`].
            offset: `[B, T, 1]`, of phase 1, in at least fp32.
            scores: `[j, B, T]`, of the sources from `start` on.

        Returns:
            the mix `[B, T, D]`.
        """
        if self.link is None:
            kept, taken, _ = form.merge_several(offset.squeeze(-1), scores, self.length)
            return merge_rows(base, kept, taken, self.sources[start : self.length])
        mix, self.link = _MergeSlots.apply(self.link, base, offset, scores, form, self, start)
        return mix

    def row_to_keep(self, row: torch.Tensor) -> torch.Tensor:
        """`row` `[B, T, D]` of [`weighted_sum`]; for backward a copy, where the row would keep all of its group."""
        # A compiler decides itself what to keep.
        return row.clone() if torch.is_grad_enabled() and not torch.compiler.is_compiling() else row
