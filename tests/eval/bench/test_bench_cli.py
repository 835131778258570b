# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from test_clocks import FakeCuda

from modeling_attnres.command_line import SHARED
from modeling_attnres.eval.bench import cli, report, timing
from modeling_attnres.eval.bench.clocks import GpuClock
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


def test_published_launches_write_the_tables_of_the_documentation(monkeypatch, tmp_path):
    figure = Figure("GPU prefill, launches", Ratio(9.0, 9.0, 9.0))
    monkeypatch.setattr(cli, "GROUPS", {"launches": lambda: ([figure], {})})
    monkeypatch.setattr(cli, "launches_markdown", lambda: "| tables |\n")

    cli.main(["--published", "launches", "--output", str(tmp_path)])

    assert (tmp_path / "launches.md").read_text() == "| tables |\n"


@pytest.mark.parametrize("option", ["--tokens", "--rounds", "--batch-size", "--threads"])
def test_counts_below_one_are_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([option, "0"])
    assert f"argument {option}: must be at least 1, got 0" in capsys.readouterr().err


def test_launches_are_counted_without_weights(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "build_lineup", None)

    options = "--mode launches --preset tiny --dtype bf16 --batch-size 4 --tokens 4096 --variants block"
    cli.main([*options.split(), "--output", str(tmp_path)])

    rows = json.loads((tmp_path / "results.json").read_text())["launches"]
    assert [row["mode"] for row in rows] == ["prefill", "decode", "train", "checkpoint"]
    assert "launches fwd" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "cuda", "sentence"),
    [
        (["--device", "mps"], False, "`device` must be 'cpu' or 'cuda', got 'mps'."),
        (["--gpu-day"], False, "`--gpu-day` needs a CUDA device, and PyTorch finds none."),
        (["--gpu-day"], True, "`--gpu-day` needs `--output`, a folder for what it finds."),
        (
            ["--device", "cuda", "--published"],
            True,
            "`--published` is measured on the processor: leave out `--device cuda`.",
        ),
        (
            ["--device", "cuda", "--mode", "train", "launches"],
            True,
            "`--mode launches` is counted on the processor: leave out `--device cuda`.",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(arguments, cuda, sentence, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setitem(SHARED["--device"], "type", torch.device)  # as if they were there

    assert cli.main([*TINY, *arguments]) == 2
    assert capsys.readouterr().err == f"attnres-bench: error: {sentence}\n"


def test_a_day_on_a_gpu_ends_with_its_status(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    days = []
    monkeypatch.setattr(cli, "run_day", lambda day, output: days.append((day, output)) or 1)

    with pytest.raises(SystemExit) as left:
        cli.main(["--gpu-day", "--output", str(tmp_path)])

    assert left.value.code == 1
    ((day, output),) = days
    assert (day.device.type, day.clock.label, output) == ("cuda", "gpu", tmp_path)


def test_models_are_timed_on_a_gpu(monkeypatch, tmp_path, capsys):
    """The processor stands in for the GPU, and a clock of fake events for its clock."""
    cuda = FakeCuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setitem(SHARED["--device"], "type", torch.device)
    clock = GpuClock(cuda)
    for module in (cli, report, timing):
        monkeypatch.setattr(module, "clock_for", lambda device: clock)
    build = cli.build_lineup
    monkeypatch.setattr(cli, "build_lineup", lambda *args, device, **kwargs: build(*args, device="cpu", **kwargs))
    forward = torch.nn.Embedding.forward  # one in every forward of a model
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *args: (cuda.work(), forward(*args))[1])

    cli.main([*TINY, "--device", "cuda", "--mode", "prefill", "decode", "train", "--output", str(tmp_path)])

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["gpu"] == "NVIDIA H100"
    for mode in ("prefill", "decode", "train"):
        assert [row["gpu ms"] for row in results[mode]] == [20.0, 20.0, 20.0]
    for mode in ("prefill", "train"):
        assert all(row["peak MB"] == 50 / 2**20 and row["TB/s"] > 0 for row in results[mode])
    assert "gpu ms" in capsys.readouterr().out
