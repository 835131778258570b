# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Pretrain a preset on plain text: PreNorm, Full or Block AttnRes, on the same tokens in the same order.

    python examples/pretrain.py --preset llama-2m-block --text path/to/texts --output runs/block --steps 500

The folder's `*.txt` files are tokenized with a byte-level BPE trained on them; the last twentieth of every file is held
out. `--set` overrides any argument of the preset (`--set depth_attention_type=static sublayers_per_block=4`). Writes the
model, `metrics.jsonl`, `loss.png`, `summary.json`, and under `dynamics/` how depth weights, output magnitudes and
gradient norms developed; `--resume` continues from the last checkpoint.
"""

import argparse
import json
import math
import sys
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from modeling_attnres import AttnResConfig
from modeling_attnres.command_line import Result, ToolParser, positive_int, run_tool
from modeling_attnres.configuration import list_presets, load_preset
from modeling_attnres.text_files import load_texts
from modeling_attnres.training import CHECKPOINTING, DepthDynamics, JsonlMetrics, attnres_optimizer, plot_metrics


HELD_OUT = 0.05


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    """The training and the held-out part of a text file, or of every `*.txt` file below a folder."""
    texts = load_texts(path)
    cuts = [int(len(text) * (1 - HELD_OUT)) for text in texts]
    return [text[:cut] for text, cut in zip(texts, cuts)], [text[cut:] for text, cut in zip(texts, cuts)]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be encoded, and bits per byte compare across vocabularies."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def to_blocks(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> Dataset:
    """Texts in a row, cut into blocks of `length` tokens."""
    encoded = tokenizer([text + tokenizer.eos_token for text in texts])["input_ids"]
    ids = list(chain.from_iterable(encoded))
    blocks = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not blocks:
        raise ValueError(f"`--tokens` must not exceed the {len(ids)} tokens of the shortest split, got {length}.")
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def build_model(preset: str, overrides: dict, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    text_config = overrides.pop("text_config", {})
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return AutoModelForCausalLM.from_config(load_preset(preset, text_config={**tokens, **text_config}, **overrides))


def parse_overrides(pairs: list[str]) -> dict:
    """`name=value` with a JSON value or a bare word."""
    overrides = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found:
            raise ValueError(f"`--set` takes name=value, got {pair!r}.")
        try:
            overrides[name] = json.loads(value)
        except json.JSONDecodeError:
            overrides[name] = value
    return overrides


def build_parser() -> ToolParser:
    parser = ToolParser(prog="pretrain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True, choices=list_presets(), metavar="NAME", help="a model's shape")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", dest="overrides", help="fields of the preset"
    )
    parser.add_shared("--text", required=True, help="a text file, or a folder of *.txt files")
    parser.add_shared("--output", required=True, help="folder for metrics, checkpoints and the model")
    parser.add_shared("--steps", default=500, help="of the optimizer (default: %(default)s)")
    parser.add_shared(
        "--batch-size", former=("--batch",), default=16, help="sequences per step (default: %(default)s)"
    )
    parser.add_shared("--tokens", former=("--length",), default=128, help="per sequence (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=positive_int, default=2048, help="of the tokenizer (default: %(default)s)"
    )
    parser.add_shared("--lr", default=3e-3, help="learning rate (default: %(default)s)")
    parser.add_shared("--query-lr", help="of the depth queries (default: --lr)")
    parser.add_shared("--seed", default=0, help="of the weights and of the data's order (default: %(default)s)")
    parser.add_shared(
        "--eval-every", former=("--eval-steps",), default=100, help="between evaluations (default: %(default)s)"
    )
    parser.add_shared(
        "--save-every", former=("--save-steps",), default=250, help="between checkpoints (default: %(default)s)"
    )
    parser.add_shared("--bf16")
    parser.add_shared("--gradient-checkpointing", former=("--activation-checkpointing",))
    parser.add_shared("--resume")
    parser.add_shared("--json", help="print the figures of summary.json, and nothing else")
    return parser


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=2 * args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=args.eval_every,
        save_steps=args.save_every,
        save_total_limit=1,
        seed=args.seed,
        data_seed=args.seed,
        bf16=args.bf16,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
        **{CHECKPOINTING: args.gradient_checkpointing},
    )


def run(args: argparse.Namespace) -> dict:
    """Trains; returns the content of summary.json."""
    overrides = parse_overrides(args.overrides)
    checkpoint = get_last_checkpoint(str(args.output)) if args.resume and args.output.is_dir() else None
    if args.resume and checkpoint is None:
        raise ValueError(f"`--resume` needs a checkpoint in `--output`, got {args.output}.")
    train_texts, held_out_texts = read_texts(args.text)
    tokenizer = train_tokenizer(train_texts, args.vocab_size)
    train, held_out = (to_blocks(tokenizer, texts, args.tokens) for texts in (train_texts, held_out_texts))

    set_seed(args.seed)
    model = build_model(args.preset, overrides, tokenizer)
    arguments = training_arguments(args)
    depth_attention = isinstance(model.config, AttnResConfig)
    trainer = Trainer(
        model,
        arguments,
        data_collator=default_data_collator,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=attnres_optimizer(arguments, args.lr if args.query_lr is None else args.query_lr)
        if depth_attention
        else None,
        callbacks=[
            JsonlMetrics(args.output / "metrics.jsonl"),
            DepthDynamics(torch.tensor(held_out[:4]["input_ids"]), args.output / "dynamics", every=args.eval_every),
        ],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()

    held_out_bytes = sum(len(text.encode()) for text in held_out_texts)
    predicted = len(held_out) * (args.tokens - 1)
    tokens_per_byte = len(held_out) * args.tokens / held_out_bytes
    summary = {
        "preset": args.preset,
        "overrides": parse_overrides(args.overrides),
        "seed": args.seed,
        "steps": args.steps,
        "parameters": model.num_parameters(),
        "training_tokens": args.steps * args.batch_size * args.tokens,
        "held_out_tokens": predicted,
        "held_out_loss": loss,
        "held_out_bits_per_byte": loss / math.log(2) * tokens_per_byte,
    }
    (args.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_metrics(args.output / "metrics.jsonl", args.output / "loss.png")
    print(f"held-out loss {loss:.4f} ({summary['held_out_bits_per_byte']:.4f} bits per byte) -> {args.output}")
    return summary


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    left = "interrupted; go on with --resume if --output has a checkpoint."
    return run_tool(
        parser.prog, lambda arguments: Result("", run(arguments)), parser.parse_args(argv), interrupted=left
    )


if __name__ == "__main__":
    sys.exit(main())
