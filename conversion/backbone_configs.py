# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Backbone configs in the words of the AttnRes dialects, and back.

A field that the library's backbone does not know, or knows with another value, is an error that lists what is missing:
dropping it would load a model that computes something else.
"""

import math
from collections.abc import Iterable
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from .checkpoint import ConversionError
from .kimi_k3 import KIMI_K3_TEXT, KIMI_LINEAR, OUTER_TYPE


Shapes = dict[str, tuple[int, ...]]


# --- Kimi K3, and AttnRes on kimi_linear in its naming ---------------------------------------------------------------

# Fields that Transformers 4 wrote into every config: how to generate, what of the model to return. None of them changes
# what the text model computes.
_INERT_BEFORE_5 = {
    *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id"),
    *("is_decoder", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups"),
    *("num_beams", "num_return_sequences", "output_scores", "prefix", "pruned_heads", "remove_invalid_values"),
    *("repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params"),
    *("temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torchscript"),
    *("typical_p", "use_bfloat16"),
}
# Fields of published text configs that no part reads: where code lies, positions of a model that has none.
_INERT = {"auto_map", "_name_or_path", "transformers_version", "rope_theta", "rope_scaling", "rope_parameters"}
# Read while a config is built, not kept under these names.
_READ = {
    *("linear_attn_config", "first_k_dense_replace", "moe_layer_freq", "head_dim", "qk_head_dim", "torch_dtype"),
    *("moe_router_activation_func", "topk_method", "mla_use_nope", "num_nextn_predict_layers", "use_grouped_topk"),
    "attn_res_block_size",
}
_LINEAR_ATTENTION = {
    *("head_dim", "num_heads", "short_conv_kernel_size", "full_attn_layers", "kda_layers"),
    *("use_full_rank_gate", "gate_lower_bound"),
}
# Fields of the outer multimodal config: how images enter the text.
_INERT_OUTSIDE = {
    *("vision_config", "ignore_index", "image_placeholder", "media_placeholder_token_id", "use_unified_vision_chunk"),
    *("video_placeholder", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
}
# Values that kimi_linear's code fixes and has no fields for.
_KIMI_LINEAR_FIXED = {
    "moe_router_activation_func": ("sigmoid",),
    "moe_layer_freq": (1,),
    "mla_use_nope": (True,),
    "num_nextn_predict_layers": (0, None),
    "use_grouped_topk": (True,),
    "topk_method": ("noaux_tc",),
}


def kimi_k3_text_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's fields of a `config.json`, with what only the multimodal config around them says.

    Raises:
        ConversionError: for fields around them that are unknown, or say something else.
    """
    fields = config.get("text_config")
    if not isinstance(fields, dict):
        if config.get("model_type") == OUTER_TYPE:
            raise ConversionError(f"A '{OUTER_TYPE}' config must have a `text_config`, got {fields!r:.60}.")
        return config
    if config.get("model_type") not in (OUTER_TYPE, None):
        raise ConversionError(
            f"Of multimodal models '{OUTER_TYPE}' is understood, got model_type {config['model_type']!r}."
        )
    common = {*PreTrainedConfig().to_dict(), "torch_dtype", "text_config", "auto_map", "tie_word_embeddings"}
    unknown = [name for name, value in config.items() if name not in common | _INERT_OUTSIDE and value is not None]
    if unknown:
        raise ConversionError(f"Fields of this '{OUTER_TYPE}' config are unknown here: {', '.join(sorted(unknown))}.")
    fields = dict(fields)
    for name, alias in (("tie_word_embeddings", None), ("dtype", "torch_dtype")):
        outside, inside = (level.get(name, level.get(alias)) for level in (config, fields))
        if None not in (outside, inside) and outside != inside:
            raise ConversionError(f"`{name}` is {outside!r} in the config and {inside!r} in its `text_config`.")
        if inside is None and outside is not None:
            fields[name] = outside
    return fields


