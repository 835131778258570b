# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Every message that docs/faq.md quotes is raised, and is the code's own word for word."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from pages import ROOT, read_blocks
from peft import LoraConfig, get_peft_model
from tiny_backbones import tiny_backbone
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2VLConfig

from modeling_attnres import AttnResConfig, AttnResForCausalLM, attnres_lora_config, peft_attnres
from modeling_attnres.conversion import convert
from modeling_attnres.eval.comparison import Model, compare_models
from modeling_attnres.eval.model_argument import check_model
from modeling_attnres.eval.records import load_run
from modeling_attnres.training import attnres_parameter_groups


sys.path.insert(0, str(ROOT / "tests" / "eval"))
from synthetic_runs import multiple_choice, write_run


MESSAGES = [block for block in read_blocks(ROOT / "docs" / "faq.md") if block.language == "text"]


@pytest.fixture
def source(tmp_path) -> Path:
    """A PreNorm model."""
    AutoModelForCausalLM.from_config(tiny_backbone("llama")).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def model() -> AttnResForCausalLM:
    return AttnResForCausalLM(AttnResConfig(text_config=tiny_backbone("llama"), num_blocks=2))


def refused_backbone():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    AttnResForCausalLM(
        AttnResConfig(text_config=Gemma2Config(num_hidden_layers=2, head_dim=16, vocab_size=64, **sizes))
    )


def multimodal_config():
    AttnResConfig(text_config=Qwen2VLConfig())


def both_block_arguments():
    AttnResConfig(text_config=LlamaConfig(), num_blocks=8, sublayers_per_block=4)


def existing_output(source):
    (source.parent / "out").mkdir()
    convert(source, source.parent / "out")


def quantised_source(source):
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, source.parent / "out")


def adapter_source(source):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(source), LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(source.parent / "adapter")
    convert(source.parent / "adapter", source.parent / "out")


def trained_queries(model, tmp_path):
    torch.nn.init.ones_(model.model.depth_attention.query)
    model.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "out", to="prenorm")


def frozen_queries(model):
    attnres_parameter_groups(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")), lr=1e-4)


def second_derivative(model):
    tokens = torch.arange(3, 11).unsqueeze(0)
    torch.autograd.grad(model(tokens, labels=tokens).loss, model.model.depth_attention.query, create_graph=True)


def removed_layer(model):
    del model.model.layers[0]


def replaced_layer(model):
    model.model.layers[1] = torch.nn.Identity()


def missing_model():
    check_model("nobody/nothing", "MODEL")


def different_runs(tmp_path):
    samples = {"task": multiple_choice("task", [1, 0, 1, 1])}
    runs = [load_run(write_run(tmp_path / name, samples, lm_eval_version=name)) for name in ("0.4.12", "0.4.13")]
    compare_models([Model(run.folder.name, [run]) for run in runs])


def missing_package(monkeypatch):
    monkeypatch.setattr(peft_attnres, "LoraConfig", None)
    attnres_lora_config()


def kimi_k3_folder():
    AutoModelForCausalLM.from_pretrained(ROOT / "tests" / "fixtures" / "kimi-k3-tiny")


CASES = (
    *(refused_backbone, multimodal_config, both_block_arguments, existing_output, quantised_source, adapter_source),
    *(trained_queries, frozen_queries, second_derivative, removed_layer, replaced_layer, missing_model),
    *(different_runs, missing_package, kimi_k3_folder),
)


@pytest.mark.parametrize("place", range(len(CASES)), ids=lambda place: CASES[place].__name__)
def test_a_quoted_message_is_raised(place, request):
    assert len(MESSAGES) == len(CASES)
    case, quoted = CASES[place], MESSAGES[place].code.rstrip("\n")
    arguments = [request.getfixturevalue(name) for name in case.__code__.co_varnames[: case.__code__.co_argcount]]
    pattern = ".*".join(re.escape(part) for part in quoted.split("..."))
    with pytest.raises((ValueError, RuntimeError, ImportError)) as raised:
        case(*arguments)
    assert re.fullmatch(pattern, str(raised.value), re.DOTALL), str(raised.value)


def test_every_entry_has_a_cause_and_a_way_out():
    entries = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8").split("\n## ")[1:]
    for entry in entries:
        if "```text" in entry:
            assert "**Cause.**" in entry, entry
            assert "**Way out.**" in entry, entry
