# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The model's numbers: against the paper's pseudocode, against the dense model, and what it returns on request."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tiny_backbones import (
    BACKBONES,
    NUM_LAYERS,
    NUM_SUBLAYERS,
    load_plain_weights,
    tiny_backbone,
    tiny_config,
    tiny_inputs,
    tiny_model,
)
from transformers import AutoModel, AutoModelForCausalLM

from modeling_attnres import (
    AttnResConfig,
    AttnResForCausalLM,
    AttnResForQuestionAnswering,
    AttnResForSequenceClassification,
    AttnResForTokenClassification,
    AttnResModel,
)


MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "qwen3_next")
FP32_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def dense_model(model_type: str, **overrides):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_backbone(model_type, **overrides)).eval()


def wrap(dense, sublayers_per_block: int, depth_weights: str = "sum") -> AttnResForCausalLM:
    """An AttnRes model at zero queries with the weights of a dense one."""
    config = AttnResConfig(
        text_config=copy.deepcopy(dense.config), sublayers_per_block=sublayers_per_block, depth_weights=depth_weights
    )
    model = AttnResForCausalLM(config).to(dense.dtype).eval()
    load_plain_weights(model, dense)
    return model


# --- The paper -------------------------------------------------------------------------------------------------------


def figure_2(model: AttnResForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """The paper's Figure 2 written out for a Llama: block representations, partial sum, one mix before each sublayer."""
    backbone, depth, block_size = model.model, model.model.depth_attention, model.config.sublayers_per_block
    queries, norms = iter(depth.query), iter(depth.key_norm)

    def block_attn_res(blocks, partial_block):
        values = torch.stack([*blocks, *([] if partial_block is None else [partial_block])])
        keys = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + depth.eps) * next(norms)
        weights = torch.einsum("d, n b t d -> n b t", next(queries), keys).softmax(0)
        return torch.einsum("n b t, n b t d -> b t d", weights, values)

    embedding = backbone.embed_tokens(input_ids)
    tokens = input_ids.shape[1]
    position_embeddings = backbone.rotary_emb(embedding, torch.arange(tokens)[None])
    mask = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]
    blocks, partial_block = [], embedding
    for layer_number, layer in enumerate(backbone.layers):
        # Before its boundary the partial sum is still the last source of the mix; the first layer has only that one.
        hidden_states = embedding if layer_number == 0 else block_attn_res(blocks, partial_block)
        if layer_number % (block_size // 2) == 0:
            blocks.append(partial_block)
            partial_block = None
        output = layer.self_attn(
            layer.input_layernorm(hidden_states), position_embeddings=position_embeddings, attention_mask=mask
        )[0]
        partial_block = output if partial_block is None else partial_block + output
        hidden_states = block_attn_res(blocks, partial_block)
        partial_block = partial_block + layer.mlp(layer.post_attention_layernorm(hidden_states))
    return model.lm_head(backbone.norm(block_attn_res(blocks, partial_block)))


@pytest.mark.parametrize("query_std", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("sublayers_per_block", [2, 4, 6, NUM_SUBLAYERS])  # 6: the last block is short
def test_logits_are_those_of_the_papers_figure_2(sublayers_per_block, query_std):
    model = tiny_model("llama", sublayers_per_block, query_std=query_std)
    input_ids = tiny_inputs()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, figure_2(model, input_ids), **FP32_TOLERANCE)


@pytest.mark.parametrize("sublayers_per_block", [2, 4, 6, NUM_SUBLAYERS])
def test_gradients_are_those_of_the_papers_figure_2(sublayers_per_block):
    model = tiny_model("llama", sublayers_per_block)
    input_ids = tiny_inputs()
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(figure_2(model, input_ids).square().sum(), parameters)
    found = torch.autograd.grad(model(input_ids).logits.square().sum(), parameters)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        # fp32, and random depth weights amplify rounding: relative to the tensor's largest gradient
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < 2e-5, f"{name}: {error}"


def reference_mixes(model: AttnResForCausalLM, outputs: list[torch.Tensor], embedding: torch.Tensor):
    """Equations 2 to 6 for any S and both forms: weights and mixes of sublayers 1..L and the output, sources at last."""
    config, depth = model.config, model.model.depth_attention
    sources, results = [embedding], []
    for sublayer, output in enumerate(outputs):
        if sublayer % config.sublayers_per_block == 0:
            sources.append(output)
        else:
            sources[-1] = sources[-1] + output
        values = torch.stack(sources, dim=-2)
        keys = torch.nn.functional.rms_norm(values, values.shape[-1:], depth.key_norm[sublayer], depth.eps)
        weights = torch.softmax(keys @ depth.query[sublayer], dim=-1)
        if config.depth_weights == "sum":
            weights = weights * len(sources)
        results.append((weights, (weights.unsqueeze(-1) * values).sum(-2)))
    return results, torch.stack(sources, dim=-2)


def run_recording(model: AttnResForCausalLM, input_ids: torch.Tensor):
    """A forward with everything returned, and what reached and left each sublayer."""
    reads, outputs, handles = [], [], []
    for layer in model.model.layers:
        for norm, sublayer in (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")):
            handles.append(
                getattr(layer, norm).register_forward_pre_hook(lambda _, arguments: reads.append(arguments[0]))
            )
            handles.append(
                getattr(layer, sublayer).register_forward_hook(
                    lambda _module, _arguments, output: outputs.append(
                        output[0] if isinstance(output, tuple) else output
                    )
                )
            )
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, args: reads.append(args[0])))
    with torch.no_grad():
        result = model(input_ids, output_hidden_states=True, output_depth_weights=True, output_block_summaries=True)
    for handle in handles:
        handle.remove()
    return result, reads, outputs