def kimi_k3_to_library(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The fields of a text config in Kimi K3's naming, for the backbone that computes what it says.

    A config that the library wrote for a kimi_linear without parts of Kimi K3 is for that. Any other is for
    `kimi_k3_text`, where fields that are left out mean what they mean in Kimi K3's own code.

    Args:
        shapes: of the checkpoint's tensors, by name.

    Raises:
        ConversionError: naming fields that are unknown, or ask for something that is not implemented.
    """
    if config.get("model_type") not in (KIMI_LINEAR, KIMI_K3_TEXT):
        raise ConversionError(
            f"Kimi K3 naming is understood on text configs of model_type '{KIMI_LINEAR}', got "
            f"{config.get('model_type')!r}."
        )
    linear = config.get("linear_attn_config")
    if not isinstance(linear, dict | None):
        raise ConversionError(f"`linear_attn_config` must be an object, got {linear!r:.60}.")
    model_type = KIMI_K3_TEXT if is_kimi_k3(config, shapes) or "mlp_layer_types" not in config else KIMI_LINEAR
    known_class = CONFIG_MAPPING[model_type]
    known = {*known_class().to_dict(), *known_class.attribute_map, *known_class.attribute_map.values()}
    known |= _READ | _INERT | _INERT_BEFORE_5
    problems = [f"`{name}`={value!r:.60}" for name, value in config.items() if name not in known and value is not None]
    problems += [
        f"`linear_attn_config.{name}`={value!r:.60}"
        for name, value in (linear or {}).items()
        if name not in _LINEAR_ATTENTION and value is not None
    ]
    if model_type == KIMI_LINEAR:
        problems += [
            f"`{name}`={config[name]!r:.60}"
            for name, allowed in _KIMI_LINEAR_FIXED.items()
            if config.get(name, allowed[0]) not in allowed
        ]
    if problems:
        raise ConversionError(
            f"Fields of this config are unknown to a '{model_type}' backbone, or have a value that it does not "
            f"implement: {'; '.join(sorted(problems))}."
        )
    left_out = _INERT | _INERT_BEFORE_5 | {"attn_res_block_size", "architectures"}
    library = {name: value for name, value in config.items() if name not in left_out} | {"model_type": model_type}
    if model_type == KIMI_K3_TEXT:
        library = {name: value for name, value in library.items() if name not in ("head_dim", "qk_head_dim")}
        library["linear_padded_heads"] = _padded_heads(shapes)
    return library


def _padded_heads(shapes: Shapes) -> int | None:
    """How many numbers every `A_log` has."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if name.endswith(".A_log")}
    if len(set(sizes.values())) > 1:
        odd = min(sizes, key=lambda name: list(sizes.values()).count(sizes[name]))
        raise ConversionError(
            f"Every `A_log` must have the same size, got {sizes[odd]} in '{odd}' and others elsewhere."
        )
    return next(iter(sizes.values()), None)


def is_kimi_k3(config: dict[str, Any], names: Iterable[str]) -> bool:
    """Whether a text config in kimi_linear's name has parts that only Kimi K3 has."""
    linear = config.get("linear_attn_config")
    linear = linear if isinstance(linear, dict) else {}
    return (
        config.get("model_type") == KIMI_K3_TEXT
        or str(config.get("hidden_act")) == "situ"
        or bool(config.get("mla_use_output_gate"))
        or bool(linear.get("use_full_rank_gate"))
        or linear.get("gate_lower_bound") is not None
        or any(config.get(name) is not None for name in ("routed_expert_hidden_size", "activation_situ_beta"))
        or any(".routed_expert_" in name for name in names)
    )


def library_to_kimi_k3(config: PreTrainedConfig) -> dict[str, Any]:
    """The config of a backbone for a `config.json` in Kimi K3's naming, without the block size.

    Raises:
        ConversionError: for a backbone that the naming has no words for.
    """
    if config.model_type == KIMI_LINEAR:
        return {**config.to_dict(), "architectures": ["KimiLinearForCausalLM"]}
    if config.model_type != KIMI_K3_TEXT:
        raise ConversionError(
            f"Kimi K3 naming is written for {KIMI_K3_TEXT} and {KIMI_LINEAR} backbones, got '{config.model_type}'."
        )
    layers = range(1, config.num_hidden_layers + 1)
    first_sparse, every = _sparse_layers(config)
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "model_type": KIMI_LINEAR,
        "architectures": ["KimiLinearForCausalLM"],
        "dtype": config.to_dict().get("dtype"),
        **tokens,
        **{name: getattr(config, name) for name in _SAME_NAMES},
        **{theirs: getattr(config, ours) for ours, theirs in _OTHER_NAMES.items()},
        "linear_attn_config": {
            "full_attn_layers": [layer for layer in layers if config.layer_types[layer - 1] == "full_attention"],
            "kda_layers": [layer for layer in layers if config.layer_types[layer - 1] == "linear_attention"],
            "num_heads": config.linear_num_heads,
            "head_dim": config.linear_head_dim,
            "short_conv_kernel_size": config.linear_conv_kernel_dim,
            "use_full_rank_gate": config.linear_use_full_rank_gate,
            "gate_lower_bound": config.linear_gate_lower_bound,
        },
        "first_k_dense_replace": first_sparse,
        "moe_layer_freq": every,
        "mla_use_nope": True,
        "moe_router_activation_func": "sigmoid",
        "topk_method": "noaux_tc",
        "use_grouped_topk": True,
        "num_nextn_predict_layers": 0,
    }


