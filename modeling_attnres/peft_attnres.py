# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""PEFT (LoRA, IA3...) on AttnRes models: which modules an adapter goes to, and a recipe that trains the queries too.

PEFT looks its default target modules up by `model_type`, one table per method. Here every table learns about `attnres`
when the model's code is imported, from the package or from a checkpoint.
"""

try:
    from peft import LoraConfig
    from peft.utils import constants
except ImportError:
    LoraConfig = constants = None  # type: ignore[assignment, misc]


# What PEFT adapts in a Llama, and the same part of a layer in other backbones: separate, fused, with latent attention
# (q_b, kv_b), in a linear attention, in a feed-forward without gate.
_FUSED = ("qkv_proj", "in_proj_qkvz", "in_proj_qkv")
_COUNTERPARTS = {
    "q_proj": ("q_proj", "q_b_proj", *_FUSED),
    "k_proj": ("k_proj", "kv_b_proj", *_FUSED),
    "v_proj": ("v_proj", "kv_b_proj", *_FUSED),
}


def register_peft_targets(model_type: str):
    """Enters a model type in PEFT's tables of default target modules; without PEFT it does nothing.

    The targets are those of a Llama, with their counterparts in other backbones. A list may name modules that a
    backbone does not have: PEFT asks for one match. Methods that do not know Llama get no entry.
    """
    if constants is None:
        return
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "llama" in table:
            targets = [part for target in table["llama"] for part in _COUNTERPARTS.get(target, (target,))]
            table[model_type] = list(dict.fromkeys(targets))


def attnres_lora_config(**kwargs) -> "LoraConfig":
    """A `peft.LoraConfig` that trains queries and key norms in full beside the adapter.

    A converted model's queries are zero: LoRA alone leaves its residual stream the plain sum it was. Depth attention
    is small (two vectors of D per sublayer), so it is trained and saved whole, as one of `modules_to_save`. Give it a
    learning rate of its own (`modeling_attnres.training`).

    `merge_and_unload` keeps the trained queries; so does `unload`, which takes back the low-rank part alone, as PEFT
    does for every module to save. `disable_adapter` and several adapters work; several within one batch do not.

    Args:
        kwargs: of `LoraConfig`. `task_type` defaults to "CAUSAL_LM", `modules_to_save` is added to.

    Raises:
        ImportError: if PEFT is not installed.
    """
    if LoraConfig is None:
        raise ImportError('`attnres_lora_config` needs PEFT: pip install "modeling-attnres[train]".')
    modules_to_save = ["depth_attention", *(kwargs.pop("modules_to_save", None) or [])]
    return LoraConfig(**{"task_type": "CAUSAL_LM", **kwargs, "modules_to_save": list(dict.fromkeys(modules_to_save))})


__all__ = ["attnres_lora_config", "register_peft_targets"]
