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
    finish(tmp_path / "sizes" / "200k-prenorm-0", 4.0, parameters=250)
    finish(tmp_path / "sizes" / "2m-prenorm-0", 1.0, parameters=4000)
    finish(tmp_path / "sizes" / "200k-block-0", 3.0, parameters=250)
    reproduce.main(["report", "--output", str(tmp_path), "--report", str(tmp_path / "report")])

    block = table(tmp_path / "report" / "seeds.csv")["block"]
    assert float(block["mean"]) == pytest.approx(6.2 / 3)
    assert float(block["difference"]) == pytest.approx((-0.1 - 0.2 - 0.1) / 3)
    assert float(block["its standard deviation"]) == pytest.approx(0.1 / math.sqrt(3))
    ablation = table(tmp_path / "report" / "ablation.csv")
    assert float(ablation["static"]["difference from PreNorm"]) == pytest.approx(-0.05)
    assert float(ablation["static"]["paper's difference"]) == pytest.approx(-0.017)
    assert math.isnan(float(ablation["sigmoid"]["held-out loss"]))  # was not run
    assert (tmp_path / "report" / "losses.png").read_bytes().startswith(b"\x89PNG")
    _, fits = reproduce.sizes_table(tmp_path)
    assert set(fits) == {"prenorm"}  # the others have not run at every size
    # A quarter of the parameters and twice the loss: an exponent of -1/2, through the loss at 6 PFLOP... of 1000.
    scale, exponent = fits["prenorm"]
    assert exponent == pytest.approx(-0.5)
    assert scale * (6 * 1000 * 1e9 / 1e15) ** exponent == pytest.approx(2.0)


@pytest.mark.parametrize(("action", "needed"), [("commands", "--text"), ("report", "--report")])
def test_what_an_action_needs_is_named(action, needed, tmp_path, capsys):
    with pytest.raises(SystemExit):
        reproduce.main([action, "--output", str(tmp_path)])
    assert f"`{action}` needs {needed}" in capsys.readouterr().err
