# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Depth streams that write the bank between two layers, and the choice of one for a forward.

Letters: B batch, T tokens, M = B * T, D hidden size, L sublayers, S sublayers per block, n sources of a mix, j of them
from its own group.

*Full AttnRes* (S = 1) makes every output a source. Reading all of them once per decoder layer is what makes it
expensive, so phase 1 runs once per group of up to eight sublayers, outputs are filed as they appear, and phase 2 merges
those of its own group in one product. *A decode step* moves few bytes and pays for the number of calls, so there is one
softmax over all sources where they lie: the open block grows inside the bank, and nothing is filed, scored ahead or
merged. Depth attention is per token, so it does not matter whether tokens lie in rows of their own or in one row.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from .block_summaries_attnres import BlockSummaries
from .depth_attention_attnres import MAX_GROUP_SUBLAYERS, DepthRead, DepthStream, State, plan_depth
from .depth_fused_attnres import FusedDecodeSteps, FusedStream


# --- Full AttnRes ----------------------------------------------------------------------------------------------------


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
    """The depth side of one forward with S = 1, over all L sublayers. The recent source of its state is the newest."""

    output_in_group = True

    def _groups(self) -> list[tuple[int, int]]:
        return full_groups(self.num_sublayers)

    def mix(self, read: DepthRead, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Phase 2: the mix `[B, T, D]`, and the scores `[j, B, T]` of the group's own sources."""
        # The group's own sources come after those of phase 1.
        base, start = self.base(read, state), len(read.scores)
        if start == self.bank.length:
            return self.bank.row_to_keep(base), None
        scores = self.bank.score(read.sublayer, read.sublayer + 1, slice(start, None)).squeeze(1)
        return self.bank.merge(base, read.offset, scores, self.form, start), scores

    def recent_scores(self, read: DepthRead, scores: torch.Tensor) -> torch.Tensor:
        return scores

    def advance(self, read: DepthRead, state: State, output: torch.Tensor, starts_block: bool) -> State:
        """Files a sublayer's `output` `[B, T, D]`."""
        return (*(stream + output for stream in self.split(state)[0]), self.file(output))

    def close(self, state: State, next_sublayer: int) -> State:
        return state

    def stacked_sources(self, state: State) -> torch.Tensor:
        return torch.stack(self.sources, dim=-2)


# --- A decode step ---------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class DecodeRead:
    """What one sublayer reads, and where its output goes: views of the bank, whose sources have `D'` channels: their own,
    the floor of their norm and zeros, see [`BankPlan`].

    Deliberately not a tuple: FSDP casts tensors in tuples, and the layer would write to a copy.

    Attributes:
        queries: `[D', R]` in at least fp32, its folded query and zeros. Where the newest source is complete, those of all
            later sublayers follow.
        scores: `[n, M]`, its scores of the n sources that it sees.
        newest_scores: `[M, R]`, memory for the scores that `queries` give the newest source.
        per_token: `[M, n, D]`, the sources.
        newest, newest_with_floor: `[B, T, D]` and `[M, D']`, the last of them.
        opening: `[B, T, D]`, the slot of a block that its output opens; `None` behind the last slot.
    """

    queries: torch.Tensor
    scores: torch.Tensor
    newest_scores: torch.Tensor
    per_token: torch.Tensor
    newest: torch.Tensor
    newest_with_floor: torch.Tensor
    opening: torch.Tensor | None


class DecodeStream(DepthStream):
    """The depth side of one decode step, all sublayers in one group; every source is in the bank, in at least fp32."""

    def _groups(self) -> list[tuple[int, int]]:
        return [(0, self.num_sublayers)]

    def start(self, embedding: torch.Tensor) -> State:
        """Writes the embedding `[B, T, D]` to the bank as the first source; returns the first depth state."""
        self.dtype, self.shape = embedding.dtype, embedding.shape
        capacity = 1 + math.ceil(self.num_sublayers / self.sublayers_per_block)
        self.bank.reset(embedding, capacity, len(self.queries), self.plan.bank, self.norm_floor)
        self.bank.sources[0, ..., : self.shape[-1]].copy_(embedding)
        return (embedding,) * self.form.anchored

    def read(self, first: int, last: int) -> list[DecodeRead]:
        """The reads of the sublayers `[first, last)`, which are all of them; the output mix's is kept."""
        kept = self.bank.decode_reads
        if kept is None or kept[0] is not self.queries or kept[1] != self.sublayers_per_block:
            ones = self.queries.new_ones(self.bank.norms[0].numel(), 1)
            kept = self.bank.decode_reads = self.queries, self.sublayers_per_block, ones, self._make_reads()
        _, _, self.ones, (*reads, self.output_read) = kept
        return reads

    def _make_reads(self) -> list[DecodeRead]:
        """Those of all sublayers, from as few operations as there can be: a server makes a bank for each step."""
        with_floor, capacity = self.bank.sources.flatten(1, 2), len(self.bank.sources)
        all_scores = self.bank.scores.view(len(self.queries), capacity, -1)  # a query's scores lie together
        sources, reads = self.bank.sources[..., : self.shape[-1]], []
        queries = nn.functional.pad(self.queries, (0, with_floor.shape[-1] - self.shape[-1]))
        per_token, newest = sources.flatten(1, 2).transpose(0, 1), sources.unbind()
        for slot, with_its_floor in enumerate(with_floor.unbind()):
            # The readers that find this source the newest: while it grows, then once when it is complete.
            first = max(0, (slot - 1) * self.sublayers_per_block + 1)
            last = min(slot * self.sublayers_per_block, self.num_sublayers)
            of_readers = zip(
                (*queries[first:last].unsqueeze(-1).unbind(), queries[last:].T),
                all_scores[first : last + 1, : slot + 1].unbind(),
                (*all_scores[first:last, slot].unsqueeze(-1).unbind(), all_scores[last:, slot].T),
            )
            opening = newest[slot + 1] if slot + 1 < len(newest) else None
            of_source = (per_token[:, : slot + 1], newest[slot], with_its_floor, opening)
            reads += [DecodeRead(*of_reader, *of_source) for of_reader in of_readers]
        return reads

    def mix(self, read: DecodeRead, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One softmax over all sources: the mix `[B, T, D]`, and its shares `[n, M]`, which sum to 1."""
        # Only the newest source has changed since the sublayer before. Its channel behind D is the floor of its norm.
        key, _ = torch._weight_norm_interface(read.newest_with_floor, self.ones)
        torch.mm(key, read.queries, out=read.newest_scores)
        shares = torch.softmax(read.scores, dim=0)
        if not state:
            mix = torch.bmm(shares.T.unsqueeze(1), read.per_token).view(self.shape)
            return mix.to(self.dtype), shares
        # Equal scores have the share 1 / n exactly as rounded: nothing is added to the stream.
        n, stream = len(shares), state[0]
        excess = (shares - 1 / n).T.unsqueeze(1)
        if stream.dtype == excess.dtype:
            anchor = stream.view(-1, 1, self.shape[-1])
            return torch.baddbmm(anchor, excess, read.per_token, alpha=n).view(self.shape), shares
        mix = torch.bmm(excess, read.per_token).view(self.shape)
        return torch.add(stream, mix, alpha=n, out=torch.empty_like(stream)), shares

    def mix_weights(self, read: DecodeRead, shares: torch.Tensor) -> torch.Tensor:
        return shares.T.unflatten(0, self.shape[:-1]) * self.form.total(len(shares))

    def advance(self, read: DecodeRead, state: State, output: torch.Tensor, starts_block: bool) -> State:
        """Writes a sublayer's `output` `[B, T, D]` to the bank: it opens a block or is added to the open one."""
        if starts_block:
            read.opening.copy_(output)
        else:
            read.newest.add_(output)
        return tuple(stream + output for stream in state)

    def close(self, state: State, next_sublayer: int) -> State:
        return state

    def stacked_sources(self, state: State) -> torch.Tensor:
        sources = self.output_read.per_token.to(self.dtype, copy=True)
        return sources.unflatten(0, self.shape[:-1])


class FusedDecodeStream(FusedDecodeSteps, DecodeStream):
    """[`DecodeStream`] by kernels."""


# --- The choice ------------------------------------------------------------------------------------------------------


def open_stream(
    form,
    embedding: torch.Tensor,
    queries: torch.Tensor,
    norm_floor: torch.Tensor,
    bank: BlockSummaries,
    sublayers_per_block: int,
    undivided: bool = True,
    sublayers: tuple[int, int] | None = None,
) -> DepthStream:
    """The depth side of one forward, as [`plan_depth`] decides.

    Args:
        form: from [`build_depth_attention`].
        embedding: `[B, T, D]`, or any hidden states: only their shape, dtype and device count.
        undivided: whether every sublayer reads and writes the bank itself: nothing that recomputes a layer, or hands
            it copies, stands in between.

    The other arguments are those of [`DepthStream`].
    """
    plan = plan_depth(embedding, len(queries) - 1, sublayers_per_block, undivided)
    if form.stream is not None:
        stream = form.stream
    elif plan.one_pass:
        stream = FusedDecodeStream if plan.kernels else DecodeStream
    elif plan.files_outputs:
        stream = FullStream
    else:
        stream = FusedStream if plan.kernels else DepthStream
    return stream(form, queries, norm_floor, bank, sublayers_per_block, plan, sublayers)
