# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""SGLang's Transformers backend reads tensors by their names on disk, and renames none: the rule, in a few lines."""

import json

import pytest
import torch
from safetensors.torch import load_file
from served_models import save, served_model
from tiny_backbones import tiny_inputs
from transformers import AutoConfig, AutoModelForCausalLM


def load_by_names_on_disk(folder):
    """A model from its config alone, and every tensor of the folder copied to the parameter of its name and shape."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name not in parameters:
            raise KeyError(f"no parameter is called {name}")
        if parameters[name].shape != tensor.shape:
            raise ValueError(f"{name} is {list(tensor.shape)} on disk and {list(parameters[name].shape)} in memory")
        parameters[name].data.copy_(tensor)
        missing.discard(name)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    if missing - tied:
        raise KeyError(f"not on disk: {sorted(missing - tied)}")
    return model.eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sublayers_per_block", [1, 3, 4])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@torch.no_grad()
def test_names_and_shapes_on_disk_are_those_in_memory(model_type, sublayers_per_block, tied, tmp_path):
    model = served_model(model_type, sublayers_per_block, "sum", tie_word_embeddings=tied)
    save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["AttnResForCausalLM"]
    loaded = load_by_names_on_disk(tmp_path)
    assert torch.equal(loaded(tiny_inputs()).logits, model(tiny_inputs()).logits)
    loaded.save_pretrained(tmp_path / "again")
    saved, again = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert saved.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved.items())
