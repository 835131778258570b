# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Why a small ablation can turn the paper's Table 4 around: every row at a depth rate of its own, and controls.

    python examples/ablation_puzzle.py run --text path/to/texts --output runs/puzzle
    python examples/ablation_puzzle.py report --output runs/puzzle --report docs/evidence

`run` trains what has no result yet, stage by stage, one file per run; interrupt it and start it again as you like. Later
stages take the rates that the first one found best. Some held-out blocks choose rates, others are reported. A run is one
process on one thread; `--stages` runs some of them.
"""

import argparse
import csv
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

from ablation_training import Data, Run, train


# The conditions that rates are chosen in: small enough for three seeds of everything, and a larger one
FIRST = Run("prenorm", layers=4, width=32, steps=200)
LARGER = Run("prenorm", layers=6, width=64, steps=320)
ROWS = ("prenorm", "full", "static", "input-dependent")
PAPER = {"prenorm": 1.766, "full": 1.737, "static": 1.749, "input-dependent": 1.731}  # Table 4
SEEDS = (0, 1, 2)
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2)
DEPTH_SHARES = (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1, 4, 16, 64)  # of the rate of everything else
# Colours that are told apart by their darkness too
STYLES = {
    "prenorm": ("0.6", ""),
    "full": ("black", "o"),
    "static": ("tab:orange", "s"),
    "input-dependent": ("tab:blue", "^"),
    "full-mean-keys": ("0.45", "x"),
    "static-softmax": ("tab:brown", "d"),
    "query-and-logits": ("tab:green", "v"),
}
# Which of them are tried in any case
STARTS = {"full": [3, 4, 5], "static": [5, 6, 7], "input-dependent": [1, 2, 3]}
STARTS |= {"full-mean-keys": [4, 5], "static-softmax": [6, 7], "query-and-logits": [4, 5]}
EARLY = 20  # the step that early depth statistics are reported of


# --- The study -------------------------------------------------------------------------------------------------------


class Study:
    """The results in `folder`, and the means to make those that are missing.

    Args:
        folder: of the results, one file per run.
        data: what to train on; without, a missing result is an error.
        steps: of every run, in units of the study's own number (a reduced study has less than 1).
    """

    def __init__(self, folder: Path, data: Data | None = None, steps: float = 1.0):
        self.folder, self.data, self.steps = folder, data, steps

    def find(self, run: Run) -> dict | None:
        run = replace(run, steps=max(2, round(run.steps * self.steps)))
        path = self.folder / f"{run.name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def result(self, run: Run) -> dict:
        found = self.find(run)
        if found is None and self.data is None:
            raise ValueError(
                f"`--output` must hold the runs of the stage `rates`, got {self.folder} without {run.name}."
            )
        return self.train(run) if found is None else found

    def train(self, run: Run) -> dict:
        run = replace(run, steps=max(2, round(run.steps * self.steps)))
        result = train(run, self.data)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{run.name}.json"
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(unfinished, path)
        print(f"{result['loss']:.4f} (choosing {result['choosing_loss']:.4f}) {run.name}", flush=True)
        return result

    def sweep(self, runs: list[Run], start: list[int]) -> Run:
        """The best of `runs` along a line: tries those at `start`, and goes on from a best at an edge."""

        def loss(index: int) -> float:
            return self.result(runs[index])["choosing_loss"]

        tried = list(start)
        while True:
            best = min(tried, key=loss)
            beyond = {best - 1, best + 1} & set(range(len(runs))) - set(tried)
            if not beyond:
                return runs[best]
            tried += beyond

    def best(self, variant: str, condition: Run | None = None) -> Run:
        """PreNorm at its best rate; another variant at that rate and its best depth rate. By default in `FIRST`."""
        runs = [replace(condition or FIRST, lr=rate) for rate in RATES]
        prenorm = self.sweep(runs, start=[1, 2, 3])
        return prenorm if variant == "prenorm" else self.sweep(depth_rates(prenorm, variant), STARTS[variant])


def depth_rates(prenorm: Run, variant: str) -> list[Run]:
    return [replace(prenorm, variant=variant, depth_lr=share * prenorm.lr) for share in DEPTH_SHARES]


def at_one_rate(run: Run) -> Run:
    """PreNorm has no depth parameters, and its runs keep the name that they have."""
    return run if run.variant == "prenorm" else replace(run, depth_lr=run.lr)


def plan_rates(study: Study) -> list[Run]:
    """Depth parameters at rates of their own."""
    return [study.best(variant) for variant in ROWS]


def plan_seeds(study: Study) -> list[Run]:
    """The rows at depth rates of their own."""
    best = plan_rates(study)
    return [replace(run, seed=seed) for seed in SEEDS for run in best]


def plan_one_rate(study: Study) -> list[Run]:
    """The rows at one rate for everything, the one that suits PreNorm."""
    return [at_one_rate(run) for run in reversed(plan_seeds(study))]


def plan_weights(study: Study) -> list[Run]:
    """What sets static scalars apart: no softmax, the same weights for all tokens, or a parameter per source."""
    return [study.best(variant) for variant in ("static-softmax", "full-mean-keys", "query-and-logits")]


def plan_projections(study: Study) -> list[Run]:
    """The input-dependent query with one thing changed at a time."""
    best = study.best("input-dependent")
    return [
        replace(at_one_rate(best), muon=True),
        replace(best, variant="query-and-projection"),
        replace(best, variant="input-dependent-from-stream"),
        replace(best, variant="input-dependent-frozen-key-norm"),
        replace(best, query_std=0.02),
    ]


def plan_queries(study: Study) -> list[Run]:
    """The pseudo-query with one thing changed at a time."""
    best = study.best("full")
    return [replace(best, variant="full-frozen-key-norm"), replace(best, query_std=0.02)]


def plan_shallow(study: Study) -> list[Run]:
    """Plain models of one and two decoder layers, at the rate of the deep one: what is gained by skipping layers."""
    deep = [study.best("prenorm"), replace(LARGER, lr=RATES[2])]
    return [replace(run, layers=layers) for run in deep for layers in (1, 2)]


def plan_larger(study: Study) -> list[Run]:
    """Twice the width, three sublayers for two, and more steps, at depth rates of their own again."""
    return [study.best(variant, LARGER) for variant in (*ROWS, "full-mean-keys", "static-softmax")]


def plan_steps(study: Study) -> list[Run]:
    """Four times the steps."""
    return [replace(run, steps=4 * run.steps) for run in plan_rates(study)]


# In the order of their worth: an interrupted study lacks its last ones.
STAGES = {
    "rates": plan_rates,
    "weights": plan_weights,
    "seeds": plan_seeds,
    "shallow": plan_shallow,
    "projections": plan_projections,
    "one-rate": plan_one_rate,
    "larger": plan_larger,
    "steps": plan_steps,
    "queries": plan_queries,
}


# --- The report ------------------------------------------------------------------------------------------------------


def flat(result: dict) -> dict:
    """One row per run: the condition, the losses, and depth statistics early and late."""
    curve = {record["step"]: record for record in result["curve"]}
    early, late = curve.get(EARLY, {}), result["curve"][-1]
    numbers = {
        "choosing_loss": result["choosing_loss"],
        "loss": result["loss"],
        "cost_of_mean_weights": result.get("cost_of_mean_weights"),
        f"entropy_at_{EARLY}": early.get("entropy"),
        "entropy": late.get("entropy"),
        "per_token": late.get("per_token"),
    }
    return {**result["run"], **{name: "" if value is None else round(value, 5) for name, value in numbers.items()}}


def spread(values) -> float:
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else math.nan


def compare(study: Study, rates: str, runs: list[Run]) -> list[dict]:
    """Mean and spread over the seeds that have run, and the paired difference from `runs[0]`: same seed and batches."""
    losses = []
    for run in runs:
        found = {seed: study.find(replace(run, seed=seed)) for seed in SEEDS}
        losses.append({seed: result["loss"] for seed, result in found.items() if result})
    rows = []
    for run, of_seeds in zip(runs, losses):
        differences = [loss - losses[0][seed] for seed, loss in of_seeds.items() if seed in losses[0]]
        if differences:
            row = {"depth rates": rates, "variant": run.variant, "lr": run.lr, "depth_lr": run.depth_lr}
            row |= {"layers": run.layers, "width": run.width, "steps": run.steps, "batch": run.batch}
            row |= {"seeds": len(differences), "loss": statistics.fmean(of_seeds.values())}
            row |= {"spread": spread(of_seeds.values()), "difference": statistics.fmean(differences)}
            row |= {"its spread": spread(differences), "paper": PAPER[run.variant] - PAPER["prenorm"]}
            rows.append(row)
    return rows


def compare_all(study: Study) -> list[dict]:
    best = plan_rates(study)
    rows = compare(study, "one", [at_one_rate(run) for run in best])
    rows += compare(study, "own", best)
    rows += compare(study, "own, of fewer steps", plan_steps(study))
    return rows


def draw_rates(axis, study: Study, condition: Run):
    """Loss against the depth rate, one line per variant."""
    prenorm = study.best("prenorm", condition)
    axis.axhline(study.result(prenorm)["loss"], color=STYLES["prenorm"][0], linestyle="--", label="prenorm")
    for variant, (color, marker) in list(STYLES.items())[1:]:
        found = [study.find(run) for run in depth_rates(prenorm, variant)]
        points = [(share, result["loss"]) for share, result in zip(DEPTH_SHARES, found) if result]
        if points:
            axis.plot(*zip(*points), color=color, marker=marker, label=variant)
    axis.set_xscale("log", base=4)
    axis.set_xticks(DEPTH_SHARES[1:], [str(Fraction(share)) for share in DEPTH_SHARES[1:]])
    axis.minorticks_off()
    axis.set(xlabel="depth rate / rate of everything else", ylabel="held-out loss, seed 0")
    axis.set_title(f"{condition.layers} layers of width {condition.width}, {condition.steps} steps")
    axis.legend()


def draw_entropies(axis, study: Study, rate_of: Callable[[Run], Run]):
    """How uniform depth weights are as training goes, in the first condition."""
    for variant in ROWS[1:]:
        if result := study.find(rate_of(study.best(variant))):
            points = [(record["step"], record["entropy"]) for record in result["curve"]]
            axis.plot(*zip(*points), color=STYLES[variant][0], marker=STYLES[variant][1], label=variant)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set(xlabel="step", ylabel="entropy of depth weights (1: uniform)", ylim=(0, 1.03))
    axis.legend(loc="lower left")


def draw(study: Study, folder: Path):
    # Without pyplot: no display, and the user's backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for name in ("puzzle-rates", "puzzle-entropy"):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2)
        if name == "puzzle-rates":
            draw_rates(axes[0], study, FIRST)
            if study.find(replace(LARGER, lr=RATES[2])):
                draw_rates(axes[1], study, LARGER)
        else:
            for axis, rate_of, title in zip(
                axes, (at_one_rate, replace), ("One rate for everything", "Own depth rates")
            ):
                draw_entropies(axis, study, rate_of)
                axis.set_title(title)
        figure.savefig(folder / f"{name}.png", dpi=110)


def write_table(rows: list[dict], path: Path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def report(study: Study, folder: Path):
    rows = compare_all(study)
    folder.mkdir(parents=True, exist_ok=True)
    results = [json.loads(path.read_text()) for path in sorted(study.folder.glob("*.json"))]
    write_table([flat(result) for result in results], folder / "puzzle-runs.csv")
    write_table(rows, folder / "puzzle-rows.csv")
    draw(study, folder)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print(
            "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()) + " |"
        )


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results, one file per run")
    parser.add_argument("--text", type=Path, help="folder of *.txt files, for `run`")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="for `run`")
    parser.add_argument("--steps", type=float, default=1.0, help="of every run, as a share of the study's own number")
    parser.add_argument("--report", type=Path, help="folder for tables and pictures, for `report`")
    args = parser.parse_args(argv)
    needed = "text" if args.action == "run" else "report"
    if getattr(args, needed) is None:
        parser.error(f"`{args.action}` needs --{needed}")
    if not args.steps > 0:
        parser.error(f"--steps must be positive, got {args.steps}")
    if args.action == "report":
        report(Study(args.output, steps=args.steps), args.report)
        return
    study = Study(args.output, Data(args.text), args.steps)
    for stage in args.stages:
        print(f"--- {stage}", flush=True)
        for run in STAGES[stage](study):
            study.result(run)


if __name__ == "__main__":
    main()
