# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a folder of Kimi K3's is said by name, before anything is written."""

import json
import struct
from pathlib import Path

import pytest
import torch
from k3_folders import (
    INDEX,
    PREFIX,
    QUANTISATION,
    SINGLE,
    copy_fixture,
    edit_config,
    edit_tensors,
    pack_experts,
    read_config,
    split,
)
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_json

from modeling_attnres.conversion import ConversionError, convert


LAYER = f"{PREFIX}model.layers.1."
EXPERT = f"{LAYER}block_sparse_moe.experts.3.w1.weight"
DECAY = f"{LAYER}self_attn.A_log"
MIX = f"{LAYER}mlp_res"


def text(**fields):
    return lambda folder: edit_config(folder, text=fields)


def linear(**fields):
    return lambda folder: edit_config(folder, linear=fields)


def outer(**fields):
    return lambda folder: edit_config(folder, **fields)


def without(name: str):
    return lambda folder: edit_tensors(folder, **{name: None})


def added(name: str):
    return lambda folder: edit_tensors(folder, **{name: torch.ones(2)})


def renamed(name: str, new_name: str):
    return lambda folder: edit_tensors(folder, **{name: None, new_name: load_file(folder / SINGLE)[name]})


def changed(name: str, change):
    return lambda folder: edit_tensors(folder, **{name: change(load_file(folder / SINGLE)[name])})


def packed(change):
    """A change of a folder whose experts are MXFP4."""

    def fault(folder: Path):
        pack_experts(folder, folder.parent / "plain")
        change(folder)

    return fault


def sharded(change):
    def fault(folder: Path):
        split(folder)
        change(folder)

    return fault


def cut_a_shard(folder: Path):
    shard = sorted(folder.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-40])


def lose_a_shard(folder: Path):
    sorted(folder.glob("model-*"))[1].unlink()


def edit_index(change):
    def fault(folder: Path):
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        change(weight_map)
        edit_json(folder / INDEX, weight_map=weight_map)

    return fault


def store_twice(folder: Path):
    first, second = sorted(folder.glob("model-*"))[:2]
    save_file({**load_file(second), DECAY: torch.ones(16), **dict([next(iter(load_file(first).items()))])}, second)


def stale_file_beside_the_index(folder: Path):
    save_file({"model.norm.weight": torch.ones(2)}, folder / SINGLE)


def wrong_dtype_in_a_header(folder: Path):
    data = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[DECAY]["dtype"] = "F16"
    encoded = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def quantisation(**fields):
    def fault(folder: Path):
        config = read_config(folder)["text_config"]["quantization_config"]
        edit_config(folder, text={"quantization_config": {**config, **fields}})

    return packed(fault)


def no_text_config(folder: Path):
    config = read_config(folder)
    del config["text_config"]
    (folder / "config.json").write_text(json.dumps(config))


def set_scales(value: int):
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale[0, 0] = value
        return scale

    return change


