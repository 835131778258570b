# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Kimi Linear 48B-A3B's public layout, PreNorm."""

from pathlib import Path

import pytest
import torch
from kimi_linear_folder import HEADS, save_published
from tiny_backbones import tiny_inputs
from tiny_checkpoints import load, logits_with_and_without_cache, weights

from modeling_attnres import AttnResForCausalLM
from modeling_attnres.conversion import convert


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kimi") / "published"
    save_published(folder)
    return folder


def test_the_twin_has_the_published_names_and_shapes(published):
    tensors = weights(published)
    assert tensors["model.layers.0.self_attn.A_log"].shape == (1, 1, HEADS, 1)
    assert tensors["model.layers.0.self_attn.q_conv1d.weight"].shape == (4 * HEADS, 1, 4)
    assert tensors["model.layers.0.mlp.gate_proj.weight"].shape == (48, 32)
    assert tensors["model.layers.26.self_attn.kv_a_proj_with_mqa.weight"].shape == (24, 32)
    assert tensors["model.layers.26.block_sparse_moe.experts.3.w2.weight"].shape == (32, 16)
    assert "model.layers.1.block_sparse_moe.gate.e_score_correction_bias" in tensors


@pytest.mark.parametrize("sublayers_per_block", [1, 7, 14])
def test_conversion_is_lossless(published, tmp_path, sublayers_per_block):
    report = convert(published, tmp_path / "out", sublayers_per_block=sublayers_per_block)
    assert (report.source_kind, report.model_type, report.num_sublayers) == ("prenorm", "kimi_linear", 54)
    assert report.max_logit_difference == 0.0
    for dtype in (torch.float32, torch.bfloat16):
        plain, ours = load(published, dtype), load(tmp_path / "out", dtype, AttnResForCausalLM)
        due, found = (logits_with_and_without_cache(model, tiny_inputs()) for model in (plain, ours))
        assert due.abs().max() > 0.1
        assert torch.equal(found, due)


def test_there_and_back_gives_the_same_bytes(published, tmp_path):
    convert(published, tmp_path / "ours", num_blocks=8)
    convert(tmp_path / "ours", tmp_path / "back", to="prenorm")
    before, after = weights(published), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
