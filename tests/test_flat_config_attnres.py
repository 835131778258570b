# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A config that others cannot tell from the backbone's: fields, files of earlier versions, copies."""

import copy
import pickle

import pytest
from tiny_backbones import BACKBONES, tiny_backbone, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from modeling_attnres import AttnResConfig, AttnResForCausalLM, AttnResModel


OWN = {
    *("sublayers_per_block", "depth_weights", "depth_norm_eps", "depth_query_init_std", "depth_attention_type"),
    *("depth_window", "depth_heads", "backbone_type"),
}


@pytest.mark.parametrize("model_type", BACKBONES)
def test_every_field_of_the_backbone_is_at_the_top(model_type):
    plain, config = tiny_backbone(model_type), tiny_config(model_type)
    fields, expected = config.to_dict(), plain.to_dict()
    assert fields.keys() - expected.keys() == OWN
    assert {name: fields[name] for name in expected if name != "model_type"} == {
        name: value for name, value in expected.items() if name != "model_type"
    }
    assert config.to_diff_dict().keys() - OWN == plain.to_diff_dict().keys()
    assert isinstance(config, type(plain))
    assert config.text_config == plain
    assert type(config.text_config) is type(plain)
    for name in ("attribute_map", "base_model_tp_plan", "base_model_ep_plan", "keys_to_ignore_at_inference"):
        assert getattr(config, name, None) == getattr(plain, name, None)
    assert not config.base_model_pp_plan


def nested(config: AttnResConfig) -> dict:
    """What earlier versions wrote."""
    own = {name: value for name, value in config.to_dict().items() if name in OWN - {"backbone_type"}}
    return {"model_type": "attnres", **own, "text_config": config.text_config.to_dict()}


@pytest.mark.parametrize("model_type", BACKBONES)
def test_files_of_earlier_versions_load(model_type, tmp_path):
    config = tiny_config(model_type, 3, "sum")
    earlier = {**nested(config), "dtype": "bfloat16", "architectures": ["AttnResForCausalLM"]}
    loaded = AttnResConfig.from_dict(copy.deepcopy(earlier))
    assert loaded.to_dict() == {**config.to_dict(), "dtype": "bfloat16", "architectures": ["AttnResForCausalLM"]}
    loaded.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert {**again.text_config.to_dict(), "_name_or_path": ""} == {
        **loaded.text_config.to_dict(),
        "_name_or_path": "",
    }
    assert (again.sublayers_per_block, again.depth_weights) == (3, "sum")


def test_what_stands_beside_a_nested_config_wins():
    config = AttnResConfig(text_config=LlamaConfig(vocab_size=64, num_labels=4), vocab_size=32, num_labels=3)
    assert (config.vocab_size, config.text_config.vocab_size, config.num_labels) == (32, 32, 3)


def test_a_plain_models_file_is_a_backbone(tmp_path):
    plain = tiny_backbone("qwen3")
    plain.save_pretrained(tmp_path)
    config = AttnResConfig.from_pretrained(tmp_path, num_blocks=2)
    assert config.backbone_type == "qwen3"
    assert config.num_blocks == 2
    assert config.hidden_size == plain.hidden_size


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_apart(copied):
    config = tiny_config("qwen3_moe", 3)
    other = copied(config)
    assert type(other) is type(config)
    assert other.to_dict() == config.to_dict()
    other.depth_weights, other.vocab_size = "sum", 7
    assert (config.depth_weights, config.vocab_size) == ("mean", 96)
    assert other.text_config.vocab_size == 7


def test_text_config_is_live_and_can_be_replaced():
    config = tiny_config("llama", 3)
    view = config.text_config
    config.vocab_size = 5
    assert view.vocab_size == 5
    config.text_config = tiny_backbone("llama", vocab_size=11)
    assert (config.vocab_size, view.vocab_size, config.sublayers_per_block) == (11, 11, 3)
    with pytest.raises(ValueError, match="must stay a LlamaConfig, got Qwen3Config"):
        config.text_config = Qwen3Config()
    assert config.text_config.to_dict().keys() == tiny_backbone("llama").to_dict().keys()


