# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The stages of a model, one after another in this process."""

import pytest
import torch
from tiny_backbones import BACKBONES, tiny_inputs, tiny_model

from modeling_attnres.parallel.cache import CrossStageCache
from modeling_attnres.parallel.layout import CACHING, PipelineLayout
from modeling_attnres.parallel.stage_module import AttnResStageModule, merge_stage_tensors


def build_stages(model, boundaries, num_ranks, caching="all"):
    config = model.config
    layout = PipelineLayout(boundaries, num_ranks, config.sublayers_per_block, config.depth_weights == "sum", caching)
    return [AttnResStageModule(model, layout, stage) for stage in range(layout.num_stages)]


def run(stages, input_ids, **kwargs):
    num_ranks = stages[0].layout.num_ranks
    caches = [CrossStageCache() for _ in range(num_ranks)]
    outputs = (input_ids,)
    for stage in stages:
        cache = caches[stage.stage % num_ranks]
        outputs, kept = stage(*outputs, cached=cache.read(0), **kwargs)
        cache.file(0, stage.stage, kept)
        if not stage.is_last:
            assert len(outputs) == stage.layout.tensors_received(stage.stage + 1)
    return outputs


@pytest.mark.parametrize("model_type", BACKBONES)
def test_logits_equal_the_models_for_every_backbone(model_type):
    model = tiny_model(model_type, 3, "sum")
    input_ids = tiny_inputs()
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        expected = model(input_ids, **kwargs).logits
        logits = run(build_stages(model, (0, 1, 2, 3, 4), 2), input_ids, **kwargs)
    # The same sums over the same sources; fp32, and the products of phase 1 have other shapes.
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-5)


@pytest.mark.parametrize("caching", CACHING)
@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
@pytest.mark.parametrize("sublayers_per_block", [1, 2, 3, 5, 12])
def test_logits_equal_the_models_for_every_block_size(sublayers_per_block, depth_weights, caching):
    model = tiny_model("llama", sublayers_per_block, depth_weights, num_hidden_layers=6)
    with torch.no_grad():
        expected = model(tiny_inputs()).logits
        for num_ranks, boundaries in ((2, (0, 1, 3, 4, 6)), (4, (0, 2, 3, 4, 6)), (2, (0, 1, 2, 3, 4, 5, 6))):
            logits = run(build_stages(model, boundaries, num_ranks, caching), tiny_inputs())
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


def test_every_parameter_lies_on_one_stage_under_its_own_name():
    model = tiny_model("llama", 2)
    stages = build_stages(model, (0, 1, 3, 4), 3)
    rows = [len(stage.model.depth_attention.query) for stage in stages]
    assert rows == [1, 4, 3]  # none for sublayer 0, and the output mix's
    merged = merge_stage_tensors(stage.state_dict() for stage in stages)
    expected = model.state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name
    names = [name for stage in stages for name, _ in stage.named_parameters() if "depth_attention" not in name]
    assert len(names) == len(set(names))


def test_frozen_queries_stay_frozen():
    model = tiny_model("llama", 2)
    model.model.depth_attention.requires_grad_(False)
    for stage in build_stages(model, (0, 2, 4), 2):
        assert not stage.model.depth_attention.query.requires_grad
        assert not stage.model.depth_attention.key_norm.requires_grad
