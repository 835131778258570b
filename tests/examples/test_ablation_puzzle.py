# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import csv
import json
import random
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import ablation_puzzle as puzzle
import ablation_training as training
from ablation_training import Run


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran"]
    (folder / "0.txt").write_text(" ".join(rng.choice(words) for _ in range(12000)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(texts):
    return training.Data(texts)


def record(folder: Path, run: Run, loss: float):
    """The file of a finished run, as far as the study reads it."""
    folder.mkdir(exist_ok=True)
    curve = [{"step": step, "loss": 5.0, "entropy": 1 - step / 1000} for step in (puzzle.EARLY, run.steps)]
    result = {"run": asdict(run), "choosing_loss": loss + 0.5, "loss": loss, "curve": curve}
    (folder / f"{run.name}.json").write_text(json.dumps(result))


def record_rates(folder: Path):
    """PreNorm is best at 6e-3, Full at four times that, static at a quarter, the input-dependent query at a 64th."""
    best = {"full": 4, "static": 1 / 4, "input-dependent": 1 / 64}
    for rate in puzzle.RATES[1:4]:
        record(folder, replace(puzzle.FIRST, lr=rate), 2 + abs(rate - 6e-3))
    for variant, share in best.items():
        for index, run in enumerate(puzzle.depth_rates(replace(puzzle.FIRST, lr=6e-3), variant)):
            record(folder, run, 2 + 0.1 * abs(index - puzzle.DEPTH_SHARES.index(share)))


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_a_study_is_run_continued_and_reported(texts, tmp_path, monkeypatch, capsys):
    """A hundredth of the steps, in a model of two layers of width 16."""
    monkeypatch.setattr(puzzle, "FIRST", replace(puzzle.FIRST, layers=2, width=16))
    arguments = ["--output", str(tmp_path / "runs"), "--share", "0.01"]
    for _ in range(2):
        stages = ["--stages", "rates", "weights", "projections", "queries"]
        assert puzzle.main(["run", "--text", str(texts), *arguments, *stages]) == 0
    trained = [line for line in capsys.readouterr().out.splitlines() if "choosing" in line]
    assert len(trained) == len(set(trained)) == len(list((tmp_path / "runs").iterdir()))  # none was trained twice
    assert puzzle.main(["report", *arguments, "--report", str(tmp_path / "report")]) == 0
    rows = read(tmp_path / "report" / "puzzle-runs.csv")
    assert {row["variant"] for row in rows} == set(training.VARIANTS) - (set(puzzle.PAPER) - set(puzzle.ROWS)) - {
        "block-n8"
    }
    assert {row["steps"] for row in rows} == {"2"}
    assert all(0 < float(row["entropy"]) <= 1 + 1e-6 for row in rows if row["variant"] != "prenorm")
    for name in ("puzzle-rates.png", "puzzle-entropy.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert "table is left out: `--output` must hold the runs that rates are chosen from" in capsys.readouterr().out


def test_the_table_and_the_shapes_are_run_and_reported(texts, tmp_path, monkeypatch, capsys):
    """Three rows, two shapes and two seeds of them, for two steps."""
    rows = ("prenorm", "full", "sliding-window", "block-s4-heads16")
    monkeypatch.setattr(puzzle, "PAPER", {name: puzzle.PAPER[name] for name in rows})
    monkeypatch.setattr(puzzle, "TABLE", replace(puzzle.TABLE, layers=2, width=16))
    monkeypatch.setattr(puzzle, "SHAPES", [replace(puzzle.FIRST, layers=n, width=d) for n, d in ((1, 24), (5, 12))])
    monkeypatch.setattr(puzzle, "SEEDS", (0, 1))
    arguments = ["--output", str(tmp_path / "runs"), "--share", "0.01"]
    assert puzzle.main(["run", "--text", str(texts), *arguments, "--stages", "table", "shapes"]) == 0
    assert puzzle.main(["report", *arguments, "--report", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert "rank correlation with the paper: " in printed
    assert "puzzle is left out: " in printed
    table = read(tmp_path / "report" / "table-rows.csv")
    assert [row["variant"] for row in table] == list(rows)
    assert {row["seeds"] for row in table} == {"2"}
    shapes = read(tmp_path / "report" / "shapes-rows.csv")
    assert [(row["variant"], row["layers"]) for row in shapes] == [
        (variant, layers) for layers in "15" for variant in ("prenorm", "block-n8")
    ]
    for name, wanted in {"table": {("2", "16")}, "shapes": {("1", "24"), ("5", "12")}}.items():
        found = read(tmp_path / "report" / f"{name}-runs.csv")
        assert {(row["layers"], row["width"]) for row in found} == wanted
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "report").glob("puzzle*"))


def test_shapes_have_as_many_parameters_and_about_eight_blocks(data):
    blocks = []
    for shape in puzzle.SHAPES:
        config = training.build(replace(shape, variant="block-n8"), data).config
        per_layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
        assert config.num_hidden_layers * per_layer == pytest.approx(797_000, rel=0.01)
        blocks.append(config.num_blocks)
    assert blocks == [4, 8, 7, 8, 8]


@pytest.mark.parametrize("variant", sorted(puzzle.PAPER))
def test_rows_of_the_table_are_what_they_are_called(variant, data):
    model = training.build(replace(puzzle.TABLE, variant=variant, width=16), data)
    if variant == "prenorm":
        assert model.config.model_type == "llama"
        return
    size = re.search(r"block-s(\d+)", variant)
    assert model.config.sublayers_per_block == (int(size[1]) if size else 1)
    kinds = {"heads16": "multi_head", "full": "softmax", **dict.fromkeys(("s2", "s4", "s8", "s16"), "softmax")}
    kind = variant.removeprefix("block-").removeprefix("s4-")
    assert model.config.depth_attention_type == kinds.get(kind, kind.replace("-", "_"))


def test_rates_are_chosen_apart_from_what_is_reported(tmp_path):
    record_rates(tmp_path)
    best = {variant: puzzle.Study(tmp_path).best(variant) for variant in puzzle.ROWS}
    assert {run.lr for run in best.values()} == {6e-3}
    shares = {variant: run.depth_lr / run.lr for variant, run in best.items() if variant != "prenorm"}
    assert shares == pytest.approx({"full": 4, "static": 1 / 4, "input-dependent": 1 / 64})


def test_a_row_of_the_table_has_two_rates_of_its_own(tmp_path):
    """A valley across the grid: the best rate beside the first depth rate is not the one beside the last."""
    for rate_index, rate in enumerate(puzzle.RATES):
        for share_index, run in enumerate(puzzle.depth_rates(replace(puzzle.TABLE, lr=rate), "full")):
            record(tmp_path, run, 2 + 0.1 * (rate_index + share_index - 6) ** 2 + 0.1 * (share_index - 2) ** 2)
    found = puzzle.Study(tmp_path).best_own_rates("full", puzzle.TABLE)
    assert (found.lr, found.depth_lr) == (puzzle.RATES[3], puzzle.RATES[3] / 4)
    for neighbour in (puzzle.RATES[2], puzzle.RATES[4]):
        beside = replace(found, lr=neighbour, depth_lr=neighbour / 4)
        assert puzzle.Study(tmp_path).find(beside)["loss"] > puzzle.Study(tmp_path).find(found)["loss"]


def test_a_rate_that_fails_in_another_seed_is_halved(tmp_path):
    """Full at 0.012 is best in seed 0 and worst over all seeds; PreNorm has no depth rate to halve."""
    study = puzzle.Study(tmp_path)
    for variant, losses in {"full": ((2.0, 4.0, 3.0), (2.5, 2.5, 2.5)), "prenorm": ((2.0,) * 3, (2.5,) * 3)}.items():
        run = replace(puzzle.TABLE, variant=variant, lr=0.012, depth_lr=0.003)
        half = replace(run, lr=0.006, depth_lr=0.0015 if variant == "full" else 0.003)
        for candidate, of_seeds in zip((run, half), losses):
            for seed, loss in enumerate(of_seeds):
                record(tmp_path, replace(candidate, seed=seed), loss)
        assert study.steadier(run) == (half if variant == "full" else run)


def test_differences_are_paired(tmp_path):
    record_rates(tmp_path)
    study = puzzle.Study(tmp_path)
    for seed, (plain, full) in {1: (2.2, 2.1), 2: (2.4, 2.0)}.items():
        record(tmp_path, replace(study.best("prenorm"), seed=seed), plain)
        record(tmp_path, replace(study.best("full"), seed=seed), full)
    rows = puzzle.compare(study, "own", [study.best(variant) for variant in puzzle.ROWS])
    found = {row["variant"]: row for row in rows}
    assert found["full"]["difference"] == pytest.approx((0 - 0.1 - 0.4) / 3)
    assert found["full"]["its spread"] == pytest.approx(0.2082, abs=1e-4)
    half = 4.302653 * found["full"]["its spread"] / 3**0.5  # Student's t with two degrees of freedom
    assert found["full"]["high"] - found["full"]["difference"] == pytest.approx(half)
    assert found["full"]["paper"] == pytest.approx(-0.029)
    assert (found["full"]["seeds"], found["static"]["seeds"]) == (3, 1)


def test_zero_projections_leave_the_pseudo_query(data):
    """`w_l + W_l k` with `W_l = 0` is the method; random projections without a bias are the library's variant."""
    run = Run("full", layers=2, width=32)
    blocks, models = data.choosing[:2], {}
    for variant in ("full", "input-dependent", "query-and-projection"):
        models[variant] = training.build(replace(run, variant=variant), data)
    both = models["query-and-projection"].model.depth_attention
    for variant, name in (("full", "query"), ("input-dependent", "query_projection")):
        depth = models[variant].model.depth_attention
        nn.init.zeros_(both.query), nn.init.zeros_(both.query_projection)
        nn.init.normal_(depth.get_parameter(name), std=0.3)
        both.get_parameter(name).data = depth.get_parameter(name).data
        expected, found = (models[of](blocks).logits for of in (variant, "query-and-projection"))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fp32, sums in another order


def test_static_logits_start_as_the_mean_and_stay_positive(data):
    model = training.build(Run("static-softmax", layers=2, width=32), data)
    with torch.no_grad():
        uniform = model(data.choosing[:1], output_depth_weights=True).depth_weights
        nn.init.normal_(model.model.depth_attention.mixing_weights, std=3)
        weights = model(data.choosing[:1], output_depth_weights=True).depth_weights
    for equal, mix in zip(uniform, weights, strict=True):
        torch.testing.assert_close(equal, torch.full_like(equal, 1 / equal.shape[-1]))
        assert mix.min() > 0
        torch.testing.assert_close(mix.sum(-1), torch.ones_like(mix.sum(-1)))


def test_queries_from_the_stream_are_its_formula():
    torch.manual_seed(0)
    values, projection = torch.randn(3, 2, 5, 8), torch.randn(8, 8)
    found = training.scores_from_the_stream(projection, values, torch.tensor(0.0))
    unit = nn.functional.normalize
    query = unit(values.sum(0), dim=-1) @ projection.T
    expected = torch.stack([(unit(value, dim=-1) * query).sum(-1) for value in values])
    torch.testing.assert_close(found, expected)


def test_muon_orthogonalises_every_slice_in_place():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 8, 8))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.data]
    stack.grad = torch.randn(3, 8, 8)
    for matrix, gradient in zip(alone, stack.grad):
        matrix.grad = gradient.clone()
    training.MuonOfSlices(stack, lr=0.1).step()
    torch.optim.Muon(alone, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    assert torch.equal(stack.data, torch.stack([matrix.data for matrix in alone]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "`run` needs --text"),
        (["report"], "`report` needs --report"),
        (["run", "--text", "texts", "--share", "0"], "argument --share: must be a number above 0, got"),
    ],
)
def test_wrong_use_is_named(arguments, message, tmp_path, capsys):
    try:
        code = puzzle.main([*arguments, "--output", str(tmp_path)])
    except SystemExit as ended:  # by the parser
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_report_without_the_rates_names_the_missing_run(tmp_path, capsys):
    assert puzzle.main(["report", "--output", str(tmp_path), "--report", str(tmp_path / "report")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"must hold the runs that rates are chosen from, got .* without prenorm-4x32", line)
    assert not (tmp_path / "report").exists()
