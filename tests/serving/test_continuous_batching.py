# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Continuous batching of Transformers, which packs the tokens of all sequences into one row, against `generate`."""

import pytest
from served_models import expected_answers, prompt_of, served_model
from tiny_backbones import VOCAB_SIZE
from transformers import ContinuousBatchingConfig, GenerationConfig

from modeling_attnres.depth_streams_attnres import DecodeStream


NEW_TOKENS = 6
# At most 24 tokens a step, in pages of 16: the longest prompt is read in three parts, beside sequences that decode.
PAGES = {"page_size": 16, "num_blocks": 32, "max_batch_tokens": 24}
PROMPTS = [prompt_of(length, VOCAB_SIZE, seed=length) for length in (1, 2, 7, 16, 17, 60)]


@pytest.fixture
def packed_steps(monkeypatch):
    """How many tokens each step held that depth attention did in one pass."""
    steps = []
    start = DecodeStream.start

    def recorded(stream, embedding):
        steps.append(tuple(embedding.shape[:2]))
        return start(stream, embedding)

    monkeypatch.setattr(DecodeStream, "start", recorded)
    return steps


@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
@pytest.mark.parametrize("sublayers_per_block", [1, 3, 4])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_moe"])
def test_equals_generate(model_type, sublayers_per_block, depth_weights, packed_steps):
    model = served_model(model_type, sublayers_per_block, depth_weights)
    (expected,) = expected_answers(model, [PROMPTS], NEW_TOKENS)
    packed_steps.clear()
    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs = model.generate_batch(
        PROMPTS, generation_config=greedy, continuous_batching_config=ContinuousBatchingConfig(**PAGES)
    )
    answers = sorted(outputs.values(), key=lambda output: PROMPTS.index(output.prompt_ids))
    assert [output.generated_tokens for output in answers] == expected
    assert all(batch == 1 for batch, _ in packed_steps)
    assert len(packed_steps) >= NEW_TOKENS
    assert max(tokens for _, tokens in packed_steps) >= len(PROMPTS)