_SAME_NAMES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "activation_situ_beta", "activation_situ_linear_beta", "rms_norm_eps"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "mla_use_output_gate"),
    *("moe_intermediate_size", "routed_expert_hidden_size", "latent_moe_use_norm", "routed_scaling_factor"),
    *("topk_group", "max_position_embeddings", "tie_word_embeddings", "initializer_range", "use_cache"),
)
_OTHER_NAMES = {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
}
# What Kimi K3's code has no fields for, and the value it stands for.
_KIMI_K3_FIXED = {"attention_bias": (False,), "attention_dropout": (0, None)}


def _sparse_layers(config: PreTrainedConfig) -> tuple[int, int]:
    """`first_k_dense_replace` and `moe_layer_freq`, which say which layers are mixtures of experts.

    Raises:
        ConversionError: for layers that these two cannot describe, and for fields that Kimi K3 does not have.
    """
    for name, allowed in _KIMI_K3_FIXED.items():
        if getattr(config, name) not in allowed:
            raise ConversionError(f"Kimi K3 has no `{name}`, which is {getattr(config, name)!r} in this model.")
    kinds = list(config.mlp_layer_types)
    if config.num_local_experts is None and "sparse" not in kinds:
        return 0, 1
    if config.num_local_experts is not None:
        for every in range(1, len(kinds) + 1):
            for first in range(len(kinds) + 1):
                sparse = [index >= first and index % every == 0 for index in range(len(kinds))]
                if sparse == [kind == "sparse" for kind in kinds]:
                    return first, every
    raise ConversionError(
        "Kimi K3 says which layers have experts by `first_k_dense_replace` and `moe_layer_freq`, which cannot express "
        f"`mlp_layer_types`={kinds} with num_experts={config.num_local_experts}."
    )


# --- flash-linear-attention's transformer ----------------------------------------------------------------------------

_FLA_DEFAULTS = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": 32,
    "num_kv_heads": None,
    "qkv_bias": False,
    "qk_norm": False,
    "window_size": None,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "initializer_range": 0.02,
    "norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
# Choices of kernels and losses, and fields that every config carries. The model's output depends on none of them.
_FLA_INERT = {
    *("fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"),
    *("elementwise_affine", "auto_map", "torch_dtype", "attnres_block_size", "model_type"),
    *PreTrainedConfig().to_dict(),
}
# The library's backbone for fla's options; fla's attention has at most one of them here.
_FLA_BACKBONES = {
    (False, False, False): "llama",
    (True, False, False): "qwen2",
    (False, True, False): "qwen3",
    (False, False, True): "mistral",
}
_FLA_QK_NORM_EPS = 1e-5  # fixed in fla's attention, the library takes the config's


