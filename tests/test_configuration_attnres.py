# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_backbones import BACKBONES, NUM_SUBLAYERS, tiny_backbone, tiny_inputs
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from modeling_attnres import AttnResConfig


def test_defaults_are_a_llama_in_eight_blocks_of_the_papers_form():
    config = AttnResConfig()
    assert type(config.text_config) is LlamaConfig
    assert config.num_blocks == 8
    assert config.sublayers_per_block == config.num_sublayers // 8
    assert config.depth_weights == "mean"
    assert config.depth_query_init_std == 0.0


@pytest.mark.parametrize(
    ("layers", "sublayers_per_block", "boundaries"),
    [
        (4, 1, [0, 1, 2, 3, 4, 5, 6, 7]),  # Full AttnRes
        (4, 2, [0, 2, 4, 6]),
        (4, 3, [0, 3, 6]),  # a boundary before a feed-forward, and a short last block
        (4, 8, [0]),  # the plain residual with the embedding apart
        (27, 6, [0, 6, 12, 18, 24, 30, 36, 42, 48]),  # Kimi Linear 48B
    ],
)
def test_block_boundaries(layers, sublayers_per_block, boundaries):
    config = AttnResConfig(
        text_config=tiny_backbone("llama", num_hidden_layers=layers), sublayers_per_block=sublayers_per_block
    )
    assert config.num_sublayers == 2 * layers
    assert config.block_boundaries == boundaries
    assert config.num_blocks == len(boundaries)


@pytest.mark.parametrize("num_blocks", range(1, NUM_SUBLAYERS + 1))
def test_num_blocks_is_sugar_for_sublayers_per_block(num_blocks):
    config = AttnResConfig(text_config=tiny_backbone("llama"), num_blocks=num_blocks)
    assert config.sublayers_per_block == math.ceil(NUM_SUBLAYERS / num_blocks)
    assert "num_blocks" not in config.to_dict()


def test_default_blocks_are_capped_at_the_sublayers():
    assert AttnResConfig(text_config=tiny_backbone("llama", num_hidden_layers=2)).sublayers_per_block == 1


@pytest.mark.parametrize("value", [0, -1, NUM_SUBLAYERS + 1, True, 2.0, "2"])
@pytest.mark.parametrize("name", ["sublayers_per_block", "num_blocks"])
def test_blocks_out_of_range(name, value):
    with pytest.raises((ValueError, StrictDataclassError), match=name):
        AttnResConfig(text_config=tiny_backbone("llama"), **{name: value})


def test_out_of_range_names_the_argument_the_rule_and_the_value():
    with pytest.raises(ValueError, match=r"`sublayers_per_block` .* from 1 to the 8 sublayers .* got 9"):
        AttnResConfig(text_config=tiny_backbone("llama"), sublayers_per_block=9)


def test_both_block_arguments():
    with pytest.raises(ValueError, match="not both: got sublayers_per_block=2 and num_blocks=4"):
        AttnResConfig(text_config=tiny_backbone("llama"), sublayers_per_block=2, num_blocks=4)


@pytest.mark.parametrize("value", ["softmax", "", "MEAN"])
def test_unknown_depth_weights(value):
    with pytest.raises(ValueError, match=rf"`depth_weights` must be one of \('mean', 'sum'\), got '{value}'"):
        AttnResConfig(text_config=tiny_backbone("llama"), depth_weights=value)


@pytest.mark.parametrize(("name", "value"), [("depth_norm_eps", 0.0), ("depth_query_init_std", -0.1)])
def test_depth_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        AttnResConfig(text_config=tiny_backbone("llama"), **{name: value})


@pytest.mark.parametrize(
    ("text_config", "reason"),
    [
        ({"hidden_size": 32}, r"must name its backbone in `model_type`.*\['hidden_size'\]"),
        ({"model_type": ""}, "must name its backbone"),
        ({"model_type": "attnres"}, "got an AttnRes config"),
        (AttnResConfig(), "got an AttnRes config"),
        ("llama", "text_config"),
    ],
)
def test_bad_text_config(text_config, reason):
    with pytest.raises((ValueError, StrictDataclassError), match=reason):
        AttnResConfig(text_config=text_config)


