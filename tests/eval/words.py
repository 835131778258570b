# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of single words, one per token id of the tiny models, and a text of them."""

import torch
from tiny_backbones import VOCAB_SIZE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


WORDS = [f"w{index}" for index in range(VOCAB_SIZE)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def random_text(count: int = 100) -> str:
    ids = torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(2)).tolist()
    return " ".join(WORDS[index] for index in ids)
