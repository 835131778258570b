# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning and pretraining with Trainer: parameter groups with a learning rate for the queries, and metrics."""

from .arguments import CHECKPOINTING
from .depth_dynamics import DepthDynamics
from .metrics import JsonlMetrics, plot_metrics, read_metrics
from .parameter_groups import DEFAULT_QUERY_LR, attnres_optimizer, attnres_parameter_groups


__all__ = [
    "CHECKPOINTING",
    "DEFAULT_QUERY_LR",
    "DepthDynamics",
    "JsonlMetrics",
    "attnres_optimizer",
    "attnres_parameter_groups",
    "plot_metrics",
    "read_metrics",
]
