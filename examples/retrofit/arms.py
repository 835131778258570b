# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What is compared: which parameters learn, in which model, at which learning rates."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modeling_attnres import AttnResConfig, AttnResForCausalLM, attnres_lora_config


LORA_RANK = 16
# Beside an adapter or a whole model that learns, the queries' best rate is lower than alone.
QUERY_RATE_BESIDE = 1 / 3


@dataclass(frozen=True)
class Arm:
    """
    Attributes:
        label: for tables and pictures.
        attnres: whether the model is converted first.
        train: "queries", "lora" or "full".
        rates: the learning rates that are swept, a factor of 3 apart. Queries and key norms learn at them in the arm
            "queries", and at `QUERY_RATE_BESIDE` of that arm's chosen rate in every other.
    """

    label: str
    attnres: bool
    train: str
    rates: tuple[float, ...]


ARMS = {
    "queries": Arm("AttnRes, queries and key norms", True, "queries", (1e-4, 3e-4, 9e-4)),
    "lora": Arm("PreNorm, LoRA", False, "lora", (1.5e-3, 4.5e-3, 1.35e-2)),
    "attnres-lora": Arm("AttnRes, LoRA and queries", True, "lora", (1.5e-3, 4.5e-3, 1.35e-2)),
    "full": Arm("PreNorm, all", False, "full", (3e-5, 1e-4, 3e-4)),
    "attnres-full": Arm("AttnRes, all", True, "full", (3e-5, 1e-4, 3e-4)),
}
# Forms of AttnRes: (depth_weights, sublayers per block)
FORMS = {"sum-8": ("sum", 8), "sum-1": ("sum", 1), "mean-8": ("mean", 8)}
MAIN_FORM = "sum-8"
PRENORM = "prenorm"


def load_base(model: Path, form: str) -> PreTrainedModel:
    """The PreNorm model, or its conversion into a form of AttnRes, in fp32."""
    if form == PRENORM:
        return AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    depth_weights, sublayers = FORMS[form]
    config = AttnResConfig(
        text_config=AutoConfig.from_pretrained(model), depth_weights=depth_weights, sublayers_per_block=sublayers
    )
    return AttnResForCausalLM.from_pretrained(model, config=config, dtype="float32")


def count_trained(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def lora_settings(rank: int) -> dict:
    return {"r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM"}


def equal_rank(base: PreTrainedModel) -> int:
    """The smallest rank at which LoRA on this PreNorm model has as many parameters as LoRA and depth attention."""
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(base.config)
    per_rank = count_trained(get_peft_model(shapes, LoraConfig(**lora_settings(1))))
    depth = 2 * 2 * base.config.num_hidden_layers * base.config.hidden_size  # a query and a key norm per sublayer
    return LORA_RANK + math.ceil(depth / per_rank)


def prepare(base: PreTrainedModel, arm: Arm) -> torch.nn.Module:
    """A copy of `base` with what the arm trains trainable. An adapter draws its weights from the global generator."""
    model = copy.deepcopy(base)
    if arm.train == "queries":
        model.requires_grad_(False)
        model.model.depth_attention.requires_grad_(True)
    elif arm.train == "lora" and arm.attnres:
        model = get_peft_model(model, attnres_lora_config(**lora_settings(LORA_RANK)))
    elif arm.train == "lora":
        model = get_peft_model(model, LoraConfig(**lora_settings(equal_rank(base))))
    return model
