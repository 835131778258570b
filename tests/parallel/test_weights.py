# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Kimi K3's weights, against the census of its released files."""

import pytest
import torch
from tiny_backbones import tiny_config, tiny_model

from modeling_attnres.configuration import load_preset
from modeling_attnres.parallel.weights import count_bytes, count_kimi_k3_file, count_weights


# Of all tensors whose names begin with `language_model.`; packed experts and their scales are bytes, two codes in each
# byte of the former.
CENSUS = {"float32": 11_122_432, "bfloat16": 56_732_525_568}
PACKED, SCALES = 1_361_370_415_104, 85_085_650_944
WHOLE_MODEL, VISION = 2_779_931_837_184, 57_179_884_544 - 56_732_525_568


def test_the_released_files_tensor_for_tensor():
    counts = count_kimi_k3_file(load_preset("kimi-k3-block"))
    assert counts == {**CENSUS, "mxfp4": 2 * PACKED}
    assert sum(counts.values()) == WHOLE_MODEL - VISION
    assert count_bytes("mxfp4", counts["mxfp4"]) == PACKED + SCALES
    assert count_bytes("float32", counts["float32"]) == 4 * CENSUS["float32"]
    assert count_bytes("bfloat16", counts["bfloat16"]) == 2 * CENSUS["bfloat16"]


def test_in_memory_without_the_padding_and_the_mix_that_nothing_reads():
    counts = count_weights(load_preset("kimi-k3-block"))
    assert counts["float32"] == CENSUS["float32"] - 69 * (128 - 96)
    assert counts["bfloat16"] == CENSUS["bfloat16"] + 2 * PACKED - 2 * 7168


def test_another_backbone_has_no_such_file():
    with pytest.raises(ValueError, match="must have a 'kimi_k3_text' backbone, got 'llama'"):
        count_kimi_k3_file(load_preset("tiny-block"))


@pytest.mark.parametrize("model_type", ["llama", "kimi_k3_text", "gpt_oss"])
def test_counts_are_what_a_load_gives(model_type, tmp_path):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = {}
    for tensor in loaded.state_dict().values():
        name = str(tensor.dtype).removeprefix("torch.")
        found[name] = found.get(name, 0) + tensor.numel()
    assert count_weights(tiny_config(model_type)) == found


def test_a_tied_embedding_counts_once():
    tied, untied = (
        count_weights(tiny_config("llama", tie_word_embeddings=tied))["bfloat16"] for tied in (True, False)
    )
    config = tiny_config("llama")
    assert untied - tied == config.vocab_size * config.hidden_size
