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
"""Backbone configs in the words of the AttnRes dialects, and back.

A field that the library's backbone does not know, or knows with another value, is an error that lists what is missing:
dropping it would load a model that computes something else.
"""

from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN

from .checkpoint import ConversionError


Shapes = dict[str, tuple[int, ...]]

# --- Kimi K3 on kimi_linear ------------------------------------------------------------------------------------------


def _linear(config: dict, name: str) -> Any:
    return (config.get("linear_attn_config") or {}).get(name)


def _padded_decay(config: dict, shapes: Shapes) -> bool:
    heads = _linear(config, "num_heads") or config.get("linear_num_heads")
    sizes = [
        shape[-1] if len(shape) == 1 else max(shape)
        for name, shape in shapes.items()
        if name.endswith("A_log") and shape
    ]
    return heads is not None and any(size != heads for size in sizes)


def _has(shapes: Shapes, part: str) -> bool:
    return any(part in name for name in shapes)


# What Kimi K3 has beyond kimi_linear, besides AttnRes: (what, how it shows in a config or in tensor names).
KIMI_K3_PARTS: tuple[tuple[str, Callable[[dict, Shapes], bool]], ...] = (
    (
        "SiTU activation",
        lambda config, shapes: (
            "situ" in str(config.get("hidden_act", "")).lower()
            or any(name.startswith("activation_situ") and value is not None for name, value in config.items())
        ),
    ),
    (
        "latent MoE (`routed_expert_hidden_size`)",
        lambda config, shapes: config.get("routed_expert_hidden_size") is not None or _has(shapes, ".routed_expert_"),
    ),
    ("MLA output gate", lambda config, shapes: bool(config.get("mla_use_output_gate"))),
    ("full-rank KDA gate", lambda config, shapes: bool(_linear(config, "use_full_rank_gate"))),
    (
        "lower bound of the KDA gate (`gate_lower_bound`)",
        lambda config, shapes: (_linear(config, "gate_lower_bound") or config.get("gate_lower_bound")) is not None,
    ),
    ("`A_log` padded beyond the number of heads", _padded_decay),
    (
        "quantised experts (MXFP4)",
        lambda config, shapes: (
            config.get("quantization_config") is not None or _has(shapes, "weight_packed") or _has(shapes, "_scale")
        ),
    ),
)

# Fields of published kimi_linear configs that the library's class does not keep, and the value its code stands for.
_KIMI_LINEAR_FIXED = {
    "moe_router_activation_func": ("sigmoid",),
    "moe_layer_freq": (1,),
    "mla_use_nope": (True,),
    "num_nextn_predict_layers": (0, None),
    "use_grouped_topk": (True,),
    "topk_method": ("noaux_tc",),
}
# Fields of published configs that do not change what the model computes, or that the class reads on construction.
_KIMI_LINEAR_READ = {"linear_attn_config", "first_k_dense_replace", "head_dim", "qk_head_dim"}
_KIMI_LINEAR_INERT = {"auto_map", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters", "use_cache"}
_LINEAR_ATTENTION_READ = {"head_dim", "num_heads", "short_conv_kernel_size", "full_attn_layers", "kda_layers"}


def kimi_k3_to_library(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The fields of a K3-style text config for the library's `kimi_linear`, if that has all of its parts.

    Raises:
        ConversionError: with the list of what the library's backbone lacks.
    """
    if config.get("model_type") != "kimi_linear":
        raise ConversionError(
            "Kimi K3 naming is understood on text configs of model_type 'kimi_linear', got "
            f"{config.get('model_type')!r}."
        )
    missing = [part for part, is_there in KIMI_K3_PARTS if is_there(config, shapes)]
    known_class = CONFIG_MAPPING["kimi_linear"]
    known = {*known_class().to_dict(), *known_class.attribute_map, "attn_res_block_size"}
    known |= _KIMI_LINEAR_READ | _KIMI_LINEAR_INERT
    explained = (
        "activation_situ",
        "routed_expert_hidden_size",
        "mla_use_output_gate",
        "gate_lower_bound",
        "quantization",
    )
    for name, value in config.items():
        if name in _KIMI_LINEAR_FIXED:
            if value not in _KIMI_LINEAR_FIXED[name]:
                missing.append(f"`{name}`={value!r}")
        elif name not in known and not name.startswith(explained) and value is not None:
            missing.append(f"`{name}`={value!r:.60}")
    for name, value in (config.get("linear_attn_config") or {}).items():
        if name not in _LINEAR_ATTENTION_READ | {"use_full_rank_gate", "gate_lower_bound"} and value is not None:
            missing.append(f"`linear_attn_config.{name}`={value!r:.60}")
    if str(config.get("hidden_act", "silu")) not in ACT2FN and "SiTU activation" not in missing:
        missing.append(f"activation {config['hidden_act']!r}")
    if missing:
        raise ConversionError(
            "This Kimi K3-style model has parts that the installed kimi_linear backbone lacks, and without them it "
            f"would compute something else: {'; '.join(missing)}."
        )
    return {name: value for name, value in config.items() if name not in ("attn_res_block_size", "auto_map")}


def library_to_kimi_k3(config: PreTrainedConfig) -> dict[str, Any]:
    """The config of a kimi_linear backbone for a K3-style `config.json`."""
    if config.model_type != "kimi_linear":
        raise ConversionError(f"Kimi K3 naming is written for kimi_linear backbones, got '{config.model_type}'.")
    return {**config.to_dict(), "architectures": ["KimiLinearForCausalLM"]}


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
# Choices of kernels and losses, and what every config carries: nothing that the model's output depends on.
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
