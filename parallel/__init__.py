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
"""Training and inference on several devices (docs/pipeline.md, docs/scaling.md), and what it costs."""

from .sequence_sharding import sequence_parallel_plan
from .stages import gather_state_dict, pipeline_stages, reduce_shared_gradients


__all__ = ["gather_state_dict", "pipeline_stages", "reduce_shared_gradients", "sequence_parallel_plan"]