def fla_to_library(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The fields of a flash-linear-attention `transformer` config for the library's equal backbone.

    Raises:
        ConversionError: if the family, an option or a combination of options has no equal.
    """
    if config.get("model_type") != "transformer":
        raise ConversionError(
            "Of flash-linear-attention's models the 'transformer' family is understood, got model_type "
            f"{config.get('model_type')!r}: its token mixers have no equal in Transformers."
        )
    unknown = {name: config[name] for name in config if name not in _FLA_DEFAULTS and name not in _FLA_INERT}
    if unknown:
        raise ConversionError(f"Fields of this 'transformer' config are unknown here: {unknown}.")
    values = {**_FLA_DEFAULTS, **{name: config[name] for name in _FLA_DEFAULTS if name in config}}
    options = (bool(values["qkv_bias"]), bool(values["qk_norm"]), values["window_size"] is not None)
    if options not in _FLA_BACKBONES:
        raise ConversionError(
            "No backbone in Transformers combines these options of fla's attention: "
            f"qkv_bias={options[0]}, qk_norm={options[1]}, window_size={values['window_size']}."
        )
    if values["hidden_act"] not in ("swish", "silu"):
        raise ConversionError(f"fla's `hidden_act` {values['hidden_act']!r} has no equal here: 'swish' is due.")
    if options[1] and values["norm_eps"] != _FLA_QK_NORM_EPS:
        raise ConversionError(
            f"fla's `qk_norm` has an epsilon of {_FLA_QK_NORM_EPS} whatever `norm_eps` is; the library has one for "
            f"both, got norm_eps={values['norm_eps']}."
        )
    intermediate_size = values["intermediate_size"]
    if intermediate_size is None:  # fla's rule: two thirds of the ratio, up to a multiple of 256
        intermediate_size = -(-int(values["hidden_size"] * values["hidden_ratio"] * 2 / 3) // 256) * 256
    shared = ("hidden_size", "num_hidden_layers", "max_position_embeddings", "initializer_range", "use_cache")
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "vocab_size")
    library = {
        "model_type": _FLA_BACKBONES[options],
        **{name: values[name] for name in (*shared, *tokens)},
        "num_attention_heads": values["num_heads"],
        "num_key_value_heads": values["num_kv_heads"] or values["num_heads"],
        "head_dim": values["hidden_size"] // values["num_heads"],
        "intermediate_size": intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": values["norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": values["rope_theta"]},
        "dtype": config.get("dtype", config.get("torch_dtype")),
    }
    if options[2]:
        library["sliding_window"] = values["window_size"]
    elif library["model_type"] == "mistral":
        library["sliding_window"] = None
    return library


def library_to_fla(config: PreTrainedConfig) -> dict[str, Any]:
    """The config of a library backbone as flash-linear-attention's `transformer`.

    Raises:
        ConversionError: naming what fla's model does not have.
    """
    options = {model_type: options for options, model_type in _FLA_BACKBONES.items()}
    if config.model_type not in options:
        raise ConversionError(f"fla naming is written for {', '.join(options)} backbones, got '{config.model_type}'.")
    qkv_bias, qk_norm, _ = options[config.model_type]
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    problems = {
        "head_dim other than hidden_size / heads": head_dim * config.num_attention_heads != config.hidden_size,
        "scaled rotary embeddings": rope.get("rope_type", "default") != "default",
        "biases of attention or MLP": bool(
            getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
        ),
        f"activation {config.hidden_act!r}": config.hidden_act not in ("silu", "swish"),
        "attention dropout": bool(config.attention_dropout),
        "sliding windows on some layers": "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        f"q/k norm epsilon of {config.rms_norm_eps}": qk_norm and config.rms_norm_eps != _FLA_QK_NORM_EPS,
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    if found:
        raise ConversionError(f"fla's 'transformer' has no {'; no '.join(found)}, which this model has.")
    return {
        "model_type": "transformer",
        "architectures": ["TransformerForCausalLM"],
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "qkv_bias": qkv_bias,
        "qk_norm": qk_norm,
        "window_size": window,
        "rope_theta": rope["rope_theta"],
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_ratio": None,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "swish",
        "initializer_range": config.initializer_range,
        "norm_eps": config.rms_norm_eps,
        "use_cache": config.use_cache,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "dtype": config.to_dict().get("dtype"),
    }
