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
"""Softmax attention over depth: naive reference and exact two-phase computation (arXiv 2603.15031, Algorithm 1).

Letters: B batch, T tokens, M = B * T, D hidden size, L sublayers (two per decoder layer), S sublayers per block,
N blocks, n sources (the embedding and the blocks so far), R queries scored together.

A *source* is the token embedding or the sum of a block's sublayer outputs. Sublayer l reads the mix
`h_l = sum_i a_i v_i` with `a = softmax_i(w_l . RMSNorm_l(v_i))` over all earlier sources (equations 2 to 6).

Two phases make that cheap: the queries `w_l` do not depend on the input, so phase 1 reads the finished sources once
for a whole *group* of sublayers, and phase 2 merges the one *recent* source that appeared since (the open block's
partial sum, or a block that closed inside the group) by online softmax. Both phases are exact.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .block_summaries_attnres import (
    BlockSummaries,
    accumulation_dtype,
    norm_with_floor,
    own_copy,
    weighted_sum,
    without_autocast,
)
from .depth_merge_attnres import merge_mean, merge_sum, softmax_and_lse


# Rows of phase 1 held at a time: a long block is several groups, so that S = L does not hold L rows of [B, T, D].
MAX_GROUP_SUBLAYERS = 8


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


# --- The schedule ----------------------------------------------------------------------------------------------------


def sublayer_groups(num_sublayers: int, sublayers_per_block: int) -> list[tuple[int, int]]:
    """Runs `[first, last + 1)` of whole decoder layers whose queries phase 1 scores together.

    Within a group a sublayer never meets more than one recent source. For an even S that holds inside a block; for an
    odd S blocks end inside decoder layers, and it holds for single decoder layers.
    """
    if sublayers_per_block % 2:
        return [(first, first + 2) for first in range(0, num_sublayers, 2)]
    groups = []
    for block in range(0, num_sublayers, sublayers_per_block):
        end = min(block + sublayers_per_block, num_sublayers)
        groups += [(first, min(first + MAX_GROUP_SUBLAYERS, end)) for first in range(block, end, MAX_GROUP_SUBLAYERS)]
    return groups


# --- Phase 1 and phase 2, per form -----------------------------------------------------------------------------------


class DepthRead(NamedTuple):
    """What phase 1 leaves for one sublayer.

    Attributes:
        query: `[D, 1]`, its folded query, in at least fp32.
        row: `[B, T, D]`, its (form-dependent) sum over the sources of phase 1; `None` for a sum known to be zero.
        stat: `[B, T, 1]`, what the merge needs of the scores (see the forms), in at least fp32.
        scores: `[n, R, B, T]`, the scores of the whole group, in at least fp32.
        position: which of the R queries this is.
    """

    query: torch.Tensor
    row: torch.Tensor | None
    stat: torch.Tensor
    scores: torch.Tensor
    position: int


def _as_reads(queries, rows, stat, scores) -> list[DepthRead]:
    parts = zip(queries.unsqueeze(-1).unbind(0), rows, stat.unsqueeze(-1).unbind(0))
    return [DepthRead(*part, scores, position) for position, part in enumerate(parts)]


def read_bank(
    bank: BlockSummaries, queries: torch.Tensor, first: int, last: int, form: "type[MeanWeights]"
) -> list[DepthRead]:
    """Phase 1: the queries `[first, last)` attend over the live sources of the bank.

    Args:
        queries: `[L + 1, D]` folded queries (see [`DepthAttention`]) in at least fp32.
        form: how weights come from scores, [`MeanWeights`] or [`SumWeights`].

    Returns:
        One [`DepthRead`] per query.
    """
    scores = bank.score(first, last)
    weights, stat = form.phase_one(scores)
    return _as_reads(queries[first:last], bank.weighted_sum(weights).unbind(0), stat, scores)


def read_one_source(
    bank: BlockSummaries,
    source: torch.Tensor,
    queries: torch.Tensor,
    first: int,
    last: int,
    form: "type[MeanWeights]",
) -> list[DepthRead]:
    """Phase 1 while the embedding `source` `[B, T, D]` is the only one: it has all the weight, whatever its scores."""
    scores = bank.score(first, last)
    row, stat = form.one_source(source, scores[0])
    return _as_reads(queries[first:last], [row] * (last - first), stat, scores)


class MeanWeights:
    """Weights that sum to 1: the paper's form. The state between sublayers is the recent sources."""

    @classmethod
    def stream(cls, *args, **kwargs) -> "DepthStream":
        """The depth side of one forward in two phases; the other arguments are those of [`DepthStream`]."""
        return DepthStream(*args, form=cls, **kwargs)

    @staticmethod
    def start(embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ()

    @classmethod
    @without_autocast
    def read_sources(
        cls, queries: torch.Tensor, sources: Sequence[torch.Tensor], norm_floor: torch.Tensor
    ) -> list[DepthRead]:
        """Phase 1 without a bank, for a layer that recomputes it under gradient checkpointing: all plain autograd.

        Args:
            queries: `[R, D]` folded queries, in at least fp32.
            sources: n tensors `[B, T, D]`.
        """
        stacked = torch.stack(tuple(sources))
        values = stacked.to(queries.dtype)
        scores = ((values @ queries.T) / norm_with_floor(values, norm_floor)).movedim(-1, 1)  # [n, R, B, T]
        weights, stat = cls.phase_one(scores)
        return _as_reads(queries, weighted_sum(weights.to(stacked.dtype), stacked).unbind(0), stat, scores)

    @staticmethod
    def phase_one(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[n, ...]` scores to the weights `[n, ...]` of the sources and the scores' log-sum-exp `[...]`."""
        return softmax_and_lse(scores)

    @staticmethod
    def one_source(source: torch.Tensor, score: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What `phase_one` and the weighted sum come to for a single source: its row, and the stat."""
        return source, score

    @staticmethod
    def recent_score(read: DepthRead, relative: torch.Tensor) -> torch.Tensor:
        """The recent source's score `[B, T, 1]`, from the relative one that `phase_two` returns."""
        return read.stat - relative

    @staticmethod
    def phase_two(read: DepthRead, norm_floor: torch.Tensor, *state: torch.Tensor):
        """Merges the recent source, if there is one, into the row of phase 1.

        With one extra source online softmax is `row + p (recent - row)`, `p = sigmoid(score - lse)`.

        Returns:
            the mix `[B, T, D]`, and the recent source's score relative to phase 1's (see `recent_score`)
            `[B, T, 1]`, or `None` without one.
        """
        if not state:
            return own_copy(read.row), None
        (recent,) = state
        return merge_mean(read.row, read.stat, read.query, recent, norm_floor)

    @classmethod
    def mix_weights(cls, read: DepthRead, relative: torch.Tensor | None) -> torch.Tensor:
        """The weights `[B, T, n]` of a mix, from what phase 1 and `phase_two` computed it with."""
        scores = read.scores[:, read.position].movedim(0, -1)
        if relative is not None:
            scores = torch.cat([scores, cls.recent_score(read, relative)], dim=-1)
        return torch.softmax(scores, dim=-1)

    @staticmethod
    def advance(read: DepthRead, state: tuple[torch.Tensor, ...], output: torch.Tensor, starts_block: bool):
        """The state after a sublayer: its `output` `[B, T, D]` opens a block or is added to the open one."""
        if starts_block:
            return (*state, output)
        return (*state[:-1], state[-1] + output)

    @staticmethod
    def outward(state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """`state` in the order in which a decoder layer takes and returns it, and back: what was last written first."""
        return state[::-1]

    @staticmethod
    def recents(state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The sources of `state` that are not in the bank, oldest first."""
        return state

    @staticmethod
    def without_closed(state: tuple[torch.Tensor, ...], num_closed: int) -> tuple[torch.Tensor, ...]:
        """`state` after its `num_closed` oldest recent sources went into the bank."""
        return state[num_closed:]


class SumWeights(MeanWeights):
    r"""Weights that sum to the number of sources n, anchored at the plain residual stream.

    The state is `(stream, *recents)`: `stream` is the running total of all sources, kept by the same additions as in a
    PreNorm model. Phase 1 weighs its sources by `e_i = exp(s_i) / mean(exp(s))`, which are exactly 1 for zero queries,
    and sums `D = sum (e_i - 1) v_i`. With `x` the recent source's weight on that scale, the mix is

        h = (1 - c) (stream + D) + c n recent,    c = (x - 1) / (x - 1 + n)

    For zero queries D and c are exactly 0: the mix is the stream bit for bit. No coefficient exceeds n, so the
    rounding of the stream is not amplified where one source has most of the weight.
    """

    @staticmethod
    def start(embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (embedding,)

    @staticmethod
    def phase_one(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[n, ...]` scores to `e - 1` `[n, ...]` and half of minus the logarithm of `mean(exp(s))` `[...]`."""
        n = len(scores)
        # Equal scores have softmax 1 / n exactly as rounded here, so their excess is exactly 0, and so is its logarithm.
        excess = (torch.softmax(scores, dim=0) - 1 / n) * n
        return excess, (torch.log1p(excess.amax(dim=0)) - scores.amax(dim=0)) * 0.5

    @staticmethod
    def one_source(source: torch.Tensor, score: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        return None, score * -0.5

    @staticmethod
    def recent_score(read: DepthRead, relative: torch.Tensor) -> torch.Tensor:
        return 2 * (relative - read.stat)

    @staticmethod
    def phase_two(read: DepthRead, norm_floor: torch.Tensor, *state: torch.Tensor):
        stream, *recents = state
        mix = stream if read.row is None else stream + read.row
        if not recents:
            return mix, None
        (recent,) = recents
        num_sources = len(read.scores) + 1
        return merge_sum(mix, read.stat, read.query, recent, norm_floor, num_sources)

    @classmethod
    def mix_weights(cls, read: DepthRead, relative: torch.Tensor | None) -> torch.Tensor:
        weights = super().mix_weights(read, relative)
        return weights * weights.shape[-1]

    @staticmethod
    def advance(read: DepthRead, state: tuple[torch.Tensor, ...], output: torch.Tensor, starts_block: bool):
        stream, *recents = state
        return (stream + output, *MeanWeights.advance(read, tuple(recents), output, starts_block))

    @staticmethod
    def outward(state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return state  # the stream is first

    @staticmethod
    def recents(state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return state[1:]

    @staticmethod
    def without_closed(state: tuple[torch.Tensor, ...], num_closed: int) -> tuple[torch.Tensor, ...]:
        return (state[0], *state[1 + num_closed :])


FORMS = {"mean": MeanWeights, "sum": SumWeights}


# --- The module ------------------------------------------------------------------------------------------------------


def init_query(query: torch.Tensor, std: float):
    """Zeros for `std=0`, without drawing from the random generator; leaves weights that were loaded alone."""
    init.normal_(query, mean=0.0, std=std) if std > 0 else init.zeros_(query)


class DepthAttention(nn.Module):
    """Owns the pseudo-queries and key norms of the whole model.

    They do not belong to the decoder layers: phase 1 needs a group's queries before its layers run. Row `l - 1` serves
    sublayer `l` (counted from 0), the last row the output mix. Sublayer 0 has one source and needs no query.

    Args:
        num_sublayers: L.
        hidden_size: D.
        eps: epsilon of the key RMSNorm.
    """

    def __init__(self, num_sublayers: int, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.query = nn.Parameter(torch.zeros(num_sublayers, hidden_size))
        self.key_norm = nn.Parameter(torch.ones(num_sublayers, hidden_size))

    def init_weights(self, query_std: float):
        """Zero queries for `query_std=0` (the paper), key norms of ones; leaves weights that were loaded alone."""
        init_query(self.query, query_std)
        init.ones_(self.key_norm)

    def forward(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Folds each key norm's weight and `1 / rms`'s `sqrt(D)` into its query, so that a score is a quotient:

            w . (g * v / rms(v)) = (sqrt(D) * w * g) . v / sqrt(sum(v^2) + D * eps)

        Args:
            embedding: `[B, T, D]`, for dtype and device.

        Returns:
            `[L + 1, D]` folded queries in at least fp32, row l for sublayer l (row 0 zeros), row L for the output mix;
            and the scalar `sqrt(D * eps)` that the norm of a source is floored with.
        """
        dtype = accumulation_dtype(embedding.dtype)
        queries = self.query.to(dtype) * (self.key_norm.to(dtype) * math.sqrt(self.query.shape[-1]))
        queries = nn.functional.pad(queries, (0, 0, 1, 0))
        return queries, queries.new_full((), math.sqrt(self.eps * queries.shape[-1]))

    def extra_repr(self) -> str:
        return f"num_sublayers={self.query.shape[0]}, hidden_size={self.query.shape[1]}, eps={self.eps}"


class DepthStream:
    """The depth side of one forward: what the residual stream is to a PreNorm decoder.

    It owns the bank for the forward; the *depth state* (recent sources, and the plain stream under `"sum"`) flows
    through the layers as tensors.

    Args:
        queries, norm_floor: from [`DepthAttention`].
        bank: the block summaries to fill.
        sublayers_per_block: S.
        form: how weights come from scores, one of `FORMS`.
        sublayers: the run `[first, last)` that this forward computes, whole decoder layers; all L if not given. A
            pipeline stage computes some, and scores the sources for these alone.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        norm_floor: torch.Tensor,
        bank: BlockSummaries,
        sublayers_per_block: int,
        form: type[MeanWeights],
        sublayers: tuple[int, int] | None = None,
    ):
        self.queries, self.norm_floor, self.bank = queries, norm_floor, bank
        self.sublayers_per_block = sublayers_per_block
        self.form = form
        self.num_sublayers = len(queries) - 1
        self.first, self.last = sublayers or (0, self.num_sublayers)
        groups = sublayer_groups(self.num_sublayers, sublayers_per_block)
        clipped = [(max(first, self.first), min(last, self.last)) for first, last in groups]
        self.groups = [(first, last) for first, last in clipped if first < last]
        # One past the last query that reads sources here: the output mix follows the last sublayer of the model.
        self.num_readers = self.last + (self.last == self.num_sublayers)
        # The finished sources, alias by alias of the bank's slots, for layers that recompute phase 1.
        self.sources: list[torch.Tensor] = []
        self.output_read: DepthRead | None = None
        # Compiled training leaves what to keep and what to recompute to the compiler: plain autograd, no bank.
        self.uses_bank = not (torch.is_grad_enabled() and torch.compiler.is_compiling())

    def start(self, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Empties the bank, files the embedding `[B, T, D]` as the first source; returns the first depth state."""
        self.resume((embedding,))
        return self.form.start(embedding)

    def resume(self, sources: Sequence[torch.Tensor]):
        """Empties the bank and files the sources `[B, T, D]` that were finished before the first sublayer."""
        if self.uses_bank:
            capacity = 1 + math.ceil(self.last / self.sublayers_per_block)
            self.bank.reset(sources[0], capacity, num_queries=self.num_readers)
        self.embedding = sources[0]
        for source in sources:
            self.file(source)

    def read(self, first: int, last: int) -> list[DepthRead]:
        """Phase 1 for the sublayers `[first, last)`."""
        if last == self.num_sublayers and self.sublayers_per_block % 2 == 0:
            # The output mix meets the same sources and one recent one: it is one more row of the last group.
            *reads, self.output_read = self._read(first, last + 1)
            return reads
        return self._read(first, last)

    def _read(self, first: int, last: int) -> list[DepthRead]:
        if not self.uses_bank:
            return self.form.read_sources(self.queries[first:last], self.sources, self.norm_floor)
        if len(self.sources) == 1:
            # Not the bank's copy: a mix handed to the user must outlive the bank's next use.
            return read_one_source(self.bank, self.embedding, self.queries, first, last, self.form)
        return read_bank(self.bank, self.queries, first, last, self.form)

    def close(self, state: tuple[torch.Tensor, ...], next_sublayer: int) -> tuple[torch.Tensor, ...]:
        """Ends a group: files the blocks of `state` that are complete, and returns the state that is left."""
        if self.output_read is not None:
            return state
        recents = self.form.recents(state)
        is_open = next_sublayer % self.sublayers_per_block != 0
        num_closed = len(recents) - is_open
        for source in recents[:num_closed]:
            self.file(source)
        return self.form.without_closed(state, num_closed)

    def mix_output(
        self, state: tuple[torch.Tensor, ...], with_weights: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output mix `[B, T, D]` over all sources, and if asked its weights `[B, T, n]`."""
        read = self.output_read or self._read(self.num_sublayers, self.num_sublayers + 1)[0]
        state = tuple(tensor.to(self.queries.device) for tensor in state)  # where layers sit on several devices
        mix, logit = self.form.phase_two(read, self.norm_floor, *state)
        return mix, self.form.mix_weights(read, logit) if with_weights else None

    def stacked_sources(self, state: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """All sources in order of depth, `[B, T, n, D]`, as a copy that outlives the bank."""
        recents = (recent.to(self.embedding.device) for recent in self.form.recents(state))
        return torch.stack((*self.sources, *recents), dim=-2)

    def file(self, source: torch.Tensor) -> torch.Tensor:
        """Makes `source` `[B, T, D]` the next finished source, and returns it as it is kept."""
        if self.uses_bank:
            # Source k is complete when sublayer k * S begins, and no earlier query reads it from the bank.
            first_reader = min(max(self.bank.length * self.sublayers_per_block, self.first), self.num_sublayers)
            source = self.bank.append(source, self.queries[: self.num_readers], self.norm_floor, first_reader)
        self.sources.append(source)
        return source
