# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from tiny_backbones import tiny_model
from transformers import AutoConfig

from modeling_attnres.eval.model_argument import ModelError, check_model, check_weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama", 2).save_pretrained(folder)
    return folder


def test_a_whole_checkpoint(checkpoint):
    config = check_model(str(checkpoint), "model")
    assert config.to_dict() == AutoConfig.from_pretrained(checkpoint).to_dict()
    check_weights(str(checkpoint), config, "model")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "model must be a checkpoint folder, .* has no config.json"),
        ({"config.json": '{"model_type": '}, "model: .*config.json is not valid JSON: "),
        ({"config.json": b"\xff\xfe"}, "model: .*config.json is not valid JSON: "),
        ({"config.json": "[1]"}, "model: .*config.json must hold a JSON object, got list"),
        ({"config.json": '{"model_type": "unheard_of"}'}, "model: the config of .* cannot be used: .*unheard_of"),
        ({"adapter_config.json": json.dumps({"base_model_name_or_path": "base"})}, "is a PEFT adapter of 'base'"),
    ],
)
def test_folders_that_are_no_checkpoint(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=message):
        check_model(str(tmp_path), "model")


def test_names_that_are_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="model must be a checkpoint folder or a name on the Hub, got the file file"):
        check_model("file", "model")
    with pytest.raises(ModelError, match="model is neither an existing folder nor a name on the Hub: '/no/where/at'"):
        check_model("/no/where/at", "model")


def test_weights_without_files(checkpoint, tmp_path):
    config = AutoConfig.from_pretrained(checkpoint)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model: the weights of .* do not load: "):
        check_weights(str(tmp_path), config, "model")