def test_changed_after_construction_is_checked_on_save(tmp_path):
    config = AttnResConfig(text_config=tiny_backbone("llama"))
    config.sublayers_per_block = 99
    with pytest.raises(StrictDataclassError, match="sublayers_per_block"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


# --- The backbone's config -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", BACKBONES)
def test_backbone_attributes_are_read_through(model_type):
    text_config = tiny_backbone(model_type)
    config = AttnResConfig(text_config=text_config)
    for name in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert getattr(config, name) == getattr(text_config, name)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(text_config, name)
    assert config.depth_norm_eps == text_config.rms_norm_eps
    assert config.get_text_config() is config  # not the sign of a multimodal model
    assert config.get_text_config(decoder=True) is config
    assert not hasattr(config, "no_such_attribute")


def test_the_given_config_stays_as_it_was():
    """A dense model runs on it, with an attention implementation that setting up a wrapper would reset."""
    dense = AutoModelForCausalLM.from_config(tiny_backbone("llama")).eval()
    before = dense(tiny_inputs()).logits
    config = AttnResConfig(text_config=dense.config, num_blocks=2)
    config.text_config.vocab_size = 5
    assert torch.equal(dense(tiny_inputs()).logits, before)
    assert dense.config.vocab_size != 5


def test_text_config_as_a_dict():
    config = AttnResConfig(text_config={"model_type": "qwen3", "num_hidden_layers": 3, "hidden_size": 48})
    assert type(config.text_config) is Qwen3Config
    assert config.num_sublayers == 6
    assert config.hidden_size == 48


@pytest.mark.parametrize("tie", [True, False])
def test_tying_is_the_backbones(tie):
    config = AttnResConfig(text_config=tiny_backbone("llama", tie_word_embeddings=tie))
    assert config.tie_word_embeddings == tie
    assert AttnResConfig.from_dict(config.to_dict()).tie_word_embeddings == tie


@pytest.mark.parametrize("model_type", BACKBONES)
def test_round_trips(tmp_path, model_type):
    config = AttnResConfig(
        text_config=tiny_backbone(model_type),
        sublayers_per_block=3,
        depth_weights="sum",
        depth_norm_eps=1e-4,
        depth_query_init_std=0.1,
    )
    assert AttnResConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert type(loaded.text_config) is type(config.text_config)
    # Where it came from, and the code that a checkpoint carries.
    noted = ("_name_or_path", "auto_map")
    expected, found = (
        {key: value for key, value in side.to_dict().items() if key not in noted} for side in (config, loaded)
    )
    assert found == expected


def test_the_file_holds_every_field_once(tmp_path):
    """Two copies of one number would come to differ."""
    AttnResConfig(text_config=tiny_backbone("llama")).save_pretrained(tmp_path)
    saved = PreTrainedConfig.get_config_dict(tmp_path)[0]
    assert {"hidden_size", "vocab_size", "num_hidden_layers", "rope_parameters"} <= saved.keys()
    assert not {"num_blocks", "text_config"} & saved.keys()
    assert (saved["hidden_size"], saved["model_type"], saved["backbone_type"]) == (32, "attnres", "llama")


def test_writing_a_backbone_attribute_reaches_the_backbone():
    config = AttnResConfig(text_config=LlamaConfig(vocab_size=64))
    config.vocab_size = 128
    config.use_cache = False
    assert (config.text_config.vocab_size, config.text_config.use_cache) == (128, False)
    assert config.to_dict()["vocab_size"] == 128
    config.text_config.vocab_size = 32
    assert config.vocab_size == 32
    config.output_hidden_states = True
    assert config.text_config.output_hidden_states is True
