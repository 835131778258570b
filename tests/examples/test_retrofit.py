# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The study as a user runs it, on a tiny model and texts."""

import csv
import json
import math
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_backbones import tiny_backbone
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from modeling_attnres import AttnResForCausalLM
from modeling_attnres.conversion.cli import build_parser as convert_parser
from modeling_attnres.eval.tasks import offline


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from retrofit.__main__ import build_parser, main, work
from retrofit.arms import ARMS, count_trained, equal_rank, load_base, prepare
from retrofit.schedule import Run, Study, form_of, planned, sweep_run, write_json
from retrofit.texts import cut, load_domain
from retrofit.training import Settings, block_losses


SETTINGS = "--steps 2 --batch-size 2 --tokens 8 --validation-blocks 2 --test-blocks 3 --warmup-steps 1 --seeds 2"
LENGTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A PreNorm model with a tokenizer of bytes, and a domain of ten texts."""
    folder = tmp_path_factory.mktemp("retrofit")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    config = tiny_backbone("llama")
    config.vocab_size = len(alphabet)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for index in range(10):
        text = " ".join(f"wörd{index}{word * (index + 1) % 7}" for word in range(30))
        (folder / "texts" / f"{index}.txt").write_text(text, encoding="utf-8")
    return folder


def arguments(folder: Path, output: Path, action: str = "run") -> list[str]:
    domain = f"{folder / 'texts'}/*.txt"
    return [action, "--model", str(folder / "model"), "--domain", f"words={domain}", "--output", str(output)] + (
        SETTINGS.split()
    )


def run(argv: list[str]):
    work(build_parser().parse_args(argv))


@pytest.fixture(scope="module")
def output(folder, tmp_path_factory) -> Path:
    """The whole study, done once."""
    output = tmp_path_factory.mktemp("study")
    run([*arguments(folder, output), "--keep-models"])
    return output


def records(output: Path, stage: str) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(output.glob(f"runs/*-{stage}-*.json"))}


def test_every_planned_run_is_done_once(folder, output, capsys):
    runs = Study.open(output, seeds=2).runs
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) == 2 + 15 + 5 + 5 + 2 + 4
    assert {path.stem for path in output.glob("runs/*.json")} == set(names)
    times = {path: path.stat().st_mtime_ns for path in output.glob("runs/*.json")}
    capsys.readouterr()
    run(arguments(folder, output))
    assert capsys.readouterr().out == ""
    assert times == {path: path.stat().st_mtime_ns for path in output.glob("runs/*.json")}


def test_a_run_that_was_lost_comes_out_the_same_again(folder, output):
    (path,) = output.glob("runs/words-seeds-sum-8-attnres-lora-1.json")
    before = json.loads(path.read_text())
    path.unlink()
    run(arguments(folder, output))
    after = json.loads(path.read_text())
    assert [after[name] for name in ("losses", "train_losses")] == [
        before[name] for name in ("losses", "train_losses")
    ]


def test_arms_are_paired(output):
    """Without training a converted model is its source, and the first batch of a seed is the same for every arm."""
    before = records(output, "before")
    assert before["words-before-prenorm"]["losses"] == before["words-before-sum-8"]["losses"]
    for seed in range(2):
        group = [record for name, record in records(output, "seeds").items() if name.endswith(f"-{seed}")]
        first = {record["train_losses"][0] for record in group if record["form"] in ("prenorm", "sum-8")}
        assert len(group) == 7
        assert len(first) == 1
    losses = {tuple(record["losses"]) for record in records(output, "seeds").values()}
    assert len(losses) == 14  # and then all differ


def test_rates_are_those_that_the_sweep_chose(output):
    study = Study.open(output, seeds=2)
    for record in records(output, "seeds").values():
        chosen = study.chosen_rate(record["arm"])
        assert record["rate"] == chosen
        alone = study.chosen_rate("queries")
        expected = {"queries": alone, "attnres-lora": alone / 3, "attnres-full": alone / 3}.get(record["arm"])
        assert record["query_rate"] == (None if expected is None else pytest.approx(expected))


def test_the_best_rate_has_the_least_validation_loss(tmp_path):
    study = Study(tmp_path, Settings(), {"words": ""}, 1)
    runs = [sweep_run("words", "lora", rate) for rate in ARMS["lora"].rates]
    for run, loss in zip(runs, (3.0, 2.0, 4.0)):
        assert study.chosen_rate("lora") is None
        write_json(study.path(run), {"losses": [loss, loss]})
    assert study.chosen_rate("lora") == ARMS["lora"].rates[1]
    waiting = Run("seeds", "words", form_of("attnres-lora"), "attnres-lora")
    assert study.rates(waiting) is None


def test_models_of_seed_0_load(folder, output):
    names = {path.name for path in (output / "models").iterdir()}
    assert names == {run.name for run in planned(["words"], 1) if run.stage == "seeds"}
    trained = AttnResForCausalLM.from_pretrained(output / "models" / "words-seeds-sum-8-attnres-lora-0")
    tokenizer = AutoTokenizer.from_pretrained(output / "models" / "words-seeds-sum-8-attnres-lora-0")
    test = load_domain(f"{folder / 'texts'}/*.txt", tokenizer, LENGTH)["test"].spread(3)
    due = json.loads((output / "runs" / "words-seeds-sum-8-attnres-lora-0.json").read_text())["losses"]
    # The adapter is merged: fp32, sums in another order.
    assert block_losses(trained, test) == pytest.approx(due, rel=1e-5)
    assert trained.model.depth_attention.query.any()


def test_a_run_is_done_by_one_process_only(tmp_path):
    study = Study(tmp_path, Settings(), {"words": ""}, 1)
    run = study.runs[0]
    with study.claim(run) as first, study.claim(run) as second:
        assert first
        assert not second
    write_json(study.path(run), {})
    with study.claim(run) as late:
        assert not late


def test_lora_has_no_fewer_parameters_than_lora_and_queries(folder):
    prenorm, attnres = (load_base(folder / "model", form) for form in ("prenorm", "sum-8"))
    both = count_trained(prepare(attnres, ARMS["attnres-lora"]))
    lora = count_trained(prepare(prenorm, ARMS["lora"]))
    per_rank = lora // equal_rank(prenorm)
    assert lora - per_rank < both <= lora
    depth = sum(value.numel() for value in attnres.model.depth_attention.parameters())
    assert count_trained(prepare(attnres, ARMS["queries"])) == depth
    assert count_trained(prepare(prenorm, ARMS["full"])) == sum(value.numel() for value in prenorm.parameters())


def test_splits_share_no_document_and_no_evaluated_passage(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    line = (Path(offline.__file__).parent / "shakespeare.jsonl").read_text("utf-8").splitlines()[0]
    passage = json.loads(line)["text"]
    for index in range(5):
        (tmp_path / f"{index}.txt").write_text(f"plain text {index}\n\n{passage}\n\nthe end", encoding="utf-8")
    splits = load_domain(f"{tmp_path}/*.txt", tokenizer, 6)
    documents = [set(blocks.documents) for blocks in splits.values()]
    assert documents == [{"0.txt", "1.txt", "3.txt"}, {"2.txt"}, {"4.txt"}]
    evaluated = [part for part in passage.split("\n\n") if len(part) > 60]
    text = "".join(tokenizer.decode(row) for row in splits["test"].ids)
    assert text.startswith("plain text 4")
    assert evaluated
    assert not any(part[:40] in text for part in evaluated)


def test_bytes_are_those_of_the_predicted_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    blocks = cut({"a": "ä plain wörd", "b": "short"}, tokenizer, 4)
    assert blocks.ids.shape == (4, 4)
    assert blocks.documents == ["a", "a", "a", "b"]
    assert blocks.num_bytes.tolist() == [3, 3, 3, 3]
    assert tokenizer.decode(blocks.ids[0]) == "ä pl"[:3]


def test_the_report_is_about_paired_differences(output, tmp_path, capsys):
    run(["report", "--output", str(output), "--seeds", "2", "--report", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "largest difference of a block's loss before training: 0.0 nats" in printed
    seeds = records(output, "seeds")
    nats = {
        arm: np.array([seeds[f"words-seeds-{form_of(arm)}-{arm}-{seed}"]["losses"] for seed in range(2)])
        for arm in ARMS
    }
    (row,) = [
        row
        for row in csv.DictReader((tmp_path / "retrofit-differences.csv").open())
        if row["variant"] == ARMS["attnres-lora"].label
    ]
    difference = (nats["attnres-lora"] - nats["lora"]) / (LENGTH - 1)
    assert float(row["nats per token"]) == pytest.approx(difference.mean())
    low, high = stats.t.interval(0.95, 1, difference.mean(), stats.sem(difference.mean(1)))
    assert [float(row["nats per token, low"]), float(row["nats per token, high"])] == pytest.approx([low, high])
    low, high = stats.t.interval(0.95, 2, difference.mean(), stats.sem(difference.mean(0)))
    assert [float(row["over blocks, low"]), float(row["over blocks, high"])] == pytest.approx([low, high])
    num_bytes = sum(seeds["words-seeds-prenorm-lora-0"]["num_bytes"])
    bits = difference.sum(1).mean() * (LENGTH - 1) / math.log(2) / num_bytes
    assert float(row["bits per byte"]) == pytest.approx(bits)
    arms = list(csv.DictReader((tmp_path / "retrofit-arms.csv").open()))
    assert [row["arm"] for row in arms] == ["before training", *(arm.label for arm in ARMS.values())]
    assert len(list(csv.DictReader((tmp_path / "retrofit-sweep.csv").open()))) == 15
    assert len(list(csv.DictReader((tmp_path / "retrofit-forms.csv").open()))) == 3
    assert len(list(csv.DictReader((tmp_path / "retrofit-runs.csv").open()))) == 18
    for name in ("differences", "curves"):
        assert (tmp_path / f"retrofit-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_plan_says_what_is_left(folder, tmp_path, capsys):
    run(arguments(folder, tmp_path, "plan"))
    printed = capsys.readouterr().out
    assert "sweep: 15 runs left" in printed
    assert "hours of CPU time" in printed


def test_the_commands_of_the_page_are_understood():
    page = (Path(__file__).parents[2] / "docs" / "evidence.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m examples\.retrofit (.+)$", page, re.MULTILINE)
    parsed = [build_parser().parse_args(shlex.split(command)) for command in commands]
    assert [args.action for args in parsed] == ["run", "report"]
    assert [name for name, _ in parsed[0].domains] == ["shakespeare", "django"]
    assert parsed[0].seeds == 5
    assert Settings() == Settings(**{field.name: getattr(parsed[0], field.name) for field in fields(Settings)})
    converted, plain = re.findall(r"^attnres-convert (build/.+)$", page, re.MULTILINE)
    assert convert_parser().parse_args(shlex.split(converted)).out == "build/smollm2-attnres"
    assert convert_parser().parse_args(shlex.split(plain)).out == str(parsed[0].model)


def test_errors_come_before_the_work(folder, output, tmp_path, capsys):
    with pytest.raises(ValueError, match="`--output` must be a new folder or one of the same settings"):
        run([*arguments(folder, output), "--steps", "3"])
    with pytest.raises(ValueError, match="must match at least 5 text files, got 1"):
        run([*arguments(folder, tmp_path), "--domain", f"few={folder / 'texts' / '0.txt'}"])
    with pytest.raises(ValueError, match="must have 20000 blocks to train on"):
        run([*arguments(folder, tmp_path / "long"), "--steps", "10000"])
    with pytest.raises(ValueError, match=r"without study\.json"):
        run(["report", "--output", str(tmp_path / "none"), "--report", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main([*arguments(folder, tmp_path), "--domain", "no-pattern"])
    assert "`--domain` takes NAME=PATTERN" in capsys.readouterr().err
    assert main(["run", "--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`run` needs --model and --domain" in line
