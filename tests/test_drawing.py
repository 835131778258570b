# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Functions that draw leave the caller's Matplotlib as it was: its backend, and its figures."""

import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot

from modeling_attnres.eval.bench.plots import plot_sweep
from modeling_attnres.eval.bench.timing import Timing
from modeling_attnres.eval.causal_report import CausalMap, draw_map
from modeling_attnres.eval.comparison import Comparison, Model, Row, RowKey
from modeling_attnres.eval.depth_weights import save_depth_heatmap
from modeling_attnres.eval.dynamics import LayerDynamics, save_dynamics
from modeling_attnres.eval.forest import forest_plot
from modeling_attnres.eval.paired import Difference, SeedSpread
from modeling_attnres.eval.pruning import CHOICES, Cut
from modeling_attnres.eval.pruning_report import draw_table
from modeling_attnres.training import plot_metrics


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import reproduce


ROOT = Path(__file__).parents[1]


def heatmap(folder: Path):
    save_depth_heatmap({"title": torch.eye(5)}, folder / "picture.png")


def dynamics(folder: Path):
    save_dynamics({"a": LayerDynamics([1.0, 2.0], [3.0, 4.0])}, folder / "picture.png")


def sweep(folder: Path):
    entry = {form: Timing([1.0, 2.0], [1.0, 2.0]) for form in ("mean", "sum", "figure2")}
    cases = {f"mixer {axis}={value}": entry for axis in "TNL" for value in (8, 16)}
    plot_sweep(cases, folder / "picture.png", num_sublayers=60, sublayers_per_block=8)


def forest(folder: Path):
    difference = Difference(0.1, 0.1, -0.1, 0.3, 0.3, "McNemar")
    key, seeds = RowKey("Task", ("task",), "acc", "none"), SeedSpread(None, None, None, None, None)
    gold = {"gold_baseline": None, "gold_variant": None, "gold_difference": None, "gold_holm": None}
    scores = {"baseline": 0.5, "baseline_se": 0.1, "variant": 0.6, "variant_se": 0.1}
    row = Row(
        key, 0, 10, **scores, difference=difference, holm=0.3, higher_is_better=True, chance=0.25, **gold, seeds=seeds
    )
    baseline, variant = Model("a", []), Model("b", [])
    forest_plot(Comparison(baseline, [variant], {"b": [row]}, {"b": []}, 99, 0), folder / "picture.png")


def metrics(folder: Path):
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    plot_metrics(path, folder / "picture.png")


def causal(folder: Path):
    draw_map(CausalMap(torch.eye(3), torch.eye(3), None, "remove", 1.0), "title", folder / "picture.png")


def pruning(folder: Path):
    cuts = [Cut(choice, 0, (1,), (2.0,), 0.0) for choice in CHOICES]
    draw_table([Cut("nothing", 0, (), (1.0,), 0.0), *cuts], "layers", folder / "picture.png")


def reproduction(folder: Path):
    for name in reproduce.VARIANTS:
        for seed in reproduce.SEEDS:
            run = folder / f"small/{name}-{seed}"
            run.mkdir(parents=True)
            (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    sizes = [{"variant": name, "PFLOP": 1.0 + index, "held-out loss": 2.0} for index, name in enumerate("xy")]
    sizes = [{**row, "variant": name} for row in sizes for name in reproduce.VARIANTS]
    fits = dict.fromkeys(reproduce.VARIANTS, (2.0, float(np.float64(-0.1))))
    reproduce.draw(folder, sizes, fits, folder / "picture.png")


@pytest.mark.parametrize("backend", ["svg", "pdf"])
@pytest.mark.parametrize("draw", [heatmap, dynamics, sweep, forest, metrics, causal, pruning, reproduction])
def test_drawing_leaves_backend_and_figures(draw, backend, tmp_path):
    before = matplotlib.get_backend()
    matplotlib.use(backend)
    try:
        own = pyplot.figure()
        draw(tmp_path)
        assert matplotlib.get_backend() == backend
        assert pyplot.get_fignums() == [own.number]
        assert pyplot.gcf() is own
    finally:
        pyplot.close("all")
        matplotlib.use(before)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_drawing_function_is_among_these():
    """A new one must be drawn above; none takes pyplot, whose state is the caller's."""
    drawing = set()
    for folder in ("modeling_attnres", "conversion", "eval", "examples", "parallel", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"pyplot\b(?!:)|matplotlib\.use\(", text.replace("Without pyplot:", "")), path
            if re.search(r"^ *from matplotlib", text, re.MULTILINE):
                drawing.add(path.relative_to(ROOT).as_posix())
    assert drawing == {
        "eval/bench/plots.py",
        "eval/causal_report.py",
        "eval/depth_weights.py",
        "eval/dynamics.py",
        "eval/forest.py",
        "eval/pruning_report.py",
        "examples/reproduce.py",
        "training/metrics.py",
        "examples/ablation_puzzle.py",  # drawn by its own test
        "examples/retrofit/report.py",  # drawn by its own test
    }
