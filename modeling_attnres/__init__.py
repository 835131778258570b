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
"""Attention Residuals (arXiv 2603.15031) for any PreNorm decoder of Hugging Face Transformers."""

from transformers import AutoConfig

from .backbone_attnres import UnsupportedBackboneError, supported_backbones
from .block_summaries_attnres import BlockSummaries
from .configuration_attnres import AttnResConfig
from .depth_weights_attnres import naive_depth_attention
from .kimi_k3_attnres import KimiK3ForCausalLM, KimiK3TextConfig, KimiK3TextModel
from .kimi_k3_folders import refuse_kimi_k3_folders
from .modeling_attnres import (
    AttnResForCausalLM,
    AttnResForQuestionAnswering,
    AttnResForSequenceClassification,
    AttnResForTokenClassification,
    AttnResModel,
    AttnResPreTrainedModel,
)
from .peft_attnres import attnres_lora_config
from .stack import attention_residuals


__version__ = "0.1.0"

# Checkpoints carry their code, so that they load with `trust_remote_code=True` where the package is missing.
AutoConfig.register(AttnResConfig.model_type, AttnResConfig)
AttnResConfig.register_for_auto_class()
refuse_kimi_k3_folders()

__all__ = [
    "AttnResConfig",
    "AttnResForCausalLM",
    "AttnResForQuestionAnswering",
    "AttnResForSequenceClassification",
    "AttnResForTokenClassification",
    "AttnResModel",
    "AttnResPreTrainedModel",
    "BlockSummaries",
    "KimiK3ForCausalLM",
    "KimiK3TextConfig",
    "KimiK3TextModel",
    "UnsupportedBackboneError",
    "attention_residuals",
    "attnres_lora_config",
    "naive_depth_attention",
    "supported_backbones",
]
