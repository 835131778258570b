# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Variants of depth attention that the paper ablates (arXiv 2603.15031, Table 4), for research.

Letters: B batch, T tokens, D hidden size, L sublayers, N blocks, n sources of a mix, H heads.

Every variant replaces one step of `h_l = sum_i a_i v_i`, `a = softmax_i(w_l . RMSNorm_l(v_i))`. They are computed as
written, source by source, with plain autograd: what they cost is not what the two-phase computation costs. The state
between sublayers is all sources so far, so that gradient checkpointing sees tensors only.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init

from .configuration_attnres import AttnResConfig
from .depth_attention_attnres import DepthAttention, DepthStream, State, init_query
from .depth_weights_attnres import FORMS, Form, accumulation_dtype, source_norm, without_autocast


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


# --- Scores: `[n, B, T]` (or `[n, B, T, H]`) of the sources `values` `[n, B, T, D]` ------------------------------------


def normed_scores(query: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
    """`w_l . RMSNorm_l(v_i)`, with the query `[D]` folded as in [`DepthAttention`]: the method's own."""
    return (values @ query) / source_norm(values, norm_floor).squeeze(-1)


def unnormed_scores(query: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
    """`w_l . v_i`: large sources weigh in by their size."""
    return values @ query


def scores_per_head(query: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor, heads: int) -> torch.Tensor:
    """Every slice of `D / H` channels has scores of its own; keys are normed over all of D."""
    return (values * query).unflatten(-1, (heads, -1)).sum(-1) / source_norm(values, norm_floor)


def input_dependent_scores(projection: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
    """`w_l = W_l RMSNorm_l(v_n)`: the query is projected `[D, D]` from the most recent source, token by token."""
    normed = values / source_norm(values, norm_floor)
    return (normed * (normed[-1] @ projection.mT)).sum(-1)


def learned_scalars(scalars: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
    """`alpha_{l,i}` for every token (input-independent mixing, in the manner of DenseFormer)."""
    return scalars[: len(values)].view(-1, 1, 1).expand(values.shape[:-1])


# --- Weights from scores, over the first dimension --------------------------------------------------------------------

softmax = functools.partial(torch.softmax, dim=0)


def windowed_softmax(scores: torch.Tensor, window: int) -> torch.Tensor:
    """Sees the embedding and the last `window` sources; older ones have weight 0."""
    index = torch.arange(len(scores), device=scores.device).view(-1, 1, 1)
    hidden = (index > 0) & (index < len(scores) - window)
    return softmax(scores.masked_fill(hidden, float("-inf")))


# --- The form and its stream -----------------------------------------------------------------------------------------


class SourcesStream(DepthStream):
    """The depth side of a forward without bank and phases: every mix sees all sources, which are the depth state."""

    def start(self, embedding: torch.Tensor) -> State:
        self.embedding = embedding
        return (embedding,)

    def read(self, first: int, last: int) -> list[torch.Tensor]:
        """The parameters of each mix: there is nothing to read before it."""
        return list(self.queries[first:last].unbind(0))

    def inputs_again(self, first: int) -> tuple[torch.Tensor, ...]:
        return (self.queries[first : first + 2],)

    def read_again(self, queries: torch.Tensor, first: int) -> list[torch.Tensor]:
        return list(queries.unbind(0))

    def mix(self, read: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mix `[B, T, D]` of the n sources in `state`, and its weights `[n, B, T]` (or `[n, B, T, H]`)."""
        return self.form.mix(read, self.norm_floor.to(read.device), *state)

    def mix_weights(self, read: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weights as `[B, T, n]`, averaged over heads."""
        return (weights.mean(-1) if weights.dim() == 4 else weights).movedim(0, -1)

    def mix_output(self, state: State, with_weights: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        mix, weights = self.mix(self.queries[-1], *(tensor.to(self.queries.device) for tensor in state))
        return mix, self.mix_weights(self.queries[-1], weights) if with_weights else None

    def close(self, state: State, next_sublayer: int) -> State:
        return state


class SourcesForm:
    """A mix over all sources: `h = sum_i a_i v_i` with `a = weights(scores(w_l, v))`.

    Args:
        scores: one of the functions above, of a sublayer's parameters, the sources and the norm's floor.
        weights: one of the functions above, of the scores.
    """

    stream = SourcesStream
    anchored = 0

    def __init__(self, scores: Callable = normed_scores, weights: Callable = softmax):
        self.scores, self.weights = scores, weights

    @without_autocast
    def mix(self, query: torch.Tensor, norm_floor: torch.Tensor, *sources: torch.Tensor):
        """The mix `[B, T, D]` of n sources `[B, T, D]`, and its weights; a single one is handed on: it has no query."""
        if len(sources) == 1:
            return sources[0], sources[0].new_ones((1, *sources[0].shape[:-1]), dtype=query.dtype)
        values = torch.stack(sources).to(query.dtype)
        weights = self.weights(self.scores(query, values, norm_floor))
        per_channel = weights.unsqueeze(-1)
        if weights.dim() == 4:  # [n, B, T, H]: each head weighs its own slice
            mix = (per_channel * values.unflatten(-1, (weights.shape[-1], -1))).sum(0).flatten(-2)
        else:
            mix = (per_channel * values).sum(0)
        return mix.to(sources[0].dtype), weights


# --- Choice ----------------------------------------------------------------------------------------------------------


def build_depth_attention(config: AttnResConfig) -> tuple[DepthAttention, Form | SourcesForm]:
    """The module that owns the depth parameters, and the form that computes mixes with them.

    Chosen once, when a model is built: a forward does not know which one it runs.
    """
    kind = config.depth_attention_type
    if kind == "static":
        return StaticMixing(config), SourcesForm(learned_scalars, weights=lambda scalars: scalars)
    if kind == "no_key_norm":
        return UnnormedDepthAttention(config), SourcesForm(unnormed_scores)
    if kind == "input_dependent":
        return InputDependentDepthAttention(config), SourcesForm(input_dependent_scores)
    forms = {
        "softmax": FORMS[config.depth_weights],
        "sigmoid": SourcesForm(weights=torch.sigmoid),
        "sliding_window": SourcesForm(weights=functools.partial(windowed_softmax, window=config.depth_window)),
        "multi_head": SourcesForm(functools.partial(scores_per_head, heads=config.depth_heads)),
    }
    return DepthAttention(config.num_sublayers, config.text_config.hidden_size, config.depth_norm_eps), forms[kind]
