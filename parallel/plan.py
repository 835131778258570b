# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The cost of block summaries at scale, on paper: bytes between pipeline stages, memory of a prefill, overhead.

Pure arithmetic; nothing here builds a model. Letters: L sublayers (two per decoder layer), S sublayers per block, N
blocks, D hidden size, T tokens, P pipeline ranks, V virtual stages per rank, C = P * V stages, N_p blocks produced per
stage. Stage k runs on rank k mod P. A *source* is the embedding (source 0) or a finished block.

How much a stage has to be sent depends on what its rank keeps per micro-batch for its later virtual stages
(`caching`): nothing (`"none"`), the sources that it received, which is what the paper counts (`"received"`), or also
those that it produced itself (`"all"`).
"""

import math
from dataclasses import dataclass

from .layout import PipelineLayout, check_caching, formula_summaries, stage_boundaries


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class DepthShape:
    """What the costs depend on of a model.

    Attributes:
        num_layers: decoder layers, L / 2.
        hidden_size: D.
        sublayers_per_block: S.
        depth_weights: `"mean"`, or `"sum"`, under which the plain residual stream travels too.

    Raises:
        ValueError: if one is out of range.
    """

    num_layers: int
    hidden_size: int
    sublayers_per_block: int
    depth_weights: str = "mean"

    def __post_init__(self):
        check_positive(num_layers=self.num_layers, hidden_size=self.hidden_size)
        if not 1 <= self.sublayers_per_block <= self.num_sublayers:
            raise ValueError(
                f"`sublayers_per_block` must be from 1 to the {self.num_sublayers} sublayers (two per decoder layer), "
                f"got {self.sublayers_per_block}."
            )
        if self.depth_weights not in ("mean", "sum"):
            raise ValueError(f"`depth_weights` must be 'mean' or 'sum', got {self.depth_weights!r}.")

    @property
    def num_sublayers(self) -> int:
        """L."""
        return 2 * self.num_layers

    @property
    def num_blocks(self) -> int:
        """N = ceil(L / S)."""
        return math.ceil(self.num_sublayers / self.sublayers_per_block)


def check_positive(**values: float):
    """Raises a `ValueError` that names the first argument which is not positive."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")


# --- Pipeline parallelism --------------------------------------------------------------------------------------------


def pipeline_elements_per_token(
    num_ranks: int, virtual_stages: int, blocks_per_stage: int, hidden_size: int, caching: str = "received"
) -> int:
    """Elements of block summaries that a forward sends per token, where every stage ends where a block does.

        "none"      C (C - 1) / 2 N_p D                          (equation 7)
        "received"  P (P - 1) / 2 N_p D + (V - 1) P^2 N_p D      (equation 8)
        "all"       P (P - 1) / 2 N_p D + (V - 1) P (P - 1) N_p D

    The backward sends as much. As in the paper the embedding is not counted; see [`pipeline_transitions`].

    Args:
        num_ranks: P.
        virtual_stages: V.
        blocks_per_stage: N_p.
        hidden_size: D.
    """
    check_positive(
        num_ranks=num_ranks, virtual_stages=virtual_stages, blocks_per_stage=blocks_per_stage, hidden_size=hidden_size
    )
    check_caching(caching)
    return formula_summaries(num_ranks, virtual_stages, blocks_per_stage, caching) * hidden_size


def peak_elements_per_token(
    num_ranks: int, virtual_stages: int, blocks_per_stage: int, hidden_size: int, caching: str = "received"
) -> int:
    """The most that one transition of [`pipeline_elements_per_token`] sends: O(C) without caching, O(P) with it."""
    check_positive(
        num_ranks=num_ranks, virtual_stages=virtual_stages, blocks_per_stage=blocks_per_stage, hidden_size=hidden_size
    )
    check_caching(caching)
    if caching == "none":
        blocks = num_ranks * virtual_stages - 1
    else:
        blocks = num_ranks if caching == "received" and virtual_stages > 1 else num_ranks - 1
    return blocks * blocks_per_stage * hidden_size


@dataclass(frozen=True)
class Transition:
    """What one stage receives from the one before it.

    Attributes:
        stage: index of the receiving stage, from 1 to C - 1.
        sources: number of sources that its rank lacks, the embedding included.
        state: number of tensors of depth state: the open block's partial sum, and the stream under `"sum"`.
    """

    stage: int
    sources: int
    state: int

    @property
    def tensors(self) -> int:
        """Number of `[B, T, D]` tensors. A PreNorm pipeline sends one."""
        return self.sources + self.state


