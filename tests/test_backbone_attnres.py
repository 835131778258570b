# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Which backbones are taken and which are refused, by what their code does and not by what they are called."""

import copy

import pytest
import torch
from accelerate import init_empty_weights
from tiny_backbones import BACKBONES, NUM_LAYERS, load_plain_weights, tiny_backbone, tiny_inputs
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

from modeling_attnres import AttnResConfig, AttnResForCausalLM, AttnResModel, UnsupportedBackboneError
from modeling_attnres.backbone_attnres import (
    LAYER_ARGUMENTS,
    backbone_class,
    backbone_problem,
    check_backbone,
    check_language_model_head,
    supported_backbones,
)
from modeling_attnres.compat_attnres import CACHE


# --- Taken -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", BACKBONES)
def test_required_backbones_have_a_plan_for_every_layer(model_type):
    backbone = AutoModel.from_config(tiny_backbone(model_type))
    weights = copy.deepcopy(backbone.state_dict())
    generator_state = torch.get_rng_state()
    plans = check_backbone(backbone)
    check_language_model_head(backbone.config)
    assert len(plans) == NUM_LAYERS
    for plan, layer in zip(plans, backbone.layers, strict=True):
        parts = {plan.mixer_norm, plan.mixer, plan.feed_forward_norm, plan.feed_forward}
        assert len(parts) == 4
        assert parts <= set(dict(layer.named_children()))
    # Looking does not touch.
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.state_dict().items())
    assert backbone.training


def test_the_plan_of_a_linear_attention_layer():
    linear, *_, full = check_backbone(AutoModel.from_config(tiny_backbone("qwen3_next")))
    assert (linear.mixer, full.mixer) == ("linear_attn", "self_attn")
    for plan in (linear, full):  # under whatever name the mixer takes it
        assert list(plan.mixer_arguments.values()).count(CACHE) == 1


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "deepseek_v3", "gpt_oss"])
def test_default_configurations_are_judged_without_weights(model_type):
    assert backbone_problem(model_type) is None


def test_checks_run_inside_from_pretrained_where_the_default_device_is_meta():
    with torch.device("meta"):
        assert len(check_backbone(LlamaModel(tiny_backbone("llama")))) == NUM_LAYERS


# --- Refused ---------------------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
REFUSED = {
    "gemma2": r"must hold a token mixer, a feed-forward and a norm before each, and holds .*pre_feedforward_layernorm",
    "gemma3_text": r"its rotary embedding takes more than hidden states and positions",
    "olmo2": r"reads the residual stream without a norm: a post-norm decoder",
    "granite": r"scales the residual stream by `residual_multiplier`",
    "cohere": r"must hold a token mixer, a feed-forward and a norm before each, and holds input_layernorm, mlp, self",
    "phi": r"has no `norm`",
    "falcon": r"has no `embed_tokens`, `layers`, `norm`",
    "gpt2": r"has no `embed_tokens`, `layers`, `norm`",
    "nanochat": r"scales or changes the embedding",
    "glm4": r"must hold a token mixer, a feed-forward and a norm before each",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_backbones_outside_the_contract_are_refused_with_the_reason(model_type):
    config = AttnResConfig(text_config=CONFIG_MAPPING[model_type](**TINY), sublayers_per_block=2)
    with pytest.raises(UnsupportedBackboneError, match=REFUSED[model_type]) as refusal:
        AttnResForCausalLM(config)
    assert f"'{model_type}'" in str(refusal.value)
    assert isinstance(refusal.value, ValueError)


def test_a_multiplier_that_happens_to_be_one_is_refused_too():
    config = AttnResConfig(text_config=CONFIG_MAPPING["granite"](**TINY, residual_multiplier=1.0))
    with pytest.raises(UnsupportedBackboneError, match="residual_multiplier"):
        AttnResModel(config)


def test_a_vision_language_model_is_not_a_decoder():
    with pytest.raises(ValueError, match=r"must describe a decoder .* got a 'qwen2_vl' config \(of a multimodal"):
        AttnResConfig(text_config=CONFIG_MAPPING["qwen2_vl"]())


def test_attnres_does_not_go_into_attnres():
    with pytest.raises(ValueError, match="got an AttnRes config"):
        AttnResConfig(text_config=AttnResConfig(text_config=tiny_backbone("llama")))


def test_a_config_without_a_base_model():
    with pytest.raises(UnsupportedBackboneError, match="has no base model for a 'trocr' config"):
        backbone_class(CONFIG_MAPPING["trocr"]())


def test_auto_classes_refuse_with_the_same_reason(tmp_path):
    AttnResConfig(text_config=CONFIG_MAPPING["olmo2"](**TINY)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBackboneError, match="post-norm"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))


