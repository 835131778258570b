# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The text model of Kimi K3 as a PreNorm backbone: what it has beyond Transformers' kimi_linear.

| part | kimi_linear | Kimi K3 |
|---|---|---|
| gated activation | `silu(gate) * up` | SiTU: both factors bounded by tanh, in fp32 |
| mixture of experts | experts read the hidden states | experts read a latent; their sum is normed and projected back |
| full attention (MLA) | | a sigmoid gate before the output projection |
| linear attention (KDA), decay | `-exp(A_log) softplus(r)` | `lower_bound * sigmoid(exp(A_log) r)` |
| linear attention (KDA), output gate | low rank | full rank |

Depth attention is not part of it: [`AttnResForCausalLM`] lays it around this backbone as around any other. A checkpoint of
such a model names this module in its `auto_map`, which is why the AttnRes classes can be imported from here. It carries
this file and every other, while a checkpoint with a backbone of the library goes without this one.

Letters: B batch, T tokens, D hidden size, E experts, K experts per token, H heads.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.integrations import use_experts_implementation
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearAttention,
    KimiLinearDecoderLayer,
    KimiLinearDeltaAttention,
    KimiLinearForCausalLM,
    KimiLinearForgetGate,
    KimiLinearModel,
    KimiLinearPreTrainedModel,
    KimiLinearRMSNorm,
    KimiLinearTopkRouter,
)

from .configuration_attnres import AttnResConfig
from .modeling_attnres import (
    AttnResForCausalLM,
    AttnResForQuestionAnswering,
    AttnResForSequenceClassification,
    AttnResForTokenClassification,
    AttnResModel,
)
from .peft_attnres import register_peft_targets


# --- Configuration ---------------------------------------------------------------------------------------------------

# Fields of published configs that choose between ways of computing, and the one way that exists here.
_FIXED = {
    "moe_router_activation_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "mla_use_nope": (True,),
    "num_nextn_predict_layers": (0, None),
}


