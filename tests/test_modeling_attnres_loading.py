# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Saving and loading: AttnRes checkpoints, plain checkpoints of backbones, broken ones, devices and quantisers."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_backbones import BACKBONES, tiny_backbone, tiny_config, tiny_inputs, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, TorchAoConfig
from transformers.utils import logging

from modeling_attnres import AttnResConfig, AttnResForCausalLM, AttnResForSequenceClassification, AttnResModel


DEPTH_KEYS = {"model.depth_attention.query", "model.depth_attention.key_norm"}


def saved_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_weights(one, other):
    expected, found = one.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# --- AttnRes checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", BACKBONES)
def test_save_and_reload_is_exact(tmp_path, model_type, dtype):
    tiny_model(model_type, 3, "sum").to(dtype).save_pretrained(tmp_path / "first")
    models = []
    for source, target in (("first", "second"), ("second", "third")):
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / source, dtype=dtype, output_loading_info=True)
        assert isinstance(model, AttnResForCausalLM)
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        model.save_pretrained(tmp_path / target)
        models.append(model)
    assert_same_weights(*models)
    with torch.no_grad():
        assert torch.equal(models[0](tiny_inputs()).logits, models[1](tiny_inputs()).logits)
    first, *others = (saved_tensors(tmp_path / folder) for folder in ("first", "second", "third"))
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_on_disk_it_is_the_plain_checkpoint_and_two_tensors(tmp_path, model_type):
    model = tiny_model(model_type, 3)
    model.save_pretrained(tmp_path / "attnres")
    AutoModelForCausalLM.from_config(tiny_backbone(model_type)).save_pretrained(tmp_path / "dense")
    ours, theirs = saved_tensors(tmp_path / "attnres"), saved_tensors(tmp_path / "dense")
    assert set(ours) - set(theirs) == DEPTH_KEYS
    assert set(theirs) <= set(ours)
    for name in DEPTH_KEYS:
        assert ours[name].shape == (model.config.num_sublayers, model.config.hidden_size)


def test_sharded(tmp_path):
    model = tiny_model("mixtral", 3)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(model, AttnResForCausalLM.from_pretrained(tmp_path))


def test_base_and_heads_load_each_others_checkpoints(tmp_path):
    model = tiny_model("mixtral", 3)
    model.save_pretrained(tmp_path / "causal")
    base = AutoModel.from_pretrained(tmp_path / "causal")
    assert isinstance(base, AttnResModel)
    assert_same_weights(model.model, base)
    base.save_pretrained(tmp_path / "base")
    head, info = AttnResForSequenceClassification.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert_same_weights(model.model, head.model)


# --- Plain checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", BACKBONES)
def test_a_plain_checkpoint_lacks_the_depth_attention_alone(tmp_path, model_type, caplog):
    dense = AutoModelForCausalLM.from_config(tiny_backbone(model_type)).eval()
    dense.save_pretrained(tmp_path)
    config = AttnResConfig(text_config=dense.config, sublayers_per_block=3, depth_weights="sum")
    logging.set_verbosity_warning()
    logging.enable_propagation()
    try:
        model, info = AttnResForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    finally:
        logging.disable_propagation()
        logging.set_verbosity_error()
    assert info["missing_keys"] == DEPTH_KEYS
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    # Loud: a log at warning level that names them.
    warnings = " ".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert all(name.removeprefix("model.") in warnings for name in DEPTH_KEYS)
    with torch.no_grad():
        assert torch.equal(model(tiny_inputs()).logits, dense(tiny_inputs()).logits)


# --- Broken checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model("llama", 2).save_pretrained(tmp_path)
    return tmp_path


def test_truncated_file(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"incomplete|Incomplete|InvalidHeader|not fully covered|corrupted"):
        AttnResForCausalLM.from_pretrained(checkpoint)


def test_not_a_safetensors_file(checkpoint):
    (checkpoint / "model.safetensors").write_text("not tensors")
    with pytest.raises(Exception, match=r"[Hh]eader|safetensors"):
        AttnResForCausalLM.from_pretrained(checkpoint)


def test_foreign_tensors_are_named(checkpoint):
    save_file({"encoder.weight": torch.ones(2)}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    _, info = AttnResForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert info["unexpected_keys"] == {"encoder.weight"}
    assert info["missing_keys"] >= DEPTH_KEYS


def test_queries_of_another_depth_are_refused(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.depth_attention.query"] = torch.zeros(4, 32)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        AttnResForCausalLM.from_pretrained(checkpoint)


def test_config_with_a_block_size_out_of_range(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["sublayers_per_block"] = 100
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"`sublayers_per_block` must be an integer from 1 to the 8 .* got 100"):
        AttnResForCausalLM.from_pretrained(checkpoint)


# --- Devices and quantisers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sublayers_per_block", [1, 3, 8])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_disk_offload(tmp_path, model_type, sublayers_per_block):
    model = tiny_model(model_type, sublayers_per_block)
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size="50KB")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        **{f"model.layers.{index}": "disk" for index in (1, 2, 3)},
        "model.norm": "cpu",
        "model.depth_attention": "disk",
        "lm_head": "disk",
    }
    offloaded = AttnResForCausalLM.from_pretrained(
        tmp_path / "checkpoint", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert offloaded.model.layers[2].mlp.gate_proj.weight.device.type == "meta" if model_type == "llama" else 1
    with torch.no_grad():
        # fp32 rounding: Full takes another way where hooks come between the layers
        torch.testing.assert_close(offloaded(tiny_inputs()).logits, model(tiny_inputs()).logits, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(offloaded.generate(tiny_inputs(), **options), model.generate(tiny_inputs(), **options))


def test_a_device_map_keeps_decoder_layers_whole():
    from accelerate import infer_auto_device_map

    model = tiny_model("llama")
    sizes = {"cpu": 30_000 * 4, "disk": 10**9}
    device_map = infer_auto_device_map(model, max_memory=sizes, no_split_module_classes=model._no_split_modules)
    assert {"cpu", "disk"} == set(device_map.values())
    assert not [name for name in device_map if ".layers." in name and name.count(".") > 3]


def test_int8_weights_leave_the_depth_attention_alone(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model("llama", 3)
    model.save_pretrained(tmp_path)
    quantized = AttnResForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig())
    )
    assert "Int8" in type(quantized.model.layers[0].mlp.up_proj.weight).__name__
    for name in DEPTH_KEYS:
        assert type(quantized.get_parameter(name)) is torch.nn.Parameter
        assert torch.equal(quantized.get_parameter(name), model.get_parameter(name))
    with torch.no_grad():
        logits, expected = quantized(tiny_inputs()).logits, model(tiny_inputs()).logits
    assert 0 < (logits - expected).abs().max() < 0.05
    generated = quantized.generate(tiny_inputs(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 15)


def test_the_file_says_it_is_pytorch(checkpoint):
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_meta_model_takes_a_state_dict():
    model = tiny_model("llama", 3)
    with torch.device("meta"):
        empty = AttnResForCausalLM(tiny_config("llama", 3))
    # Buffers that no checkpoint holds are not in the state dict: the rotary embedding is built anew.
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.model.rotary_emb = model.model.rotary_emb
    assert torch.equal(empty.eval()(tiny_inputs()).logits, model(tiny_inputs()).logits)
