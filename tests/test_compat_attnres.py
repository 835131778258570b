# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""One code base for every version of Transformers: the names that differ, in what users call."""

import pytest
import torch
from tiny_backbones import tiny_inputs, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import LlamaModel

from modeling_attnres import AttnResForCausalLM, AttnResForSequenceClassification, AttnResModel, compat_attnres
from modeling_attnres.compat_attnres import CACHE, given_cache, slice_logits_to_keep


def test_the_cache_has_the_name_that_the_library_uses(tmp_path):
    plain = LlamaModel(tiny_model("llama").config.text_config)
    outputs = plain(tiny_inputs(), use_cache=True)
    assert isinstance(outputs[CACHE], DynamicCache)
    assert set(outputs) == {"last_hidden_state", CACHE}
    assert set(tiny_model("llama", model_class=AttnResModel)(tiny_inputs(), use_cache=True)) == set(outputs)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("model_class", [AttnResModel, AttnResForCausalLM, AttnResForSequenceClassification])
@torch.no_grad()
def test_a_model_takes_its_cache_under_both_names(model_class, name):
    model = tiny_model("llama", model_class=model_class)
    whole = model(tiny_inputs())[0]
    first = model(tiny_inputs()[:, :-1], use_cache=True)
    last = model(tiny_inputs()[:, -1:], use_cache=True, **{name: first[CACHE]})
    expected = whole if model_class is AttnResForSequenceClassification else whole[:, -1:]
    torch.testing.assert_close(last[0], expected, rtol=0, atol=1e-5)  # fp32, another order of sums
    assert last[CACHE] is first[CACHE]
    assert last[CACHE].get_seq_length() == tiny_inputs().shape[1]


def test_a_cache_under_both_names_is_refused():
    cache = DynamicCache()
    assert given_cache(None, None) is None
    assert given_cache(cache, None) is given_cache(None, cache) is cache
    with pytest.raises(ValueError, match="as `cache` or as `past_key_values`, not as both"):
        tiny_model("llama")(tiny_inputs(), past_key_values=cache, cache=cache)


def test_positional_arguments_stay_in_the_librarys_order():
    cache = DynamicCache()
    tiny_model("llama")(tiny_inputs(), None, None, cache)
    assert cache.get_seq_length() == tiny_inputs().shape[1]


@pytest.mark.parametrize("kept", [0, 1, 3, torch.tensor([2, 0])], ids=["all", "one", "three", "indices"])
def test_logits_to_keep_without_the_librarys_function(kept):
    hidden_states = torch.arange(24.0).view(2, 4, 3)
    expected = hidden_states[:, [2, 0]] if isinstance(kept, torch.Tensor) else hidden_states[:, -kept:]
    for function in (slice_logits_to_keep, compat_attnres._slice_logits_to_keep):
        assert torch.equal(function(hidden_states, kept), expected)


def test_no_pipeline_plan_is_claimed():
    """A plan of the library hands one tensor from stage to stage; depth attention needs every source."""
    model = tiny_model("llama")
    assert AutoModelForCausalLM.from_config(model.config.text_config).supports_pp_plan
    assert not model.supports_pp_plan
    assert not model.model.supports_pp_plan
    assert not model.pp_plan


def test_no_layer_can_be_replaced_by_an_empty_one():
    """As a server does that splits a model by its list of layers."""
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"Decoder layer 2 must stay .* got Identity; for pipeline parallelism use"):
        model.model.layers[2] = nn.Identity()
    model.model.layers[2] = nn.Sequential(model.model.layers[2])  # around a layer is another matter
    model.model.layers[1] = tiny_model("llama").model.layers[1]
