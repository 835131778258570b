# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_attnres.configuration import load_preset


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import pretrain


ALWAYS = ["--batch-size", "2", "--tokens", "16", "--vocab-size", "300", "--lr", "1e-2", "--eval-every", "4"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files of words that follow one another by a rule, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "to", "its", "old", "house"]
    for seed in (0, 1):
        rng = random.Random(seed)
        index, text = 0, []
        for _ in range(1500):
            text.append(words[index])
            index = (index + rng.choice((1, 2))) % len(words)
        (folder / f"{seed}.txt").write_text(" ".join(text), encoding="utf-8")
    return folder


def run(texts, output, preset, *extra, steps=8):
    arguments = ["--preset", preset, "--text", str(texts), "--output", str(output), "--steps", str(steps)]
    return pretrain.run(pretrain.build_parser().parse_args([*arguments, *ALWAYS, *extra]))


@pytest.mark.parametrize(
    ("preset", "extra", "kind"),
    [
        ("tiny-prenorm", [], None),
        ("tiny-full", ["--set", "depth_attention_type=sigmoid"], "sigmoid"),
        ("tiny-block", ["--gradient-checkpointing", "--bf16"], "softmax"),
    ],
)
def test_a_preset_is_pretrained(texts, tmp_path, preset, extra, kind):
    summary = run(texts, tmp_path, preset, *extra)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert losses[-1] == pytest.approx(summary["held_out_loss"])
    assert losses[-1] < losses[0] < 5.7  # ln(300) is 5.70
    assert summary["training_tokens"] == 8 * 2 * 16
    assert {"loss.png", "summary.json", "dynamics", "config.json", "tokenizer.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(model.config, "depth_attention_type", None) == kind
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("the cat sat")["input_ids"]) == "the cat sat"
    assert len(tokenizer) == model.config.vocab_size <= 300


def test_variants_start_from_the_same_backbone_and_see_the_same_data(texts, tmp_path):
    """Paired runs: at zero queries and a learning rate of zero only the scale of what the layers read differs."""
    for name, preset in (("prenorm", "tiny-prenorm"), ("block", "tiny-block")):
        run(texts, tmp_path / name, preset, "--lr", "0", steps=2)
    prenorm, block = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("prenorm", "block"))
    expected, found = prenorm.state_dict(), block.state_dict()
    assert torch.equal(found["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
    name = "layers.3.mlp.down_proj.weight"
    assert torch.equal(found[f"model.{name}"], expected[f"model.{name}"])


class Killed(BaseException): ...


class KillAtStep6(pretrain.JsonlMetrics):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise Killed


def test_resumed_equals_uninterrupted(texts, tmp_path, monkeypatch):
    whole = run(texts, tmp_path / "whole", "tiny-block", "--save-every", "4")
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "JsonlMetrics", KillAtStep6)
        with pytest.raises(Killed):
            run(texts, tmp_path / "halted", "tiny-block", "--save-every", "4")
    resumed = run(texts, tmp_path / "halted", "tiny-block", "--save-every", "4", "--resume")
    assert resumed == whole
    expected, found = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "halted")
    )
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "depth_window"], "`--set` takes name=value, got 'depth_window'"),
        (["--set", "window=3"], "has no field `window`"),
        (["--resume"], "`--resume` needs a checkpoint in `--output`"),
        (["--tokens", "100000"], "`--tokens` must not exceed"),
    ],
)
def test_bad_requests_are_refused_before_training(texts, tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        run(texts, tmp_path / "out", "tiny-block", *extra)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_texts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`--text` must be a text file or a folder with"):
        run(tmp_path, tmp_path / "out", "tiny-block")


def test_overrides_are_json_or_words():
    found = pretrain.parse_overrides(["sublayers_per_block=4", "depth_weights=sum", 'text_config={"hidden_size": 64}'])
    assert found == {"sublayers_per_block": 4, "depth_weights": "sum", "text_config": {"hidden_size": 64}}
    assert load_preset("tiny-block", **found).hidden_size == 64


def test_the_command_speaks_as_the_tools_do(texts, tmp_path, capsys):
    arguments = ["--preset", "tiny-block", "--text", str(texts), "--output", str(tmp_path / "out"), "--steps", "1"]
    former = ["--batch", "2", "--length", "16", "--eval-steps", "1", "--save-steps", "1", "--activation-checkpointing"]
    assert pretrain.main([*arguments, *former, "--vocab-size", "300", "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["training_tokens"] == 32
    assert captured.err == ""
    assert pretrain.main([*arguments[:-2], "--set", "depth_window"]) == 2
    assert capsys.readouterr().err == "pretrain.py: error: `--set` takes name=value, got 'depth_window'.\n"
