# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What causal effects cost on a real model, SmolLM2-135M (60 sublayers), beside one forward per connection."""

import statistics
import time

import pytest
import torch
from naive_ablation import next_token_loss
from tiny_backbones import randomize_depth_attention
from transformers import AutoModelForCausalLM

from modeling_attnres.conversion.convert_checkpoint import convert
from modeling_attnres.eval.ablation import connections, forward_without
from modeling_attnres.eval.causal import causal_effects, causal_estimates


TOKENS, EVERY = 64, 6  # brute force on every sixth connection: each is one full forward


def cpu_seconds(function):
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


@pytest.mark.slow
@torch.no_grad()
def test_shared_forwards_cost_less_than_brute_force(gguf_file, tmp_path):
    convert(gguf_file, tmp_path / "model", sublayers_per_block=8, check=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    randomize_depth_attention(model, 0.005)
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    every = connections(model.config)
    assert len(every) == 316
    model(ids)

    brute, estimates, forwards, losses = 0.0, [], [], {}
    sweep, (effects, loss) = cpu_seconds(lambda: causal_effects(model, ids))
    for connection in every[::EVERY]:
        seconds, logits = cpu_seconds(
            lambda connection=connection: forward_without(model, [connection], input_ids=ids)
        )
        brute, losses[connection] = brute + EVERY * seconds, next_token_loss(logits, ids).item()
    for _ in range(5):
        estimates.append(cpu_seconds(lambda: causal_estimates(model, ids))[0])
        forwards.append(cpu_seconds(lambda: next_token_loss(model(ids).logits, ids))[0])
    for connection, without in losses.items():
        assert effects[connection].item() == pytest.approx(without - loss, abs=1e-5)  # fp32
    shares = sweep / brute, statistics.median(estimates) / statistics.median(forwards)
    print(f"exact: {shares[0]:.2f} of brute force; estimates: {shares[1]:.2f} forwards")
    assert shares[0] < 0.6
    assert shares[1] < 5
