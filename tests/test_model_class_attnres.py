# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Model classes made per backbone: names of weights, what the class answers, copies, users' subclasses, former names."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_backbones import BACKBONES, tiny_backbone, tiny_config, tiny_inputs, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from modeling_attnres import (
    AttnResConfig,
    AttnResForCausalLM,
    AttnResForSequenceClassification,
    AttnResModel,
    supported_backbones,
)


DEPTH = {"model.depth_attention.query", "model.depth_attention.key_norm"}
PLANS = ("_tp_plan", "_ep_plan", "_fsdp_plan")
IGNORED = ("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_save")
KEPT = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "all_tied_weights_keys")
FLAGS = ("_is_stateful", "_can_compile_fullgraph", "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn")


def differences(config) -> dict:
    """What tells an AttnRes model of a backbone from the plain model, beside depth attention."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        model = AttnResForCausalLM(AttnResConfig(text_config=config, sublayers_per_block=1))
    found = {}
    if model.state_dict().keys() ^ plain.state_dict().keys() != DEPTH:
        found["names"] = (model.state_dict().keys() ^ plain.state_dict().keys()) - DEPTH
    for name in (*PLANS, *IGNORED, *KEPT):
        if getattr(model, name, None) != getattr(plain, name, None):
            found[name] = getattr(model, name, None), getattr(plain, name, None)
    for ours, theirs in ((type(model), type(plain)), (type(model.model), type(plain.model))):
        for name in (*FLAGS, "_supports_attention_backend"):
            if getattr(ours, name, None) != getattr(theirs, name, None):
                found[name] = getattr(ours, name, None), getattr(theirs, name, None)
        for name in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
            if getattr(ours, name)() != getattr(theirs, name)():
                found[name] = getattr(ours, name)()
    for name in ("_attn_implementation", "_experts_implementation"):
        if getattr(model.config, name) != getattr(plain.config, name):
            found[name] = getattr(model.config, name)
    if model.supports_pp_plan:
        found["pp"] = model._pp_plan
    return found


@pytest.mark.parametrize("model_type", BACKBONES)
def test_nobody_can_tell_it_from_the_plain_model(model_type):
    assert differences(tiny_backbone(model_type)) == {}


@pytest.mark.slow
def test_nobody_can_tell_any_supported_backbone_from_the_plain_model():
    assert {name: found for name in supported_backbones() if (found := differences(CONFIG_MAPPING[name]()))} == {}


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "deepseek_v3", "kimi_linear", "kimi_k3_text", "gpt_oss"])
def test_names_on_disk_are_the_plain_models(model_type, tmp_path):
    plain = AutoModelForCausalLM.from_config(tiny_backbone(model_type))
    plain.save_pretrained(tmp_path / "plain")
    model = tiny_model(model_type, 3)
    model.save_pretrained(tmp_path / "attnres")
    names = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("plain", "attnres")]
    assert names[1] - names[0] == DEPTH
    assert not names[0] - names[1]


def test_a_plain_checkpoint_needs_no_conversion():
    """Nothing but the former level, which the library takes for what a checkpoint need not have."""
    conversions = get_model_conversion_mapping(tiny_model("llama"), add_legacy=False)
    assert [isinstance(conversion, PrefixChange) for conversion in conversions] == [True]


def test_the_model_owns_its_parts():
    model = tiny_model("qwen3").model
    assert [name for name, _ in model.named_children()] == [
        *("depth_input", "embed_tokens", "layers", "norm", "rotary_emb", "depth_attention")
    ]
    replacement = torch.nn.Embedding(5, 32)
    model.embed_tokens = replacement
    assert model.get_input_embeddings() is replacement


def test_the_config_asks_for_gradient_checkpointing():
    """It is read at the end of a constructor: of this one, when the layers are there, not of the backbone's within."""
    config = tiny_config("llama")
    config.gradient_checkpointing = True
    assert all(layer.gradient_checkpointing for layer in AttnResForCausalLM(config).model.layers)


class Custom(AttnResForCausalLM):
    """A user's model, with a base model of their own."""

    def __init__(self, config, scale=1.0):
        super().__init__(config)
        self.scale = scale


