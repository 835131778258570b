# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Training and inference on several devices (docs/pipeline.md, docs/scaling.md), and what it costs."""

from .sequence_sharding import sequence_parallel_plan
from .stages import gather_state_dict, pipeline_stages, reduce_shared_gradients


__all__ = ["gather_state_dict", "pipeline_stages", "reduce_shared_gradients", "sequence_parallel_plan"]
