# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer on AttnRes models, with its own packing and adapters."""

import pytest
import torch
from datasets import Dataset
from tiny_backbones import VOCAB_SIZE, tiny_config, tiny_inputs, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from modeling_attnres import AttnResForCausalLM, attnres_lora_config
from modeling_attnres.training import CHECKPOINTING, attnres_optimizer


WORDS = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(VOCAB_SIZE - 3))]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def texts(count: int = 16) -> Dataset:
    """Counting up from some word, in texts of different lengths."""
    lines = [" ".join(f"w{(start * 5 + i) % 64}" for i in range(4 + start % 7)) for start in range(count)]
    return Dataset.from_dict({"text": lines})


def prompts_and_completions() -> Dataset:
    rows = [line.split(" ", 2) for line in texts()["text"]]
    return Dataset.from_dict({"prompt": [" ".join(row[:2]) for row in rows], "completion": [row[2] for row in rows]})


def train(tmp_path, tokenizer, dataset, peft_config=None, **settings) -> SFTTrainer:
    torch.manual_seed(0)
    defaults = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "max_length": 16}
    args = SFTConfig(
        **{**defaults, "output_dir": str(tmp_path), "logging_steps": 1, "save_strategy": "no", **settings},
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        AttnResForCausalLM(tiny_config("llama", depth_weights="sum")),
        args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
        optimizer_cls_and_kwargs=attnres_optimizer(args, query_lr=1e-2),
    )
    trainer.train()
    return trainer


def check_learned(trainer: SFTTrainer, least: float = 0.3):
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == trainer.state.max_steps
    assert losses[-1] < losses[0] - least
    assert {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}["depth_attention"] == 1e-2
    moved = [p for name, p in trainer.model.named_parameters() if name.endswith("depth_attention.query")]
    if not moved:
        moved = [p for name, p in trainer.model.named_parameters() if name.endswith("modules_to_save.default.query")]
    (query,) = moved
    assert (query.abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {CHECKPOINTING: False},
        {"packing": True, "packing_strategy": "bfd"},
        {"packing": True, "packing_strategy": "wrapped"},
        {"padding_free": True, "max_length": None},
    ],
    ids=["default", "no checkpointing", "packed", "wrapped", "padding-free"],
)
def test_it_learns(settings, tmp_path, tokenizer):
    check_learned(train(tmp_path, tokenizer, texts(), **settings))


def test_completions_alone(tmp_path, tokenizer):
    check_learned(train(tmp_path, tokenizer, prompts_and_completions()))


def test_an_adapter_made_by_the_trainer(tmp_path, tokenizer):
    config = attnres_lora_config(target_modules="all-linear", r=16, lora_alpha=32)
    trainer = train(tmp_path, tokenizer, texts(), peft_config=config, max_steps=16)
    check_learned(trainer, least=0.1)  # the embeddings are frozen, and random
    base = trainer.model.get_base_model().model.depth_attention.original_module
    assert not base.query.any()
    trainer.save_model(tmp_path / "saved")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "saved").iterdir()
    }


@pytest.mark.parametrize("sublayers_per_block", [1, 2, 3])
def test_packed_sequences_do_not_see_each_other(sublayers_per_block):
    """What packing and padding-free batches rely on: positions that start again start a sequence of their own."""
    model, inputs = tiny_model("llama", sublayers_per_block), tiny_inputs(batch=1, tokens=12)
    positions = torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        packed = model(inputs, position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(inputs[:, :5]).logits, model(inputs[:, 5:]).logits], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)  # fp32, sums of other lengths
