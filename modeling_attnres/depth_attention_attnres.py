# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Attention over depth in the two phases of Algorithm 1 (arXiv 2603.15031): parameters, schedule, and the depth stream.

Letters: B batch, T tokens, M = B * T, D hidden size, L sublayers (two per decoder layer), S sublayers per block,
N blocks, n sources (the embedding and the blocks so far), R queries read together.

A *source* is the token embedding or the sum of a block's sublayer outputs. Sublayer l reads the mix
`h_l = sum_i a_i v_i` with `a = softmax_i(w_l . RMSNorm_l(v_i))` over all earlier sources (equations 2 to 6).

Two phases make that cheap: the queries `w_l` do not depend on the input, so phase 1 reads the finished sources once
for a whole *group* of sublayers, and phase 2 merges the one *recent* source that appeared since (the open block's
partial sum, or a block that closed inside the group) by online softmax. Both phases are exact.

A [`DepthStream`] takes the same steps whatever it runs: `read` is phase 1, `mix` is phase 2, `advance` the block
boundary, `close` fills the cache of block summaries. What to run is decided in [`plan_depth`], and nowhere else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers import initialization as init

from .block_summaries_attnres import ANY_DEVICE, BankPlan, BlockSummaries, weighted_sum
from .depth_launch_attnres import runs_kernels
from .depth_weights_attnres import (
    Form,
    accumulation_dtype,
    derives_gradients,
    has_kernel,
    is_autocast,
    merge_recent,
    phase_one_weights,
    source_norm,
    split_queries,
    without_autocast,
)


# --- Parameters ------------------------------------------------------------------------------------------------------


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


# --- What to run -----------------------------------------------------------------------------------------------------


# Rows of phase 1 held at a time: a long block is several groups, so that S = L does not hold L rows of [B, T, D].
MAX_GROUP_SUBLAYERS = 8

# On a processor: above this many tokens, laying rows out one by one pays off (earlier in half precision)...
MANY_TOKENS, MANY_HALF_TOKENS = 1024, 128
# ...from products over so many tokens, which stay in its cache until then.
TOKENS_AT_ONCE = 64
# A compiler sums over so many tokens in one kernel.
TOKENS_OF_A_COPY = 128
# Up to so many tokens a single pass over all sources takes less time than two phases: it moves more bytes in fewer
# calls. A processor soon pays for the bytes, other devices longer for the calls.
MAX_DECODE_TOKENS, MAX_DECODE_TOKENS_ON_CPU = 128, 32


@dataclass
class DepthPlan:
    """What one forward runs.

    Attributes:
        kernels: whether what a stream does between two sublayers is a kernel.
        one_pass: every mix in one pass over all sources, in place of two phases.
        files_outputs: with S = 1, sublayers file their outputs in the bank, and a group shares phase 1.
        uses_bank: whether sources lie in the bank; without, they are separate tensors in plain autograd.
        bank: how the device wants the bank's products.
        query_copies: P, how many copies of a query share the tokens in phase 2. A compiler sums a gradient over many tokens
            in two kernels; with copies the first leaves the gradients of P, and the second is one for all queries.
    """

    kernels: bool
    one_pass: bool
    files_outputs: bool
    uses_bank: bool
    bank: BankPlan
    query_copies: int = 1


def plan_depth(embedding: torch.Tensor, num_sublayers: int, sublayers_per_block: int, undivided: bool) -> DepthPlan:
    """Decides what to run, from the shape, dtype and device of the `embedding` `[B, T, D]`, and from gradients.

    The environment variable `ATTNRES_KERNELS` has the last word on kernels: `auto` (the default) uses them where they can
    run, `off` never does, `on` asks for them.

    Args:
        num_sublayers, sublayers_per_block: L, S.
        undivided: whether every sublayer reads and writes the bank itself: nothing that recomputes a layer, or hands
            it copies, stands in between.

    Raises:
        ValueError: if kernels are asked for and cannot run, with the reason.
    """
    gradients, device, dtype = torch.is_grad_enabled(), embedding.device.type, embedding.dtype
    if derives_gradients():
        # A bank is written in place, which only a compiler can undo, and only without gradients.
        compiles, num_tokens = torch.compiler.is_compiling(), embedding.shape[0] * embedding.shape[1]
        shared = compiles and gradients and statically_known_true(num_tokens % TOKENS_OF_A_COPY == 0)
        copies = num_tokens // TOKENS_OF_A_COPY if shared else 1
        return DepthPlan(False, False, False, compiles and not gradients, ANY_DEVICE, copies)
    batch, tokens, _ = embedding.shape
    if device == "cpu":
        many = MANY_HALF_TOKENS if embedding.element_size() == 2 else MANY_TOKENS
        bank = BankPlan(tokens_at_once=TOKENS_AT_ONCE if batch * tokens >= many else None)
    else:
        # Fast products of half precision need addresses of 16 bytes.
        in_half = dtype == torch.bfloat16 and has_kernel("mm.dtype", device)
        bank = BankPlan(in_half=in_half, alignment=8, floor_channels=8)
    few = MAX_DECODE_TOKENS_ON_CPU if device == "cpu" else MAX_DECODE_TOKENS
    one_pass = (
        undivided
        and not gradients
        # `generate` steps over `[B, 1]`; servers pack the tokens of all sequences into one row `[1, T]`.
        and min(batch, tokens) == 1
        and max(batch, tokens) <= few
        and not is_autocast(device)  # it would round scores to half precision
        and has_kernel("_weight_norm_interface", device)
    )
    files_outputs = undivided and not one_pass and sublayers_per_block == 1
    kernels = False
    if not files_outputs:  # there, one product merges the sources of a group
        kernels = runs_kernels(embedding, 1 + math.ceil(num_sublayers / sublayers_per_block), MAX_GROUP_SUBLAYERS + 1)
    if kernels and one_pass:
        bank = replace(bank, floor_channels=0)
    return DepthPlan(kernels, one_pass, files_outputs, True, bank)


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


