# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The trial against the plain model on a Transformers that the release was not tested with."""

import functools
import importlib.metadata

import pytest
import torch
from accelerate import init_empty_weights
from tiny_backbones import BACKBONES, tiny_backbone, tiny_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM

from modeling_attnres import AttnResForCausalLM, AttnResModel, UnsupportedBackboneError, twin_attnres
from modeling_attnres.compat_attnres import CACHE
from modeling_attnres.twin_attnres import TESTED_TRANSFORMERS, installed_version, shrunk_config


@pytest.fixture
def trials(monkeypatch):
    """An untested Transformers; the backbones that were compared with their plain model."""
    tried = []
    compare = twin_attnres._first_difference

    def recorded(text_config, build_twin):
        tried.append(text_config.model_type)
        return compare(text_config, build_twin)

    monkeypatch.setattr(twin_attnres, "installed_version", lambda: "5.99.0")
    monkeypatch.setattr(twin_attnres, "_tried", set())
    monkeypatch.setattr(twin_attnres, "_first_difference", recorded)
    return tried


def test_the_installed_version_is_tested_and_not_tried(monkeypatch):
    assert installed_version() == importlib.metadata.version("transformers")
    assert installed_version() in TESTED_TRANSFORMERS
    monkeypatch.setattr(twin_attnres, "_tried", set())
    monkeypatch.setattr(twin_attnres, "_first_difference", lambda *args: pytest.fail("it was compared"))
    AttnResForCausalLM(tiny_config("llama"))


@pytest.mark.parametrize("model_type", BACKBONES)
def test_every_backbone_equals_its_plain_model(trials, model_type):
    for model_class in (AttnResModel, AttnResForCausalLM):  # the second finds it done
        model_class(tiny_config(model_type))
    assert trials == [model_type]


def test_nothing_of_the_caller_is_touched(trials):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    text_config = tiny_backbone("qwen3_moe")
    before = text_config.to_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = AttnResForCausalLM(tiny_config("qwen3_moe"))
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert trials == ["qwen3_moe"]
    assert torch.equal(torch.get_rng_state(), state)
    assert text_config.to_dict() == before
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("include_buffers", [False, True])
def test_it_runs_where_models_are_built_without_weights(trials, include_buffers):
    with init_empty_weights(include_buffers=include_buffers):
        model = AttnResForCausalLM(tiny_config("kimi_linear"))
    assert trials == ["kimi_linear"]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def plant(monkeypatch, fault):
    """Attention that does as `fault` says, except in a plain Llama: what no probe of calls can see."""
    forward, plain_init = LlamaAttention.forward, LlamaForCausalLM.__init__

    @functools.wraps(forward)
    def faulty(self, *args, **kwargs):
        if getattr(self, "is_plain", False):
            return forward(self, *args, **kwargs)
        return fault(forward, self, *args, **kwargs)

    def marked(self, config):
        plain_init(self, config)
        for layer in self.model.layers:
            layer.self_attn.is_plain = True

    monkeypatch.setattr(LlamaAttention, "forward", faulty)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", marked)


def scales(forward, self, *args, **kwargs):
    output, weights = forward(self, *args, **kwargs)
    return 0.5 * output, weights


def forgets_the_prefill(forward, self, *args, **kwargs):
    if kwargs["attention_mask"] is not None and kwargs["attention_mask"].shape[-1] > 6:
        kwargs["attention_mask"] = torch.zeros_like(kwargs["attention_mask"])
        kwargs["attention_mask"][..., :6] = torch.finfo(torch.float32).min
    return forward(self, *args, **kwargs)


def ignores_padding(forward, self, *args, **kwargs):
    if kwargs[CACHE] is not None:
        kwargs["attention_mask"] = None
    return forward(self, *args, **kwargs)


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        (scales, "a forward without a cache"),
        (ignores_padding, "a left-padded prefill"),
        (forgets_the_prefill, "cached step 1"),
    ],
)
@pytest.mark.parametrize("model_class", [AttnResModel, AttnResForCausalLM])
def test_a_model_that_differs_is_refused_with_the_first_difference(trials, monkeypatch, fault, step, model_class):
    plant(monkeypatch, fault)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(UnsupportedBackboneError, match=rf"'llama'.* 5\.99\.0.* differs in {step} by up to"):
            model_class(tiny_config("llama"))
    assert trials == ["llama", "llama"]


def test_a_plain_model_that_does_not_run_is_refused(trials, monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("not here")

    monkeypatch.setattr(LlamaForCausalLM, "forward", broken)
    with pytest.raises(UnsupportedBackboneError, match=r"the comparison ends in|does not run"):
        AttnResForCausalLM(tiny_config("llama"))


@pytest.mark.parametrize(
    "model_type", ["llama", "deepseek_v3", "qwen3_next", "kimi_linear", "kimi_k3_text", "gpt_oss"]
)
def test_a_real_size_shrinks_to_a_tiny_one_of_the_same_kinds(model_type):
    config = CONFIG_MAPPING[model_type]()
    small = shrunk_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small)
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    assert 2 <= small.num_hidden_layers <= 4
    for name in ("layer_types", "mlp_layer_types"):
        assert set(getattr(small, name, None) or []) == set(getattr(config, name, None) or [])


def test_a_backbone_without_a_plain_head_is_compared_by_its_hidden_states(trials, monkeypatch):
    monkeypatch.setattr(twin_attnres, "_has_plain_head", lambda config: False)
    AttnResModel(tiny_config("qwen3_next"))
    assert trials == ["qwen3_next"]
    answers = twin_attnres._answers(AttnResModel(tiny_config("llama")).eval())
    assert [tuple(hidden_states.shape) for _, hidden_states in answers] == [(2, 6, 32)] * 2 + [(2, 1, 32)] * 2
