# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import csv
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_backbones import VOCAB_SIZE, tiny_backbone, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from words import random_text, word_tokenizer

from modeling_attnres.eval.ablation import connections
from modeling_attnres.eval.causal import causal_effects, causal_estimates
from modeling_attnres.eval.dynamics import measure_dynamics
from modeling_attnres.eval.inspect_model import main, read_sequences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An AttnRes model, a PreNorm model, both with a tokenizer of single words, and a text."""
    folder = tmp_path_factory.mktemp("inspect")
    tokenizer = word_tokenizer()
    tiny_model("llama", 2).save_pretrained(folder / "attnres")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_backbone("llama")).save_pretrained(folder / "prenorm")
    for name in ("attnres", "prenorm"):
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(random_text())
    return folder


def inspect(folder, output, *models, extra=()):
    models = [str(folder / model) for model in models]
    return main([*models, "--text", str(folder / "text.txt"), "--output", str(output), *extra])


def test_two_models_side_by_side(folder, tmp_path, capsys):
    assert inspect(folder, tmp_path, "prenorm", "attnres", extra=["--sequences", "3", "--tokens", "16"]) == 0
    assert "prenorm" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "dynamics.png",
        "dynamics.csv",
        "depth_weights.png",
        "depth_weights-attnres.csv",
        "summary.json",
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["prenorm", "attnres"]
    rows = list(csv.DictReader((tmp_path / "dynamics.csv").open()))
    ids = torch.tensor([int(word[1:]) for word in (folder / "text.txt").read_text().split()])[:48].view(3, 16)
    for name in ("prenorm", "attnres"):
        expected = measure_dynamics(AutoModelForCausalLM.from_pretrained(folder / name), ids)
        assert summary[name]["magnitude_ratio"] == pytest.approx(expected.magnitude_ratio, rel=1e-5)
        assert summary[name]["gradient_variation"] == pytest.approx(expected.gradient_variation, rel=1e-5)
        found = [float(row["gradient_norm"]) for row in rows if row["model"] == name]
        assert found == pytest.approx(expected.gradient_norm, rel=1e-4)


def test_a_prenorm_model_alone_has_no_depth_weights(folder, tmp_path):
    assert inspect(folder, tmp_path, "prenorm", extra=["--sequences", "1", "--tokens", "8", "--dtype", "bf16"]) == 0
    assert not (tmp_path / "depth_weights.png").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tokens", "200"], "must hold --sequences \\* --tokens = 800 tokens, got 100"),
        (["--names", "a", "b"], "must give each of the 1 models its own name"),
    ],
)
def test_bad_requests_end_in_one_line(folder, tmp_path, capsys, extra, message):
    assert inspect(folder, tmp_path / "out", "attnres", extra=extra) == 2
    error = capsys.readouterr().err
    assert error.startswith("attnres-inspect: error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert re.search(message, error)


def test_what_every_connection_is_worth(folder, tmp_path, capsys):
    extra = ["--sequences", "2", "--tokens", "8", "--causal", "--estimate", "--json"]
    assert inspect(folder, tmp_path, "attnres", extra=extra) == 0
    summary = json.loads(capsys.readouterr().out)["attnres"]["causal"]
    model = AutoModelForCausalLM.from_pretrained(folder / "attnres")
    words = (folder / "text.txt").read_text().split()[:16]
    ids = torch.tensor([int(word[1:]) for word in words]).view(2, 8)
    (effects, loss), estimates = causal_effects(model, ids), causal_estimates(model, ids)
    with (tmp_path / "causal.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["sublayer", "source", "weight", "effect", "estimate"]
    assert rows[0] == ["0", "0", "1.000000", "", ""]
    assert [(int(row[0]), int(row[1])) for row in rows[1:]] == connections(model.config)
    weights = model(ids, output_depth_weights=True).depth_weights
    for sublayer, source, weight, effect, estimate in rows[1:]:
        place = int(sublayer), int(source)
        assert float(weight) == pytest.approx(weights[place[0]][..., place[1]].mean().item(), abs=2e-6)
        assert float(effect) == pytest.approx(effects[place].item(), abs=1e-5)
        assert float(estimate) == pytest.approx(estimates[place].item(), abs=1e-5)
    assert summary["ablate"] == "remove"
    assert summary["loss"] == pytest.approx(loss, abs=1e-5)
    assert list(summary["rank_correlation"]) == ["weight_effect", "weight_estimate", "estimate_effect"]
    assert summary["rank_correlation"]["weight_effect"]["pairs"] == len(connections(model.config))
    assert {"causal.png", "depth_weights.png"} < {path.name for path in tmp_path.iterdir()}


def test_some_connections_of_two_models_set_back_to_plain(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "in")
    for name, query_std in (("a", 0.5), ("zero", 0.0)):
        shutil.copytree(folder / "attnres", tmp_path / "in" / name)
        tiny_model("llama", 4, "sum", query_std=query_std).save_pretrained(tmp_path / "in" / name)
    extra = [
        "--sequences",
        "1",
        "--tokens",
        "8",
        "--causal",
        "--ablate",
        "plain",
        "--connections",
        "8:2",
        "3:0",
        "4:1",
    ]
    assert inspect(tmp_path / "in", tmp_path / "out", "a", "zero", extra=extra) == 0
    printed = capsys.readouterr().out
    assert re.search(r"a: rank correlation of weight and effect: [+-]\d.*3 connections", printed)
    assert "zero: rank correlation of weight and effect: none, one of them is the same everywhere" in printed
    for name in ("a", "zero"):
        with (tmp_path / "out" / f"causal-{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        effects = {(row["sublayer"], row["source"]): float(row["effect"]) for row in rows if row["effect"]}
        assert set(effects) == {("3", "0"), ("4", "1"), ("8", "2")}
        assert not any(row["estimate"] for row in rows)
        assert any(effects.values()) == (name == "a")  # a weight that is 1 is not changed, bit for bit
        assert (tmp_path / "out" / f"causal-{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("model", "extra", "message"),
    [
        ("prenorm", ["--causal"], "MODEL .*prenorm: `model` must have attention over depth, got one of type 'llama'"),
        ("attnres", ["--causal", "--ablate", "plain"], "MODEL .*attnres: `ablate='plain'` .* got a model with 'mean'"),
        ("attnres", ["--estimate", "--ablate", "plain"], "MODEL .*attnres: `ablate='plain'` .* a model with 'mean'"),
        ("attnres", ["--causal", "--connections", "2:5"], "Sublayer 2 has the sources 0 to 1, got \\(2, 5\\)"),
        (
            "attnres",
            ["--causal", "--connections", "99:0"],
            "must be from 1 to 8 \\(the output mix\\), got \\(99, 0\\)",
        ),
        ("attnres", ["--causal", "--connections", "0:0"], "Sublayer 0 reads the embedding alone"),
        ("attnres", ["--connections", "2:0"], "`--connections` goes with --causal"),
        ("attnres", ["--ablate", "remove"], "`--ablate` goes with --causal or --estimate"),
    ],
)
def test_what_has_no_effects_is_refused_before_work(folder, tmp_path, capsys, model, extra, message):
    assert inspect(folder, tmp_path / "out", model, extra=["--tokens", "8", *extra]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"attnres-inspect: error: .*{message}", line)
    assert not list(tmp_path.iterdir())


def test_a_connection_that_is_no_pair_is_refused(folder, capsys):
    for wrong in ("3", "3:", "a:b", "3:-1"):
        with pytest.raises(SystemExit) as exit_code:
            main([str(folder / "attnres"), "--text", "x", "--output", "y", "--causal", "--connections", wrong])
        assert exit_code.value.code == 2
        assert f"must be SUBLAYER:SOURCE, such as 5:0, got '{wrong}'" in capsys.readouterr().err


def no_text(folder):
    return {"text": folder / "nowhere.txt"}, "`--text` must be a file that can be read, got .*No such file"


def a_folder_as_text(folder):
    return {"text": folder}, "`--text` must be a file that can be read, got .*Is a directory"


def an_empty_text(folder):
    (folder / "empty.txt").touch()
    return {"text": folder / "empty.txt"}, "`--text` must hold .* = 24 tokens, got 0 in "


def a_picture_as_text(folder):
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    return {"text": folder / "picture.png"}, "`--text` must be text in UTF-8, got .*picture.png"


def zeros_as_text(folder):
    (folder / "zeros").write_bytes(bytes(100))
    return {"text": folder / "zeros"}, "`--text` must be text in UTF-8, got .*zeros, which has zero bytes"


def more_than_the_model_reads(folder):
    (folder / "long.txt").write_text("w1 " * 200)
    return {"text": folder / "long.txt", "tokens": 129}, "`--tokens` must be at most the model's .*, 128, got 129"


def words_that_the_model_lacks(folder):
    small = tiny_model("llama", 2, vocab_size=VOCAB_SIZE // 2)
    small.save_pretrained(folder / "small")
    AutoTokenizer.from_pretrained(folder / "attnres").save_pretrained(folder / "small")
    return {"model": folder / "small"}, "tokenizer must go with the model, whose vocabulary has 48 tokens; got the id"


def weights_that_are_missing(folder):
    shutil.copytree(folder / "attnres", folder / "missing")
    weights = load_file(folder / "missing" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "missing" / "model.safetensors", metadata={"format": "pt"})
    return {"model": folder / "missing"}, "must have all of its weights, .* lacks 1: model.layers.1.mlp.up_proj"


def weights_that_are_damaged(folder):
    shutil.copytree(folder / "attnres", folder / "damaged")
    file = folder / "damaged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return {"model": folder / "damaged"}, "MODEL: the weights of .*damaged do not load: "


def an_output_that_is_a_file(folder):
    return {"output": folder / "text.txt"}, "--output must be a folder, got the file .*text.txt"


def an_output_that_takes_no_files(folder):
    return {"output": "/proc/new"}, "--output must be a path that can be written, got /proc/new"


def a_name_for_another_folder(folder):
    return {"names": "../other"}, "`--names` must be usable in names of files, got '../other'"


CASES = [no_text, a_folder_as_text, an_empty_text, a_picture_as_text, zeros_as_text, more_than_the_model_reads]
CASES += [words_that_the_model_lacks, weights_that_are_missing, weights_that_are_damaged]
CASES += [an_output_that_is_a_file, an_output_that_takes_no_files, a_name_for_another_folder]


@pytest.mark.parametrize("prepare", CASES, ids=lambda case: case.__name__)
def test_one_line_with_the_reason_and_nothing_left(folder, tmp_path, capsys, prepare):
    shutil.copytree(folder, tmp_path / "inputs")
    options, message = prepare(tmp_path / "inputs")
    options = {"text": tmp_path / "inputs" / "text.txt", "output": tmp_path / "a" / "b", **options}
    model = options.pop("model", tmp_path / "inputs" / "attnres")
    options = {"sequences": 1, "tokens": 24, **options}
    capsys.readouterr()
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main([str(model), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"attnres-inspect: error: .*{message}", line)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]
    assert not list(tmp_path.rglob(".*"))


def test_a_model_that_counts_to_nan_fails_the_check(folder, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(folder / "attnres")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(folder / "attnres").save_pretrained(tmp_path / "nan")
    arguments = ["--text", str(folder / "text.txt"), "--output", str(tmp_path / "out"), "--tokens", "8"]
    capsys.readouterr()
    assert main([str(tmp_path / "nan"), *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "are not finite: its weights are damaged or too large for float32." in line
    assert not (tmp_path / "out").exists()


def test_numbers_as_json(folder, tmp_path, capsys):
    extra = ["--sequences", "1", "--tokens", "8", "--json", "--device", "cpu"]
    assert inspect(folder, tmp_path / "out", "attnres", extra=extra) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "summary.json").read_text())


def test_what_an_earlier_run_left_is_replaced(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for tokens in ("8", "16"):
        assert inspect(folder, tmp_path, "attnres", extra=["--sequences", "1", "--tokens", tokens]) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


def test_sequences_are_the_texts_first_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "attnres")
    found = read_sequences(tokenizer, folder / "text.txt", 2, 5)
    words = (folder / "text.txt").read_text().split()[:10]
    assert found.flatten().tolist() == [int(word[1:]) for word in words]
