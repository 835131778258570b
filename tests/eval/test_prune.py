# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from fresh_process import LOADER, load_results, run_python
from safetensors.torch import load_file
from tiny_backbones import NUM_SUBLAYERS, tiny_backbone, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from words import random_text, word_tokenizer

from modeling_attnres.eval import prune
from modeling_attnres.eval.prune import main
from modeling_attnres.eval.pruning import unit_effects


DEAD = 5  # a sublayer whose output is 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a sublayer that does nothing, in bf16 with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("prune")
    model = tiny_model("llama", 4, "sum")
    model.model.layers[DEAD // 2].mlp.down_proj.weight.data.zero_()
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text("# A card\n")
    (folder / "text.txt").write_text(random_text())
    return folder


def pruned(folder, out, *extra, drop=1):
    text = ["--text", str(folder / "text.txt"), "--sequences", "2", "--held-out", "3", "--tokens", "8"]
    return main([str(folder / "model"), str(out), "--drop", str(drop), *text, "--draws", "2", *extra])


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(tiny_inputs()).logits


def test_a_sublayer_that_does_nothing_is_dropped_without_loss(folder, tmp_path, capsys, monkeypatch):
    # A random model loses nothing without some of its other sublayers either.
    monkeypatch.setattr(prune, "unit_effects", lambda *arguments: unit_effects(*arguments).abs())
    assert pruned(folder, tmp_path / "out", "--table", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert found["dropped"] == [DEAD]
    assert found["effects"][DEAD] == 0
    assert found["loss"]["before"] == found["loss"]["after"]
    assert found["loss"]["written"] == pytest.approx(found["loss"]["after"], abs=1e-5)
    assert torch.equal(logits(tmp_path / "out"), logits(folder / "model"))
    before, after = (load_file(path / "model.safetensors") for path in (folder / "model", tmp_path / "out"))
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up")}
    assert not any(after[name].any() for name in changed)
    assert found["parameters"]["zeroed"] == sum(after[name].numel() for name in changed)
    assert found["parameters"]["before"] == found["parameters"]["after"] == sum(map(torch.numel, before.values()))
    rows = list(csv.DictReader((tmp_path / "out" / "pruning.csv").open()))
    assert [(row["drop"], row["choice"]) for row in rows] == [
        ("0", "nothing"),
        *((drop, choice) for drop in "12" for choice in ("least effect", "random", "random", "last")),
    ]
    assert rows[1] == rows[1] | {"dropped": str(DEAD), "difference": "0.000000"}
    assert set(found["better_than_random"]) == {"1", "2"}
    assert {"pruning.png", "tokenizer.json", "SOURCE_README.md"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w7")["input_ids"] == [7]


def test_what_is_taken_out_is_out_of_the_files_and_loads_everywhere(folder, tmp_path, capsys):
    jobs = []
    for unit, drop in (("layer", 1), ("block", 1)):
        out = tmp_path / unit
        assert pruned(folder, out, "--unit", unit, drop=drop) == 0
        assert f"dropped     {unit}s " in capsys.readouterr().out
        found, config = (json.loads((out / name).read_text()) for name in ("pruning.json", "config.json"))
        left = NUM_SUBLAYERS - {"layer": 2, "block": 4}[unit]
        assert config["num_hidden_layers"] == left // 2
        assert config["dtype"] == "bfloat16"
        weights = load_file(out / "model.safetensors")
        assert weights["model.depth_attention.query"].shape[0] == left
        parameters = found["parameters"]
        assert parameters["after"] == sum(map(torch.numel, weights.values())) < parameters["before"]
        assert parameters["zeroed"] == 0
        job = {"source": str(out), "auto_class": "AutoModelForCausalLM", "inputs": tiny_inputs().tolist()}
        jobs.append(job | {"again": f"{out}-again", "results": f"{out}.safetensors"})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_python(LOADER, tmp_path / "jobs.json", folder=tmp_path, HF_HUB_OFFLINE="1")
    for job in jobs:
        for turn in load_results(Path(job["results"])).values():
            assert torch.equal(turn["logits"], logits(job["source"]))


def no_such_model(folder):
    return {"model": folder / "nowhere"}, "MODEL must be a checkpoint folder, got '.*nowhere'"


def a_plain_model(folder):
    AutoModelForCausalLM.from_config(tiny_backbone("llama")).save_pretrained(folder / "plain")
    return {
        "model": folder / "plain"
    }, "MODEL .*plain: `model` must have attention over depth, got one of type 'llama'"


def too_many_units(folder):
    return {"drop": 8}, "`drop` must be from 1 to 7 of the model's 8 sublayers, got 8"


def too_many_units_in_the_table(folder):
    return {"table": 9}, "`drop` must be from 1 to 7 of the model's 8 sublayers, got 9"


def an_empty_text(folder):
    (folder / "empty.txt").touch()
    return {"text": folder / "empty.txt"}, "`--text` must hold .* = 40 tokens, got 0 in "


def a_folder_that_exists(folder):
    (folder / "out").mkdir()
    return {"out": folder / "out"}, "`out` exists: .*out"


def the_model_itself(folder):
    return {"out": folder / "model"}, "`out` must not be the source or lie inside it"


CASES = [no_such_model, a_plain_model, too_many_units, too_many_units_in_the_table, an_empty_text]
CASES += [a_folder_that_exists, the_model_itself]


@pytest.mark.parametrize("prepare", CASES, ids=lambda case: case.__name__)
def test_one_line_with_the_reason_and_nothing_left(folder, tmp_path, capsys, prepare):
    shutil.copytree(folder, tmp_path / "in")
    options, message = prepare(tmp_path / "in")
    before = sorted(path for path in tmp_path.rglob("*"))
    options = {"text": tmp_path / "in" / "text.txt", "tokens": 4, "sequences": 2, "drop": 1, **options}
    model, out = options.pop("model", tmp_path / "in" / "model"), options.pop("out", tmp_path / "new")
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    capsys.readouterr()
    assert main([str(model), str(out), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"attnres-prune: error: .*{message}", line)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_checkpoint_that_is_not_what_was_measured_is_not_left(folder, tmp_path, capsys, monkeypatch):
    def others(model, unit, dropped):
        model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(prune, "pruned_model", others)
    capsys.readouterr()
    assert pruned(folder, tmp_path / "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match("attnres-prune: error: .* as it was; 'model.layers.0.mlp.up_proj.weight' differs", line)
    monkeypatch.setattr(prune, "check_written", lambda *arguments: None)
    assert pruned(folder, tmp_path / "out") == 1
    assert "has another loss than was measured, by " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
