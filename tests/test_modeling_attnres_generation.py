# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`generate` in all its ways, against plain greedy search without a cache."""

import pytest
import torch
from tiny_backbones import BACKBONES, tiny_backbone, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_attnres import BlockSummaries, depth_attention_attnres, modeling_attnres
from modeling_attnres.depth_streams_attnres import open_stream


NEW_TOKENS = 8
# Their states cannot be cropped, as assisted decoding must.
LINEAR_ATTENTION = ("qwen3_next", "kimi_linear", "kimi_k3_text")
FORMS = [(2, "mean"), (3, "sum")]


def generate(model, input_ids: torch.Tensor | None = None, max_new_tokens: int = NEW_TOKENS, **kwargs):
    """Greedy continuation of full length; the random weights have nothing to say about ending or padding."""
    if input_ids is not None:
        kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
    return model.generate(input_ids, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=None, **kwargs)


def greedy(model, input_ids: torch.Tensor, max_new_tokens: int = NEW_TOKENS) -> torch.Tensor:
    """Greedy search by hand: a full forward without a cache for every token."""
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(input_ids, use_cache=False).logits[:, -1]
        input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=1)
    return input_ids


@pytest.mark.parametrize("model_type", BACKBONES)
def test_dynamic_and_static_cache_equal_no_cache(model_type):
    for sublayers_per_block, depth_weights in FORMS:
        model = tiny_model(model_type, sublayers_per_block, depth_weights)
        expected = greedy(model, tiny_inputs())
        assert torch.equal(generate(model, tiny_inputs()), expected)
        # `disable_compile`: compiling has a test of its own.
        static = generate(model, tiny_inputs(), cache_implementation="static", disable_compile=True)
        assert torch.equal(static, expected)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_left_padding_changes_nothing(model_type):
    model = tiny_model(model_type, 3)
    input_ids = tiny_inputs()
    padding = torch.zeros(2, 4, dtype=torch.long)
    padded = torch.cat([padding, input_ids], dim=1)
    mask = torch.cat([padding, torch.ones_like(input_ids)], dim=1)
    expected = generate(model, input_ids)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(generate(model, padded, attention_mask=mask, **options)[:, 4:], expected)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunked_prefill(model_type, chunk):
    model = tiny_model(model_type, 3, "sum")
    expected = greedy(model, tiny_inputs())
    assert torch.equal(generate(model, tiny_inputs(), prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral", "qwen3_next", "kimi_linear", "kimi_k3_text"])
def test_beams_find_a_likelier_continuation_with_and_without_cache(model_type):
    model = tiny_model(model_type, 3)
    options = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    cached = generate(model, tiny_inputs(), **options)
    uncached = generate(model, tiny_inputs(), use_cache=False, **options)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, rtol=1e-4, atol=1e-4)
    for sequences in (cached.sequences, greedy(model, tiny_inputs())):
        logits = model(sequences[:, :-1]).logits[:, -NEW_TOKENS:].log_softmax(-1)
        likelihood = logits.gather(-1, sequences[:, -NEW_TOKENS:, None]).sum((1, 2))
        assert (cached.sequences_scores >= likelihood - 1e-4).all()


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("assistant", ["dense", "attnres", "itself"])
def test_assisted_decoding(model_type, assistant):
    model = tiny_model(model_type, 3)
    if assistant == "dense":
        torch.manual_seed(7)
        assistant_model = AutoModelForCausalLM.from_config(tiny_backbone("llama", num_hidden_layers=1)).eval()
    else:
        assistant_model = model if assistant == "itself" else tiny_model("llama", 2, "sum", seed=7)
    input_ids = tiny_inputs(batch=1)
    assert torch.equal(generate(model, input_ids, assistant_model=assistant_model), greedy(model, input_ids))


def test_an_attnres_model_assists_a_dense_one():
    dense = AutoModelForCausalLM.from_config(tiny_backbone("llama")).eval()
    input_ids = tiny_inputs(batch=1)
    assert torch.equal(generate(dense, input_ids, assistant_model=tiny_model("llama")), greedy(dense, input_ids))


@pytest.mark.parametrize("model_type", [name for name in BACKBONES if name not in LINEAR_ATTENTION])
def test_prompt_lookup(model_type):
    model = tiny_model(model_type, 2)
    input_ids = tiny_inputs(batch=1, tokens=6).repeat(1, 3)
    assert torch.equal(generate(model, input_ids, prompt_lookup_num_tokens=3), greedy(model, input_ids))


@pytest.mark.parametrize("model_type", BACKBONES)
def test_continues_from_a_cache(model_type):
    model = tiny_model(model_type, 3)
    first = generate(model, tiny_inputs(), max_new_tokens=3, return_dict_in_generate=True)
    second = generate(model, first.sequences, max_new_tokens=5, past_key_values=first.past_key_values)
    assert torch.equal(second, greedy(model, tiny_inputs(), 8))


def test_continues_from_a_cache_with_several_new_tokens():
    """A chat: the next turn is many tokens on top of the cached ones."""
    model = tiny_model("llama", 3)
    first = generate(model, tiny_inputs(), return_dict_in_generate=True)
    turn = torch.cat([first.sequences, tiny_inputs(seed=2)], dim=1)
    assert torch.equal(generate(model, turn, past_key_values=first.past_key_values), greedy(model, turn))


def test_from_embeddings():
    model = tiny_model("llama", 3)
    embeddings = model.get_input_embeddings()(tiny_inputs())
    expected = greedy(model, tiny_inputs())
    assert torch.equal(generate(model, inputs_embeds=embeddings), expected[:, -NEW_TOKENS:])
    assert torch.equal(generate(model, tiny_inputs(), inputs_embeds=embeddings), expected)


def test_from_nothing():
    model = tiny_model("llama", 3)
    start = torch.full((1, 1), model.config.bos_token_id)
    assert torch.equal(generate(model), greedy(model, start))


def test_several_sampled_sequences():
    model = tiny_model("llama", 3)
    sequences = model.generate(
        tiny_inputs(), do_sample=True, num_return_sequences=3, max_new_tokens=4, min_new_tokens=4
    )
    assert sequences.shape == (6, 16)
    assert torch.equal(sequences[::3, :12], tiny_inputs())


def test_stops_at_the_backbones_end_of_sequence():
    """Special tokens come from the backbone's config."""
    model = tiny_model("llama", 3)
    expected = greedy(model, tiny_inputs(batch=1))[0]
    first_new = expected[12].item()
    model.generation_config.eos_token_id = first_new
    assert model.generate(tiny_inputs(batch=1), max_new_tokens=NEW_TOKENS, do_sample=False).shape[1] == 13
    assert model.config.eos_token_id == model.config.text_config.eos_token_id


def test_returns_hidden_states_and_logits_of_each_step():
    model = tiny_model("llama", 3)
    result = generate(
        model, tiny_inputs(), return_dict_in_generate=True, output_hidden_states=True, output_logits=True
    )
    expected = model(result.sequences[:, :-1], output_hidden_states=True)
    torch.testing.assert_close(torch.stack(result.logits, 1), expected.logits[:, 11:], rtol=1e-5, atol=1e-5)
    for index, states in enumerate(expected.hidden_states):
        steps = torch.cat([step[index] for step in result.hidden_states], dim=1)
        torch.testing.assert_close(steps, states, rtol=1e-5, atol=1e-5)


# --- The bank --------------------------------------------------------------------------------------------------------


class _Recorder(BlockSummaries):
    """Notes where its sources lie after each forward's reset."""

    def __init__(self):
        super().__init__()
        self.addresses, self.reads = [], []

    def reset(self, *args, **kwargs):
        super().reset(*args, **kwargs)
        self.addresses.append((self.sources.shape[2], self.sources.data_ptr()))
        self.reads.append(self.decode_reads)


@pytest.mark.parametrize("sublayers_per_block", [1, 2, 3, 8])
def test_decode_steps_reuse_one_allocation(sublayers_per_block):
    model = tiny_model("llama", sublayers_per_block)
    bank = _Recorder()
    with torch.no_grad():
        outputs = model(tiny_inputs(), use_cache=True, block_summaries=bank)
        for _ in range(5):
            token = outputs.logits[:, -1:].argmax(-1)
            outputs = model(token, past_key_values=outputs.past_key_values, use_cache=True, block_summaries=bank)
    assert [tokens for tokens, _ in bank.addresses] == [12, 1, 1, 1, 1, 1]
    assert len({address for tokens, address in bank.addresses if tokens == 1}) == 1
    # The second step finds the views that the first one made, and all later ones the same.
    assert bank.reads[:2] == [None, None]
    assert bank.reads[2] is not None
    assert all(reads is bank.reads[2] for reads in bank.reads[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sublayers_per_block", "depth_weights"), [(1, "mean"), (3, "mean"), (2, "sum"), (8, "sum")])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 1), (1, 5)], ids=["rows", "packed"])
def test_a_decode_step_is_the_two_phase_computation(
    batch, tokens, sublayers_per_block, depth_weights, dtype, monkeypatch
):
    model = tiny_model("llama", sublayers_per_block, depth_weights).to(dtype)
    outputs = []
    for largest_batch in (32, 0):  # in one pass, in two phases
        monkeypatch.setattr(depth_attention_attnres, "MAX_DECODE_TOKENS_ON_CPU", largest_batch)
        with torch.no_grad():
            cache = model(tiny_inputs(batch), use_cache=True).past_key_values
            outputs.append(
                model(
                    tiny_inputs(batch, tokens),
                    past_key_values=cache,
                    output_hidden_states=True,
                    output_depth_weights=True,
                    output_block_summaries=True,
                )
            )
    one_pass, two_phase = outputs
    # Rounding only, which random models amplify; bf16 differs by the fp32 sources of the one pass.
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    for name in ("logits", "hidden_states", "depth_weights", "block_summaries"):
        torch.testing.assert_close(one_pass[name], two_phase[name], **tolerance)
    assert one_pass.block_summaries.dtype == dtype


def test_a_bank_serves_inference_mode_and_no_grad_in_turn():
    model = tiny_model("llama", 2)
    bank = BlockSummaries()
    results = []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            results.append(model(tiny_inputs(tokens=1), block_summaries=bank).logits.clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_generate_keeps_one_bank_for_all_its_steps(monkeypatch):
    model = tiny_model("llama", 2)
    banks = []

    def spy(form, embedding, queries, norm_floor, bank, *args, **kwargs):
        banks.append(bank)
        return open_stream(form, embedding, queries, norm_floor, bank, *args, **kwargs)

    monkeypatch.setattr(modeling_attnres, "open_stream", spy)
    generate(model, tiny_inputs())
    assert len(banks) == NEW_TOKENS
    assert len(set(map(id, banks))) == 1
    generate(model, tiny_inputs())
    assert banks[-1] is not banks[0]


def test_a_used_bank_leaves_no_trace_in_the_next_forward():
    model = tiny_model("llama", 2)
    bank = BlockSummaries()
    with torch.no_grad():
        model(tiny_inputs(seed=5), block_summaries=bank)
        again = model(tiny_inputs(), block_summaries=bank).logits
        assert torch.equal(again, model(tiny_inputs()).logits)


def test_training_takes_a_fresh_bank_each_forward():
    """Two forwards may share a bank object and one backward: the second must not write over the first's sources."""
    model = tiny_model("llama", 2).train()
    bank = BlockSummaries()
    losses = [model(tiny_inputs(seed=s), labels=tiny_inputs(seed=s), block_summaries=bank).loss for s in (1, 2)]
    sum(losses).backward()
    shared = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for seed in (1, 2):
        model(tiny_inputs(seed=seed), labels=tiny_inputs(seed=seed)).loss.backward()
    for ours, parameter in zip(shared, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-6)


def test_the_models_own_cache_is_the_backbones():
    model = tiny_model("qwen3_next")
    cache = model(tiny_inputs(), use_cache=True).past_key_values
    expected = DynamicCache(config=model.config.text_config)
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in expected.layers]
