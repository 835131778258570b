# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Trainer on AttnRes models: checkpointing, bf16, accumulation, resuming, saving, and the rates of the groups."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny_backbones import VOCAB_SIZE, tiny_config, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from modeling_attnres import AttnResForCausalLM, attnres_lora_config
from modeling_attnres.training import CHECKPOINTING, JsonlMetrics, attnres_optimizer, read_metrics


TOKENS = 16
DEPTH = ("model.depth_attention.query", "model.depth_attention.key_norm")
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}


def repeating_blocks(count: int = 32, masked: bool = False) -> Dataset:
    """Blocks of a sequence that repeats every four tokens, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(3, VOCAB_SIZE, (count, 4), generator=generator)
    input_ids = starts.repeat(1, TOKENS // 4)
    labels = input_ids.clone()
    if masked:  # as many labels in one row as in no other: means of means are not the mean
        for row in range(count):
            labels[row, : row % TOKENS] = -100
    return Dataset.from_dict({"input_ids": input_ids.tolist(), "labels": labels.tolist()})


class GroupRates(TrainerCallback):
    """The learning rates by group, as they are in every optimizer step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})


def run(tmp_path, model=None, dataset=None, resume=None, callbacks=(), query_lr=1e-3, **settings) -> Trainer:
    """A finished run, by default four AdamW steps of 4 blocks on a model whose queries start at zero."""
    torch.manual_seed(0)
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    args = TrainingArguments(
        **{**defaults, "output_dir": tmp_path, "save_strategy": "no", **settings},
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model or AttnResForCausalLM(tiny_config("llama", depth_weights="sum")),
        args,
        train_dataset=dataset or repeating_blocks(),
        data_collator=default_data_collator,
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=attnres_optimizer(args, query_lr=query_lr),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def losses(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerances):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerances, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Four steps without anything special."""
    return run(tmp_path_factory.mktemp("plain"), optim="sgd", learning_rate=0.5, query_lr=0.5)


def test_it_learns_and_the_queries_leave_zero(tmp_path):
    trainer = run(tmp_path, dataset=repeating_blocks(4), max_steps=20)
    assert losses(trainer)[-1] < losses(trainer)[0] - 1
    assert (weights(trainer)[DEPTH[0]].abs().amax(dim=-1) > 1e-3).all()


def test_each_group_has_its_rate_at_every_step(tmp_path):
    callback = GroupRates()
    run(tmp_path, callbacks=[callback], query_lr=1e-3, lr_scheduler_type="linear", warmup_steps=2, weight_decay=0.1)
    scales = [0.0, 0.5, 1.0, 0.5]  # two steps up, then down to nothing after the fourth
    for found, scale in zip(callback.rates, scales, strict=True):
        assert found == pytest.approx(
            {"decay": 1e-2 * scale, "no_decay": 1e-2 * scale, "depth_attention": 1e-3 * scale}
        )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant, tmp_path, plain):
    settings = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}, "optim": "sgd"}
    checkpointed = run(tmp_path, learning_rate=0.5, query_lr=0.5, **settings)
    assert all(layer.gradient_checkpointing for layer in checkpointed.model.model.layers)
    assert_close(weights(checkpointed), weights(plain), rtol=1e-4, atol=1e-6)  # fp32, other order of sums


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """Also where batches have different numbers of labels: the loss is the mean over all of a step's labels."""
    settings = {"optim": "sgd", "learning_rate": 0.5, "query_lr": 0.5, "dataset": repeating_blocks(masked=True)}
    whole = run(tmp_path, per_device_train_batch_size=8, **settings)
    parts = run(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-6)  # fp32, other order of sums


def test_bf16_follows_fp32(tmp_path, plain):
    trainer = run(tmp_path, bf16=True, optim="sgd", learning_rate=0.5, query_lr=0.5)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}  # the master weights
    assert losses(trainer) != losses(plain)
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-2)  # bf16: 8 bits, 4e-3 a rounding
    query = weights(trainer)[DEPTH[0]]
    assert torch.cosine_similarity(query.flatten(), weights(plain)[DEPTH[0]].flatten(), dim=0) > 0.99


def test_a_model_in_bf16_trains(tmp_path):
    trainer = run(tmp_path, model=tiny_model("llama").to(torch.bfloat16).train(), max_steps=10)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}


def with_adapter():
    torch.manual_seed(0)
    config = tiny_config("llama", depth_weights="sum", attention_dropout=0.1)
    return get_peft_model(AttnResForCausalLM(config), attnres_lora_config(lora_dropout=0.1))


def without_adapter():
    torch.manual_seed(0)
    return AttnResForCausalLM(tiny_config("llama", depth_weights="sum", attention_dropout=0.1))


def mixture_of_experts():
    """Its experts lie apart in a checkpoint's file, and merged in memory."""
    torch.manual_seed(0)
    return AttnResForCausalLM(tiny_config("mixtral", depth_weights="sum"))


@pytest.mark.parametrize("make_model", [without_adapter, with_adapter, mixture_of_experts])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(make_model, tmp_path):
    """With dropout, so that the random state matters, and accumulation, so that a step is several batches."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 2, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    metrics = JsonlMetrics(tmp_path / "metrics.jsonl")
    whole = run(tmp_path, make_model(), callbacks=[metrics], **settings)
    expected = read_metrics(metrics.path)

    torch.rand(7)  # another random state than the one the first run began with
    metrics = JsonlMetrics(tmp_path / "metrics.jsonl")
    resumed = run(tmp_path, make_model(), callbacks=[metrics], resume=tmp_path / "checkpoint-3", **settings)
    assert resumed.state.global_step == 6
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    states = [trainer.optimizer.state_dict()["state"] for trainer in (whole, resumed)]
    for index, state in states[0].items():
        assert all(torch.equal(states[1][index][name], value) for name, value in state.items())
    found = read_metrics(metrics.path)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6, 6]
    untimed = [[{k: v for k, v in record.items() if k not in TIMES} for record in part] for part in (found, expected)]
    assert untimed[0] == untimed[1]


def test_a_saved_model_loads(tmp_path):
    trainer = run(tmp_path)
    trainer.save_model(tmp_path / "saved")
    loaded = AttnResForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in weights(trainer).items():
        assert torch.equal(loaded.get_parameter(name), value), name
    assert (
        trainer.evaluate(repeating_blocks(8))["eval_loss"]
        == Trainer(loaded, trainer.args, data_collator=default_data_collator).evaluate(repeating_blocks(8))[
            "eval_loss"
        ]
    )


def test_a_saved_adapter_loads(tmp_path):
    base = without_adapter()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(AttnResForCausalLM.from_pretrained(tmp_path / "base"), attnres_lora_config())
    trainer = run(tmp_path, model)
    trainer.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(AttnResForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "saved")
    found = dict(loaded.named_parameters())
    changed = 0
    for name, value in weights(trainer).items():
        assert torch.equal(found[name], value), name
        changed += "original_module" not in name and "depth_attention" in name and bool(value.abs().sum() > 0)
    assert changed == 2