# --- The depth stream ------------------------------------------------------------------------------------------------


State = tuple[torch.Tensor, ...]


class DepthRead:
    """What phase 1 leaves for one sublayer.

    Deliberately neither a tuple nor a dataclass: FSDP casts the tensors in those, and scores must stay in fp32.
    Accelerate moves what has a `to` with a layer's other inputs.

    Args:
        query: `[P, D]`, copies of its folded query, in at least fp32; P is 1 but for compiled training.
        query_parts: `[3, D]`, the same in bf16 parts, or `None`, see [`split_queries`].
        row: `[B, T, D]`, its (form-dependent) sum over the sources of phase 1; `None` for a sum known to be zero.
        offset: `[B, T, 1]`, what puts the scores of later sources on the scale of the row, in at least fp32.
        scores: `[n, R, B, T]`, the scores of the whole group, in at least fp32.
        position: which of the R queries this is.
        sublayer: the sublayer that it is for.
        norm_floor: see [`DepthAttention`].
    """

    def __init__(
        self, query, query_parts, row, offset, scores, position: int, sublayer: int, norm_floor: torch.Tensor
    ):
        self.query, self.query_parts, self.row, self.offset = query, query_parts, row, offset
        self.scores, self.position, self.sublayer, self.norm_floor = scores, position, sublayer, norm_floor

    def to(self, device: torch.device, non_blocking: bool = False) -> "DepthRead":
        def moved(value):
            return value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value

        return type(self)(**{name: moved(value) for name, value in vars(self).items()})