def pipeline_transitions(
    shape: DepthShape, num_ranks: int, virtual_stages: int = 1, caching: str = "all", splits: list[int] | None = None
) -> list[Transition]:
    """What every transition of a forward sends; blocks need not end where stages do.

    Args:
        splits: the decoder layer that each stage but the first begins with, C - 1 of them. By default the stages are
            as even as can be, longer ones first.

    Raises:
        ValueError: if there are more stages than decoder layers, or `splits` do not cut the layers into C stages.
    """
    check_positive(num_ranks=num_ranks, virtual_stages=virtual_stages)
    layout = PipelineLayout(
        stage_boundaries(shape.num_layers, num_ranks * virtual_stages, splits),
        num_ranks,
        shape.sublayers_per_block,
        has_stream=shape.depth_weights == "sum",
        caching=caching,
    )
    return [
        Transition(stage, len(layout.received_sources(stage)), layout.state_tensors(stage))
        for stage in range(1, layout.num_stages)
    ]


# --- Memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SummaryMemory:
    """Bytes of one rank's `BlockSummaries`: the sources, their norms, and their scores for every query."""

    sources: int
    norms: int
    scores: int

    @property
    def total(self) -> int:
        return self.sources + self.norms + self.scores


def summary_memory(
    shape: DepthShape, num_tokens: int, dtype: str = "bfloat16", tensor_parallel: int = 1, chunk: int | None = None
) -> SummaryMemory:
    """Bytes of the block summaries of a forward without gradients, on one rank.

    Args:
        num_tokens: B * T of the prompt.
        dtype: of the model; norms and scores are fp32 whatever it is.
        tensor_parallel: ranks that the sequence is sharded over (`sequence_parallel_plan`); 1 also for a plain plan,
            under which every rank holds all.
        chunk: tokens of a chunk of the prefill (`prefill_chunk_size`), if there are fewer than `num_tokens`.

    Returns:
        `(N + 1) * T / P * D` elements of sources, the embedding included (the paper's figure, N * T * D, leaves it
        out), with the last shard padded to the length of the others.
    """
    check_positive(num_tokens=num_tokens, tensor_parallel=tensor_parallel, chunk=1 if chunk is None else chunk)
    if dtype not in BYTES:
        raise ValueError(f"`dtype` must be one of {tuple(BYTES)}, got {dtype!r}.")
    tokens = math.ceil(min(num_tokens, chunk or num_tokens) / tensor_parallel)
    slots = (shape.num_blocks + 1) * tokens
    return SummaryMemory(
        sources=slots * shape.hidden_size * BYTES[dtype],
        norms=slots * BYTES["float32"],
        scores=slots * (shape.num_sublayers + 1) * BYTES["float32"],
    )


# --- Time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hardware:
    """One accelerator, and its link to the next stage's.

    Attributes:
        flops: operations per second that the model's products reach.
        memory_bandwidth: bytes per second.
        link_bandwidth: bytes per second, one way.
    """

    flops: float
    memory_bandwidth: float
    link_bandwidth: float

    def __post_init__(self):
        check_positive(**vars(self))


@dataclass(frozen=True)
class Overhead:
    """Seconds of one micro-batch's forward through all stages, and what depth attention adds to them.

    Attributes:
        compute: of the PreNorm model, `2 * activated parameters * tokens / flops`.
        depth: traffic of depth attention beyond the plain residual stream's.
        transfers: of the tensors that a PreNorm pipeline does not send, one after another.
        hidden: whether the longest transition takes no longer than a stage computes, so that it can run beside it.
    """

    compute: float
    depth: float
    transfers: float
    hidden: bool

    @property
    def lowest(self) -> float:
        """Relative overhead with all transfers hidden behind computation."""
        return self.depth / self.compute

    @property
    def highest(self) -> float:
        """Relative overhead with none hidden."""
        return (self.depth + self.transfers) / self.compute


def residual_elements(shape: DepthShape) -> float:
    """Reads and writes per token and sublayer of two-phase Block AttnRes, `(N / S + 5) D`; a plain residual has 3 D."""
    return (shape.num_blocks / shape.sublayers_per_block + 5) * shape.hidden_size


def predict_overhead(
    shape: DepthShape,
    hardware: Hardware,
    activated_parameters: float,
    num_tokens: int,
    transitions: list[Transition],
    dtype: str = "bfloat16",
) -> Overhead:
    """What depth attention adds to a forward, by bandwidths alone: launches and latencies are not in it.

    Args:
        activated_parameters: parameters that a token is multiplied with.
        num_tokens: B * T of a micro-batch.
        transitions: from [`pipeline_transitions`], empty without a pipeline.
    """
    check_positive(activated_parameters=activated_parameters, num_tokens=num_tokens)
    if dtype not in BYTES:
        raise ValueError(f"`dtype` must be one of {tuple(BYTES)}, got {dtype!r}.")
    compute = 2 * activated_parameters * num_tokens / hardware.flops
    beyond_plain = shape.num_sublayers * (residual_elements(shape) - 3 * shape.hidden_size)
    tensor = shape.hidden_size * num_tokens * BYTES[dtype] / hardware.link_bandwidth
    sent = [transition.tensors for transition in transitions]
    return Overhead(
        compute=compute,
        depth=beyond_plain * num_tokens * BYTES[dtype] / hardware.memory_bandwidth,
        transfers=sum(count - 1 for count in sent) * tensor,
        hidden=max(sent, default=0) * tensor <= compute / (len(sent) + 1),
    )
