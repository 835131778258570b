# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import csv
import json
import math
import shlex
import sys
from pathlib import Path

import pytest

from modeling_attnres.configuration import load_preset


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import pretrain
import reproduce


def finish(folder: Path, loss: float, parameters: int = 1000):
    """The files of a finished run, as far as the report reads them."""
    folder.mkdir(parents=True)
    summary = {"held_out_loss": loss, "parameters": parameters, "training_tokens": 10**9}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": step, "loss": loss + 1 / step} for step in (10, 20)] + [{"step": 20, "eval_loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def table(path: Path) -> dict[str, dict[str, str]]:
    return {row["variant"]: row for row in csv.DictReader(path.open())}


def test_commands_are_calls_of_pretrain_for_what_is_missing(tmp_path, capsys):
    finish(tmp_path / "small" / "full-1", 2.0)
    reproduce.main(["commands", "--output", str(tmp_path), "--text", "some texts"])
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == len(reproduce.runs()) - 1
    outputs = set()
    for _python, script, *arguments in commands:
        assert Path(script).name == "pretrain.py"
        args = pretrain.build_parser().parse_args(arguments)
        assert str(args.text) == "some texts"
        outputs.add(args.output.relative_to(tmp_path).as_posix())
        load_preset(args.preset, **pretrain.parse_overrides(args.overrides))
    assert outputs == set(reproduce.runs()) - {"small/full-1"}


def test_the_report_compares_runs_of_the_same_seed(tmp_path):
    losses = {"prenorm": (2.0, 2.2, 2.4), "block": (1.9, 2.0, 2.3), "full": (1.8, 2.1, 2.1)}
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            finish(tmp_path / "small" / f"{name}-{seed}", loss)
    finish(tmp_path / "ablation" / "static-0", 1.95)
    finish(tmp_path / "ablation" / "static-1", 2.15)
    finish(tmp_path / "ablation" / "sigmoid-2", 2.5)
    finish(tmp_path / "ablation" / "prenorm-1", 2.3)  # not that of small/, which the row of Full is compared with
    finish(tmp_path / "ablation" / "prenorm-2", 2.4)
    finish(tmp_path / "sizes" / "200k-prenorm-0", 4.0, parameters=250)
    finish(tmp_path / "sizes" / "2m-prenorm-0", 1.0, parameters=4000)
    finish(tmp_path / "sizes" / "200k-block-0", 3.0, parameters=250)
    reproduce.main(["report", "--output", str(tmp_path), "--report", str(tmp_path / "report")])

    block = table(tmp_path / "report" / "seeds.csv")["block"]
    assert float(block["mean"]) == pytest.approx(6.2 / 3)
    assert float(block["difference"]) == pytest.approx((-0.1 - 0.2 - 0.1) / 3)
    assert float(block["its standard deviation"]) == pytest.approx(0.1 / math.sqrt(3))
    ablation = table(tmp_path / "report" / "ablation.csv")
    static = {name: float(value) for name, value in ablation["static"].items() if name != "variant"}
    assert (static["seeds"], static["held-out loss"]) == (2, pytest.approx(2.05))
    assert static["difference from PreNorm"] == pytest.approx((-0.05 - 0.15) / 2)
    assert static["high"] == pytest.approx(-0.1 + 12.7062 * 0.05)  # Student's t with one degree of freedom
    assert math.isnan(static["seed 2"])
    assert static["paper's difference"] == pytest.approx(-0.017)
    sigmoid = ablation["sigmoid"]
    assert float(sigmoid["difference from PreNorm"]) == pytest.approx(0.1)  # of seed 2 alone
    assert math.isnan(float(sigmoid["low"]))
    assert set(ablation) == {"prenorm", "full", "block", "static", "sigmoid"}  # the others were not run
    assert (tmp_path / "report" / "losses.png").read_bytes().startswith(b"\x89PNG")
    _, fits = reproduce.sizes_table(reproduce.Record(tmp_path, tmp_path / "none.csv"))
    assert set(fits) == {"prenorm"}  # the others have not run at every size
    # A quarter of the parameters and twice the loss: an exponent of -1/2, through the loss at 6 PFLOP... of 1000.
    scale, exponent = fits["prenorm"]
    assert exponent == pytest.approx(-0.5)
    assert scale * (6 * 1000 * 1e9 / 1e15) ** exponent == pytest.approx(2.0)


def test_a_report_keeps_the_figures_of_runs_whose_folders_are_gone(tmp_path, capsys):
    report = ["--report", str(tmp_path / "report")]
    for name, loss in {"prenorm": 2.0, "full": 1.9}.items():
        finish(tmp_path / "first" / "small" / f"{name}-1", loss)
    finish(tmp_path / "first" / "ablation" / "prenorm-1", 2.0)
    finish(tmp_path / "first" / "ablation" / "static-1", 1.8)
    finish(tmp_path / "second" / "ablation" / "sigmoid-1", 1.7)
    finish(tmp_path / "second" / "ablation" / "static-1", 1.6)
    for output in ("first", "second"):
        assert reproduce.main(["report", "--output", str(tmp_path / output), *report]) == 0
    assert "losses.png is not drawn" in capsys.readouterr().out
    found = {
        name: float(row["difference from PreNorm"])
        for name, row in table(tmp_path / "report" / "ablation.csv").items()
    }
    # A folder takes precedence over the figure that an earlier report kept.
    assert found == pytest.approx({"prenorm": 0, "full": -0.1, "static": -0.4, "sigmoid": -0.3})
    days = {row["run"]: row["day"] for row in csv.DictReader((tmp_path / "report" / "runs.csv").open())}
    assert list(days) == [
        "small/prenorm-1",
        "small/full-1",
        *(f"ablation/{name}-1" for name in ("prenorm", "static", "sigmoid")),
    ]
    assert all(len(day.split("-")) == 3 for day in days.values())


def test_a_report_of_nothing_is_an_error(tmp_path, capsys):
    assert reproduce.main(["report", "--output", str(tmp_path), "--report", str(tmp_path / "report")]) == 2
    assert "`--output` must hold a finished run, got" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_the_record_of_the_page_gives_its_tables(tmp_path, capsys):
    """The tables beside the page are what a report makes of the runs in it."""
    page = Path(__file__).parents[2] / "docs" / "reproduction"
    (tmp_path / "runs.csv").write_text((page / "runs.csv").read_text())
    assert reproduce.main(["report", "--output", str(tmp_path), "--report", str(tmp_path)]) == 0
    for name in ("runs", "seeds", "ablation", "sizes"):
        assert (tmp_path / f"{name}.csv").read_text() == (page / f"{name}.csv").read_text()


@pytest.mark.parametrize(("action", "needed"), [("commands", "--text"), ("report", "--report")])
def test_what_an_action_needs_is_named(action, needed, tmp_path, capsys):
    with pytest.raises(SystemExit):
        reproduce.main([action, "--output", str(tmp_path)])
    assert f"`{action}` needs {needed}" in capsys.readouterr().err
