# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-eval compare` from the command line to the files it writes."""

import csv
import json

import pytest
import yaml
from huggingface_hub import ModelCard
from synthetic_runs import multiple_choice, whole_texts, write_run

from modeling_attnres.eval.cli import main


A = [1, 0, 1, 1, 0, 0, 1, 0, 1, 1]
B = [1, 1, 1, 1, 0, 1, 1, 0, 0, 1]


@pytest.fixture
def runs(tmp_path):
    for name, correct, bits in (("base", A, [1.0, 2.0, 1.5]), ("attnres", B, [0.9, 1.9, 1.45])):
        samples = {
            "mc": multiple_choice("mc", correct),
            "pair": multiple_choice("pair", correct, choices=2),
            "bits": whole_texts("bits", bits, [10, 20, 30]),
        }
        folder = write_run(tmp_path / name, samples)
        record = {"model": f"models/{name}", "model_hash": name * 10, "seconds": 12.3, "threads": 1, "versions": {}}
        (folder / "provenance.json").write_text(json.dumps(record))
    return tmp_path


def compare(runs, *options) -> int:
    return main(["compare", str(runs / "base"), str(runs / "attnres"), "--resamples", "99", *map(str, options)])


def test_terminal_output(runs, capsys):
    assert compare(runs) == 0
    printed = capsys.readouterr().out
    assert "Scores: attnres against base" in printed
    line = next(line for line in printed.splitlines() if line.startswith("Alias of mc"))
    assert line.split() == [
        *["Alias", "of", "mc", "3", "acc", "↑", "%", "10"],
        *[
            "60.00",
            "±",
            "16.33",
            "70.00",
            "±",
            "15.28",
            "+10.00",
            "17.95",
            "[-30.61,",
            "+50.61]",
            "1.000",
            "M",
            "1.000",
        ],
    ]
    assert "Macro average, centred" in printed
    assert "Gold answers, bits per byte" in printed
    assert "model models/base, SHA-256 basebasebase, dtype float32, batch size 8, seeds 1234/1234/1234/1234" in printed


def test_files(runs):
    outputs = runs / "out"
    options = ("--json", outputs / "c.json", "--markdown", outputs / "c.md", "--plot", outputs / "c.png")
    assert compare(runs, *options, "--model-index", outputs / "c.yaml") == 0
    assert sorted(path.name for path in outputs.iterdir()) == ["c.csv", "c.json", "c.md", "c.png", "c.yaml"]

    record = json.loads((outputs / "c.json").read_text())
    rows = {row["key"]["title"]: row for row in record["variants"][0]["rows"]}
    assert rows["Alias of mc"]["difference"]["value"] == pytest.approx(0.1)
    assert record["runs"]["base"][0]["model_hash"] == "base" * 10

    assert "| Alias of mc | 3 | acc ↑ % | 10 | 60.00 ± 16.33 |" in (outputs / "c.md").read_text()
    assert (outputs / "c.png").read_bytes().startswith(b"\x89PNG")
    with (outputs / "c.csv").open() as file:
        numbers = {(line["panel"], line["row"]): float(line["difference"]) for line in csv.DictReader(file)}
    assert numbers["shares", "Alias of mc"] == pytest.approx(0.1)
    assert numbers["gold answers' bits per byte", "Alias of mc"] < 0
    assert {row for panel, row in numbers} == {*rows, "Macro average", "Macro average, centred"}

    (index,) = yaml.safe_load((outputs / "c.yaml").read_text())["model-index"]
    values = {entry["dataset"]["name"]: entry["metrics"][0]["value"] for entry in index["results"]}
    assert index["name"] == "attnres"
    assert values["Alias of mc"] == pytest.approx(70.0)
    assert values["Alias of bits"] == pytest.approx((9 + 38 + 43.5) / 60, abs=1e-4)


