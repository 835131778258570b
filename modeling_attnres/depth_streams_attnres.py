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

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from .block_summaries_attnres import BlockSummaries, LiveSources
from .depth_attention_attnres import MAX_GROUP_SUBLAYERS, DepthRead, DepthStream, State, plan_depth
from .depth_decode_kernel_attnres import decode_mix
from .depth_kernels_attnres import merge, phase_one_rows, phase_one_rows_backward
from .depth_launch_attnres import rms_norm
from .depth_weights_attnres import first_derivative


# --- Full AttnRes ----------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class FullRead:
    """What phase 1 leaves for one sublayer, and where the sources of its own group begin.

    Deliberately not a tuple: FSDP casts tensors in tuples, and scores must stay in fp32.

    Attributes:
        earlier: phase 1 over the sources of earlier groups.
        start: slot of the first source of this group.
        sublayer: its index, or L for the output mix.
    """

    earlier: DepthRead
    start: int
    sublayer: int


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

    def _groups(self) -> list[tuple[int, int]]:
        return full_groups(self.num_sublayers)

    def read(self, first: int, last: int) -> list[FullRead]:
        """Phase 1 for the sublayers `[first, last)`; the output mix is one more row of the last group."""
        is_last = last == self.num_sublayers
        earlier = self._read(first, last + is_last)
        reads = [FullRead(read, self.bank.length, first + index) for index, read in enumerate(earlier)]
        if is_last:
            *reads, self.output_read = reads
        return reads

    def mix(self, read: FullRead, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Phase 2: the mix `[B, T, D]`, and the scores `[j, B, T]` of the group's own sources."""
        anchor, _ = self.split(state)
        base = self.form.base(read.earlier.row, anchor)
        scores = self.bank.score(read.sublayer, read.sublayer + 1, slice(read.start, None)).squeeze(1)
        if len(scores) == 0:
            return self.bank.row_to_keep(base), scores
        return self.bank.merge(base, read.earlier.offset, scores, self.form, read.start), scores

    def mix_weights(self, read: FullRead, scores: torch.Tensor) -> torch.Tensor:
        earlier = read.earlier.scores[:, read.earlier.position]
        weights = torch.softmax(torch.cat([earlier, scores]).movedim(0, -1), dim=-1)
        return weights * self.form.total(weights.shape[-1])

    def advance(self, read: FullRead, state: State, output: torch.Tensor, starts_block: bool) -> State:
        """Files a sublayer's `output` `[B, T, D]`."""
        anchor, _ = self.split(state)
        return (*(stream + output for stream in anchor), self.file(output))

    def close(self, state: State, next_sublayer: int) -> State:
        return state

    def stacked_sources(self, state: State) -> torch.Tensor:
        return torch.stack(self.sources, dim=-2)


# --- A decode step ---------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class DecodeRead:
    """What one sublayer reads, and where its output goes.

    Deliberately not a tuple: FSDP casts tensors in tuples, and the layer would write to a copy.

    Attributes:
        live: the sources that it sees.
        query: `[D']`, its folded query and zeros, in at least fp32, see [`LiveSources`].
        opening: `[B, T, D]`, the slot of a block that its output opens; `None` behind the last slot.
    """

    live: LiveSources
    query: torch.Tensor
    opening: torch.Tensor | None


class DecodeStream(DepthStream):
    """The depth side of one decode step, all sublayers in one group; every source is in the bank, in at least fp32."""

    def _groups(self) -> list[tuple[int, int]]:
        return [(0, self.num_sublayers)]

    def start(self, embedding: torch.Tensor) -> State:
        """Writes the embedding `[B, T, D]` to the bank as the first source; returns the first depth state."""
        self.dtype, self.shape = embedding.dtype, embedding.shape
        capacity = 1 + math.ceil(self.num_sublayers / self.sublayers_per_block)
        self.bank.reset_for_decode(embedding, capacity, self.norm_floor, self.plan.bank)
        self.bank.live(1).newest.copy_(embedding)
        return (embedding,) * self.form.anchored

    def read(self, first: int, last: int) -> list[DecodeRead]:
        """The reads of the sublayers `[first, last)`, which are all of them; the output mix's is kept."""
        lives = [self.bank.live(count) for count in range(1, len(self.bank.sources) + 1)]
        openings = [*(live.newest for live in lives[1:]), None]
        queries = nn.functional.pad(self.queries, (0, self.bank.sources.shape[-1] - self.shape[-1]))
        reads = []
        for sublayer, query in enumerate(queries.unbind(0)):
            started = math.ceil(sublayer / self.sublayers_per_block)  # blocks that have an output
            reads.append(DecodeRead(lives[started], query, openings[started]))
        *reads, self.output_read = reads
        return reads

    def mix(self, read: DecodeRead, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One softmax over all sources: the mix `[B, T, D]`, and its shares `[n, M, 1]`, which sum to 1."""
        live = read.live
        # Only the newest source has changed since the sublayer before. Its channel behind D is the floor of its norm.
        torch.linalg.vector_norm(live.newest_with_floor, dim=-1, out=live.newest_norm)
        torch.mv(live.rows, read.query, out=live.flat_dots)
        shares = torch.softmax(live.dots / live.norms, dim=0)
        weights = self.form.excess(shares, live.uniform).permute(1, 2, 0)
        if state:  # equal scores have the share 1 / n exactly as rounded: nothing is added to the stream
            anchor = state[0].to(shares.dtype).view(-1, 1, self.shape[-1])
            mix = torch.baddbmm(anchor, weights, live.per_token, alpha=len(shares))
        else:
            mix = torch.bmm(weights, live.per_token)
        mix = mix.view(self.shape)
        return mix if mix.dtype == self.dtype else mix.to(self.dtype), shares

    def mix_weights(self, read: DecodeRead, shares: torch.Tensor) -> torch.Tensor:
        return shares.movedim(0, -1).reshape(*self.shape[:-1], -1) * self.form.total(len(shares))

    def advance(self, read: DecodeRead, state: State, output: torch.Tensor, starts_block: bool) -> State:
        """Writes a sublayer's `output` `[B, T, D]` to the bank: it opens a block or is added to the open one."""
        if starts_block:
            read.opening.copy_(output)
        else:
            read.live.newest.add_(output)
        return tuple(stream + output for stream in state)

    def close(self, state: State, next_sublayer: int) -> State:
        return state

    def stacked_sources(self, state: State) -> torch.Tensor:
        sources = self.output_read.live.per_token.to(self.dtype, copy=True)
        return sources.unflatten(0, self.shape[:-1])


# --- The same by kernels ---------------------------------------------------------------------------------------------


class _FusedRows(torch.autograd.Function):
    """Phase 1 in one launch, forward and backward, with the bank's gradient handed on as in [`BlockSummaries`]."""

    @staticmethod
    def forward(ctx, link, scores, bank, form):
        ctx.sources, ctx.form = bank.sources, form
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores)
        return *phase_one_rows(scores, bank.sources[: len(scores)], form, impl="triton"), link.view_as(link)

    @staticmethod
    @first_derivative
    def backward(ctx, rows_gradient, offset_gradient, link_gradient):
        (scores,) = ctx.saved_tensors
        live = ctx.sources[: len(scores)]
        if rows_gradient is None:
            rows_gradient = live.new_zeros(scores.shape[1], *live.shape[1:])
        if link_gradient is None:
            link_gradient = torch.zeros_like(ctx.sources)
        scores_gradient = phase_one_rows_backward(
            rows_gradient, offset_gradient, scores, live, ctx.form, link_gradient[: len(scores)], impl="triton"
        )
        return link_gradient, scores_gradient, None, None


class FusedNorm:
    """Which norms a stream takes into its launches."""

    def fused_norm(self, norm: nn.Module | None) -> tuple[torch.Tensor | None, float | None]:
        """Weight and epsilon of `norm` if it goes into the launch of the mix before it; `None` for both if not.

        A kernel sums in another order than the module: where mixes are anchored, so that zero queries give the plain
        model bit for bit, the module is called.
        """
        return (None, None) if self.form.anchored else plain_rms_norm(norm)


class FusedStream(FusedNorm, DepthStream):
    """[`DepthStream`] in one launch from one sublayer's output to the next one's input, and one for phase 1."""

    def _read(self, first: int, last: int) -> list[DepthRead]:
        if len(self.sources) == 1:
            return super()._read(first, last)
        scores, form = self.score(first, last), "sum" if self.form.anchored else "mean"
        if self.bank.link is None:
            rows, offset = phase_one_rows(scores, self.bank.sources[: len(scores)], form, impl="triton")
        else:
            rows, offset, self.bank.link = _FusedRows.apply(self.bank.link, scores, self.bank, form)
        return self._as_reads(first, self.queries[first:last], rows.unbind(0), offset, scores)

    def mix(self, read: DepthRead, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.split(state)[1] or torch.compiler.is_compiling():  # a layer that is compiled by itself
            return super().mix(read, *state)
        return self._merge(read, None, state)[1::2]

    def mix_and_norm(self, read: DepthRead, norm: nn.Module, state: State):
        if not self.split(state)[1] or torch.compiler.is_compiling():
            return super().mix_and_norm(read, norm, state)
        return self._merge(read, norm, state)[1:]

    def advance_and_mix(self, read, next_read: DepthRead, norm: nn.Module, state: State, output, starts_block: bool):
        if torch.compiler.is_compiling():
            return super().advance_and_mix(read, next_read, norm, state, output, starts_block)
        return self._merge(next_read, norm, state, output, starts_block)

    def _merge(self, read: DepthRead, norm: nn.Module | None, state: State, output=None, starts_block: bool = False):
        """The state with `output`, the mix of `read`, `norm` of it, and the recent source's logit."""
        anchor, recents = self.split(state)
        weight, eps = self.fused_norm(norm)
        merged = merge(
            read.row,
            read.offset.squeeze(-1),
            read.query.squeeze(-1),
            None if starts_block else recents[-1],
            read.norm_floor,
            output=output,
            stream=anchor[0] if anchor else None,
            num_sources=len(read.scores) + 1,
            norm_weight=weight,
            norm_eps=eps,
            impl="triton",
        )
        normed = norm(merged.mix) if weight is None and norm is not None else merged.normed
        state = (merged.stream, merged.recent) if anchor else (merged.recent,)
        return state, merged.mix, normed, merged.logit.unsqueeze(-1)


class FusedDecodeStream(FusedNorm, DecodeStream):
    """[`DecodeStream`] in one launch from one sublayer's output to the next one's input."""

    def mix(self, read: DecodeRead, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._decode(read, None, state)[1::2]

    def mix_and_norm(self, read: DecodeRead, norm: nn.Module, state: State):
        return self._decode(read, norm, state)[1:]

    def advance_and_mix(self, read, next_read: DecodeRead, norm: nn.Module, state: State, output, starts_block: bool):
        return self._decode(next_read, norm, state, output, starts_block)

    def _decode(self, read: DecodeRead, norm: nn.Module | None, state: State, output=None, starts_block: bool = False):
        """The state with `output`, the mix of `read`, `norm` of it, and its shares `[n, M, 1]`."""
        weight, eps = self.fused_norm(norm)
        decoded = decode_mix(
            self.bank.sources,
            len(read.live.dots),
            read.query,
            self.norm_floor,
            output=output,
            opens_block=starts_block,
            stream=state[0] if state else None,
            norm_weight=weight,
            norm_eps=eps,
            dtype=self.dtype,
            impl="triton",
        )
        normed = norm(decoded.mix) if weight is None and norm is not None else decoded.normed
        state = () if decoded.stream is None else (decoded.stream,)
        return state, decoded.mix, normed, decoded.weights.flatten(1).unsqueeze(-1)


def plain_rms_norm(norm: nn.Module | None) -> tuple[torch.Tensor | None, float | None]:
    """Weight and epsilon of a norm that does what Llama's RMSNorm does, and that nothing hooks; `None` for others."""
    eps = getattr(norm, "variance_epsilon", None)
    hooks = norm is None or any((norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks))
    if hooks or not isinstance(eps, float) or "forward" in vars(norm) or not _is_llamas(type(norm).forward, eps):
        return None, None
    return norm.weight, eps


@functools.cache
def _is_llamas(forward: Callable, eps: float) -> bool:
    """Whether the `forward` of a norm gives the numbers of Llama's, bit for bit."""
    generator = torch.Generator("cpu").manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        values, weight = (torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in ((3, 8), (8,)))
        stand_in = SimpleNamespace(weight=weight, variance_epsilon=eps)
        try:
            found = forward(stand_in, values)
        except (AttributeError, TypeError):  # it is made of more than a weight and an epsilon
            return False
        if not torch.equal(found, rms_norm(values, weight, eps)):
            return False
    return True


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
