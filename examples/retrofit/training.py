# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""One run: train on a seed's batches, evaluate block by block."""

import tempfile
import time
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

from modeling_attnres.training import attnres_optimizer

from .texts import Blocks


@dataclass(frozen=True)
class Settings:
    """Of the whole study: runs of different settings do not belong into one folder."""

    steps: int = 40
    batch_size: int = 2
    tokens: int = 128
    validation_blocks: int = 12
    test_blocks: int = 24
    warmup_steps: int = 4


def draw_batches(train: Blocks, settings: Settings, seed: int) -> Blocks:
    """The blocks that a seed trains on, without replacement: the same for every arm.

    Raises:
        ValueError: if there are fewer.
    """
    count = settings.steps * settings.batch_size
    if len(train) < count:
        raise ValueError(f"`--domain` must have {count} blocks to train on, got {len(train)}.")
    return train.select(torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count])


def train(model, blocks: Blocks, settings: Settings, rate: float, query_rate: float | None, seed: int) -> list[float]:
    """Trains in place, under bf16 autocast over fp32 weights. Returns the loss of every step, before it.

    Args:
        query_rate: of queries and key norms; `None` for a model without.
    """
    rows = Dataset.from_dict({"input_ids": blocks.ids.tolist(), "labels": blocks.ids.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup_steps,
            per_device_train_batch_size=settings.batch_size,
            bf16=True,
            use_cpu=not torch.accelerator.is_available(),  # Trainer wants to be told, or refuses bf16
            save_strategy="no",
            logging_steps=1,
            seed=seed,
            data_seed=seed,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            args,
            train_dataset=rows,
            data_collator=default_data_collator,
            optimizer_cls_and_kwargs=None if query_rate is None else attnres_optimizer(args, query_lr=query_rate),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # its forward is plain fp32 again
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@torch.no_grad()
def block_losses(model, blocks: Blocks, autocast: bool = False, batch_size: int = 4) -> list[float]:
    """`[n]`, nats over the `T - 1` predicted tokens of every block.

    Args:
        autocast: compute logits under bf16 autocast, in half the time.
    """
    model.eval()
    losses = []
    for ids in blocks.ids.to(model.device).split(batch_size):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, use_cache=False).logits.float()
        nats = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses += nats.view(len(ids), -1).double().sum(1).tolist()
    return losses


class Stopwatch:
    """Seconds of the process and of the wall since it was made."""

    def __init__(self):
        self._start = time.process_time(), time.perf_counter()

    def seconds(self) -> dict[str, float]:
        cpu, wall = self._start
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
