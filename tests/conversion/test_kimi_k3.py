# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Kimi K3's folders: in, out and back, against the official code's numbers."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from fresh_process import LOADER, load_results, run_python
from k3_folders import (
    EXPERTS,
    K3_NAMES,
    K3_OUTPUT,
    KINDS,
    PREFIX,
    SINGLE,
    TINY,
    copy_fixture,
    edit_config,
    edit_tensors,
    layers,
    pack_experts,
    random_folder,
    read_config,
    split,
)
from kimi_k3_tiny import expected_logits
from published_rule import published_model
from safetensors.torch import load_file
from tiny_backbones import tiny_inputs
from tiny_checkpoints import save_tokenizer, weights
from transformers import AutoModelForCausalLM

from modeling_attnres import AttnResConfig, AttnResForCausalLM
from modeling_attnres.conversion import ConversionError, convert, mxfp4
from modeling_attnres.conversion.backbone_configs import kimi_k3_text_fields, kimi_k3_to_library
from modeling_attnres.conversion.cli import describe
from modeling_attnres.conversion.kimi_k3 import backbone_shapes
from modeling_attnres.conversion.source import build_config


# fp32: sums of other kernels over 7 layers, logits of up to 3.4. What is computed otherwise shows from 0.14 on.
OFFICIAL = {"rtol": 0, "atol": 2e-4}
# fp32: the same kernels, mixes summed in another order. These random models turn one rounding of the embedding into up to 8e-4,
# more on one processor than on another.
FP32 = {"rtol": 0, "atol": 2e-3}
UNREAD = [f"model.layers.0.self_attention_res_{part}.weight" for part in ("norm", "proj")]


def assert_same_tensors(before: Path, after: Path):
    """Names, dtypes, shapes and bits."""
    due, found = weights(before), weights(after)
    assert found.keys() == due.keys()
    for name, tensor in due.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """The tiny folder (`k3`), and what it becomes (`ours`)."""
    folder = tmp_path_factory.mktemp("kimi_k3")
    copy_fixture(folder / "k3")
    convert(folder / "k3", folder / "ours")
    return folder


