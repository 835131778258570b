# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The ablation variants: each against its formula, token by token, and as models."""

import math

import pytest
import torch
from tiny_backbones import tiny_backbone, tiny_inputs

from modeling_attnres import AttnResConfig, AttnResForCausalLM, BlockSummaries
from modeling_attnres.configuration_attnres import DEPTH_ATTENTION_TYPES
from modeling_attnres.depth_streams_attnres import open_stream
from modeling_attnres.depth_variants_attnres import SourcesForm, build_depth_attention
from modeling_attnres.depth_weights_attnres import FORMS


VARIANTS = tuple(kind for kind in DEPTH_ATTENTION_TYPES if kind != "softmax")
WINDOW, HEADS = 2, 4
OPTIONS = {"sliding_window": {"depth_window": WINDOW}, "multi_head": {"depth_heads": HEADS}}
EPS = 1e-3  # large, so that a forgotten epsilon shows


def variant_config(kind, sublayers_per_block=1, model_type="llama"):
    return AttnResConfig(
        text_config=tiny_backbone(model_type),
        sublayers_per_block=sublayers_per_block,
        depth_attention_type=kind,
        depth_norm_eps=EPS,
        **OPTIONS.get(kind, {}),
    )


def variant_model(kind, sublayers_per_block=1, model_type="llama"):
    """Random depth parameters: nothing cancels that should not."""
    torch.manual_seed(0)
    model = AttnResForCausalLM(variant_config(kind, sublayers_per_block, model_type)).eval()
    randomize(model.model.depth_attention)
    return model


@torch.no_grad()
def randomize(module):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(1 + 0.2 * noise if name == "key_norm" else 0.5 * noise)


def normed(vector, gain):
    rms = math.sqrt(sum(x * x for x in vector) / len(vector) + EPS)
    return [g * x / rms for g, x in zip(gain, vector)]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def softmax(scores):
    exps = [math.exp(score) for score in scores]
    return [e / sum(exps) for e in exps]