@strict
class KimiK3TextConfig(KimiLinearConfig):
    r"""
    Configuration of Kimi K3's text model.

    Takes the fields of a published `text_config` (`linear_attn_config`, `num_experts`, `first_k_dense_replace`,
    `moe_layer_freq`...) and those of [`KimiLinearConfig`]; the latter are what it keeps. A field that a published config
    leaves out has the default of Kimi K3's own code, which often is not kimi_linear's: without `num_experts` every layer
    is dense, without `gate_lower_bound` the decay is not bounded.

    Args:
        activation_situ_beta (`float`, *optional*):
            With `hidden_act="situ"`, bound of the gate's factor; 1 where it is left out.
        activation_situ_linear_beta (`float`, *optional*):
            With `hidden_act="situ"`, bound of the other factor, which is left as it is where this is left out.
        routed_expert_hidden_size (`int`, *optional*):
            Width of the latent that the routed experts read and write; by default they do so with the hidden states.
        latent_moe_use_norm (`bool`, *optional*, defaults to `False`):
            Whether the latent is normed after the experts' outputs are summed.
        mla_use_output_gate (`bool`, *optional*, defaults to `False`):
            Whether full attention has a gate before its output projection.
        linear_use_full_rank_gate (`bool`, *optional*, defaults to `False`):
            Whether the output gate of linear attention is one projection, and not two of low rank.
        linear_gate_lower_bound (`float`, *optional*):
            Bound below of the log decay of linear attention, a negative number.
        linear_padded_heads (`int`, *optional*):
            How many numbers `A_log` has in files: one per head and zeros, as in the released ones. By default no zeros.

    Raises:
        ValueError: if a field asks for what this model does not compute, fields contradict one another, or the config
            describes depth attention (`attn_res_block_size`), which is not this backbone's.
    """

    model_type = "kimi_k3_text"

    hidden_act: str = "silu"
    activation_situ_beta: float | int | None = None
    activation_situ_linear_beta: float | int | None = None
    rms_norm_eps: float = 1e-6
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    n_shared_experts: int = 0
    routed_scaling_factor: float | int = 1.0
    routed_expert_hidden_size: int | None = None
    latent_moe_use_norm: bool = False
    mla_use_output_gate: bool = False
    linear_use_full_rank_gate: bool = False
    linear_gate_lower_bound: float | int | None = None
    linear_padded_heads: int | None = None

    def __post_init__(self, **kwargs):
        self._read_fixed(kwargs)
        self._read_linear_attention(kwargs.pop("linear_attn_config", None) or {})
        first_sparse = kwargs.pop("first_k_dense_replace", None) or 0
        every = kwargs.pop("moe_layer_freq", None) or 1
        if self.mlp_layer_types is None:
            has_experts = kwargs.get("num_experts", self.num_local_experts) is not None
            self.mlp_layer_types = [
                "sparse" if has_experts and index >= first_sparse and index % every == 0 else "dense"
                for index in range(self.num_hidden_layers)
            ]
        super().__post_init__(**kwargs)

    def _read_fixed(self, kwargs: dict[str, Any]):
        """Takes the fields of published configs that change nothing here, and refuses them where they would."""
        if (block := kwargs.pop("attn_res_block_size", None)) is not None:
            raise ValueError(
                "`attn_res_block_size` is not a field of the backbone: build "
                f"`AttnResConfig(text_config=..., sublayers_per_block={2 * block})`, which counts sublayers, two per "
                f"decoder layer; got {block}."
            )
        for name, allowed in _FIXED.items():
            if (value := kwargs.pop(name, allowed[0])) not in allowed:
                raise ValueError(f"`{name}` must be {allowed[0]!r}, the only form that is implemented, got {value!r}.")
        groups = kwargs.get("num_expert_group", self.n_group)
        if not kwargs.pop("use_grouped_topk", True) and groups != 1:
            raise ValueError(
                f"`use_grouped_topk=False` goes with one group of experts, got num_expert_group={groups}."
            )

    def _read_linear_attention(self, published: dict[str, Any]):
        """Takes `linear_attn_config`, whose lists of layers count from 1."""
        names = {
            "head_dim": "linear_head_dim",
            "num_heads": "linear_num_heads",
            "short_conv_kernel_size": "linear_conv_kernel_dim",
            "use_full_rank_gate": "linear_use_full_rank_gate",
            "gate_lower_bound": "linear_gate_lower_bound",
        }
        lists = {"full_attn_layers": "full_attention", "kda_layers": "linear_attention"}
        if unknown := sorted(set(published) - set(names) - set(lists)):
            raise ValueError(f"`linear_attn_config` has fields that are unknown here: {unknown}.")
        for name, value in published.items():
            if name in names:
                setattr(self, names[name], value)
        given = {name: published[name] for name in lists if published.get(name) is not None}
        numbers = sorted(number for layers in given.values() for number in layers)
        if given and numbers != list(range(1, self.num_hidden_layers + 1)):
            raise ValueError(
                "`linear_attn_config` must name every decoder layer once, from 1 to `num_hidden_layers`="
                f"{self.num_hidden_layers}, in {' and '.join(f'`{name}`' for name in lists)}, got {given}."
            )
        # By default as in the released model: every fourth layer, and the last.
        every_fourth = [*range(4, self.num_hidden_layers, 4), self.num_hidden_layers]
        full = given.get("full_attn_layers", [] if given else every_fourth)
        layer_types = [
            "full_attention" if number in full else "linear_attention"
            for number in range(1, self.num_hidden_layers + 1)
        ]
        if given and self.layer_types not in (None, layer_types):
            raise ValueError(f"`layer_types` must agree with `linear_attn_config`={given}, got {self.layer_types}.")
        self.layer_types = self.layer_types or layer_types

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        super().validate_architecture()
        if self.hidden_act != "situ" and self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be 'situ' or an activation of Transformers, got {self.hidden_act!r}.")
        for name in ("activation_situ_beta", "activation_situ_linear_beta"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        bound = self.linear_gate_lower_bound
        if bound is not None and not bound < 0:
            raise ValueError(f"`gate_lower_bound` bounds a log decay and must be negative, got {bound}.")
        if self.linear_padded_heads is not None and self.linear_padded_heads < self.linear_num_heads:
            raise ValueError(
                f"`linear_padded_heads` must be at least the {self.linear_num_heads} heads of linear attention, got "
                f"{self.linear_padded_heads}."
            )
        if "sparse" in (self.mlp_layer_types or ()):
            sizes = ("num_experts", "num_experts_per_token", "moe_intermediate_size")
            if missing := [name for name in sizes if getattr(self, name, None) is None]:
                raise ValueError(f"A mixture of experts needs {', '.join(f'`{name}`' for name in missing)}, got none.")
            if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
                raise ValueError(
                    f"`num_experts_per_token` must be from 1 to `num_experts`={self.num_local_experts}, got "
                    f"{self.num_experts_per_tok}."
                )


# --- Feed-forward ----------------------------------------------------------------------------------------------------


class KimiK3GatedActivation(nn.Module):
    """`activation(gate) * up`; as SiTU, with bounds b and c, `b tanh(gate / b) sigmoid(gate) * c tanh(up / c)` in fp32."""

    def __init__(self, config: KimiK3TextConfig):
        super().__init__()
        self.act_fn = None if config.hidden_act == "situ" else ACT2FN[config.hidden_act]
        self.beta = 1.0 if config.activation_situ_beta is None else config.activation_situ_beta
        self.linear_beta = config.activation_situ_linear_beta

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.act_fn is not None:
            return self.act_fn(gate) * up
        dtype = gate.dtype
        gate, up = gate.float(), up.float()
        if self.linear_beta is not None:
            up = self.linear_beta * torch.tanh(up / self.linear_beta)
        return (self.beta * torch.tanh(gate / self.beta) * torch.sigmoid(gate) * up).to(dtype)


class KimiK3MLP(nn.Module):
    def __init__(self, config: KimiK3TextConfig, intermediate_size: int | None = None):
        super().__init__()
        width = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = KimiK3GatedActivation(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


@use_experts_implementation
class KimiK3Experts(nn.Module):
    """The routed experts' weights in two tensors. Outputs are rounded to the model's dtype, then summed in fp32."""

    def __init__(self, config: KimiK3TextConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.routed_expert_hidden_size or config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = KimiK3GatedActivation(config)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(*gate_up.chunk(2, dim=-1))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `[B * T, hidden_dim]`.
            top_k_index: `[B * T, K]`; E stands for an expert of another rank.
            top_k_weights: `[B * T, K]`, fp32.
        """
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts:
                continue
            token, choice = torch.where(top_k_index == expert)
            gate_up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert])
            output = nn.functional.linear(self._apply_gate(gate_up), self.down_proj[expert])
            total.index_add_(0, token, output.float() * top_k_weights[token, choice, None])
        return total.to(hidden_states.dtype)


class KimiK3TopkRouter(KimiLinearTopkRouter):
    def __init__(self, config: KimiK3TextConfig):
        super().__init__(config)
        # Dtypes as in the released files, on every version; the product with the weight is in fp32 all the same.
        self.weight = nn.Parameter(torch.zeros(self.num_experts, self.hidden_dim))
        self.e_score_correction_bias = self.e_score_correction_bias.float()
        # A single weight is left what it is: divided by itself it would be 1.
        self.norm_topk_prob = config.norm_topk_prob and self.top_k > 1


class KimiK3MoE(nn.Module):
    """`up(norm(sum of experts(down(x)))) + shared_experts(x)`; without a latent, `sum of experts(x) + shared_experts(x)`."""

    def __init__(self, config: KimiK3TextConfig):
        super().__init__()
        self.gate = KimiK3TopkRouter(config)
        self.experts = KimiK3Experts(config)
        self.has_latent = config.routed_expert_hidden_size is not None
        if self.has_latent:
            width = config.routed_expert_hidden_size
            self.routed_expert_down_proj = nn.Linear(config.hidden_size, width, bias=False)
            if config.latent_moe_use_norm:
                self.routed_expert_norm = KimiLinearRMSNorm(width, config.rms_norm_eps)
            else:
                self.routed_expert_norm = nn.Identity()
            self.routed_expert_up_proj = nn.Linear(width, config.hidden_size, bias=False)
        if config.n_shared_experts:
            self.shared_experts = KimiK3MLP(config, config.moe_intermediate_size * config.n_shared_experts)
        else:
            self.shared_experts = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        _, weights, indices = self.gate(hidden_states)
        routed = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.has_latent:
            routed = self.routed_expert_down_proj(routed)
        routed = self.experts(routed, indices, weights)
        if self.has_latent:
            routed = self.routed_expert_up_proj(self.routed_expert_norm(routed))
        routed = routed.view(hidden_states.shape)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


# --- Token mixers ----------------------------------------------------------------------------------------------------


class _WithOutputGate:
    """An attention module whose `o_proj` multiplies by a gate first; all else is the module's own."""

    def __init__(self, attention: nn.Module, gate: torch.Tensor):
        self.attention, self.gate = attention, gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)

    def o_proj(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.attention.o_proj(hidden_states * self.gate)


class KimiK3Attention(KimiLinearAttention):
    def __init__(self, config: KimiK3TextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.mla_use_output_gate:
            self.g_proj = nn.Linear(config.hidden_size, self.num_heads * self.v_head_dim, bias=False)
        else:
            self.g_proj = None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.g_proj is None:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        gated = _WithOutputGate(self, torch.sigmoid(self.g_proj(hidden_states)))
        return KimiLinearAttention.forward(gated, hidden_states, attention_mask=attention_mask, **kwargs)


class KimiK3ForgetGate(KimiLinearForgetGate):
    """The log decay `[B, T, H, head_dim]` of linear attention, fp32; bounded below where the config has a bound."""

    def __init__(self, config: KimiK3TextConfig):
        super().__init__(config)
        self.lower_bound = config.linear_gate_lower_bound

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.lower_bound is None:
            return super().forward(hidden_states)
        raw = self.f_b_proj(self.f_a_proj(hidden_states)).float() + self.dt_bias.float()
        raw = raw.view(*hidden_states.shape[:2], -1, self.head_dim)
        return self.lower_bound * torch.sigmoid(self.A_log.float().exp() * raw)


class _Fp32OutputLinear(nn.Linear):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states).float()


class KimiK3DeltaAttention(KimiLinearDeltaAttention):
    def __init__(self, config: KimiK3TextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.activation = "silu"  # of the convolutions, whatever the feed-forward's is
        self.forget_gate = KimiK3ForgetGate(config)
        self.b_proj = _Fp32OutputLinear(config.hidden_size, self.num_heads, bias=False)  # its sigmoid is in fp32
        if config.linear_use_full_rank_gate:
            del self.g_b_proj
            self.g_a_proj = nn.Identity()
            self.g_proj = nn.Linear(config.hidden_size, self.qkv_dim, bias=False)
        # In fp32 whatever the model's dtype, when it is built as when it is loaded.
        in_fp32 = ((self.conv1d, "weight"), (self.o_norm, "weight"))
        for module, name in (*in_fp32, (self.forget_gate, "A_log"), (self.forget_gate, "dt_bias")):
            setattr(module, name, nn.Parameter(getattr(module, name).detach().float()))

    @property
    def g_b_proj(self) -> nn.Module:
        """The last projection of the output gate, by the name that kimi_linear's forward knows it by."""
        return self._modules["g_b_proj" if "g_b_proj" in self._modules else "g_proj"]


# --- Model -----------------------------------------------------------------------------------------------------------


class KimiK3DecoderLayer(KimiLinearDecoderLayer):
    def __init__(self, config: KimiK3TextConfig, layer_idx: int):
        # Past kimi_linear's constructor, which would build its own parts.
        super(KimiLinearDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.block_type = config.layer_types[layer_idx]
        full_attention = self.block_type == "full_attention"
        self.self_attn = (KimiK3Attention if full_attention else KimiK3DeltaAttention)(config, layer_idx)
        self.mlp = (KimiK3MoE if config.mlp_layer_types[layer_idx] == "sparse" else KimiK3MLP)(config)
        self.input_layernorm = KimiLinearRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = KimiLinearRMSNorm(config.hidden_size, config.rms_norm_eps)


class KimiK3PreTrainedModel(KimiLinearPreTrainedModel):
    config: KimiK3TextConfig
    _no_split_modules = ["KimiK3DecoderLayer"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "conv1d", "o_norm", "e_score_correction_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, KimiK3Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)


class KimiK3TextModel(KimiK3PreTrainedModel, KimiLinearModel):
    """Kimi K3's decoder as a PreNorm model: a backbone for [`AttnResModel`]."""

    def __init__(self, config: KimiK3TextConfig):
        super(KimiLinearModel, self).__init__(config)  # past kimi_linear's constructor, as in the layer
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(KimiK3DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = KimiLinearRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()


class KimiK3ForCausalLM(KimiK3PreTrainedModel, KimiLinearForCausalLM):
    """[`KimiK3TextModel`] with its language model head, without depth attention."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: KimiK3TextConfig):
        super(KimiLinearForCausalLM, self).__init__(config)
        self.model = KimiK3TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# --- Weights ---------------------------------------------------------------------------------------------------------


class _HeadsFromFile(ConversionOps):
    """`A_log` of a file to `[1, 1, H, 1]`: one number per head, which the released files pad with zeros."""

    @torch.no_grad
    def convert(self, input_dict, source_patterns, target_patterns, config=None, full_layer_name=None, **kwargs):
        (tensor,) = input_dict.values()
        values = (tensor[0] if isinstance(tensor, list) else tensor).reshape(-1)
        heads = config.linear_num_heads
        padding = values[heads:]
        used = 0 if padding.is_meta else int(padding.count_nonzero())
        if values.numel() < heads or used:
            raise ValueError(
                f"`{full_layer_name}` must have one number for each of the {heads} heads and zeros after them, got "
                f"{values.numel()} numbers, {used} of the later ones not zero."
            )
        return {target_patterns[0]: values[:heads].view(1, 1, heads, 1).contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        return _HeadsToFile()


class _HeadsToFile(ConversionOps):
    """`A_log` `[1, 1, H, 1]` to `[H]`, or to as many numbers as the config says."""

    @torch.no_grad
    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        (tensor,) = input_dict.values()
        values = (tensor[0] if isinstance(tensor, list) else tensor).reshape(-1)
        zeros = (config.linear_padded_heads or values.numel()) - values.numel()
        return {target_patterns[0]: nn.functional.pad(values, (0, zeros))}

    @property
    def reverse_op(self) -> ConversionOps:
        return _HeadsFromFile()


def _weight_conversions() -> list[WeightRenaming | WeightConverter]:
    """kimi_linear's, up to two: `A_log` is padded, and only a mixture of experts is called `block_sparse_moe`."""
    library = get_checkpoint_conversion_mapping(KimiLinearConfig.model_type)
    replaced = ("block_sparse_moe", "A_log")
    conversions = [part for part in library if not any(name in part.source_patterns[0] for name in replaced)]
    latent = ("routed_expert_down_proj", "routed_expert_norm", "routed_expert_up_proj")
    conversions += [
        WeightRenaming(rf"\.block_sparse_moe\.{name}\.", rf"\.mlp\.{name}\.")
        for name in ("gate", "experts", "shared_experts", *latent)
    ]
    decay = WeightConverter("self_attn.A_log", "self_attn.forget_gate.A_log", operations=[_HeadsFromFile()])
    return [*conversions, decay]


register_checkpoint_conversion_mapping(KimiK3TextConfig.model_type, _weight_conversions(), overwrite=True)
AutoConfig.register(KimiK3TextConfig.model_type, KimiK3TextConfig, exist_ok=True)
AutoModel.register(KimiK3TextConfig, KimiK3TextModel, exist_ok=True)
AutoModelForCausalLM.register(KimiK3TextConfig, KimiK3ForCausalLM, exist_ok=True)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[KimiK3TextConfig.model_type] = KimiK3ForCausalLM.__name__
register_peft_targets(KimiK3TextConfig.model_type)
KimiK3TextConfig.register_for_auto_class()
KimiK3TextModel.register_for_auto_class("AutoModel")
KimiK3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")


__all__ = [
    "AttnResConfig",
    "AttnResForCausalLM",
    "AttnResForQuestionAnswering",
    "AttnResForSequenceClassification",
    "AttnResForTokenClassification",
    "AttnResModel",
    "KimiK3ForCausalLM",
    "KimiK3TextConfig",
    "KimiK3TextModel",
]
