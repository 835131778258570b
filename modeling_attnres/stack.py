# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Depth attention over any stack of functions, without a model around it.

Letters: B batch, T tokens, D hidden size, L sublayers, S sublayers per block.
"""

from collections.abc import Callable, Sequence

import torch

from .block_summaries_attnres import BlockSummaries
from .depth_attention_attnres import DepthAttention
from .depth_streams_attnres import open_stream
from .depth_weights_attnres import FORMS, naive_depth_attention


def attention_residuals(
    embedding: torch.Tensor,
    sublayers: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    query: torch.Tensor,
    key_norm: torch.Tensor,
    eps: float,
    sublayers_per_block: int,
    depth_weights: str = "mean",
    impl: str = "two_phase",
    block_summaries: BlockSummaries | None = None,
) -> torch.Tensor:
    """A stack of sublayers whose residual adds are attention over depth.

    Args:
        embedding: `[B, T, D]`.
        sublayers: L functions `[B, T, D] -> [B, T, D]`, pre-norm included; an even number.
        query, key_norm: `[L, D]` as in [`DepthAttention`].
        eps: epsilon of the key RMSNorm.
        sublayers_per_block: S, from 1 (Full AttnRes) to L.
        depth_weights: `"mean"` or `"sum"`.
        impl: `"two_phase"` (Algorithm 1) or `"naive"` (Figure 2, generalised to any S).
        block_summaries: an allocation to reuse, as in [`AttnResModel`]; only for `"two_phase"`.

    Returns:
        `[B, T, D]`: the output mix, which a PreNorm model would hand to its final norm.

    Raises:
        ValueError: on an unknown `impl` or `depth_weights`, an odd number of sublayers, or shapes that do not fit.
    """
    if impl not in ("naive", "two_phase"):
        raise ValueError(f"`impl` must be 'naive' or 'two_phase', got {impl!r}.")
    if depth_weights not in FORMS:
        raise ValueError(f"`depth_weights` must be one of {tuple(FORMS)}, got {depth_weights!r}.")
    num_sublayers = len(sublayers)
    if num_sublayers % 2 or not 1 <= sublayers_per_block <= num_sublayers:
        raise ValueError(
            "`sublayers` must be an even number of functions and `sublayers_per_block` from 1 to that number, got "
            f"{num_sublayers} and {sublayers_per_block}."
        )
    for name, parameter in (("query", query), ("key_norm", key_norm)):
        if parameter.shape != (num_sublayers, embedding.shape[-1]):
            raise ValueError(
                f"`{name}` must be [{num_sublayers}, {embedding.shape[-1]}], got {list(parameter.shape)}."
            )
    arguments = (embedding, sublayers, query, key_norm, eps, sublayers_per_block, depth_weights)
    if impl == "naive":
        return _naive_stack(*arguments)
    return _two_phase_stack(*arguments, block_summaries or BlockSummaries())


def _naive_stack(embedding, sublayers, query, key_norm, eps, sublayers_per_block, depth_weights):
    sources = [embedding]
    hidden_states = embedding
    for index, sublayer in enumerate(sublayers):
        if index > 0:
            hidden_states, _ = naive_depth_attention(
                torch.stack(sources), query[index - 1], key_norm[index - 1], eps, depth_weights
            )
        output = sublayer(hidden_states)
        if index % sublayers_per_block == 0:
            sources.append(output)
        else:
            sources[-1] = sources[-1] + output
    return naive_depth_attention(torch.stack(sources), query[-1], key_norm[-1], eps, depth_weights)[0]


def _two_phase_stack(embedding, sublayers, query, key_norm, eps, sublayers_per_block, depth_weights, bank):
    fold = DepthAttention(len(sublayers), embedding.shape[-1], eps)
    queries, norm_floor = torch.func.functional_call(fold, {"query": query, "key_norm": key_norm}, (embedding,))
    depth = open_stream(FORMS[depth_weights], embedding, queries, norm_floor, bank, sublayers_per_block)
    state = depth.start(embedding)
    for first, last in depth.groups:
        for index, read in enumerate(depth.read(first, last), start=first):
            hidden_states, _ = depth.mix(read, *state)
            output = sublayers[index](hidden_states)
            state = depth.advance(read, state, output, starts_block=index % sublayers_per_block == 0)
        state = depth.close(state, next_sublayer=last)
    return depth.mix_output(state)[0]