# --- Refused by numbers alone: the parts of a Llama, put together otherwise ------------------------------------------


class _ScaledResidual(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + 0.5 * self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class _Parallel(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        output = self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + output + self.mlp(self.post_attention_layernorm(hidden_states))


class _NoSecondNorm(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(hidden_states) + 0 * self.post_attention_layernorm(hidden_states)


class _FeedForwardFirst(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]


class _Dropout(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        output = self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states = hidden_states + nn.functional.dropout(output, p=0.5, training=self.training)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class _OwnParameter(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.gate = nn.Parameter(torch.ones(()))


class _Crashes(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return self.no_such_part(hidden_states)


@pytest.mark.parametrize(
    ("layer_class", "reason"),
    [
        (_ScaledResidual, "not two plain residual adds"),
        (_Parallel, "not two plain residual adds"),
        (_NoSecondNorm, "where norm, token mixer, norm, feed-forward are due"),
        (_FeedForwardFirst, "where norm, token mixer, norm, feed-forward are due"),
        (_Dropout, "not two plain residual adds"),
        (_OwnParameter, "must hold a token mixer"),
        (_Crashes, r"does not run on a plain PreNorm decoder's parts \(AttributeError: .*no_such_part"),
    ],
)
def test_a_layer_with_the_right_parts_that_computes_something_else(layer_class, reason):
    backbone = LlamaModel(tiny_backbone("llama"))
    for index in range(NUM_LAYERS):
        backbone.layers[index] = layer_class(backbone.config, index)
    with pytest.raises(UnsupportedBackboneError, match=reason):
        check_backbone(backbone)


def test_one_odd_layer_among_plain_ones_is_found():
    backbone = LlamaModel(tiny_backbone("llama"))
    backbone.layers[2] = _Parallel(backbone.config, 2)
    with pytest.raises(UnsupportedBackboneError, match="not two plain residual adds"):
        check_backbone(backbone)


class _ScaledEmbedding(LlamaModel):
    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        return super().forward(inputs_embeds=2 * self.embed_tokens(input_ids), **kwargs)


class _SkipsALayer(LlamaModel):
    def forward(self, *args, **kwargs):
        layers = self.layers
        self.layers = layers[:-1]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.layers = layers


class _ScalesTheOutput(LlamaModel):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        return output


class _OwnMask(LlamaModel):
    def forward(self, *args, attention_mask=None, **kwargs):
        return super().forward(*args, attention_mask=None, **kwargs)


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (_ScaledEmbedding, "scales or changes the embedding"),
        (_SkipsALayer, "calls 3 of its 4 layers once|calls 0 of its 4 layers|does not run"),
        (_ScalesTheOutput, "more than apply the final norm"),
        (_OwnMask, "feeds its layers a `attention_mask` of its own"),
    ],
)
def test_a_model_that_does_more_than_run_its_layers(model_class, reason):
    with pytest.raises(UnsupportedBackboneError, match=reason):
        check_backbone(model_class(tiny_backbone("llama")))


def test_a_head_that_caps_its_logits(monkeypatch):
    forward = LlamaForCausalLM.forward

    def capped(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = torch.tanh(output.logits)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    with pytest.raises(UnsupportedBackboneError, match="scales or caps the logits"):
        check_language_model_head(LlamaConfig())


# --- A library that calls its layers otherwise -----------------------------------------------------------------------


class _CalledOtherwise(nn.Module):
    """A layer between whose model and itself the keyword arguments change."""

    def __init__(self, layer, change):
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, hidden_states, **kwargs):
        return self.layer(hidden_states, **self.change(kwargs))


def calls_layers_otherwise(backbone, change):
    """The backbone, whose own `forward` hands its layers what `change` makes of the keyword arguments."""
    model_class = type(backbone)

    def forward(self, *args, **kwargs):
        layers = self.layers
        self.layers = nn.ModuleList(_CalledOtherwise(layer, change) for layer in layers)
        try:
            return model_class.forward(self, *args, **kwargs)
        finally:
            self.layers = layers

    backbone.__class__ = type(model_class.__name__, (model_class,), {"forward": forward})
    return backbone


HANDED_ON = [(model_type, name) for model_type in ("llama", "qwen3_moe", "kimi_linear") for name in LAYER_ARGUMENTS]
HANDED_ON.remove(("kimi_linear", "position_embeddings"))  # it has no rotary embedding


@pytest.mark.parametrize("suffix", ["s_", "_of_layer"])
@pytest.mark.parametrize(("model_type", "name"), HANDED_ON)
def test_a_renamed_argument_is_refused_by_name(model_type, name, suffix):
    backbone = AutoModel.from_config(tiny_backbone(model_type))
    renamed = calls_layers_otherwise(
        backbone, lambda kwargs: {key + suffix if key == name else key: value for key, value in kwargs.items()}
    )
    with pytest.raises(UnsupportedBackboneError, match=f"'{model_type}'.*feeds its layers a `{name}{suffix}`"):
        check_backbone(renamed)


@pytest.mark.parametrize("name", ["attention_mask", CACHE])
def test_an_argument_that_is_left_out_is_refused_by_name(name):
    backbone = AutoModel.from_config(tiny_backbone("qwen3_moe"))
    changed = calls_layers_otherwise(
        backbone, lambda kwargs: {key: value for key, value in kwargs.items() if key != name}
    )
    with pytest.raises(UnsupportedBackboneError, match=f"feeds its layers no `{name}`"):
        check_backbone(changed)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", CACHE])
def test_another_object_under_the_right_name_is_refused(name):
    def other(value):
        return copy.deepcopy(value) if name == CACHE else value.roll(1, dims=-1)

    backbone = AutoModel.from_config(tiny_backbone("llama"))
    changed = calls_layers_otherwise(backbone, lambda kwargs: {**kwargs, name: other(kwargs[name])})
    with pytest.raises(UnsupportedBackboneError, match=f"feeds its layers a `{name}` of its own"):
        check_backbone(changed)


@pytest.mark.parametrize("value", [torch.ones(1), None], ids=["given", "none"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "kimi_linear"])
def test_a_new_argument_is_refused_by_name(model_type, value):
    """Also where it is nothing in the probe: a mixer that takes it would miss it in another forward."""
    backbone = AutoModel.from_config(tiny_backbone(model_type))
    changed = calls_layers_otherwise(backbone, lambda kwargs: {**kwargs, "segment_ids": value})
    with pytest.raises(UnsupportedBackboneError, match=r"(feeds its layers a|takes) `segment_ids`"):
        check_backbone(changed)


def test_checks_run_where_parameters_are_taken_away():
    with init_empty_weights():
        model = AttnResForCausalLM(AttnResConfig(text_config=tiny_backbone("llama"), sublayers_per_block=2))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# --- Everything this installation has --------------------------------------------------------------------------------


def _shrunk(config):
    """The config of any decoder at a size to run, where its fields allow that."""
    small = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    }
    defaults = type(config)()
    values = {name: value for name, value in small.items() if isinstance(getattr(defaults, name, None), int)}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return type(config)(**values, **tokens)


@pytest.mark.slow
def test_supported_backbones_are_the_dense_models_bit_for_bit():
    """Real weights and numbers through every supported backbone that can be built small without knowing it."""
    supported = supported_backbones()
    assert set(BACKBONES) <= set(supported)
    assert not set(REFUSED) & set(supported)
    compared, different = [], {}
    for model_type in supported:
        try:
            config = _shrunk(CONFIG_MAPPING[model_type]())
            torch.manual_seed(0)
            dense = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                expected = dense(tiny_inputs()).logits
        except Exception:
            continue
        for sublayers_per_block in (1, 2, 3, 2 * config.num_hidden_layers):
            model = AttnResForCausalLM(
                AttnResConfig(text_config=config, sublayers_per_block=sublayers_per_block, depth_weights="sum")
            ).eval()
            load_plain_weights(model, dense)
            with torch.no_grad():
                difference = (model(tiny_inputs()).logits - expected).abs().max().item()
            if difference != 0.0:
                different[model_type, sublayers_per_block] = difference
        compared.append(model_type)
    assert not different
    assert len(compared) >= 30, compared
