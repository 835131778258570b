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
"""Full AttnRes (S = 1) by groups: phase 1 over the sources of earlier groups, phase 2 over those of its own.

Letters: B batch, T tokens, M = B * T, D hidden size, L sublayers, n sources of a mix, j of them from its own group.

With one sublayer per block every output is a source. Reading all of them once per decoder layer is what makes Full
expensive, so phase 1 runs once per group of up to eight sublayers, outputs are filed as they appear, and phase 2 merges
those of its own group in one product. In backward both leave their gradients in the bank's.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .block_summaries_attnres import BlockSummaries, own_copy, without_autocast
from .depth_attention_attnres import MAX_GROUP_SUBLAYERS, DepthRead, DepthStream, MeanWeights, SumWeights


# --- Phase 2 over several sources ------------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """How a merge combines what phase 1 left with the j sources of the group.

    Attributes:
        kept: `[B, T]`, the coefficient of phase 1's part.
        taken: `[j, B, T]`, those of the sources.
        weights: `[j, B, T]`, their share of the softmax over everything.
        scale: what the weights of a mix sum to.
        stat_slope: of a score on the scale of phase 1 by phase 1's stat.
    """

    kept: torch.Tensor
    taken: torch.Tensor
    weights: torch.Tensor
    scale: int
    stat_slope: int


def mean_coefficients(lse: torch.Tensor, scores: torch.Tensor, num_sources: int) -> Coefficients:
    """`h = a_0 row + sum_i a_i v_i` with `a = softmax([lse, scores])`: online softmax.

    Args:
        lse: `[B, T]`, the log-sum-exp of phase 1's scores.
        scores: `[j, B, T]`.
        num_sources: n.
    """
    weights = torch.softmax(torch.cat([lse.unsqueeze(0), scores]), dim=0)
    return Coefficients(weights[0], weights[1:], weights[1:], scale=1, stat_slope=-1)


def sum_coefficients(half_offset: torch.Tensor, scores: torch.Tensor, num_sources: int) -> Coefficients:
    """`h = g (stream + row) + sum_i c_i v_i`, anchored as in [`SumWeights`].

    With `x_i = exp(score_i + offset)` and `Z = n - j + sum_i x_i`: `g = n / Z` and `c_i = n (x_i - 1) / Z`, which are
    exactly 1 and 0 where `score + offset` is 0. Both are divided by the largest `x` (or 1) and cannot overflow.
    """
    logits = scores + 2 * half_offset
    largest = logits.amax(0).clamp_min(0)
    one, exponentials = torch.exp(-largest), torch.exp(logits - largest)
    total = (num_sources - len(scores)) * one + exponentials.sum(0)
    taken = num_sources * (exponentials - one) / total
    return Coefficients(num_sources * one / total, taken, exponentials / total, scale=num_sources, stat_slope=2)


@without_autocast
def merge_slots(coefficients, base: torch.Tensor, stat: torch.Tensor, scores, bank: BlockSummaries, start: int):
    """Merges the bank's live sources from slot `start` on into `base` `[B, T, D]`.

    Args:
        coefficients: [`mean_coefficients`] or [`sum_coefficients`].
        base: phase 1's row; for sums, the stream plus that row.
        stat: `[B, T, 1]`, phase 1's log-sum-exp or half offset.
        scores: `[j, B, T]`, of the sources from `start` on.

    Returns:
        the mix `[B, T, D]`.
    """
    if bank.link is None:
        parts = coefficients(stat.squeeze(-1), scores, bank.length)
        return _merge_slots(base, parts, bank.sources[start : bank.length])
    mix, bank.link = _MergeSlots.apply(bank.link, base, stat, scores, coefficients, bank, start)
    return mix


def _merge_slots(base: torch.Tensor, parts: Coefficients, sources: torch.Tensor) -> torch.Tensor:
    own = torch.bmm(_columns(parts.taken, base.dtype).transpose(1, 2), sources.flatten(1, 2).transpose(0, 1))
    # In half precision `kept` and its product are not rounded.
    return torch.addcmul(own.view_as(base), base, parts.kept.unsqueeze(-1)).to(base.dtype)


def _columns(coefficients: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[j, B, T]` to `[M, j, 1]`, as a view whose transpose batched products take without a copy."""
    return coefficients.to(dtype).flatten(1).unsqueeze(-1).transpose(0, 1)


