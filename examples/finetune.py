# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a converted model on plain text: LoRA with the depth queries, the queries alone, or everything.

    attnres-convert path/to/model my-attnres-model --num-blocks 8
    python examples/finetune.py --model my-attnres-model --text path/to/texts --output build/finetune

Writes `metrics.jsonl` (every logged record), `loss.png` and `model/` to the output folder, and prints the loss on
held-out text before and after. With `--resume` it goes on from its last checkpoint, bit for bit. A PreNorm model is
accepted too: with the same arguments it sees the same blocks in the same order, so the two can be compared.
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from modeling_attnres import AttnResForCausalLM, attnres_lora_config
from modeling_attnres.command_line import Result, ToolParser, positive_int, run_tool
from modeling_attnres.text_files import load_texts
from modeling_attnres.training import (
    CHECKPOINTING,
    DEFAULT_QUERY_LR,
    JsonlMetrics,
    attnres_optimizer,
    plot_metrics,
    read_metrics,
)


DEFAULT_LR = {"lora": 2e-4, "queries": DEFAULT_QUERY_LR, "full": 2e-5}
HELD_OUT = 0.05  # the share at the end of every text that is not trained on


def pack(token_ids: list[list[int]], block_size: int) -> Dataset:
    """Texts end to end, cut into blocks of `block_size` tokens; the last, short block is dropped."""
    stream = [token for text in token_ids for token in text]
    blocks = [stream[i : i + block_size] for i in range(0, len(stream) - block_size + 1, block_size)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def load_blocks(tokenizer, arguments) -> DatasetDict:
    """Packed blocks: `train`, and `held_out` (spread evenly over the texts' ends, at most `--eval-blocks`).

    Raises:
        ValueError: if the text is too short for one block of each.
    """
    texts = Dataset.from_dict({"text": load_texts(arguments.text)})
    texts = texts.map(lambda batch: {"ids": tokenizer(batch["text"]).input_ids}, batched=True, desc="Tokenizing")
    train, held_out = [], []
    for ids in texts["ids"]:
        ids = [*ids, tokenizer.eos_token_id]
        split = len(ids) - round(HELD_OUT * len(ids))
        train.append(ids[:split])
        held_out.append(ids[split:])
    blocks = DatasetDict(train=pack(train, arguments.tokens), held_out=pack(held_out, arguments.tokens))
    if not all(len(part) for part in blocks.values()):
        tokens = {"train": sum(map(len, train)), "held-out": sum(map(len, held_out))}
        raise ValueError(f"`--text` must fill blocks of {arguments.tokens} tokens, got {tokens} tokens.")
    count = len(blocks["held_out"])
    kept = min(count, arguments.eval_blocks)
    blocks["held_out"] = blocks["held_out"].select([index * count // kept for index in range(kept)])
    return blocks


def load_model(arguments):
    """The model, with what `--train` names trainable.

    Raises:
        ValueError: if the queries of a model without depth attention are to be trained.
    """
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
    is_attnres = isinstance(model, AttnResForCausalLM)
    if arguments.train == "queries":
        if not is_attnres:
            raise ValueError(f"`--train queries` needs a converted model, got a '{model.config.model_type}' model.")
        model.requires_grad_(False)
        model.model.depth_attention.requires_grad_(True)
    elif arguments.train == "lora":
        settings = {"r": arguments.lora_rank, "lora_alpha": 2 * arguments.lora_rank, "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, attnres_lora_config(**settings) if is_attnres else LoraConfig(**settings))
    return model


def training_arguments(arguments) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(arguments.output / "checkpoints"),
        max_steps=arguments.steps,
        learning_rate=DEFAULT_LR[arguments.train] if arguments.lr is None else arguments.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, arguments.steps // 20),
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.accumulation,
        bf16=arguments.bf16,
        use_cpu=not torch.accelerator.is_available(),  # Trainer wants to be told, or refuses bf16
        eval_strategy="steps",
        eval_steps=arguments.eval_every,
        save_steps=arguments.eval_every,
        save_total_limit=2,
        logging_steps=1,
        seed=arguments.seed,
        data_seed=arguments.seed,
        report_to=[],
        **{CHECKPOINTING: arguments.gradient_checkpointing},
    )


def build_parser() -> ToolParser:
    parser = ToolParser(prog="finetune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a converted or a PreNorm model")
    parser.add_shared("--text", required=True, help="a text file, or a folder of *.txt files")
    parser.add_shared("--output", required=True, help="folder for metrics, checkpoints and the model")
    parser.add_argument("--train", choices=tuple(DEFAULT_LR), default="lora", help="what learns (default: lora)")
    parser.add_shared("--steps", default=100, help="of the optimizer (default: %(default)s)")
    parser.add_shared("--batch-size", default=4, help="sequences per step and process (default: %(default)s)")
    parser.add_argument("--accumulation", type=positive_int, default=1, help="batches per step (default: %(default)s)")
    parser.add_shared("--tokens", former=("--block-size",), default=128, help="per sequence (default: %(default)s)")
    parser.add_shared("--lr", help=f"learning rate (default: {DEFAULT_LR})")
    parser.add_shared("--query-lr", help=f"of the depth queries (default: {DEFAULT_QUERY_LR})")
    parser.add_argument("--lora-rank", type=positive_int, default=16, help="of the adapter (default: %(default)s)")
    parser.add_argument(
        "--eval-blocks", type=positive_int, default=64, help="held-out sequences, at most (default: %(default)s)"
    )
    parser.add_shared("--eval-every", default=25, help="between evaluations and checkpoints (default: %(default)s)")
    parser.add_shared("--bf16")
    parser.add_shared("--gradient-checkpointing")
    parser.add_shared("--seed", default=0, help="of the adapter and of the data's order (default: %(default)s)")
    parser.add_shared("--resume")
    parser.add_shared("--json", help="print the held-out loss by step as JSON, and nothing else")
    return parser


def run(arguments: argparse.Namespace) -> dict[int, float]:
    """Trains; returns the held-out loss by the step it was taken at (in the main process)."""
    args = training_arguments(arguments)
    checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if arguments.resume and checkpoint is None:
        raise ValueError(f"`--resume` needs a checkpoint in {args.output_dir}, got none.")
    if checkpoint is not None and not arguments.resume:
        raise ValueError(f"`--output` must be a new folder, or give --resume: {checkpoint} exists.")

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    blocks = load_blocks(tokenizer, arguments)
    set_seed(arguments.seed)  # before the adapter draws its weights
    model = load_model(arguments)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(
        f"{len(blocks['train'])} blocks to train on, {len(blocks['held_out'])} held out; {trained:,} parameters learn"
    )
    has_queries = any("depth_attention" in name for name, _ in model.named_parameters())
    query_lr = args.learning_rate if arguments.train == "queries" else DEFAULT_QUERY_LR
    query_lr = query_lr if arguments.query_lr is None else arguments.query_lr
    metrics = JsonlMetrics(arguments.output / "metrics.jsonl")
    trainer = Trainer(
        model,
        args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["held_out"],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[metrics],
        optimizer_cls_and_kwargs=attnres_optimizer(args, query_lr=query_lr) if has_queries else None,
    )
    if checkpoint is None:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.evaluate()
    trainer.save_model(str(arguments.output / "model"))

    if not trainer.is_world_process_zero():  # the main process alone writes metrics
        return {}
    picture = plot_metrics(metrics.path, arguments.output / "loss.png")
    print(f"wrote {metrics.path}, {picture} and {arguments.output / 'model'}")
    losses = {record["step"]: record["eval_loss"] for record in read_metrics(metrics.path) if "eval_loss" in record}
    print(f"held-out loss {losses[0]:.4f} before, {losses[arguments.steps]:.4f} after {arguments.steps} steps")
    return losses


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    left = "interrupted; go on with --resume if --output has a checkpoint."
    return run_tool(
        parser.prog, lambda arguments: Result("", run(arguments) or None), parser.parse_args(argv), interrupted=left
    )


if __name__ == "__main__":
    sys.exit(main())
