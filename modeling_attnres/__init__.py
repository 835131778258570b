# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
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
