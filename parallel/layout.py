# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What crosses the stage boundaries of a pipelined AttnRes model: integers only, known before anything runs.

Letters: L sublayers (two per decoder layer), S sublayers per block, P ranks, V virtual stages per rank, C = P * V
stages in all. Stage k runs on rank k mod P. A *source* is the embedding (source 0) or a finished block.
"""

import itertools
from dataclasses import dataclass


CACHING = ("all", "received", "none")


def check_caching(caching: str):
    """Raises a `ValueError` for an unknown way of caching."""
    if caching not in CACHING:
        raise ValueError(f"`caching` must be one of {CACHING}, got {caching!r}.")


@dataclass(frozen=True)
class PipelineLayout:
    """Which decoder layers each stage runs, and which sources each stage receives, holds and hands on.

    Attributes:
        boundaries: C + 1 indices of decoder layers; stage k runs the layers `[boundaries[k], boundaries[k + 1])`.
        num_ranks: P.
        sublayers_per_block: S.
        has_stream: whether the plain residual stream travels too (`depth_weights="sum"`).
        caching: which sources a rank keeps per micro-batch for its later virtual stages: `"all"` that it received or
            produced, only those it `"received"` (what the paper counts), or `"none"`.
    """

    boundaries: tuple[int, ...]
    num_ranks: int
    sublayers_per_block: int
    has_stream: bool
    caching: str = "all"

    def __post_init__(self):
        check_caching(self.caching)

    @property
    def num_stages(self) -> int:
        """C."""
        return len(self.boundaries) - 1

    def layers(self, stage: int) -> range:
        """Indices of the decoder layers of a stage."""
        return range(self.boundaries[stage], self.boundaries[stage + 1])

    def sources_before(self, stage: int) -> int:
        """Number of sources that are finished where `stage` begins; stage 0 begins with the embedding."""
        return 1 + 2 * self.boundaries[stage] // self.sublayers_per_block

    def cached_sources(self, stage: int) -> int:
        """Number of sources (the first ones) that the rank of `stage` holds before `stage` receives anything."""
        previous = stage - self.num_ranks
        if previous < 0 or self.caching == "none":
            return 0
        if self.caching == "received":
            return self.sources_before(previous)
        return self.sources_before(previous + 1)

    def received_sources(self, stage: int) -> range:
        """Indices of the sources that `stage` receives from the stage before it."""
        if stage == 0:
            return range(0)
        return range(self.cached_sources(stage), self.sources_before(stage))

    def kept_sources(self, stage: int) -> range:
        """Indices of the sources that the rank of `stage` adds to its cache when `stage` has run."""
        later = stage + self.num_ranks
        if later >= self.num_stages:
            return range(0)
        return range(self.cached_sources(stage), self.cached_sources(later))

    def state_tensors(self, stage: int) -> int:
        """Number of tensors of depth state that `stage` receives: the open block's partial sum, and the stream."""
        if stage == 0:
            return 0
        return self.has_stream + (2 * self.boundaries[stage] % self.sublayers_per_block != 0)

    def tensors_received(self, stage: int) -> int:
        """Number of `[B, T, D]` tensors that `stage` receives, and as many gradients that it returns."""
        return self.state_tensors(stage) + len(self.received_sources(stage))


def stage_boundaries(num_layers: int, num_stages: int, splits: list[int] | None = None) -> tuple[int, ...]:
    """The boundaries of [`PipelineLayout`]: given `splits` checked, or as even as can be, longer stages first.

    Args:
        splits: the decoder layer that each stage but the first begins with, C - 1 of them; they need not be where
            blocks begin.

    Raises:
        ValueError: if there are more stages than decoder layers, or `splits` do not cut the layers into stages.
    """
    if num_stages > num_layers:
        raise ValueError(
            f"A pipeline of {num_stages} stages (ranks of the mesh x `virtual_stages`) needs as many decoder layers, "
            f"and the model has {num_layers}."
        )
    if splits is None:
        shortest, longer = divmod(num_layers, num_stages)
        return tuple(stage * shortest + min(stage, longer) for stage in range(num_stages + 1))
    boundaries = (0, *splits, num_layers)
    if len(boundaries) != num_stages + 1 or any(a >= b for a, b in itertools.pairwise(boundaries)):
        raise ValueError(
            f"`splits` must be {num_stages - 1} increasing indices from 1 to {num_layers - 1}, the first decoder layer "
            f"of every stage after the first ({num_stages} stages, {num_layers} layers), got {list(splits)}."
        )
    return boundaries


def formula_summaries(num_ranks: int, virtual_stages: int, blocks_per_stage: int, caching: str) -> int:
    """Block summaries sent forward per token, in closed form, where every stage ends where a block does.

    With C = P V stages of N_p blocks each, and d elements per block (section 4.1 of the paper for the first two):

        "none"      C (C - 1) / 2 N_p
        "received"  P (P - 1) / 2 N_p + (V - 1) P^2 N_p
        "all"       P (P - 1) / 2 N_p + (V - 1) P (P - 1) N_p

    The embedding is not counted. It is one more source wherever a receiver holds no source yet: C - 1 times without
    caching and P - 1 times with it.
    """
    stages = num_ranks * virtual_stages
    if caching == "none":
        return stages * (stages - 1) // 2 * blocks_per_stage
    first = num_ranks * (num_ranks - 1) // 2
    later = num_ranks if caching == "received" else num_ranks - 1
    return (first + (virtual_stages - 1) * num_ranks * later) * blocks_per_stage
