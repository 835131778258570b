import json

import pytest

from modeling_attnres.eval.bench import cli
from modeling_attnres.eval.bench.models import EqualityGateError
from modeling_attnres.eval.bench.published import Figure, Ratio


TINY = ["--preset", "tiny", "--tokens", "8", "--rounds", "2", "--variants", "figure2", "block"]


def test_modes_are_measured_printed_and_written(tmp_path, capsys):
    cli.main([*TINY, "--mode", "prefill", "decode", "train", "counts", "--output", str(tmp_path)])

    printed = capsys.readouterr().out
    assert printed.startswith("equality gate passed: figure2")
    results = json.loads((tmp_path / "results.json").read_text())
    for mode in ("prefill", "decode", "train", "counts"):
        assert [row["variant"] for row in results[mode]] == ["base", "figure2", "block"]
        assert (tmp_path / f"{mode}.csv").read_text().count("\n") == 4
    assert results["counts"][1]["saved / base"] > 1.5
    assert results["environment"]["threads"] == 1


def test_nothing_is_timed_before_the_gate_passes(monkeypatch, capsys):
    def gate(lineup):
        raise EqualityGateError("'block' is wrong")

    monkeypatch.setattr(cli, "check_equality", gate)

    assert cli.main(TINY) == 1  # a check failed
    captured = capsys.readouterr()
    assert "ms" not in captured.out
    assert captured.err == "attnres-bench: error: 'block' is wrong\n"


def test_published_groups_are_written_as_they_are_done(monkeypatch, tmp_path, capsys):
    figure = Figure("decode fp32, batch 1", Ratio(1.05, 1.04, 1.06), Ratio(1.06, 1.0, 1.1), Ratio(1.11, 1.1, 1.2))

    def broken():
        raise EqualityGateError("stop")

    monkeypatch.setattr(cli, "GROUPS", {"decode": lambda: ([figure], {}), "prefill": broken})

    assert cli.main(["--published", "--output", str(tmp_path)]) == 1
    (row,) = json.loads((tmp_path / "published.json").read_text())["rows"]
    assert (row["row"], row["value"], row["met"], row["Figure 2"]) == ("decode fp32, batch 1", 1.05, "must", 1.11)
    assert "decode fp32, batch 1" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--tokens", "--rounds", "--batch", "--threads"])
def test_counts_below_one_are_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([option, "0"])
    assert f"argument {option}: must be at least 1, got 0" in capsys.readouterr().err
