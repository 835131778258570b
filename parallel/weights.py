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
"""What a preset's weights come to: parameters and bytes by dtype, in memory and in Kimi K3's own files."""

import itertools
import re
from collections import Counter

import torch
from torch import nn

from modeling_attnres import AttnResConfig, AttnResForCausalLM, KimiK3TextConfig

from .plan import BYTES


MXFP4 = "mxfp4"  # 4 bits per parameter, and one byte of scale for every 32
MXFP4_GROUP = 32


def count_weights(config: AttnResConfig, dtype: str = "bfloat16") -> dict[str, int]:
    """Parameters of an AttnRes model by dtype, buffers of its state dict included; built on the meta device.

    Args:
        dtype: that the model is loaded in. What its backbone keeps in fp32 counts as that.
    """
    model = _build(config)
    kept = _in_fp32(model)
    counts = Counter()
    for name, tensor in _stored(model):
        counts["float32" if kept.search(name) else dtype] += tensor.numel()
    return dict(counts)


def count_kimi_k3_file(config: AttnResConfig) -> dict[str, int]:
    """Parameters of the same model as Kimi K3 stores them, by dtype: experts in `mxfp4`, all else in bf16 or fp32.

    Its files hold two things more: `A_log` is padded with zeros to as many numbers as a head has channels, and the first
    decoder layer has a query and key norm for its token mixer, which nothing reads.

    Raises:
        ValueError: if the backbone is another.
    """
    if config.backbone_type != KimiK3TextConfig.model_type:
        raise ValueError(
            f"`config` must have a '{KimiK3TextConfig.model_type}' backbone, got '{config.backbone_type}'."
        )
    experts = sum(tensor.numel() for name, tensor in _stored(_build(config)) if ".mlp.experts." in name)
    counts = count_weights(config)
    padding = config.layer_types.count("linear_attention") * (config.linear_head_dim - config.linear_num_heads)
    return {
        "float32": counts["float32"] + padding,
        "bfloat16": counts["bfloat16"] - experts + 2 * config.hidden_size,
        MXFP4: experts,
    }


def count_bytes(dtype: str, parameters: int) -> int:
    """Bytes of `parameters` stored in `dtype`, scales included."""
    if dtype == MXFP4:
        return parameters // 2 + parameters // MXFP4_GROUP
    return parameters * BYTES[dtype]


def _build(config: AttnResConfig) -> AttnResForCausalLM:
    with torch.device("meta"):
        return AttnResForCausalLM(config)


def _stored(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Names and tensors of a state dict, a tied one once."""
    names = model.state_dict().keys()
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return [(name, tensor) for name, tensor in tensors if name in names]


def _in_fp32(model: AttnResForCausalLM) -> re.Pattern:
    """Finds the names of what `from_pretrained` leaves in fp32, as the library finds them."""
    return re.compile("|".join(sorted(model._keep_in_fp32_modules_strict)) or r"(?!)")
