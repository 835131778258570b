# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from safetensors.torch import load_file
from tiny_backbones import BACKBONES, tiny_model

from modeling_attnres.state_dict_attnres import names_in_memory, to_model_names


@pytest.mark.parametrize("model_type", BACKBONES)
def test_a_checkpoints_file_loads_into_a_model_that_exists(model_type, tmp_path):
    saved, other = tiny_model(model_type, seed=0), tiny_model(model_type, seed=1)
    saved.save_pretrained(tmp_path)
    state_dict = load_file(tmp_path / "model.safetensors")
    parameters = dict(other.named_parameters())
    result = other.load_state_dict(state_dict, strict=False)
    tied = ["lm_head.weight"] if saved.config.tie_word_embeddings else []  # is not in the file
    assert (result.missing_keys, result.unexpected_keys) == (tied, [])
    for name, value in saved.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    # Loaded in place: an optimizer may hold them already.
    assert all(other.get_parameter(name) is parameter for name, parameter in parameters.items())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("model_type", "count", "down"), [("mixtral", "num_local_experts", "w2"), ("olmoe", "num_experts", "down_proj")]
)
def test_more_than_ten_experts_keep_their_order(model_type, count, down, reverse, tmp_path):
    """As text, expert 10 comes before expert 2."""
    saved, other = (tiny_model(model_type, seed=seed, **{count: 12}) for seed in (0, 1))
    saved.save_pretrained(tmp_path)
    state_dict = load_file(tmp_path / "model.safetensors")
    apart = sorted(name for name in state_dict if "layers.1." in name and name.endswith(f".{down}.weight"))
    assert [int(name.split(".")[-3]) for name in apart] == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    found = to_model_names(other, dict(sorted(state_dict.items(), reverse=reverse)))
    (merged,) = [name for name in found if "layers.1." in name and name.endswith("experts.down_proj")]
    for name in apart:
        assert torch.equal(found[merged][int(name.split(".")[-3])], state_dict[name]), name
    other.load_state_dict(state_dict)
    for name, value in saved.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_the_models_own_names_pass_through(model_type):
    model = tiny_model(model_type)
    state_dict = model.state_dict()
    assert to_model_names(model, state_dict) is state_dict
    assert model.load_state_dict(tiny_model(model_type, seed=1).state_dict()).missing_keys == []


def test_a_base_models_file_loads_into_a_base_model(tmp_path):
    saved, other = tiny_model("llama").model, tiny_model("llama", seed=1).model
    saved.save_pretrained(tmp_path)
    assert other.load_state_dict(load_file(tmp_path / "model.safetensors")).missing_keys == []
    for name, value in saved.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_what_is_unknown_or_missing_is_told(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    state_dict = load_file(tmp_path / "model.safetensors")
    state_dict["model.layers.9.mlp.up_proj.weight"] = state_dict.pop("model.layers.3.mlp.up_proj.weight")
    result = model.load_state_dict(state_dict, strict=False)
    assert result.missing_keys == ["model.layers.3.mlp.up_proj.weight"]
    assert result.unexpected_keys == ["model.layers.9.mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*model\.layers\.3\.mlp\.up_proj\.weight"):
        model.load_state_dict(state_dict)


def test_a_missing_expert_is_an_error(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    state_dict = load_file(tmp_path / "model.safetensors")
    (name,) = [name for name in state_dict if "layers.2." in name and "experts.3.w2" in name]
    del state_dict[name]
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state_dict, strict=False)


def test_names_of_a_file_become_those_in_memory():
    model = tiny_model("kimi_linear")
    names = names_in_memory(
        model,
        [
            "model.layers.0.self_attn.q_conv1d.weight",
            "model.layers.1.block_sparse_moe.experts.3.w1.weight",
            "model.depth_attention.query",
        ],
    )
    assert [*names.values()] == [
        "model.layers.0.self_attn.conv1d.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.depth_attention.query",
    ]
