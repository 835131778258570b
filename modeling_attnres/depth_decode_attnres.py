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
"""Depth attention for few tokens: every mix in one pass over all sources, as a decode step wants it.

Letters: B batch, T tokens, M = B * T, D hidden size, L sublayers, S sublayers per block, n sources of a mix.

A decode step moves few bytes; what it pays for is the number of calls. The two phases save bytes and cost calls, so
here there is one: `softmax_i(score_i)` over the sources where they lie. The open block grows inside the bank, its norm
is brought up to date before each mix, and nothing is filed, scored ahead or merged. The sources are kept in at least
fp32, which for few tokens is little. Not for training: the bank is written in place.

Depth attention is per token, so it does not matter how the tokens lie: `generate` steps over `[B, 1]`, one row per
sequence; servers and continuous batching pack the tokens of all sequences into one row `[1, T]`.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from .block_summaries_attnres import LiveSources
from .depth_attention_attnres import DepthStream


# More tokens are moved faster in two phases.
MAX_DECODE_BATCH = 32


def is_decode_step(embedding: torch.Tensor) -> bool:
    """Whether a forward over `embedding` `[B, T, D]` is one that this file is for: `[B, 1]` or `[1, T]`, few of them."""
    batch, tokens, _ = embedding.shape
    return (
        min(batch, tokens) == 1
        and max(batch, tokens) <= MAX_DECODE_BATCH
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(embedding.device.type)  # it would round scores to half precision
    )


@dataclass(slots=True, eq=False)
class DecodeRead:
    """What one sublayer reads, and where its output goes.

    Not a tuple, on purpose: whoever walks through a layer's arguments and replaces tensors (FSDP casts them) would hand
    the layer copies of what it has to write.

    Attributes:
        live: the sources that it sees.
        query: `[D + 1]`, its folded query and a zero, in at least fp32.
        opening: `[B, T, D]`, the slot of a block that its output opens; `None` behind the last slot.
        dtype, shape: of the mix, `[B, T, D]`.
    """

    live: LiveSources
    query: torch.Tensor
    opening: torch.Tensor | None
    dtype: torch.dtype
    shape: torch.Size


class DecodeMean:
    """Weights that sum to 1, as in [`MeanWeights`]. Everything is in the bank, the depth state is empty."""

    @staticmethod
    def start(embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ()

    @staticmethod
    def outward(state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return state

    @classmethod
    def phase_two(cls, read: DecodeRead, norm_floor: torch.Tensor, *state: torch.Tensor):
        """The mix `[B, T, D]`, and its weights `[n, M, 1]`, which sum to 1."""
        live = read.live
        # Only the newest source has changed since the sublayer before. Its last channel is the floor of its norm.
        torch.linalg.vector_norm(live.newest_with_floor, dim=-1, out=live.newest_norm)
        torch.mv(live.rows, read.query, out=live.flat_dots)
        weights = torch.softmax(live.dots / live.norms, dim=0)
        mix = cls.weighted_sum(read, weights, *state)
        return mix if mix.dtype == read.dtype else mix.to(read.dtype), weights

    @staticmethod
    def weighted_sum(read: DecodeRead, weights: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` from weights `[n, M, 1]`."""
        return torch.bmm(weights.permute(1, 2, 0), read.live.per_token).view(read.shape)

    @staticmethod
    def mix_weights(read: DecodeRead, weights: torch.Tensor) -> torch.Tensor:
        """The weights as `[B, T, n]`."""
        return weights.movedim(0, -1).reshape(*read.shape[:-1], -1)

    @staticmethod
    def advance(read: DecodeRead, state: tuple[torch.Tensor, ...], output: torch.Tensor, starts_block: bool):
        """Writes a sublayer's `output` `[B, T, D]` to the bank: it opens a block or is added to the open one."""
        if starts_block:
            read.opening.copy_(output)
        else:
            read.live.newest.add_(output)
        return state


class DecodeSum(DecodeMean):
    """Weights that sum to n, as in [`SumWeights`]: `stream + sum_i (n a_i - 1) v_i`. The state is the stream.

    Equal scores have the softmax `1 / n` exactly as rounded here, so zero queries hand on the stream bit for bit.
    """

    @staticmethod
    def start(embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (embedding,)

    @staticmethod
    def weighted_sum(read: DecodeRead, weights: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        per_token = stream.to(weights.dtype).view(-1, 1, read.shape[-1])
        excess = (weights - read.live.uniform).permute(1, 2, 0)
        return torch.baddbmm(per_token, excess, read.live.per_token, alpha=len(weights)).view(read.shape)

    @classmethod
    def mix_weights(cls, read: DecodeRead, weights: torch.Tensor) -> torch.Tensor:
        return super().mix_weights(read, weights) * len(weights)

    @staticmethod
    def advance(read: DecodeRead, state: tuple[torch.Tensor, ...], output: torch.Tensor, starts_block: bool):
        (stream,) = DecodeMean.advance(read, state, output, starts_block)
        return (stream + output,)


class DecodeStream(DepthStream):
    """The depth side of one decode step, all sublayers in one group. `form` is [`DecodeMean`] or [`DecodeSum`]."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.groups = [(0, self.num_sublayers)]

    def start(self, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Writes the embedding `[B, T, D]` to the bank as the first source; returns the first depth state."""
        self.dtype, self.shape = embedding.dtype, embedding.shape
        capacity = 1 + math.ceil(self.num_sublayers / self.sublayers_per_block)
        self.bank.reset_for_decode(embedding, capacity, self.norm_floor)
        self.bank.live(1).newest.copy_(embedding)
        return self.form.start(embedding)

    def read(self, first: int, last: int) -> list[DecodeRead]:
        """The reads of the sublayers `[first, last)`, which are all of them; the output mix's is kept."""
        lives = [self.bank.live(count) for count in range(1, len(self.bank.sources) + 1)]
        openings = [*(live.newest for live in lives[1:]), None]
        reads = []
        for sublayer, query in enumerate(nn.functional.pad(self.queries, (0, 1)).unbind(0)):
            started = math.ceil(sublayer / self.sublayers_per_block)  # blocks that have an output
            reads.append(DecodeRead(lives[started], query, openings[started], self.dtype, self.shape))
        *reads, self.output_read = reads
        return reads

    def stacked_sources(self, state: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """All sources in order of depth, `[B, T, n, D]`, as a copy that outlives the bank."""
        sources = self.output_read.live.per_token.to(self.dtype, copy=True)
        return sources.unflatten(0, self.shape[:-1])