@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
@pytest.mark.parametrize("sublayers_per_block", [1, 2, 3, 5, NUM_SUBLAYERS])
def test_every_mix_weight_and_source_follows_the_equations(sublayers_per_block, depth_weights):
    model = tiny_model("llama", sublayers_per_block, depth_weights)
    input_ids = tiny_inputs()
    result, reads, outputs = run_recording(model, input_ids)
    embedding = model.get_input_embeddings()(input_ids)
    expected, sources = reference_mixes(model, outputs, embedding)

    assert len(result.depth_weights) == NUM_SUBLAYERS + 1
    torch.testing.assert_close(reads[0], embedding, rtol=0, atol=0)
    num_sources = [weights.shape[-1] for weights in result.depth_weights]
    assert num_sources == [1 + -(-sublayer // sublayers_per_block) for sublayer in range(NUM_SUBLAYERS + 1)]
    total = [n if depth_weights == "sum" else 1 for n in num_sources]
    for weights, weights_sum in zip(result.depth_weights, total, strict=True):
        assert weights.shape[:-1] == input_ids.shape
        torch.testing.assert_close(weights.sum(-1), torch.full(input_ids.shape, float(weights_sum)))
    for weights, read, (expected_weights, expected_mix) in zip(
        result.depth_weights[1:], reads[1:], expected, strict=True
    ):
        torch.testing.assert_close(weights, expected_weights, **FP32_TOLERANCE)
        torch.testing.assert_close(read, expected_mix, **FP32_TOLERANCE)

    assert result.block_summaries.shape == (*input_ids.shape, model.config.num_blocks + 1, model.config.hidden_size)
    torch.testing.assert_close(result.block_summaries, sources, **FP32_TOLERANCE)
    # What a PreNorm user expects: what each token mixer reads before its norm, and the end after the final norm.
    for hidden_states, read in zip(result.hidden_states, reads[:-1:2], strict=False):
        assert torch.equal(hidden_states, read)
    assert torch.equal(result.hidden_states[-1], model.model.norm(reads[-1]))
    assert len(result.hidden_states) == NUM_LAYERS + 1


def test_extras_are_returned_only_on_request():
    model = tiny_model()
    result = model(tiny_inputs())
    assert result.hidden_states is None
    assert result.depth_weights is None
    assert result.block_summaries is None


def test_hidden_states_can_be_requested_by_index():
    model = tiny_model()
    everything = model(tiny_inputs(), output_hidden_states=True).hidden_states
    some = model(tiny_inputs(), output_hidden_states=[1, -1]).hidden_states
    assert [state is not None for state in some] == [index in (1, NUM_LAYERS) for index in range(NUM_LAYERS + 1)]
    assert torch.equal(some[1], everything[1])
    assert torch.equal(some[-1], everything[-1])


def test_block_summaries_that_are_returned_outlive_the_next_forward():
    model = tiny_model()
    with torch.no_grad():
        kept = model(tiny_inputs(), output_block_summaries=True).block_summaries
        before = kept.clone()
        model(tiny_inputs(seed=2), output_block_summaries=True)
    assert torch.equal(kept, before)


# --- The dense model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", BACKBONES)
def test_sum_with_zero_queries_is_the_dense_model_bit_for_bit(model_type, dtype):
    dense = dense_model(model_type).to(dtype)
    input_ids = tiny_inputs()
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0  # left padding
    inputs = {"input_ids": input_ids, "attention_mask": mask, "output_hidden_states": True}
    with torch.no_grad():
        expected = dense(**inputs)
    for sublayers_per_block in (1, 2, 3, NUM_SUBLAYERS):
        with torch.no_grad():
            result = wrap(dense, sublayers_per_block)(**inputs)
        assert (result.logits - expected.logits).abs().max().item() == 0.0
        assert len(result.hidden_states) == len(expected.hidden_states)
        for ours, theirs in zip(result.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_token_by_token_equals_one_forward(model_type):
    input_ids = tiny_inputs()
    for sublayers_per_block, depth_weights in ((2, "mean"), (3, "sum")):
        model = tiny_model(model_type, sublayers_per_block, depth_weights)
        with torch.no_grad():
            expected = model(input_ids, use_cache=False).logits
            outputs = model(input_ids[:, :5], use_cache=True)
            logits = [outputs.logits]
            for position in range(5, input_ids.shape[1]):
                outputs = model(
                    input_ids[:, position : position + 1], past_key_values=outputs.past_key_values, use_cache=True
                )
                logits.append(outputs.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, **FP32_TOLERANCE)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_router_logits_and_auxiliary_loss_are_the_backbones_own(model_type):
    dense = dense_model(model_type)
    input_ids = tiny_inputs()
    inputs = {"input_ids": input_ids, "labels": input_ids, "output_router_logits": True}
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = dense(**inputs, attention_mask=mask)
        result = wrap(dense, 2)(**inputs, attention_mask=mask)
    assert len(result.router_logits) == len(expected.router_logits) > 0
    for ours, theirs in zip(result.router_logits, expected.router_logits, strict=True):
        assert torch.equal(ours, theirs)
    assert result.aux_loss == expected.aux_loss > 0
    assert result.loss == expected.loss


def test_attention_maps_are_the_backbones_own():
    dense = dense_model("llama")
    dense.set_attn_implementation("eager")
    model = wrap(dense, 2)
    model.set_attn_implementation("eager")
    expected = dense(tiny_inputs(), output_attentions=True).attentions
    result = model(tiny_inputs(), output_attentions=True).attentions
    assert len(result) == len(expected) == NUM_LAYERS
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, expected, strict=True))


@pytest.mark.parametrize("model_type", BACKBONES)
def test_loss_is_the_backbones_own(model_type):
    dense = dense_model(model_type)
    input_ids = tiny_inputs()
    labels = input_ids.masked_fill(input_ids < 10, -100)
    with torch.no_grad():
        assert wrap(dense, 3)(input_ids, labels=labels).loss == dense(input_ids, labels=labels).loss


# --- Precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_stays_near_full(dtype, tolerance, depth_weights):
    model = tiny_model("llama", 3, depth_weights)
    with torch.no_grad():
        expected = model(tiny_inputs()).logits
        result = model.to(dtype)(tiny_inputs(), output_depth_weights=True)
    assert result.logits.dtype == dtype
    assert all(weights.dtype == torch.float32 for weights in result.depth_weights)
    torch.testing.assert_close(result.logits.float(), expected, rtol=0, atol=tolerance)


# --- Construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", BACKBONES)
def test_initialisation_draws_the_dense_models_weights(model_type):
    """Depth attention draws no random number: under one seed the backbone is the dense model's, and so is the next draw."""
    torch.manual_seed(3)
    dense = AutoModelForCausalLM.from_config(tiny_backbone(model_type))
    next_dense_draw = torch.rand(())
    torch.manual_seed(3)
    model = AttnResForCausalLM(tiny_config(model_type))
    assert torch.rand(()) == next_dense_draw
    ours, theirs = model.state_dict(), dense.state_dict()
    assert ours.keys() - theirs.keys() == {"model.depth_attention.query", "model.depth_attention.key_norm"}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not model.model.depth_attention.query.any()
    assert (model.model.depth_attention.key_norm == 1).all()


def test_query_init_std():
    config = tiny_config()
    config.depth_query_init_std = 0.25
    query = AttnResForCausalLM(config).model.depth_attention.query
    assert 0.2 < query.std().item() < 0.3


@pytest.mark.parametrize("model_type", BACKBONES)
def test_builds_on_the_meta_device(model_type):
    with torch.device("meta"):
        model = AttnResForCausalLM(tiny_config(model_type))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("model_type", BACKBONES)
def test_weights_that_a_checkpoint_lacks_are_initialised(model_type):
    """All of them here, from the meta device: none is left as the memory happened to be."""
    expected = AttnResForCausalLM(tiny_config(model_type)).state_dict()
    found = AttnResForCausalLM.from_pretrained(None, config=tiny_config(model_type), state_dict={}).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point() and tensor.numel() > 64:
            torch.testing.assert_close(found[name].mean(), tensor.mean(), rtol=0, atol=0.02, msg=name)
            torch.testing.assert_close(found[name].std(), tensor.std(), rtol=0.5, atol=1e-6, msg=name)


@pytest.mark.parametrize("tie", [True, False])
def test_tied_embeddings_follow_the_backbones_config(tie):
    model = tiny_model("llama", tie_word_embeddings=tie)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
    assert model.get_output_embeddings() is model.lm_head


@pytest.mark.parametrize("tie", [True, False])
def test_resizing_the_embeddings_keeps_the_old_tokens(tie):
    model = tiny_model("llama", tie_word_embeddings=tie)
    vocab_size = model.config.vocab_size
    before = model(tiny_inputs()).logits
    model.resize_token_embeddings(vocab_size + 7)
    assert model.config.vocab_size == model.config.text_config.vocab_size == vocab_size + 7
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
    after = model(tiny_inputs()).logits
    assert after.shape[-1] == vocab_size + 7
    assert torch.equal(after[..., :vocab_size], before)
    loss = model(tiny_inputs(), labels=torch.full((2, 12), vocab_size + 6)).loss
    assert torch.isfinite(loss)


def test_exactly_one_kind_of_input():
    model = tiny_model()
    embeddings = model.get_input_embeddings()(tiny_inputs())
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(tiny_inputs(), inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(tiny_inputs()).logits)


# --- Other heads -----------------------------------------------------------------------------------------------------


def test_sequence_classification_reads_the_last_token():
    model = tiny_model(model_class=AttnResForSequenceClassification)
    input_ids = tiny_inputs()
    padded = torch.cat([input_ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    hidden_states = model.model(input_ids).last_hidden_state
    result = model(padded, attention_mask=(padded != 0).long(), labels=torch.tensor([0, 1]))
    torch.testing.assert_close(result.logits, model.score(hidden_states[:, -1]), **FP32_TOLERANCE)
    torch.testing.assert_close(
        result.loss, torch.nn.functional.cross_entropy(result.logits, torch.tensor([0, 1])), **FP32_TOLERANCE
    )


def test_token_classification_reads_every_token():
    model = tiny_model(model_class=AttnResForTokenClassification)
    hidden_states = model.model(tiny_inputs()).last_hidden_state
    result = model(tiny_inputs(), labels=tiny_inputs() % 2)
    assert torch.equal(result.logits, model.score(hidden_states))
    assert torch.isfinite(result.loss)


def test_question_answering_finds_spans_and_its_embeddings():
    model = tiny_model(model_class=AttnResForQuestionAnswering)
    positions = torch.tensor([1, 2])
    result = model(tiny_inputs(), start_positions=positions, end_positions=positions + 1)
    assert result.start_logits.shape == result.end_logits.shape == (2, 12)
    assert torch.isfinite(result.loss)
    assert model.get_input_embeddings() is model.model.embed_tokens
    replacement = torch.nn.Embedding(5, model.config.hidden_size)
    model.set_input_embeddings(replacement)
    assert model.model.embed_tokens is replacement


def test_auto_classes_build_the_attnres_models():
    config = tiny_config()
    assert isinstance(AutoModel.from_config(config), AttnResModel)
    assert isinstance(AutoModelForCausalLM.from_config(config), AttnResForCausalLM)


# --- Numbers of earlier versions -------------------------------------------------------------------------------------

EARLIER = json.loads((Path(__file__).parent / "earlier_logits.json").read_text())


@pytest.mark.parametrize("case", EARLIER)
def test_logits_are_those_of_earlier_versions(case):
    """Written while the backbone was a module of its own."""
    model_type, depth_weights, sublayers_per_block = case.split("-")
    model = tiny_model(model_type, int(sublayers_per_block), depth_weights)
    found = model(tiny_inputs()).logits[:, ::5, ::32].flatten()
    torch.testing.assert_close(found, torch.tensor(EARLIER[case]), rtol=1e-4, atol=1e-5)  # fp32, other machines
