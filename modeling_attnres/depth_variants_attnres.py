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
"""Variants of depth attention that the paper ablates (arXiv 2603.15031, Table 4), for research.

Letters: B batch, T tokens, D hidden size, L sublayers, N blocks, n sources of a mix, H heads.

Every variant replaces one step of `h_l = sum_i a_i v_i`, `a = softmax_i(w_l . RMSNorm_l(v_i))`. They are computed as
written, source by source, with plain autograd: what they cost is not what the two-phase computation costs. The state
between sublayers is all sources so far, so that gradient checkpointing sees tensors only.
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from .block_summaries_attnres import BlockSummaries, accumulation_dtype, norm_with_floor, without_autocast
from .configuration_attnres import AttnResConfig
from .depth_attention_attnres import FORMS, DepthAttention, DepthStream, MeanWeights, SumWeights, init_query
from .depth_decode_attnres import DecodeMean, DecodeStream, DecodeSum, is_decode_step
from .depth_full_attnres import FullMean, FullStream, FullSum


# --- Parameters ------------------------------------------------------------------------------------------------------


class UnnormedDepthAttention(DepthAttention):
    """Pseudo-queries without key norms."""

    def __init__(self, config: AttnResConfig):
        nn.Module.__init__(self)
        self.query = nn.Parameter(torch.zeros(config.num_sublayers, config.text_config.hidden_size))

    def init_weights(self, query_std: float):
        init_query(self.query, query_std)

    def forward(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the queries `[L + 1, D]`, row l for sublayer l, and a floor that nothing reads."""
        queries = self.query.to(accumulation_dtype(embedding.dtype))
        return nn.functional.pad(queries, (0, 0, 1, 0)), queries.new_zeros(())

    def extra_repr(self) -> str:
        return f"num_sublayers={self.query.shape[0]}, hidden_size={self.query.shape[1]}"


