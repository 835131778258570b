# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Loading a folder in Kimi K3's own layout names the command that converts it."""

import json

import pytest
from kimi_k3_tiny import FOLDER
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from modeling_attnres import AttnResConfig, AttnResForCausalLM
from modeling_attnres.kimi_k3_folders import KimiK3Config, refuse_kimi_k3_folders


@pytest.mark.parametrize("load", [AttnResForCausalLM, AutoModelForCausalLM, AutoConfig, AttnResConfig])
def test_a_raw_folder(load):
    with pytest.raises(ValueError, match="`attnres-convert SOURCE OUT`"):
        load.from_pretrained(FOLDER)


def test_a_raw_text_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_linear", "attn_res_block_size": 12}))
    with pytest.raises(ValueError, match=r"`attn_res_block_size`=12 counts blocks .* `attnres-convert SOURCE OUT`"):
        AttnResForCausalLM.from_pretrained(tmp_path)


def test_a_class_that_is_there_already_stays(monkeypatch):
    class Known(KimiK3Config):
        pass

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "kimi_k3", Known)
    refuse_kimi_k3_folders()
    assert CONFIG_MAPPING["kimi_k3"] is Known