# --- Reading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_official_codes_logits(converted):
    expected = expected_logits()
    model = AttnResForCausalLM.from_pretrained(converted / "ours").eval()
    assert (model.config.backbone_type, model.config.sublayers_per_block) == ("kimi_k3_text", 6)
    ids, mask = expected["input_ids"].long(), expected["attention_mask"].bool()
    torch.testing.assert_close(model(ids[:1]).logits, expected["logits"], **OFFICIAL)
    padded = model(ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(padded[mask], expected["padded_logits"][mask], **OFFICIAL)


def test_the_official_codes_logits_without_the_package(converted):
    tokens = expected_logits()["input_ids"][:1].long()
    paths = {"again": str(converted / "again"), "results": str(converted / "results.safetensors")}
    job = {"source": str(converted / "ours"), "auto_class": "AutoModelForCausalLM", "inputs": tokens.tolist(), **paths}
    (converted / "jobs.json").write_text(json.dumps([job]))
    run_python(LOADER, converted / "jobs.json", folder=converted, HF_HUB_OFFLINE="1")
    results = load_results(converted / "results.safetensors")
    for turn in ("first", "again"):
        torch.testing.assert_close(results[turn]["logits"], expected_logits()["logits"], **OFFICIAL)


def test_rows_of_depth_attention_are_those_of_the_sublayers(converted):
    k3, ours = weights(converted / "k3"), weights(converted / "ours")
    query, key_norm = ours["model.depth_attention.query"], ours["model.depth_attention.key_norm"]
    mixes = [f"layers.{layer}.{name}" for layer in range(7) for name in K3_NAMES][1:] + [K3_OUTPUT]
    assert query.shape == key_norm.shape == (14, 64)
    for row, mix in enumerate(mixes):
        assert torch.equal(query[row : row + 1], k3[f"{PREFIX}model.{mix}_proj.weight"]), mix
        assert torch.equal(key_norm[row], k3[f"{PREFIX}model.{mix}_norm.weight"]), mix


def test_vision_parts_are_left_out_and_counted(tmp_path):
    copy_fixture(tmp_path / "k3")
    vision = {f"vision_tower.blocks.{block}.weight": torch.ones(3) for block in range(9)}
    edit_tensors(tmp_path / "k3", **vision, **{"mm_projector.linear.weight": torch.ones(3)})
    report = convert(tmp_path / "k3", tmp_path / "ours")
    assert report.dropped_keys == sorted([*vision, "mm_projector.linear.weight"])
    assert "left out    10 tensors: mm_projector.* (1), vision_tower.* (9)\n" in describe(report)
    assert not any("vision" in name for name in weights(tmp_path / "ours"))


def test_what_is_set_aside_is_said_and_not_loaded(converted):
    report = json.loads((converted / "ours" / "conversion_report.json").read_text())
    assert report["unread_keys"] == UNREAD
    assert sorted(load_file(converted / "ours" / "unread" / "unread.safetensors")) == UNREAD
    _, info = AttnResForCausalLM.from_pretrained(converted / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_tokenizer_comes_along(tmp_path):
    copy_fixture(tmp_path / "k3")
    save_tokenizer(tmp_path / "k3")
    report = convert(tmp_path / "k3", tmp_path / "ours", check_text="depth attends over blocks")
    assert report.tokenizer.startswith("Loads with the vocabulary")


# --- There and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 4])
def test_there_and_back_gives_every_tensor(tmp_path, shards):
    copy_fixture(tmp_path / "k3")
    if shards > 1:
        split(tmp_path / "k3", shards)
    convert(tmp_path / "k3", tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "back", to="kimi_k3")
    assert (report.target, report.unread_keys) == ("kimi_k3", [])
    assert_same_tensors(tmp_path / "k3", tmp_path / "back")
    before, after = read_config(tmp_path / "k3"), read_config(tmp_path / "back")
    assert after["model_type"] == before["model_type"]
    for name, value in before["text_config"].items():
        assert after["text_config"][name] == value, name


def test_there_and_back_in_the_released_dtypes(tmp_path):
    copy_fixture(tmp_path / "k3")
    in_fp32 = ("A_log", "dt_bias", "conv1d.weight", "o_norm.weight", "e_score_correction_bias")
    tensors = load_file(tmp_path / "k3" / SINGLE)
    edit_tensors(tmp_path / "k3", **{n: t.bfloat16() for n, t in tensors.items() if not n.endswith(in_fp32)})
    edit_config(tmp_path / "k3", text={"dtype": "bfloat16"}, dtype="bfloat16")
    report = convert(tmp_path / "k3", tmp_path / "ours")
    assert report.dtype == "bfloat16"
    convert(tmp_path / "ours", tmp_path / "back", to="kimi_k3")
    assert_same_tensors(tmp_path / "k3", tmp_path / "back")


def test_a_cast_keeps_in_fp32_what_the_model_does(converted, tmp_path):
    convert(converted / "k3", tmp_path / "ours", dtype="bfloat16")
    kept = {name.split(".", 3)[-1] for name, t in weights(tmp_path / "ours").items() if t.dtype == torch.float32}
    convolutions = {f"self_attn.{part}_conv1d.weight" for part in "qkv"}
    gates = {"self_attn.A_log", "self_attn.dt_bias", "self_attn.o_norm.weight"}
    assert kept == {"block_sparse_moe.gate.e_score_correction_bias", *convolutions, *gates}
    assert load_file(tmp_path / "ours" / "unread" / "unread.safetensors")[UNREAD[0]].dtype == torch.bfloat16


def test_a_model_that_was_saved_in_between_keeps_names_and_shapes(converted, tmp_path):
    AttnResForCausalLM.from_pretrained(converted / "ours").save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "back", to="kimi_k3")
    before, after = weights(converted / "k3"), weights(tmp_path / "back")
    assert after.keys() == before.keys()
    different = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    # Of these only the model's own files keep the values; as at initialisation they compute the same.
    assert sorted(different) == [PREFIX + name for name in UNREAD]
    assert torch.equal(after[PREFIX + UNREAD[0]], torch.ones(64))
    assert torch.equal(after[PREFIX + UNREAD[1]], torch.zeros(1, 64))


# --- MXFP4 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 5])
def test_packed_experts_are_the_values_of_their_codes(tmp_path, shards):
    pack_experts(copy_fixture(tmp_path / "packed"), tmp_path / "plain")
    if shards > 1:
        split(tmp_path / "packed", shards)  # pairs lie in two files
    report = convert(tmp_path / "packed", tmp_path / "ours")
    assert report.decoded_weights == 6 * 8 * 3
    assert "| decoded | 144 weights, from MXFP4 |" in (tmp_path / "ours" / "README.md").read_text()
    assert "decoded     144 weights, from MXFP4 to bfloat16 without rounding" in describe(report)
    convert(tmp_path / "plain", tmp_path / "due")
    assert_same_tensors(tmp_path / "due", tmp_path / "ours")
    ours = weights(tmp_path / "ours")
    assert ours["model.layers.1.block_sparse_moe.experts.0.w1.weight"].dtype == torch.bfloat16
    assert ours["model.layers.1.block_sparse_moe.routed_expert_up_proj.weight"].dtype == torch.float32
    assert "quantization_config" not in read_config(tmp_path / "ours")
    due, found = (AttnResForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("due", "ours"))
    with torch.no_grad():
        assert torch.equal(found(tiny_inputs()).logits, due(tiny_inputs()).logits)
    # Written back, experts stay bf16.
    convert(tmp_path / "ours", tmp_path / "back", to="kimi_k3")
    assert_same_tensors(tmp_path / "plain", tmp_path / "back")


def test_files_that_decoding_would_make_too_large_are_split(tmp_path, monkeypatch):
    pack_experts(copy_fixture(tmp_path / "packed"), tmp_path / "plain")
    monkeypatch.setattr("modeling_attnres.conversion.targets.MAX_SHARD_BYTES", 300_000)
    convert(tmp_path / "packed", tmp_path / "ours")
    files = list((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 4
    assert max(file.stat().st_size for file in files) < 350_000  # with its header
    convert(tmp_path / "plain", tmp_path / "due")
    assert_same_tensors(tmp_path / "due", tmp_path / "ours")


def test_one_decoded_weight_is_in_memory_at_a_time(tmp_path, monkeypatch):
    decode, decoded, most = mxfp4.decode_mxfp4, [], []

    def watched(packed, scale):
        weight = decode(packed, scale)
        decoded.append(weakref.ref(weight))
        most.append(sum(reference() is not None for reference in decoded))
        return weight

    monkeypatch.setattr(mxfp4, "decode_mxfp4", watched)
    pack_experts(copy_fixture(tmp_path / "packed"), tmp_path / "plain")
    convert(tmp_path / "packed", tmp_path / "ours")
    assert len(most) == 2 * 144  # written, and compared with what was written
    assert max(most) == 1


# --- Other sizes and kinds -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("kind", "nested"), [*((kind, True) for kind in KINDS), ("dense and tied", False)])
def test_kinds_compute_the_published_rule_and_come_back(tmp_path, kind, nested):
    block, fields = KINDS[kind]
    model, depth = random_folder(tmp_path / "k3", block, nested, **fields)
    convert(tmp_path / "k3", tmp_path / "ours")
    ours = AttnResForCausalLM.from_pretrained(tmp_path / "ours").eval()(tiny_inputs()).logits
    due = published_model(model, depth, K3_NAMES, K3_OUTPUT, 2 * block)(tiny_inputs(), use_cache=False).logits
    assert due.abs().max() > 0.3
    torch.testing.assert_close(ours, due, **FP32)
    convert(tmp_path / "ours", tmp_path / "back", to="kimi_k3")
    before, after = weights(tmp_path / "k3"), weights(tmp_path / "back")
    prefix = "" if nested else PREFIX  # a text model alone is written as a part of the multimodal one
    assert after.keys() == {prefix + name for name in before}
    assert all(torch.equal(after[prefix + name], tensor) for name, tensor in before.items())
    convert(tmp_path / "back", tmp_path / "again")
    assert_same_tensors(tmp_path / "ours", tmp_path / "again")


@torch.no_grad()
@pytest.mark.parametrize("nested", [True, False])
def test_without_depth_attention_it_is_a_prenorm_model(tmp_path, nested):
    model, _ = random_folder(tmp_path / "k3", None, nested, **KINDS["no lower bound"][1])
    report = convert(tmp_path / "k3", tmp_path / "ours", num_blocks=4)
    assert (report.source_kind, report.depth_weights, report.num_blocks) == ("kimi_k3", "sum", 4)
    ours = AttnResForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(ours(tiny_inputs()).logits, model(tiny_inputs()).logits, rtol=0, atol=1e-5)
    convert(tmp_path / "ours", tmp_path / "plain", to="prenorm")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert plain.config.model_type == "kimi_k3_text"
    torch.testing.assert_close(plain(tiny_inputs()).logits, model(tiny_inputs()).logits, rtol=0, atol=1e-5)
    with pytest.raises(ConversionError, match=r"weights that sum to 1 .* is 'sum', which it cannot express"):
        convert(tmp_path / "ours", tmp_path / "back", to="kimi_k3")


def test_axes_of_length_one_may_be_missing_or_added(converted, tmp_path):
    copy_fixture(tmp_path / "k3")
    tensors = load_file(tmp_path / "k3" / SINGLE)
    flat = {name: tensor.squeeze(1) for name, tensor in tensors.items() if "conv1d" in name}
    decays = {name: tensor.view(1, 1, -1, 1) for name, tensor in tensors.items() if name.endswith("A_log")}
    edit_tensors(tmp_path / "k3", **flat, **decays)
    convert(tmp_path / "k3", tmp_path / "ours")
    name = "model.layers.0.self_attn.q_conv1d.weight"
    assert torch.equal(weights(tmp_path / "ours")[name], tensors[PREFIX + name])
    due, found = (AttnResForCausalLM.from_pretrained(folder / "ours").eval() for folder in (converted, tmp_path))
    with torch.no_grad():
        assert torch.equal(found(tiny_inputs()).logits, due(tiny_inputs()).logits)


RELEASED = {
    "model_type": "kimi_k3",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "text_config": {
        **TINY,
        **EXPERTS,
        **layers(93, [*range(4, 93, 4), 93], gate_lower_bound=-5.0),
        "model_type": "kimi_linear",
        "attn_res_block_size": 12,
        # Written by Transformers 4, in the released config.
        **{"_name_or_path": "", "add_cross_attention": False, "bad_words_ids": None, "chunk_size_feed_forward": 0},
        **{"diversity_penalty": 0.0, "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0},
        **{"is_decoder": False, "is_encoder_decoder": False, "length_penalty": 1.0, "max_length": 20, "min_length": 0},
        **{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
        **{"no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1},
        **{"output_attentions": False, "output_hidden_states": False, "output_scores": False, "pruned_heads": {}},
        **{"remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True, "temperature": 1.0},
        **{"return_dict_in_generate": False, "tf_legacy_loss": False, "tie_encoder_decoder": False, "top_k": 50},
        **{"top_p": 1.0, "torchscript": False, "typical_p": 1.0, "use_bfloat16": False, "use_cache": True},
        **{"head_dim": 74, "rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        **{"moe_layer_freq": 1, "moe_renormalize": True, "moe_router_activation_func": "sigmoid"},
        **{"num_expert_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "use_grouped_topk": True},
        **{"num_nextn_predict_layers": 0, "routed_scaling_factor": 1.0, "initializer_range": 0.02},
    },
}


def read_fields(config: dict) -> AttnResConfig:
    fields = kimi_k3_to_library(kimi_k3_text_fields(config), {})
    return build_config(fields, "config.json")


def test_every_field_of_the_released_config_is_known():
    config = read_fields(RELEASED)
    assert config.layer_types.count("full_attention") == 24
    assert config.layer_types[-2:] == ["full_attention", "full_attention"]
    assert config.linear_gate_lower_bound == -5.0
    assert str(config.dtype) == "torch.bfloat16"
    assert not hasattr(config, "temperature")


def test_the_released_sizes_have_the_released_parameters():
    sizes = {
        **{"vocab_size": 163840, "hidden_size": 7168, "intermediate_size": 33792, "num_attention_heads": 96},
        **{"num_key_value_heads": 96, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128},
        **{"qk_rope_head_dim": 64, "v_head_dim": 128, "num_experts": 896, "num_experts_per_token": 16},
        **{"num_shared_experts": 2, "moe_intermediate_size": 3072, "routed_expert_hidden_size": 3584},
    }
    linear = layers(93, [*range(4, 93, 4), 93], num_heads=96, head_dim=128, gate_lower_bound=-5.0)
    shapes = backbone_shapes(read_fields({**RELEASED, "text_config": {**RELEASED["text_config"], **sizes, **linear}}))
    experts = {name for name in shapes if ".experts." in name}
    in_fp32 = {
        name for name in shapes if name.endswith(("A_log", "dt_bias", "conv1d.weight", "o_norm.weight", "_bias"))
    }
    count = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    # The released files' census: two codes per byte, fp32 with 69 `A_log` of 128 in place of 96, bf16 with 187 pairs of
    # depth attention.
    assert len(experts) == 247_296
    assert sum(count[name] for name in experts) == 2 * 1_361_370_415_104
    assert sum(count[name] for name in in_fp32) == 11_122_432 - 69 * 32
    assert sum(count.values()) == 2 * 1_361_370_415_104 + 11_122_432 - 69 * 32 + 56_732_525_568 - 187 * 2 * 7168


def test_the_config_of_a_small_public_checkpoint_is_accepted():
    """Kimi-K3-0.40B, as published: fields of other models' positions, no lower bound, dtypes that differ by level."""
    sizes = {
        **{"vocab_size": 163840, "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8},
        **{"num_key_value_heads": 8, "q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 64},
        **{"qk_rope_head_dim": 32, "v_head_dim": 64, "num_experts": 8, "num_experts_per_token": 2},
        **{"num_shared_experts": 1, "moe_intermediate_size": 256, "routed_expert_hidden_size": 512},
    }
    text = {
        **RELEASED["text_config"],
        **sizes,
        **layers(8, [4, 8], num_heads=8, head_dim=32),
        "attn_res_block_size": 4,
    }
    outer = {"model_type": "kimi_k3", "dtype": "float32", "pad_token_id": 0, "use_cache": False, "vision_config": {}}
    config = read_fields({**outer, "text_config": {**text, "dtype": None}})
    assert config.linear_gate_lower_bound is None
    assert str(config.dtype) == "torch.float32"
    parameters = sum(torch.Size(shape).numel() for shape in backbone_shapes(config).values())
    assert round(parameters / 1e9, 2) == 0.39  # and vision