class _MergeSlots(torch.autograd.Function):
    """Keeps the mix, which the following norm keeps anyway, and small coefficients; the sources are the bank's."""

    @staticmethod
    def forward(ctx, link, base, stat, scores, coefficients, bank, start):
        parts = coefficients(stat.squeeze(-1), scores, bank.length)
        # Not saved through autograd: later slots are written while these live ones stay as they are.
        ctx.sources, ctx.slots = bank.sources[start : bank.length], slice(start, bank.length)
        mix = _merge_slots(base, parts, ctx.sources)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mix, parts.kept, parts.taken, parts.weights)
        ctx.scale, ctx.stat_slope, ctx.link_shape = parts.scale, parts.stat_slope, link.shape
        return mix, link.view_as(link)

    @staticmethod
    @once_differentiable
    def backward(ctx, mix_gradient, link_gradient):
        if mix_gradient is None:
            return link_gradient, None, None, None, None, None, None
        mix, kept, taken, weights = ctx.saved_tensors
        gradient_per_token = mix_gradient.flatten(0, 1).unsqueeze(-1)  # [M, D, 1]
        # d h / d score_i = a_i (scale v_i - h), also where the sum is anchored
        dots = torch.bmm(ctx.sources.flatten(1, 2).transpose(0, 1), gradient_per_token)  # [M, j, 1]
        dots = dots.squeeze(-1).T.reshape(weights.shape).to(weights.dtype)
        through_mix = (mix_gradient * mix).sum(-1, dtype=weights.dtype)
        scores_gradient = weights * (ctx.scale * dots - through_mix)
        stat_gradient = ctx.stat_slope * scores_gradient.sum(0).unsqueeze(-1)
        base_gradient = mix_gradient * kept.unsqueeze(-1).to(mix.dtype)
        if link_gradient is None:
            link_gradient = mix_gradient.new_zeros(ctx.link_shape)
        in_slots = link_gradient[ctx.slots].flatten(1, 2).transpose(0, 1)
        in_slots.baddbmm_(_columns(taken, mix.dtype), gradient_per_token.transpose(1, 2))
        return link_gradient, base_gradient, stat_gradient, scores_gradient, None, None, None


# --- Forms and stream ------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class FullRead:
    """What phase 1 leaves for one sublayer, and where the sources of its own group are.

    Not a tuple, on purpose: see [`DecodeRead`].

    Attributes:
        earlier: phase 1 over the sources of earlier groups.
        start: slot of the first source of this group.
        sublayer: its index, or L for the output mix.
        stream: holds the bank.
    """

    earlier: DepthRead
    start: int
    sublayer: int
    stream: "FullStream"


class FullMean(MeanWeights):
    """[`MeanWeights`] with every source in the bank. The state is the newest, for whoever looks at it from outside."""

    coefficients = staticmethod(mean_coefficients)

    @staticmethod
    def base(earlier: DepthRead, *state: torch.Tensor) -> torch.Tensor:
        return earlier.row

    @classmethod
    def phase_two(cls, read: FullRead, norm_floor: torch.Tensor, *state: torch.Tensor):
        """The mix `[B, T, D]`, and the scores `[j, B, T]` of the group's own sources."""
        earlier, bank = read.earlier, read.stream.bank
        base = cls.base(earlier, *state)
        scores = bank.score(read.sublayer, read.sublayer + 1, slice(read.start, None)).squeeze(1)
        if len(scores) == 0:
            return own_copy(base), scores
        return merge_slots(cls.coefficients, base, earlier.stat, scores, bank, read.start), scores

    @classmethod
    def mix_weights(cls, read: FullRead, scores: torch.Tensor) -> torch.Tensor:
        """The weights `[B, T, n]` of a mix, from what phase 1 and `phase_two` computed it with."""
        earlier = read.earlier.scores[:, read.earlier.position]
        return torch.softmax(torch.cat([earlier, scores]).movedim(0, -1), dim=-1)

    @classmethod
    def advance(cls, read: FullRead, state: tuple[torch.Tensor, ...], output: torch.Tensor, starts_block: bool):
        """Files a sublayer's `output` `[B, T, D]`."""
        return (read.stream.file(output),)


class FullSum(FullMean, SumWeights):
    """[`SumWeights`] with every source in the bank. The state is the stream and the newest source."""

    coefficients = staticmethod(sum_coefficients)

    @staticmethod
    def base(earlier: DepthRead, *state: torch.Tensor) -> torch.Tensor:
        return state[0] if earlier.row is None else state[0] + earlier.row

    @classmethod
    def mix_weights(cls, read: FullRead, scores: torch.Tensor) -> torch.Tensor:
        weights = super().mix_weights(read, scores)
        return weights * weights.shape[-1]

    @classmethod
    def advance(cls, read: FullRead, state: tuple[torch.Tensor, ...], output: torch.Tensor, starts_block: bool):
        return (state[0] + output, *super().advance(read, state, output, starts_block))


def full_groups(num_sublayers: int) -> list[tuple[int, int]]:
    """Runs `[first, last)` of whole decoder layers: of two, four and eight sublayers, then all of eight.

    No mix has more sources of its own group than of earlier ones (and one). The anchored sum then scales the stream,
    and what it has been rounded by, at most by two.
    """
    groups, first = [], 0
    while first < num_sublayers:
        last = min(first + min(first + 2, MAX_GROUP_SUBLAYERS), num_sublayers)
        groups.append((first, last))
        first = last
    return groups


class FullStream(DepthStream):
    """The depth side of one forward with S = 1, over all L sublayers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.groups = full_groups(self.num_sublayers)

    def read(self, first: int, last: int) -> list[FullRead]:
        """Phase 1 for the sublayers `[first, last)`; the output mix is one more row of the last group."""
        is_last = last == self.num_sublayers
        earlier = self._read(first, last + is_last)
        reads = [FullRead(read, self.bank.length, first + index, self) for index, read in enumerate(earlier)]
        if is_last:
            *reads, self.output_read = reads
        return reads

    def close(self, state: tuple[torch.Tensor, ...], next_sublayer: int) -> tuple[torch.Tensor, ...]:
        """Nothing is left to file."""
        return state

    def stacked_sources(self, state: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """All sources in order of depth, `[B, T, n, D]`, as a copy that outlives the bank."""
        return torch.stack(self.sources, dim=-2)