def test_model_card_keeps_what_it_had_and_is_updated_in_place(runs):
    card_path = runs / "README.md"
    card_path.write_text("---\nlicense: apache-2.0\n---\n# My model\n\nWords.\n")
    assert compare(runs, "--card", card_path) == 0
    once = card_path.read_text()
    assert compare(runs, "--card", card_path) == 0
    assert card_path.read_text() == once
    card = ModelCard.load(card_path)
    assert card.data.license == "apache-2.0"
    assert "# My model\n\nWords.\n\n<!-- attnres-eval: begin -->\n## Evaluation" in card.text
    assert "| Alias of mc | 3 |" in card.text
    assert len(card.data.eval_results) == 3
    assert not list(runs.glob(".*partial"))


def test_model_card_is_made(runs):
    assert compare(runs, "--card", runs / "new.md") == 0
    assert ModelCard.load(runs / "new.md").data.model_name == "attnres"


def test_model_card_with_half_a_section(runs, capsys):
    card_path = runs / "README.md"
    card_path.write_text("---\n---\n<!-- attnres-eval: begin -->\n")
    assert compare(runs, "--card", card_path) == 2
    assert "expected one pair" in capsys.readouterr().err
    assert card_path.read_text() == "---\n---\n<!-- attnres-eval: begin -->\n"


def test_seeds_are_joined_by_commas(runs, capsys):
    for name, correct in (("base", B), ("attnres", A)):
        samples = {
            "mc": multiple_choice("mc", correct),
            "pair": multiple_choice("pair", correct, choices=2),
            "bits": whole_texts("bits", [1.1, 2.1, 1.7], [10, 20, 30]),
        }
        write_run(runs / f"{name}2", samples)
    sides = [f"{runs / name},{runs / name}2" for name in ("base", "attnres")]
    assert main(["compare", *sides, "--resamples", "99", "--names", "PreNorm", "AttnRes"]) == 0
    printed = capsys.readouterr().out
    assert "Training seeds (2 and 2), the same items" in printed
    assert "SD over seeds, PreNorm" in printed
    assert "model hash not recorded" in printed  # runs of lm-eval alone are read too


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resamples", "5"), "--resamples must be at least 99, got 5"),
        (("--names", "one"), "one name per model, got 1 for 2"),
        (("--tasks", "unknown"), "no task or group unknown"),
        (("--plot", "plot.pdf"), "--plot must end in .png"),
    ],
)
def test_bad_requests(runs, capsys, options, message):
    assert compare(runs, *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results_*.json", "[]", "must be a JSON object, got list"),
        ("results_*.json", "{}", "was not written by lm-eval: its results must be dict, got none"),
        ("results_*.json", b"\xff", " is not JSON: 'utf-8' codec can't decode"),
        ("samples_mc_*.jsonl", "1\n", ", line 1 must be a JSON object, got int"),
        (
            "samples_mc_*.jsonl",
            '{"filter": "none"}\n',
            ", line 1 was not written by lm-eval: its doc_hash must be str",
        ),
        ("samples_mc_*.jsonl", b"\xff", " is not JSON lines: 'utf-8' codec can't decode"),
    ],
)
def test_files_that_lm_eval_did_not_write(runs, capsys, file, content, message):
    (path,) = (runs / "attnres").glob(file)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert compare(runs, "--json", runs / "new" / "c.json") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (runs / "new").exists()


def test_figures_on_the_terminal(runs, capsys):
    assert compare(runs, "--json") == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == "base"
    assert compare(runs, "--quiet") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("option", ["--json", "--markdown", "--card", "--model-index"])
def test_all_files_or_none(runs, capsys, option):
    others = [name for name in ("--json", "--markdown", "--card", "--model-index") if name != option]
    before = sorted(runs.iterdir())
    paths = [text for name in others for text in (name, runs / f"{name[2:]}.out")]
    assert compare(runs, *paths, option, "/proc/new.out") == 2
    assert f"{option} must be a path that can be written, got /proc/new.out" in capsys.readouterr().err
    assert sorted(runs.iterdir()) == before


def test_the_same_run_twice_is_no_second_seed(runs, capsys):
    assert main(["compare", f"{runs / 'base'},{runs / 'base'}", str(runs / "attnres")]) == 2
    assert "must be different runs" in capsys.readouterr().err