class StaticMixing(DepthAttention):
    """One learned scalar per sublayer and source. They start as the plain mean, like zero queries."""

    def __init__(self, config: AttnResConfig):
        nn.Module.__init__(self)
        self.sublayers_per_block = config.sublayers_per_block
        self.mixing_weights = nn.Parameter(torch.empty(config.num_sublayers, config.num_blocks + 1))
        self.init_weights(0.0)

    def init_weights(self, query_std: float):
        num_sublayers, num_sources = self.mixing_weights.shape
        live = 1 + torch.arange(num_sublayers).div(self.sublayers_per_block, rounding_mode="floor") + 1
        means = (torch.arange(num_sources) < live.unsqueeze(-1)) / live.unsqueeze(-1)
        init.copy_(self.mixing_weights, means.to(self.mixing_weights))

    def forward(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scalars `[L + 1, N + 1]`, row l for sublayer l, and a floor that nothing reads."""
        weights = self.mixing_weights.to(accumulation_dtype(embedding.dtype))
        return nn.functional.pad(weights, (0, 0, 1, 0)), weights.new_zeros(())

    def extra_repr(self) -> str:
        return f"num_sublayers={self.mixing_weights.shape[0]}, num_sources={self.mixing_weights.shape[1]}"


class InputDependentDepthAttention(DepthAttention):
    """A `[D, D]` projection per sublayer in place of its query; zeros at the start, as the queries are."""

    def __init__(self, config: AttnResConfig):
        nn.Module.__init__(self)
        self.eps = config.depth_norm_eps
        num_sublayers, hidden_size = config.num_sublayers, config.text_config.hidden_size
        self.query_projection = nn.Parameter(torch.zeros(num_sublayers, hidden_size, hidden_size))
        self.key_norm = nn.Parameter(torch.ones(num_sublayers, hidden_size))

    def init_weights(self, query_std: float):
        init_query(self.query_projection, query_std)
        init.ones_(self.key_norm)

    def forward(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Folds both key norms into the projection, as [`DepthAttention`] folds one into the query.

        Returns:
            `[L + 1, D, D]`, entry l for sublayer l, and the scalar `sqrt(D * eps)`.
        """
        dtype, width = accumulation_dtype(embedding.dtype), self.key_norm.shape[-1]
        gain = self.key_norm.to(dtype) * math.sqrt(width)
        projections = gain.unsqueeze(-1) * self.query_projection.to(dtype) * gain.unsqueeze(-2)
        projections = nn.functional.pad(projections, (0, 0, 0, 0, 1, 0))
        return projections, projections.new_full((), math.sqrt(self.eps * width))

    def extra_repr(self) -> str:
        return f"num_sublayers={self.key_norm.shape[0]}, hidden_size={self.key_norm.shape[1]}, eps={self.eps}"


# --- Forms -----------------------------------------------------------------------------------------------------------


class SourcesStream(DepthStream):
    """The depth side of a forward without bank and phases: every mix sees all sources, which are the depth state."""

    def start(self, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.embedding = embedding
        return self.form.start(embedding)

    def read(self, first: int, last: int) -> None:
        """Nothing to prepare: the layers are given their rows of `queries`."""

    def close(self, state: tuple[torch.Tensor, ...], next_sublayer: int) -> tuple[torch.Tensor, ...]:
        return state

    def mix_output(self, state, with_weights: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        state = tuple(tensor.to(self.queries.device) for tensor in state)
        mix, weights = self.form.phase_two(self.queries[-1], self.norm_floor, *state)
        return mix, self.form.mix_weights(self.queries[-1], weights) if with_weights else None


class SourcesForm:
    """A mix over all sources: the steps that a variant replaces are `weights` and what they are made of.

    `advance` and `recents` are those of [`MeanWeights`], over a state that holds every source.
    """

    advance = staticmethod(MeanWeights.advance)
    recents = staticmethod(MeanWeights.recents)
    outward = staticmethod(MeanWeights.outward)

    def stream(self, *args, **kwargs) -> SourcesStream:
        return SourcesStream(*args, form=self, **kwargs)

    def start(self, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (embedding,)

    def read_sources(
        self, queries: torch.Tensor, sources: tuple, norm_floor: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The parameters of each of a layer's mixes; the sources come with the state."""
        return queries.unbind(0)

    @without_autocast
    def phase_two(self, query: torch.Tensor, norm_floor: torch.Tensor, *state: torch.Tensor):
        """The mix `[B, T, D]` of the n sources `[B, T, D]` in `state`, and its weights `[n, B, T]` (or `[n, B, T, H]`).

        A single source is handed on as it is: sublayer 0 has no query.
        """
        if len(state) == 1:
            return state[0], state[0].new_ones((1, *state[0].shape[:-1]), dtype=query.dtype)
        values = torch.stack(state).to(query.dtype)
        weights = self.weights(query, values, norm_floor)
        return self.weighted_sum(weights, values).to(state[0].dtype), weights

    def mix_weights(self, query: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weights as `[B, T, n]`."""
        return weights.movedim(0, -1)

    def scores(self, query: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
        """`[n, B, T]`: the query `[D]`, folded as in [`DepthAttention`], with the normed sources `[n, B, T, D]`."""
        return (values @ query) / norm_with_floor(values, norm_floor).squeeze(-1)

    def weights(self, query: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.scores(query, values, norm_floor), dim=0)

    def weighted_sum(self, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (weights.unsqueeze(-1) * values).sum(0)


class StaticWeights(SourcesForm):
    """`h_l = sum_i alpha_{l,i} v_i` with learned scalars (input-independent mixing, in the manner of DenseFormer)."""

    def weights(self, query: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
        return query[: len(values)].view(-1, 1, 1).expand(values.shape[:-1])


class SigmoidWeights(SourcesForm):
    """`a_i = sigmoid(w_l . RMSNorm_l(v_i))`: sources do not compete."""

    def weights(self, query: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.scores(query, values, norm_floor))


class UnnormedKeys(SourcesForm):
    """`a = softmax_i(w_l . v_i)`: large sources weigh in by their size."""

    def scores(self, query: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
        return values @ query


class SlidingWindow(SourcesForm):
    """The softmax sees the embedding and the last `window` sources; older ones have weight 0."""

    def __init__(self, window: int):
        self.window = window

    def scores(self, query: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
        scores = super().scores(query, values, norm_floor)
        index = torch.arange(len(scores), device=scores.device).view(-1, 1, 1)
        hidden = (index > 0) & (index < len(scores) - self.window)
        return scores.masked_fill(hidden, float("-inf"))


class MultiHead(SourcesForm):
    """Every slice of `D / H` channels has its own softmax over depth; keys are normed over all of D.

    `mix_weights` gives the average over heads.
    """

    def __init__(self, num_heads: int):
        self.num_heads = num_heads

    def scores(self, query: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
        per_head = (values * query).unflatten(-1, (self.num_heads, -1)).sum(-1)
        return per_head / norm_with_floor(values, norm_floor)

    def weighted_sum(self, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (weights.unsqueeze(-1) * values.unflatten(-1, (self.num_heads, -1))).sum(0).flatten(-2)

    def mix_weights(self, query: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return super().mix_weights(query, weights.mean(-1) if weights.dim() == 4 else weights)


class InputDependentQuery(SourcesForm):
    """`w_l = W_l RMSNorm_l(v_n)`: the query is projected from the most recent source, token by token."""

    def scores(self, query: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
        normed = values / norm_with_floor(values, norm_floor)
        return (normed @ query * normed[-1]).sum(-1)


# --- Choice ----------------------------------------------------------------------------------------------------------


def build_depth_attention(config: AttnResConfig) -> tuple[DepthAttention, "type[MeanWeights] | SourcesForm"]:
    """The module that owns the depth parameters, and the form that computes mixes with them.

    Chosen once, when a model is built: a forward does not know which one it runs.
    """
    kind = config.depth_attention_type
    if kind == "static":
        return StaticMixing(config), StaticWeights()
    if kind == "no_key_norm":
        return UnnormedDepthAttention(config), UnnormedKeys()
    if kind == "input_dependent":
        return InputDependentDepthAttention(config), InputDependentQuery()
    forms = {
        "softmax": FORMS[config.depth_weights],
        "sigmoid": SigmoidWeights(),
        "sliding_window": SlidingWindow(config.depth_window),
        "multi_head": MultiHead(config.depth_heads),
    }
    return DepthAttention(config.num_sublayers, config.text_config.hidden_size, config.depth_norm_eps), forms[kind]


# The forms of the method itself have faster ways through one forward.
DECODE_FORMS = {MeanWeights: DecodeMean, SumWeights: DecodeSum}
FULL_FORMS = {MeanWeights: FullMean, SumWeights: FullSum}


def open_stream(
    form,
    embedding: torch.Tensor,
    queries: torch.Tensor,
    norm_floor: torch.Tensor,
    bank: BlockSummaries,
    sublayers_per_block: int,
    undivided: bool = True,
) -> DepthStream:
    """The depth side of one forward over all sublayers, in the way that is fastest for its shape.

    Args:
        form: from [`build_depth_attention`].
        embedding: `[B, T, D]`, for its shape and device.
        queries, norm_floor: from [`DepthAttention`].
        bank: the block summaries to fill.
        sublayers_per_block: S.
        undivided: whether every sublayer reads and writes the bank itself: nothing that recomputes a layer, or hands
            it copies, stands in between.
    """
    arguments = (queries, norm_floor, bank, sublayers_per_block)
    if not undivided or torch.compiler.is_compiling() or form not in DECODE_FORMS:
        return form.stream(*arguments)
    if is_decode_step(embedding):
        return DecodeStream(*arguments, form=DECODE_FORMS[form])
    if sublayers_per_block == 1:
        return FullStream(*arguments, form=FULL_FORMS[form])
    return form.stream(*arguments)
