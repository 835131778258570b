# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Small models that a server can hold, prompts for them, and what `generate` answers."""

import contextlib
from pathlib import Path

import torch
from tiny_backbones import tiny_model


NEW_TOKENS = 16
# Around the server's block of 32 tokens and its chunks of 48; the longest is read in six of them.
PROMPT_LENGTHS = [1, 2, 3, 5, 8, 16, 31, 32, 33, 47, 64, 96, 100, 150, 200, 260]
# Rounding to fp32 moves no logit of these models by more than 9e-5 (against fp64, over all positions of the longest
# prompt), and most by a tenth of that. Where the two best tokens are further apart, another token means another model.
SMALLEST_MARGIN = 1e-4


def served_model(model_type: str, sublayers_per_block: int, depth_weights: str, **overrides):
    """A tiny model with non-zero queries, of a head size that vLLM has on CPUs, and with weights that make logits vary."""
    fixed = {"head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.2}
    return tiny_model(model_type, sublayers_per_block, depth_weights, **{**fixed, **overrides})


def prompts_in_two_rounds(vocab_size: int) -> list[list[list[int]]]:
    """`[round][prompt][token id]`: the second round repeats prompts of the first, or goes on from their first half."""
    first = [prompt_of(length, vocab_size, seed=length) for length in PROMPT_LENGTHS]
    forked = [prompt[: len(prompt) // 2] + prompt_of(20, vocab_size, seed=1000 + len(prompt)) for prompt in first[-4:]]
    return [first, first[::3] + forked]


def prompt_of(length: int, vocab_size: int, seed: int) -> list[int]:
    """Random token ids, without special ones."""
    return torch.randint(3, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def generated(model, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> tuple[list[list[int]], float]:
    """Greedy tokens of each prompt, asked alone, and the smallest difference between a token's logit and the next best."""
    answers, margin = [], float("inf")
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answers.append(output.sequences[0, len(prompt) :].tolist())
        best = torch.cat(output.logits).topk(2).values
        margin = min(margin, (best[:, 0] - best[:, 1]).min().item())
    return answers, margin


class CloseTokensError(ValueError):
    """Rounding could choose another token in one of the answers."""


def answered_model(*arguments, rounds: list[list[list[int]]], **overrides):
    """The first of ten random models (see `served_model`) in whose answers no token hangs on rounding; its answers."""
    for seed in range(10):
        model = served_model(*arguments, seed=seed, **overrides)
        with contextlib.suppress(CloseTokensError):
            return model, expected_answers(model, rounds)
    raise CloseTokensError(f"each of ten models of {arguments} has tokens closer than {SMALLEST_MARGIN}")


def expected_answers(model, rounds: list[list[list[int]]], new_tokens: int = NEW_TOKENS) -> list[list[list[int]]]:
    """What `generate` answers to each round. Raises where a token was so close to another that rounding may choose."""
    known: dict[tuple[int, ...], list[int]] = {}
    smallest = float("inf")
    for prompt in (prompt for prompts in rounds for prompt in prompts):
        if tuple(prompt) not in known:
            (known[tuple(prompt)],), margin = generated(model, [prompt], new_tokens)
            smallest = min(smallest, margin)
    if smallest < SMALLEST_MARGIN:
        raise CloseTokensError(f"two tokens are {smallest:.1e} apart in one of the answers: choose other weights")
    return [[known[tuple(prompt)] for prompt in prompts] for prompts in rounds]


def save(model, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)