class DepthStream:
    """The depth side of one forward: what the residual stream is to a PreNorm decoder.

    Layers ask it for the mix that a sublayer reads ([`mix`]) and hand it the output ([`advance`]). It owns the bank for
    the forward; the *depth state* (the plain stream under `"sum"`, and the recent sources) flows through the layers as
    tensors:

        start(e) -> state     read(group) -> reads                             close(state) -> state     mix_output
                                    |                                                ^
                              mix(read, *state) -> h [B, T, D] -> sublayer -> advance(read, state, output)

    Args:
        form: how weights come from scores, one of `FORMS`.
        queries, norm_floor: from [`DepthAttention`].
        bank: the block summaries to fill.
        sublayers_per_block: S.
        plan: from [`plan_depth`].
        sublayers: the run `[first, last)` that this forward computes, whole decoder layers; all L if not given. A
            pipeline stage computes some, and scores the sources for these alone.
    """

    def __init__(
        self,
        form: Form,
        queries: torch.Tensor,
        norm_floor: torch.Tensor,
        bank: BlockSummaries,
        sublayers_per_block: int,
        plan: DepthPlan,
        sublayers: tuple[int, int] | None = None,
    ):
        self.form, self.queries, self.norm_floor, self.bank, self.plan = form, queries, norm_floor, bank, plan
        self.query_parts = split_queries(queries) if plan.bank.in_half and not plan.one_pass else None
        self.sublayers_per_block = sublayers_per_block
        self.num_sublayers = len(queries) - 1
        self.first, self.last = sublayers or (0, self.num_sublayers)
        self.groups = self._groups()
        # One past the last query that reads sources here: the output mix follows the last sublayer of the model.
        self.num_readers = self.last + (self.last == self.num_sublayers)
        # The finished sources: with a bank, alias by alias of its slots.
        self.sources: list[torch.Tensor] = []
        self.output_read = None

    @property
    def output_in_group(self) -> bool:
        """Whether the output mix meets the sources of the last group and at most one more, as one more row of it."""
        return self.sublayers_per_block % 2 == 0

    def _groups(self) -> list[tuple[int, int]]:
        groups = sublayer_groups(self.num_sublayers, self.sublayers_per_block)
        clipped = [(max(first, self.first), min(last, self.last)) for first, last in groups]
        return [(first, last) for first, last in clipped if first < last]

    def start(self, embedding: torch.Tensor) -> State:
        """Empties the bank, files the embedding `[B, T, D]` as the first source; returns the first depth state."""
        self.resume((embedding,))
        return (embedding,) * self.form.anchored

    def resume(self, sources: Sequence[torch.Tensor]):
        """Empties the bank and files the sources `[B, T, D]` that were finished before the first sublayer."""
        if self.plan.uses_bank:
            capacity = 1 + math.ceil(self.last / self.sublayers_per_block)
            self.bank.reset(sources[0], capacity, self.num_readers, self.plan.bank)
        self.embedding = sources[0]
        for source in sources:
            self.file(source)

    def file(self, source: torch.Tensor) -> torch.Tensor:
        """Makes `source` `[B, T, D]` the next finished source, and returns it as it is kept."""
        if self.plan.uses_bank:
            # Source k is complete when sublayer k * S begins, and no earlier query reads it from the bank.
            first_reader = min(max(self.bank.length * self.sublayers_per_block, self.first), self.num_sublayers)
            source = self.bank.append(source, self.queries[: self.num_readers], self.norm_floor, first_reader)
        self.sources.append(source)
        return source

    # --- Phase 1

    def read(self, first: int, last: int) -> list[DepthRead]:
        """Phase 1 for the sublayers `[first, last)`."""
        with_output = last == self.num_sublayers and self.output_in_group
        readers = slice(first, last + with_output)
        reads = self.read_again(self.queries[readers], self.score(readers.start, readers.stop), first=first)
        if with_output:
            *reads, self.output_read = reads
        return reads

    def inputs_again(self, first: int) -> tuple[torch.Tensor, ...]:
        """All that has a gradient and that [`read_again`] wants for the decoder layer of sublayer `first`."""
        return (self.queries[first : first + 2], self.score(first, first + 2), *self.sources)

    @without_autocast
    def read_again(
        self, queries: torch.Tensor, scores: torch.Tensor, *sources: torch.Tensor, first: int
    ) -> list[DepthRead]:
        """Phase 1 for sublayers from `first` on; a layer that is run again in backward is handed all that has a gradient.

        Args:
            queries: `[R, D]`, the folded queries.
            scores: `[n, R, B, T]`, from [`score`].
            sources: all n finished sources `[B, T, D]`, in a layer that is run again.
        """
        if len(scores) == 1:
            # Not the bank's copy: a mix handed to the user must outlive the bank's next use.
            source = sources[0] if sources else self.embedding
            rows = [None if self.form.anchored else source] * len(queries)
            offset = scores[0] / -self.form.offset_slope
        else:
            rows, offset = self.sum_rows(scores, sources)
        parts, norm_floor = [None] * len(queries), self.norm_floor.to(queries.device)
        if self.query_parts is not None:
            parts = self.query_parts[first : first + len(queries)].to(queries.device).unbind(0)
        # The first sublayer of a block merges nothing: apart, it is not made a gradient of zeros.
        apart = first % self.sublayers_per_block == 0
        copies, offsets = queries.unsqueeze(1).expand(-1, self.plan.query_copies, -1), offset.unsqueeze(-1)
        copies, offsets = (
            (every[0], *every[1:].unbind(0)) if apart else every.unbind(0) for every in (copies, offsets)
        )
        of_reads = zip(copies, parts, rows, offsets)
        return [
            DepthRead(*of_read, scores, position, first + position, norm_floor)
            for position, of_read in enumerate(of_reads)
        ]

    def sum_rows(self, scores: torch.Tensor, sources: tuple[torch.Tensor, ...]) -> tuple[Sequence, torch.Tensor]:
        """The rows `[B, T, D]` and the offsets `[R, B, T]` of phase 1 over several sources, see [`read_again`]."""
        weights, offset = phase_one_weights(scores, self.form)
        if self.plan.uses_bank:
            return self.bank.weighted_sum(weights, sources), offset
        stacked = torch.stack(sources or self.sources)
        return weighted_sum(weights.to(stacked.dtype), stacked), offset

    def score(self, first: int, last: int) -> torch.Tensor:
        """The scores `[n, R, B, T]` that the queries `[first, last)` give the finished sources."""
        if self.plan.uses_bank:
            return self.bank.score(first, last)
        return self._score_plainly(self.queries[first:last])

    @without_autocast
    def _score_plainly(self, queries: torch.Tensor) -> torch.Tensor:
        values = torch.stack(self.sources).to(queries.dtype)
        return ((values @ queries.T) / source_norm(values, self.norm_floor)).movedim(-1, 1)

    # --- Phase 2

    def mix(self, read: DepthRead, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Phase 2: merges the recent source, if there is one, into the row of phase 1.

        Returns:
            the mix `[B, T, D]`, and what [`mix_weights`] wants of it.
        """
        base, (_, recents) = self.base(read, state), self.split(state)
        if not recents:
            return base if self.form.anchored else self.bank.row_to_keep(base), None
        return merge_recent(
            *(self.form, base, read.offset, read.query, recents[-1], read.norm_floor),
            num_sources=len(read.scores) + 1,
            query_parts=read.query_parts,
        )

    def base(self, read: DepthRead, state: State) -> torch.Tensor:
        """What recent sources are merged into: phase 1's row `[B, T, D]`, on top of the plain stream if anchored."""
        if not self.form.anchored:
            return read.row
        return state[0] if read.row is None else state[0] + read.row

    def mix_and_norm(
        self, read, norm: nn.Module, state: State
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The mix, `norm` of it, which is what a sublayer's function reads, and what [`mix_weights`] wants."""
        mix, found = self.mix(read, *state)
        return mix, norm(mix), found

    def advance_and_mix(
        self, read, next_read, norm: nn.Module, state: State, output: torch.Tensor, starts_block: bool
    ):
        """From the `output` `[B, T, D]` of one sublayer to the input of the next: the new state, and [`mix_and_norm`]."""
        state = self.advance(read, state, output, starts_block)
        return state, *self.mix_and_norm(next_read, norm, state)

    def mix_weights(self, read: DepthRead, found: torch.Tensor | None) -> torch.Tensor:
        """The weights `[B, T, n]` of a mix, from what phase 1 and `mix` computed it with."""
        scores = read.scores[:, read.position]
        if found is not None:
            scores = torch.cat([scores, self.recent_scores(read, found)])
        return torch.softmax(scores, dim=0).movedim(0, -1) * self.form.total(len(scores))

    def recent_scores(self, read: DepthRead, logit: torch.Tensor) -> torch.Tensor:
        """`[j, B, T]`, the scores of the recent sources, from what `mix` found."""
        return (self.form.offset_slope * (logit - read.offset)).movedim(-1, 0)

    def mix_output(self, state: State, with_weights: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output mix `[B, T, D]` over all sources, and if asked its weights `[B, T, n]`."""
        read = self.output_read or self.read(self.num_sublayers, self.num_sublayers + 1)[0]
        state = tuple(tensor.to(self.queries.device) for tensor in state)  # where layers sit on several devices
        mix, found = self.mix(read, *state)
        return mix, self.mix_weights(read, found) if with_weights else None

    # --- The block boundary

    def advance(self, read: DepthRead, state: State, output: torch.Tensor, starts_block: bool) -> State:
        """The state after a sublayer: its `output` `[B, T, D]` opens a block or is added to the open one."""
        anchor, recents = self.split(state)
        anchor = (stream + output for stream in anchor)
        if starts_block:
            return (*anchor, *recents, output)
        return (*anchor, *recents[:-1], recents[-1] + output)

    def close(self, state: State, next_sublayer: int) -> State:
        """Ends a group: files the blocks of `state` that are complete, and returns the state that is left."""
        if self.output_read is not None:
            return state
        anchor, recents = self.split(state)
        is_open = next_sublayer % self.sublayers_per_block != 0
        num_closed = len(recents) - is_open
        for source in recents[:num_closed]:
            self.file(source)
        return (*anchor, *recents[num_closed:])

    def split(self, state: State) -> tuple[State, State]:
        """The depth state as the anchor and the sources that are not in the bank, oldest first."""
        return state[: self.form.anchored], state[self.form.anchored :]

    def outward(self, state: State) -> State:
        """`state` in the order in which a decoder layer takes and returns it, and back.

        The stream comes first, as in a plain decoder layer. Without one, what was last written to does.
        """
        return state if self.form.anchored else state[::-1]

    def stacked_sources(self, state: State) -> torch.Tensor:
        """All sources in order of depth, `[B, T, n, D]`, as a copy that outlives the bank."""
        recents = (recent.to(self.embedding.device) for recent in self.split(state)[1])
        return torch.stack((*self.sources, *recents), dim=-2)
