# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The example as a user runs it, on a tiny model and text."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tiny_backbones import VOCAB_SIZE, tiny_backbone, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_attnres import AttnResForCausalLM
from modeling_attnres.training import read_metrics


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import finetune


BLOCK = 16
SETTINGS = f"--tokens {BLOCK} --batch-size 4 --eval-blocks 4 --steps 6 --eval-every 3 --lr 1e-2 --query-lr 1e-2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted model and the PreNorm model it came from, both with a tokenizer, and two texts."""
    folder = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(tiny_backbone("llama"))
    dense.save_pretrained(folder / "prenorm")
    config = tiny_config("llama", depth_weights="sum")
    AttnResForCausalLM.from_pretrained(folder / "prenorm", config=config).save_pretrained(folder / "attnres")
    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(VOCAB_SIZE - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    for name in ("prenorm", "attnres"):
        tokenizer.save_pretrained(folder / name)
    (folder / "texts" / "more").mkdir(parents=True)
    for path, step in (("a.txt", 1), ("more/b.txt", 3)):
        line = " ".join(f"w{i * step % 50}" for i in range(900))
        (folder / "texts" / path).write_text(line, encoding="utf-8")
    return folder


def run(folder, output, arguments: str = "", model: str = "attnres") -> dict[int, float]:
    arguments = f"--model {folder / model} --text {folder / 'texts'} --output {output} {SETTINGS} {arguments}"
    return finetune.run(finetune.build_parser().parse_args(arguments.split()))


def first_loss(output) -> float:
    return next(record["loss"] for record in read_metrics(output / "metrics.jsonl") if "loss" in record)


@pytest.mark.parametrize("train", ["lora", "queries", "full"])
def test_held_out_loss_falls(train, folder, tmp_path, capsys):
    losses = run(folder, tmp_path, f"--train {train}")
    assert list(losses) == [0, 3, 6]
    # Embeddings of random weights are what has to learn here, and `full` alone trains them.
    assert losses[6] < losses[0] - {"lora": 0.02, "queries": 0.0, "full": 0.1}[train]
    assert f"held-out loss {losses[0]:.4f} before, {losses[6]:.4f} after 6 steps" in capsys.readouterr().out
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    load = AutoPeftModelForCausalLM if train == "lora" else AutoModelForCausalLM
    saved = load.from_pretrained(tmp_path / "model").state_dict()
    (query,) = [value for name, value in saved.items() if name.endswith(("n.query", "default.query"))]
    assert query.any()
    source = AttnResForCausalLM.from_pretrained(folder / "attnres").state_dict()
    moved = {name for name, value in source.items() if name in saved and not torch.equal(saved[name], value)}
    depth = {"model.depth_attention.query", "model.depth_attention.key_norm"}
    assert moved == {"lora": set(), "queries": depth, "full": set(source)}[train]


def test_a_prenorm_model_sees_the_same_batches(folder, tmp_path):
    for model in ("prenorm", "attnres"):
        run(folder, tmp_path / model, "--train lora --steps 1", model)
    before = {
        model: read_metrics(tmp_path / model / "metrics.jsonl")[0]["eval_loss"] for model in ("prenorm", "attnres")
    }
    # fp32; the weights come from differently aligned memory.
    assert before["prenorm"] == pytest.approx(before["attnres"], rel=1e-6)
    assert first_loss(tmp_path / "prenorm") == pytest.approx(first_loss(tmp_path / "attnres"), rel=1e-6)


def test_resuming_gives_the_uninterrupted_run(folder, tmp_path):
    arguments = "--accumulation 2 --bf16 --gradient-checkpointing"
    whole = run(folder, tmp_path / "whole", arguments)
    run(folder, tmp_path / "parts", arguments)
    for path in (tmp_path / "parts" / "checkpoints" / "checkpoint-6").iterdir():
        path.unlink()
    (tmp_path / "parts" / "checkpoints" / "checkpoint-6").rmdir()  # as if it had been killed after step 3
    resumed = run(folder, tmp_path / "parts", f"{arguments} --resume")
    assert resumed == whole
    for name in ("whole", "parts"):
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        assert [record["step"] for record in records] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 6]
    files = [next((tmp_path / name / "model").glob("*model.safetensors")).read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_the_readmes_command_is_understood():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"`python examples/finetune\.py ([^`]+)`", readme)
    arguments = finetune.build_parser().parse_args(command.split())
    assert (arguments.train, arguments.steps) == ("lora", 100)


def test_errors_come_before_the_work(folder, tmp_path):
    with pytest.raises(ValueError, match="`--resume` needs a checkpoint"):
        run(folder, tmp_path, "--resume")
    with pytest.raises(ValueError, match="needs a converted model, got a 'llama' model"):
        run(folder, tmp_path, "--train queries", "prenorm")
    with pytest.raises(ValueError, match="must fill blocks of 2048 tokens"):
        run(folder, tmp_path, "--tokens 2048")
    with pytest.raises(ValueError, match=r"must be a text file or a folder with \*\.txt files"):
        run(folder, tmp_path, f"--text {folder / 'attnres'}")
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match="must be a new folder, or give --resume"):
        run(folder, tmp_path)


def test_the_command_speaks_as_the_tools_do(folder, tmp_path, capsys):
    arguments = f"--model {folder / 'attnres'} --text {folder / 'texts'} --output {tmp_path}"
    # `--block-size` is the former name of `--tokens`.
    assert finetune.main(f"{arguments} --block-size {BLOCK} --steps 1 --eval-blocks 1 --json --quiet".split()) == 0
    captured = capsys.readouterr()
    assert set(json.loads(captured.out)) == {"0", "1"}
    assert captured.err == ""
    assert finetune.main(f"{arguments} --train queries".split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("finetune.py: error: `--output` must be a new folder, or give --resume")