def formula(kind, sources, parameters, row):
    """One token's mix as the docstrings state it, in plain Python: the weights `[n]` (per head, `[H][n]`) and `[D]`."""
    of_row = {name: value[row].tolist() for name, value in parameters.items()}
    query, gain = of_row.get("query"), of_row.get("key_norm")
    n, width = len(sources), len(sources[0])
    if kind == "static":
        weights = of_row["mixing_weights"][:n]
    elif kind == "sigmoid":
        weights = [1 / (1 + math.exp(-dot(query, normed(source, gain)))) for source in sources]
    elif kind == "no_key_norm":
        weights = softmax([dot(query, source) for source in sources])
    elif kind == "sliding_window":
        seen = [i for i in range(n) if i == 0 or i >= n - WINDOW]
        found = softmax([dot(query, normed(sources[i], gain)) for i in seen])
        weights = [found[seen.index(i)] if i in seen else 0.0 for i in range(n)]
    elif kind == "input_dependent":
        latest = normed(sources[-1], gain)
        query = [dot(matrix_row, latest) for matrix_row in of_row["query_projection"]]
        weights = softmax([dot(query, normed(source, gain)) for source in sources])
    else:
        size = width // HEADS
        slices = [slice(head * size, (head + 1) * size) for head in range(HEADS)]
        keys = [normed(source, gain) for source in sources]
        weights = [softmax([dot(query[part], key[part]) for key in keys]) for part in slices]
        mix = [dot(weights[c // size], [source[c] for source in sources]) for c in range(width)]
        return [sum(column) / HEADS for column in zip(*weights)], mix
    return weights, [dot(weights, [source[c] for source in sources]) for c in range(width)]


@pytest.mark.parametrize("num_sources", [2, 3, 7])
@pytest.mark.parametrize("kind", VARIANTS)
def test_a_mix_is_its_formula(kind, num_sources):
    config = variant_config(kind)
    module, form = build_depth_attention(config)
    module.double()
    randomize(module)
    width = config.text_config.hidden_size
    generator = torch.Generator().manual_seed(5)
    sources = torch.randn(num_sources, 2, 3, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        queries, norm_floor = module(sources[0])
        row = num_sources  # any sublayer that has a query
        depth = open_stream(form, sources[0], queries, norm_floor, BlockSummaries(), 1)
        mix, weights = depth.mix(queries[row], *sources)
        weights = depth.mix_weights(queries[row], weights)
    parameters = dict(module.named_parameters())
    for b in range(2):
        for t in range(3):
            expected_weights, expected_mix = formula(kind, sources[:, b, t].tolist(), parameters, row - 1)
            # fp64, sums of at most 32 terms in another order
            torch.testing.assert_close(mix[b, t], mix.new_tensor(expected_mix), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(weights[b, t], mix.new_tensor(expected_weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sublayers_per_block", [1, 2, 3, 8])
def test_the_plain_form_over_all_sources_is_the_method(sublayers_per_block):
    """With no step replaced, the variants' way through the model gives what the two-phase computation gives."""
    model = variant_model("softmax", sublayers_per_block)
    expected = model(tiny_inputs(), output_depth_weights=True, output_block_summaries=True)
    form = SourcesForm()
    model.model.depth_form = form
    found = model(tiny_inputs(), output_depth_weights=True, output_block_summaries=True)
    # fp32, where random models amplify rounding
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.block_summaries, expected.block_summaries, rtol=1e-4, atol=1e-4)
    for found_weights, expected_weights in zip(found.depth_weights, expected.depth_weights, strict=True):
        torch.testing.assert_close(found_weights, expected_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sublayers_per_block", [1, 3])
@pytest.mark.parametrize("kind", [kind for kind in VARIANTS if kind != "sigmoid"])
def test_variants_start_as_the_mean(kind, sublayers_per_block):
    torch.manual_seed(0)
    model = AttnResForCausalLM(variant_config(kind, sublayers_per_block)).eval()
    for weights in model(tiny_inputs(), output_depth_weights=True).depth_weights:
        seen = weights[weights > 0].unique()
        window = WINDOW + 1 if kind == "sliding_window" else weights.shape[-1]
        assert seen.tolist() == pytest.approx([1 / min(weights.shape[-1], window)] * len(seen))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", VARIANTS)
def test_checkpointed_gradients_are_the_plain_ones(kind, use_reentrant):
    model = variant_model(kind, 3).train()
    inputs = tiny_inputs()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.zero_grad()
        model(inputs, labels=inputs).loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, plain in found[0].items():
        assert plain.abs().sum() > 0, name
        torch.testing.assert_close(found[1][name], plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "kimi_linear"])
@pytest.mark.parametrize("kind", VARIANTS)
def test_saved_loaded_and_generating(kind, model_type, tmp_path):
    model = variant_model(kind, 2, model_type)
    inputs = tiny_inputs()
    model.save_pretrained(tmp_path)
    again, info = AttnResForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.depth_attention_type == kind
    assert torch.equal(again.eval()(inputs).logits, model(inputs).logits)
    cached, uncached = (
        model.generate(inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("kind", VARIANTS)
def test_runs_in_bf16(kind):
    model = variant_model(kind, 2)
    expected = model(tiny_inputs()).logits
    found = model.bfloat16()(tiny_inputs()).logits
    assert found.dtype == torch.bfloat16
    assert torch.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth_attention_type": "dense"}, "`depth_attention_type` must be one of .* got 'dense'"),
        ({"depth_attention_type": "static", "depth_weights": "sum"}, "`depth_weights='mean'` only, got 'sum'"),
        ({"depth_window": 4}, "`depth_window` goes with .*'sliding_window'.* got 4 with 'softmax'"),
        ({"depth_attention_type": "sliding_window", "depth_window": 0}, "`depth_window` must be at least 1, got 0"),
        ({"depth_attention_type": "multi_head", "depth_heads": 5}, "`depth_heads` must divide .* got 5"),
        ({"depth_attention_type": "multi_head", "depth_window": 5}, "`depth_window` goes with"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttnResConfig(text_config=tiny_backbone("llama"), **arguments)


def test_the_method_stays_the_default():
    config = AttnResConfig(text_config=tiny_backbone("llama"))
    assert (config.depth_attention_type, config.depth_window, config.depth_heads) == ("softmax", None, None)
    assert build_depth_attention(config)[1] is FORMS["mean"]
    assert AttnResConfig(depth_attention_type="sliding_window").depth_window == 8
    assert AttnResConfig(depth_attention_type="multi_head").depth_heads == 16
