# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What a preset's weights come to: parameters and bytes by dtype, in memory and in Kimi K3's own files."""

import itertools
import re
from collections import Counter

import torch

from modeling_attnres import AttnResConfig, AttnResForCausalLM, KimiK3TextConfig

from .plan import BYTES


MXFP4 = "mxfp4"  # 4 bits per parameter, and one byte of scale for every 32
MXFP4_GROUP = 32


def count_weights(config: AttnResConfig, dtype: str = "bfloat16") -> dict[str, int]:
    """Parameters of an AttnRes model by dtype, buffers of its state dict included; built on the meta device.

    Args:
        dtype: that the model is loaded in. What its backbone keeps in fp32 counts as that.
    """
    experts, others = _count(config, dtype)
    return dict(experts + others)


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
    experts, others = _count(config, "bfloat16")
    padding = config.layer_types.count("linear_attention") * (config.linear_head_dim - config.linear_num_heads)
    return {
        "float32": others["float32"] + padding,
        "bfloat16": others["bfloat16"] + 2 * config.hidden_size,
        MXFP4: experts.total(),
    }


def count_bytes(dtype: str, parameters: int) -> int:
    """Bytes of `parameters` stored in `dtype`, scales included."""
    if dtype == MXFP4:
        return parameters // 2 + parameters // MXFP4_GROUP
    return parameters * BYTES[dtype]


def _count(config: AttnResConfig, dtype: str) -> tuple[Counter, Counter]:
    """Parameters by dtype: of the routed experts, and of all else. A tied tensor counts once."""
    with torch.device("meta"):
        model = AttnResForCausalLM(config)
    # Find the parameters that `from_pretrained` keeps in fp32 by the library's own rule.
    kept = re.compile("|".join(sorted(model._keep_in_fp32_modules_strict)) or r"(?!)")
    stored = model.state_dict().keys()
    experts, others = Counter(), Counter()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in stored:
            counts = experts if ".mlp.experts." in name else others
            counts["float32" if kept.search(name) else dtype] += tensor.numel()
    return experts, others
