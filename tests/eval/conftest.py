# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A tiny AttnRes checkpoint with a tokenizer, as every test of `attnres-eval run` needs one."""

from pathlib import Path

import pytest
import torch
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from modeling_attnres import AttnResConfig, AttnResForCausalLM
from modeling_attnres.eval.tasks.offline.texts import read


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([record["text"] for record in read("python_reference")[:5]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A folder as `save_pretrained` leaves it; the queries are not zero, so that depth attention takes part."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = AttnResForCausalLM(AttnResConfig(text_config=text_config, sublayers_per_block=2))
    torch.nn.init.normal_(model.model.depth_attention.query)
    # The default initialisation makes nearly uniform outputs; these prefer some tokens, which scores can tell apart.
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def own_tasks_only(monkeypatch):
    """lm-eval's command line without the index of its own 13,000 tasks, which takes 15 s."""
    verbosity, include_path, _, metadata = TaskManager.__init__.__defaults__
    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (verbosity, include_path, False, metadata))
