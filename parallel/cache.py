# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Cross-stage caching: the sources that a rank keeps, per micro-batch, for its later virtual stages.

A later virtual stage reads a cached source through a leaf that is cut off the graph of the stage that filed it. On
one rank the backward of a later virtual stage runs before that of an earlier one, so when the filing stage's turn
comes the leaf's gradient is complete: it is one more gradient of that stage's outputs, and so returns to the
stage that produced the source.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass
class _Entry:
    stage: int
    source: torch.Tensor  # in the graph of the stage that filed it
    leaf: torch.Tensor  # the same values for later virtual stages; its `.grad` sums up over them


class CrossStageCache:
    """The cached sources of one rank. Its stages share it; nothing else does.

    An entry lives from the forward of the stage that files it to that stage's backward.
    """

    def __init__(self):
        self._entries: dict[int, list[_Entry]] = {}

    def __len__(self) -> int:
        """Number of cached sources, over all micro-batches."""
        return sum(map(len, self._entries.values()))

    def read(self, micro_batch: int) -> tuple[torch.Tensor, ...]:
        """The cached sources `[B, T, D]` of a micro-batch, in order of depth."""
        return tuple(entry.leaf for entry in self._entries.get(micro_batch, ()))

    def file(self, micro_batch: int, stage: int, sources: Sequence[torch.Tensor]):
        """Adds the sources that `stage` keeps for later virtual stages of its rank."""
        entries = self._entries.setdefault(micro_batch, [])
        for source in sources:
            entries.append(_Entry(stage, source, source.detach().requires_grad_(source.requires_grad)))
        if not entries:
            del self._entries[micro_batch]

    def release(self, micro_batch: int, stage: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Drops what `stage` filed; returns the sources that later stages have a gradient for, and the gradients."""
        entries = self._entries.pop(micro_batch, [])
        kept = [entry for entry in entries if entry.stage != stage]
        if kept:
            self._entries[micro_batch] = kept
        filed = [entry for entry in entries if entry.stage == stage and entry.leaf.grad is not None]
        return [entry.source for entry in filed], [entry.leaf.grad for entry in filed]

    def drop(self, micro_batch: int):
        """Drops a micro-batch that will have no backward."""
        self._entries.pop(micro_batch, None)

    def clear(self):
        """Drops everything, as before a step: an interrupted one may have left entries."""
        self._entries.clear()