FAULTS = {
    # The config.
    "unknown field": (text(depth_router="x"), "`depth_router`='x'"),
    "unknown field of linear attention": (linear(gate_ceiling=2.0), "`linear_attn_config.gate_ceiling`=2.0"),
    "unknown field around the text model": (outer(audio_config={"d": 1}), "unknown here: audio_config"),
    "lower bound as text": (linear(gate_lower_bound="-5"), "linear_gate_lower_bound"),
    "lower bound above zero": (
        linear(gate_lower_bound=5.0),
        "`gate_lower_bound` bounds a log decay and must be negative",
    ),
    "unknown activation": (text(hidden_act="situ2"), "`hidden_act` must be 'situ' or an activation"),
    "router that is not sigmoid": (text(moe_router_activation_func="softmax"), "`moe_router_activation_func` must be"),
    "positions in full attention": (text(mla_use_nope=False), "`mla_use_nope` must be True"),
    "heads for multi-token prediction": (text(num_nextn_predict_layers=1), "`num_nextn_predict_layers` must be 0"),
    "a layer of no kind": (linear(kda_layers=[1, 2, 3, 5]), "`linear_attn_config` must name every decoder layer once"),
    "linear attention that is no object": (
        text(linear_attn_config=[1]),
        r"`linear_attn_config` must be an object, got \[1\]",
    ),
    "block of no layers": (text(attn_res_block_size=0), "needs `attn_res_block_size` >= 1, got 0"),
    "block size as text": (text(attn_res_block_size="3"), "needs `attn_res_block_size` >= 1, got '3'"),
    "block size left out": (text(attn_res_block_size=None), rf"unknown: {PREFIX}model\.layers\.0\.mlp_res"),
    "no text config": (no_text_config, "'kimi_k3' config must have a `text_config`, got None"),
    "text model of another type": (text(model_type="llama"), "text configs of model_type 'kimi_linear', got 'llama'"),
    "another multimodal model": (
        outer(model_type="kimi_k9"),
        "Of multimodal models 'kimi_k3' is understood, got .*'kimi_k9'",
    ),
    "tied outside, untied inside": (
        outer(tie_word_embeddings=True),
        "`tie_word_embeddings` is True in the config and False",
    ),
    "more layers than tensors": (text(num_hidden_layers=8), "must name every decoder layer once"),
    "more experts than tensors": (
        text(num_experts=9),
        rf"missing: {PREFIX}model\.layers\.1\.block_sparse_moe\.experts\.8",
    ),
    "another width": (
        text(moe_intermediate_size=64),
        r"shape of .*experts\.0\.w1\.weight: \[32, 32\], the config says \[64, 32\]",
    ),
    # Tensors.
    "no key norm of a mix": (without(f"{MIX}_norm.weight"), rf"1 depth tensors are missing: {MIX}_norm\.weight"),
    "no query of the output mix": (without(f"{PREFIX}model.output_attn_res_proj.weight"), "output_attn_res_proj"),
    "half of the pair that nothing reads": (
        without(f"{PREFIX}model.layers.0.self_attention_res_norm.weight"),
        r"1 depth tensors are missing: .*layers\.0\.self_attention_res_norm\.weight",
    ),
    "query of another width": (
        changed(f"{MIX}_proj.weight", lambda t: t[:, :32]),
        r"must be \[1, 64\] and \[64\], got \[1, 32\]",
    ),
    "tail of A_log that is not zero": (
        changed(DECAY, lambda t: t + 1),
        rf"'{DECAY}' must have zeros after its 3 heads",
    ),
    "A_log of too few heads": (changed(DECAY, lambda t: t[:2]), f"A_log` must have the same size, got 2 in '{DECAY}'"),
    "all A_log of too few heads": (
        lambda folder: edit_tensors(
            folder, **{n: t[:2] for n, t in load_file(folder / SINGLE).items() if n.endswith("A_log")}
        ),
        "`linear_padded_heads` must be at least the 3 heads",
    ),
    "A_log per channel": (
        changed(DECAY, lambda t: t.view(2, 8)),
        rf"shape of {DECAY}: \[2, 8\], the config says \[3\]",
    ),
    "renamed expert": (
        renamed(EXPERT, EXPERT.replace(".3.", ".8.")),
        rf"missing: {EXPERT}; unknown: .*experts\.8\.w1",
    ),
    "transposed weight": (
        changed(f"{LAYER}self_attn.f_b_proj.weight", lambda t: t.t().contiguous()),
        r"shape of .*f_b_proj",
    ),
    "no norm of the latent": (
        without(f"{LAYER}block_sparse_moe.routed_expert_norm.weight"),
        "missing: .*routed_expert_norm",
    ),
    "unknown tensor": (added(f"{LAYER}self_attn.rope.inv_freq"), r"unknown: .*self_attn\.rope\.inv_freq"),
    "tensor of integers": (changed(f"{LAYER}self_attn.dt_bias", lambda t: t.int()), "not floating point: .*dt_bias"),
    "8-bit floats": (changed(EXPERT, lambda t: t.to(torch.float8_e4m3fn)), "8-bit floats, such as .*experts"),
    "tensor with and without the prefix": (
        added("model.norm.weight"),
        "stored twice, with and without 'language_model.'",
    ),
    # Files.
    "truncated shard": (sharded(cut_a_shard), "of data, the file holds"),
    "missing shard": (sharded(lose_a_shard), "missing shard: model-00002-of-000003.safetensors"),
    "index that names an absent file": (
        sharded(edit_index(lambda weight_map: weight_map.update({DECAY: "model-00009.safetensors"}))),
        r"missing shard: model-00009\.safetensors",
    ),
    "index that names a path": (
        sharded(edit_index(lambda weight_map: weight_map.update({DECAY: "../model.safetensors"}))),
        "not the name of a shard beside it",
    ),
    "index without a tensor": (
        sharded(edit_index(lambda weight_map: weight_map.pop(DECAY))),
        f"disagree on 1 tensors: {DECAY}",
    ),
    "tensor in two shards": (sharded(store_twice), "is stored twice, in model-"),
    "one file beside an index": (sharded(stale_file_beside_the_index), "remove the one that is stale"),
    "wrong dtype in a header": (wrong_dtype_in_a_header, f"tensor '{DECAY}' .* the header gives it"),
    # MXFP4.
    "packed expert without scales": (packed(without(f"{EXPERT}_scale")), f"have no `weight_scale`: {EXPERT}_packed"),
    "scales without a packed expert": (
        packed(without(f"{EXPERT}_packed")),
        f"have no `weight_packed`: {EXPERT}_scale",
    ),
    "scale that is not a number": (
        packed(changed(f"{EXPERT}_scale", set_scales(255))),
        f"'{EXPERT}_packed' .* got 255",
    ),
    "scale that overflows": (packed(changed(f"{EXPERT}_scale", set_scales(254))), f"'{EXPERT}_packed' .* got 254"),
    "scales of another shape": (
        packed(changed(f"{EXPERT}_scale", lambda t: t.repeat(1, 2))),
        f"'{EXPERT}_packed' .* must be",
    ),
    "scales as floats": (
        packed(changed(f"{EXPERT}_scale", lambda t: t.float())),
        "`weight_scale` must be a uint8 matrix",
    ),
    "half a group": (
        packed(changed(f"{EXPERT}_packed", lambda t: t[:, :8].contiguous())),
        "whole groups of 32 columns, got 16",
    ),
    "expert packed and unpacked": (packed(added(EXPERT)), f"'{EXPERT}' is stored twice, packed and unpacked"),
    "packed expert of another width": (
        packed(lambda folder: edit_config(folder, text={"moe_intermediate_size": 64})),
        r"experts\.0\.w1\.weight: \[32, 32\], the config says \[64, 32\]",
    ),
    "zero points": (packed(added(f"{EXPERT}_zero_point")), "quantised weights .*weight_zero_point"),
    "packed experts that no config explains": (
        packed(lambda folder: edit_config(folder, text={"quantization_config": None})),
        "144 weights are packed, and no `quantization_config` says how",
    ),
    "config of packed experts without any": (
        text(quantization_config=QUANTISATION),
        "`quantization_config` says that weights are packed, and none is",
    ),
    "another 4-bit format": (quantisation(format="nvfp4-pack-quantized"), "format='nvfp4-pack-quantized'"),
    "two quantisation configs": (
        packed(lambda folder: edit_config(folder, quantization_config={"quant_method": "fp8"})),
        "`quantization_config` must be one object",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_by_name_and_nothing_is_written(tmp_path, monkeypatch, fault):
    damage, message = FAULTS[fault]
    damage(copy_fixture(tmp_path / "k3"))
    before = sorted(path.name for path in tmp_path.iterdir())
    written = []
    monkeypatch.setattr("modeling_attnres.conversion.convert_checkpoint.write_shards", lambda *_: written.append(1))
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "k3", tmp_path / "out")
    assert not written
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_their_number_is_the_documents():
    document = Path(__file__).parents[2] / "docs" / "kimi-k3.md"
    assert f"| {len(FAULTS)} faults in " in document.read_text(encoding="utf-8")