def test_keywords_of_from_pretrained_set_fields(tmp_path):
    tiny_config("llama", 3).save_pretrained(tmp_path)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    config = AutoConfig.from_pretrained(
        tmp_path, rope_parameters=rope, use_cache=False, text_config={"vocab_size": 7}, num_blocks=4
    )
    assert config.rope_parameters == config.text_config.rope_parameters == rope
    assert (config.use_cache, config.vocab_size, config.num_blocks) == (False, 7, 4)


def test_fewer_layers_cap_the_block():
    config = tiny_config("llama", 6)
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = 2
    assert (shorter.num_sublayers, shorter.sublayers_per_block, shorter.num_blocks) == (4, 4, 1)
    shorter.validate()
    assert AttnResForCausalLM(shorter).model.depth_attention.query.shape[0] == 4
    shorter.num_hidden_layers = 4  # as the drafts of an early exit do
    assert shorter.sublayers_per_block == config.sublayers_per_block == 6
    shorter.num_hidden_layers = 2
    shorter.sublayers_per_block = 6
    with pytest.raises(ValueError, match=r"from 1 to the 4 sublayers .* got 6"):
        AttnResForCausalLM(shorter)


def test_a_users_config_keeps_its_own_fields_and_constructor(tmp_path):
    class Custom(AttnResConfig):
        temperature: float = 0.5

    class Written(AttnResConfig):
        def __init__(self, scale=2, **kwargs):
            self.scale = scale
            super().__init__(**kwargs)

    config = Custom(text_config=tiny_backbone("qwen3"), temperature=0.25)
    assert isinstance(config, Qwen3Config)
    assert copy.deepcopy(config).to_dict()["temperature"] == 0.25
    assert "temperature" not in config.text_config.to_dict()
    assert isinstance(AutoModelForCausalLM.from_config(config), AttnResForCausalLM)
    written = Written(text_config=tiny_backbone("qwen3"), scale=3)
    assert (written.scale, written.hidden_size) == (3, 32)


def test_a_field_named_like_our_own_is_refused():
    class Clash(LlamaConfig):
        model_type = "clash"
        depth_window: int = 3

    with pytest.raises(ValueError, match=r"got a 'clash' config with \['depth_window'\]"):
        AttnResConfig(text_config=Clash())


def test_saved_names_of_classes_are_those_that_modules_have():
    config = tiny_config("qwen3_moe")
    config.architectures = [type(AttnResModel(config)).__name__]
    assert config.architectures == ["AttnResModel_Qwen3Moe"]
    assert config.to_dict()["architectures"] == ["AttnResModel"]
    assert config.text_config.architectures is None
    assert AttnResConfig.from_dict(config.to_dict()).text_config.architectures == ["Qwen3MoeModel"]


def test_a_flat_file_without_its_backbone_is_refused():
    with pytest.raises(ValueError, match=r"names it in `backbone_type`"):
        AttnResConfig(model_type="attnres", hidden_size=32)
    with pytest.raises(ValueError, match=r"`backbone_type` must be a model type .* got 'nothing'"):
        AttnResConfig(backbone_type="nothing")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "kimi_k3", "text_config": {"model_type": "kimi_linear"}}, "got a part of a 'kimi_k3' config"),
        ({"text_config": {"model_type": "kimi_linear", "attn_res_block_size": 12}}, "`attn_res_block_size`=12 counts"),
        ({"model_type": "kimi_linear", "attn_res_block_size": 12}, "`attn_res_block_size`=12 counts"),
    ],
)
def test_other_layouts_of_depth_attention_are_refused_with_the_command(fields, message):
    with pytest.raises(ValueError, match=f"{message}.*`attnres-convert SOURCE OUT`"):
        AttnResConfig(**fields)
