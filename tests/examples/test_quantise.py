# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The example as a user runs it, on tiny models and a text."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from tiny_backbones import VOCAB_SIZE, tiny_backbone, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_attnres import AttnResForCausalLM


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import quantise


SIZES = {"hidden_size": 64, "intermediate_size": 128}
NUMBERS = ("prenorm_loss", "attnres_loss", "prenorm_cost", "attnres_cost", "extra", "low", "high")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A PreNorm model, its converted form, that with other queries, each with the tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("quantise")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_backbone("llama", **SIZES)).save_pretrained(folder / "prenorm")
    config = tiny_config("llama", depth_weights="sum", **SIZES)
    model = AttnResForCausalLM.from_pretrained(folder / "prenorm", config=config)
    model.save_pretrained(folder / "converted")
    with torch.no_grad():
        model.model.depth_attention.query.normal_(std=0.5)
    model.save_pretrained(folder / "trained")
    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(VOCAB_SIZE - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    for name in ("prenorm", "converted", "trained"):
        tokenizer.save_pretrained(folder / name)
    line = " ".join(f"w{index * index % 89}" for index in range(3000))
    (folder / "text.txt").write_text(line, encoding="utf-8")
    return folder


def run(folder, output, *pairs: tuple[str, str, str], arguments: str = "") -> list[quantise.Row]:
    named = [f"--pair {name} {folder / prenorm} {folder / attnres}" for name, prenorm, attnres in pairs]
    blocks = "--tokens 16 --blocks 4"
    return quantise.main(
        f"{' '.join(named)} --text {folder / 'text.txt'} --output {output} {blocks} {arguments}".split()
    )


def test_costs_of_both_models_stand_side_by_side(folder, tmp_path, capsys):
    pairs = [("zero", "prenorm", "converted"), ("trained", "prenorm", "trained")]
    rows = run(folder, tmp_path / "out", *pairs)
    methods = ["none", "int8", "int8-activations", "int4"]
    assert [(row.pair, row.method) for row in rows] == [(name, method) for name, *_ in pairs for method in methods]
    for row in rows[:4]:  # zero queries: the plain model, quantised or not
        assert row.prenorm_loss == row.attnres_loss
        assert (row.extra, row.low, row.high) == (0, 0, 0)
    for row, full in [(row, rows[0]) for row in rows[:4]] + [(row, rows[4]) for row in rows[4:]]:
        assert row.prenorm_cost == pytest.approx(row.prenorm_loss - full.prenorm_loss, abs=1e-12)
        assert row.attnres_cost == pytest.approx(row.attnres_loss - full.attnres_loss, abs=1e-12)
        assert row.extra == pytest.approx(row.attnres_cost - row.prenorm_cost, abs=1e-6)  # smaller ones count as none
        assert row.low <= row.extra <= row.high
        assert (row.blocks, row.tokens) == (4, 64)
    assert rows[7].low < rows[7].extra < rows[7].high
    assert abs(rows[7].attnres_cost) > abs(rows[5].attnres_cost) > 0  # 4 bits cost more than 8
    with open(tmp_path / "out" / "quantised.csv", encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [[float(line[name]) for name in NUMBERS] for line in written] == [
        [getattr(row, name) for name in NUMBERS] for row in rows
    ]
    printed = capsys.readouterr().out
    assert all(quantise.describe(row) in printed for row in rows)


def test_one_method_in_another_dtype(folder, tmp_path):
    rows = run(folder, tmp_path / "out", ("a", "prenorm", "trained"), arguments="--methods int8 --dtype bfloat16")
    assert [row.method for row in rows] == ["none", "int8"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            [("a", "converted", "prenorm")],
            r"`--pair a` must name a PreNorm and then an AttnRes model, got \['attnres'",
        ),
        (
            [("a", "prenorm", "converted"), ("a", "prenorm", "trained")],
            r"a name of its own each time, got \['a', 'a'\]",
        ),
    ],
    ids=["other way round", "one name"],
)
def test_wrong_pairs_end_before_work(pairs, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "out", *pairs)
    assert not (tmp_path / "out").exists()


def test_a_short_text_ends_before_work(folder, tmp_path):
    with pytest.raises(
        ValueError, match="`--text` must hold 40 blocks of 16 tokens in the last 5% of its texts, got 9"
    ):
        run(folder, tmp_path / "out", ("a", "prenorm", "trained"), arguments="--blocks 40")