class CustomBase(AttnResModel):
    """A user's base model."""


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_torch, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize(
    "model_class", [AttnResForCausalLM, AttnResModel, AttnResForSequenceClassification, Custom, CustomBase]
)
def test_models_are_copied_and_pickled(model_class, copied):
    model = tiny_model("qwen3_moe", 3, model_class=model_class)
    other = copied(model)
    assert type(other) is type(model)
    assert torch.equal(other(tiny_inputs())[0], model(tiny_inputs())[0])


def test_a_users_subclass_keeps_its_name_and_constructor(tmp_path):
    torch.manual_seed(0)
    model = Custom(tiny_config("qwen3_moe"), scale=2.0)
    assert (type(model).__name__, model.scale) == ("Custom", 2.0)
    assert isinstance(model, Custom)
    assert type(model)._can_set_experts_implementation()
    model.save_pretrained(tmp_path)
    assert AttnResConfig.from_pretrained(tmp_path).architectures == ["Custom"]
    loaded = Custom.from_pretrained(tmp_path)
    assert torch.equal(loaded(tiny_inputs()).logits, model.eval()(tiny_inputs()).logits)


def test_a_users_base_model_is_saved_under_its_own_name(tmp_path):
    tiny_model("llama", model_class=CustomBase).save_pretrained(tmp_path)
    config = AttnResConfig.from_pretrained(tmp_path)
    assert config.architectures == ["CustomBase"]
    assert config.auto_map["AutoModel"] == "test_model_class_attnres.CustomBase"
    assert isinstance(CustomBase.from_pretrained(tmp_path), CustomBase)


def test_a_plain_config_is_refused():
    with pytest.raises(ValueError, match="`config` must be an AttnResConfig, got a LlamaConfig"):
        AttnResForCausalLM(LlamaConfig())


# --- Names of earlier versions ---------------------------------------------------------------------------------------


def formerly(state_dict: dict) -> dict:
    """The names that tensors had in memory when the backbone was a module of its own."""
    return {
        name
        if name in DEPTH or not name.startswith("model.")
        else name.replace("model.", "model.backbone.", 1): tensor
        for name, tensor in state_dict.items()
    }


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_state_dicts_of_earlier_versions_load(model_type):
    model, other = tiny_model(model_type, 3), tiny_model(model_type, 3, seed=1)
    result = other.load_state_dict(formerly(model.state_dict()))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other(tiny_inputs()).logits, model(tiny_inputs()).logits)
    around = torch.nn.ModuleDict({"inner": tiny_model(model_type, 3, seed=2)})
    around.load_state_dict({f"inner.{name}": tensor for name, tensor in formerly(model.state_dict()).items()})
    assert torch.equal(around["inner"](tiny_inputs()).logits, model(tiny_inputs()).logits)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_files_of_earlier_names_in_memory_load(model_type, tmp_path):
    """What torch or FSDP wrote as they found it, and somebody put beside a config."""
    model = tiny_model(model_type, 3)
    model.config.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in formerly(model.state_dict()).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for model_class in (AttnResForCausalLM, AttnResModel):
        loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert torch.equal(
            loaded(tiny_inputs())[0], (model if loaded.can_generate() else model.model)(tiny_inputs())[0]
        )
    loaded.save_pretrained(tmp_path / "again")
    assert not any("backbone" in name for name in load_file(tmp_path / "again" / "model.safetensors"))


def test_an_earlier_name_that_does_not_fit_is_told():
    model = tiny_model("llama", 3)
    tensor = torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"has `model\.backbone\.layers\.9\.x`, today `model\.layers\.9\.x`.* neither"
    ):
        model.load_state_dict({"model.backbone.layers.9.x": tensor}, strict=False)
    both = {"model.backbone.norm.weight": tensor, "model.norm.weight": tensor}
    for around in (model, torch.nn.ModuleDict({"model": model.model})):
        with pytest.raises(ValueError, match=r"`model\.norm\.weight`.*two names of one tensor"):
            around.load_state_dict(both, strict=False)
