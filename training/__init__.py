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
