# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Why a small ablation can turn the paper's Table 4 around: rates of its own for every row, controls, and shapes.

    python examples/ablation_puzzle.py run --text path/to/texts --output runs/puzzle
    python examples/ablation_puzzle.py report --output runs/puzzle --report docs/evidence

`run` trains what has no result yet, stage by stage, one file per run; interrupt it and start it again as you like. Later
stages take the rates that the first one found best; `table` (every row, in deeper models) and `shapes` (depth against width)
choose their own. Some held-out blocks choose rates, others are reported. A run is one process on one thread; `--stages` runs
some of them. `report` writes the parts whose rates are chosen: puzzle-*, table*, shapes*.
"""

import argparse
import csv
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch

from modeling_attnres.command_line import Result, ToolParser, positive_number, run_tool
from modeling_attnres.eval.causal_report import rank_correlation
from modeling_attnres.tables import markdown_table


sys.path.insert(0, str(Path(__file__).parent))

from ablation_training import Data, Run, train
from seeds import interval, spread


# The conditions that rates are chosen in: small enough for three seeds of everything, and a larger one
FIRST = Run("prenorm", layers=4, width=32, steps=200)
LARGER = Run("prenorm", layers=6, width=64, steps=320)
# That of the whole table: twice the depth of the first, or a window of 8 would be no window and blocks of 8 no blocks
TABLE = replace(FIRST, layers=8)
ROWS = ("prenorm", "full", "static", "input-dependent")
# The paper's validation losses at 436M (Table 4 and, of the block sizes, its sweep of them)
PAPER = {"prenorm": 1.766, "full": 1.737, "static": 1.749, "input-dependent": 1.731}
PAPER |= {"sigmoid": 1.741, "no-key-norm": 1.743, "sliding-window": 1.764}
PAPER |= {"block-s2": 1.746, "block-s4": 1.746, "block-s8": 1.748, "block-s16": 1.753}
PAPER |= {"block-s4-heads16": 1.752, "block-s4-no-key-norm": 1.750}
# Of 0.79M to 0.80M parameters without the embedding; about eight blocks in each (four sublayers make four)
SHAPES = [
    replace(FIRST, layers=layers, width=width) for layers, width in ((2, 180), (4, 128), (7, 96), (16, 64), (28, 48))
]
SHAPES_ROWS = ("prenorm", "block-n8")
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
STARTS |= {variant: [3, 4, 5] for variant in PAPER if variant not in ("prenorm", *STARTS)}
EARLY = 20  # the step that early depth statistics are reported of


# --- The study -------------------------------------------------------------------------------------------------------


class MissingRun(ValueError):
    """A run that rates are chosen from has no result."""


class Study:
    """The results in `folder`, and the means to make those that are missing.

    Args:
        folder: of the results, one file per run.
        data: what to train on; without, a missing result is an error.
        share: of the study's own number of steps, in every run (a reduced study has less than 1).
    """

    def __init__(self, folder: Path, data: Data | None = None, share: float = 1.0):
        self.folder, self.data, self.share = folder, data, share

    def find(self, run: Run) -> dict | None:
        run = replace(run, steps=max(2, round(run.steps * self.share)))
        path = self.folder / f"{run.name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def result(self, run: Run) -> dict:
        found = self.find(run)
        if found is None and self.data is None:
            raise MissingRun(
                f"`--output` must hold the runs that rates are chosen from, got {self.folder} without {run.name}."
            )
        return self.train(run) if found is None else found

    def train(self, run: Run) -> dict:
        run = replace(run, steps=max(2, round(run.steps * self.share)))
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

    def best_one_rate(self, variant: str, condition: Run) -> Run:
        """A variant at its best rate for all parameters, those of depth attention too."""
        runs = [at_one_rate(replace(condition, variant=variant, lr=rate)) for rate in RATES]
        return self.sweep(runs, start=[1, 2, 3])

    def best(self, variant: str, condition: Run | None = None) -> Run:
        """PreNorm at its best rate; another variant at that rate and its best depth rate. By default in `FIRST`."""
        prenorm = self.best_one_rate("prenorm", condition or FIRST)
        return prenorm if variant == "prenorm" else self.sweep(depth_rates(prenorm, variant), STARTS[variant])

    def steadier(self, run: Run) -> Run:
        """`run`, or the same at half of its rates if that does better over the seeds that both have run.

        The rate that is best in one seed can lie at the edge of where training goes well, and beyond it in the next.
        """
        found = [[self.find(replace(each, seed=seed)) for each in (run, halved(run))] for seed in SEEDS]
        if not (both := [pair for pair in found if all(pair)]):
            return run
        losses = [statistics.fmean(result["choosing_loss"] for result in results) for results in zip(*both)]
        return run if losses[0] <= losses[1] else halved(run)

    def best_own_rates(self, variant: str, condition: Run) -> Run:
        """A variant at rates of its own: neither the backbone's nor the depth rate's neighbours do better."""
        if variant == "prenorm":
            return self.best_one_rate(variant, condition)
        rate, share, before = 3, STARTS[variant][1], None
        while (rate, share) != before:
            before = rate, share
            along = [depth_rates(replace(condition, lr=lr), variant)[share] for lr in RATES]
            best = self.sweep(along, [rate])
            rate, across = along.index(best), depth_rates(best, variant)
            best = self.sweep(across, [share])
            share = across.index(best)
        return best


def depth_rates(run: Run, variant: str) -> list[Run]:
    return [replace(run, variant=variant, depth_lr=share * run.lr) for share in DEPTH_SHARES]


def halved(run: Run) -> Run:
    """At half of its rates."""
    return replace(run, lr=run.lr / 2, depth_lr=run.depth_lr if run.variant == "prenorm" else run.depth_lr / 2)


def with_halves(best: list[Run]) -> list[Run]:
    """The runs and the same at half of their rates, in all seeds: what [`Study.steadier`] chooses from."""
    return [replace(each, seed=seed) for seed in SEEDS for run in best for each in (run, halved(run))]


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


def plan_table(study: Study) -> list[Run]:
    """Every row of Table 4 that the package has, in deeper models, at rates of their own for all parameters."""
    return with_halves([study.best_own_rates(variant, TABLE) for variant in PAPER])


def plan_shapes(study: Study) -> list[Run]:
    """Deep and narrow to shallow and wide, both variants at their best rate in every shape."""
    return with_halves([study.best_one_rate(variant, shape) for shape in SHAPES for variant in SHAPES_ROWS])


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
    "table": plan_table,
    "shapes": plan_shapes,
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
            row |= {"spread": spread(list(of_seeds.values())), "difference": statistics.fmean(differences)}
            row |= {"its spread": spread(differences)} | dict(zip(("low", "high"), interval(differences)))
            row |= {"paper": PAPER[run.variant] - PAPER["prenorm"]} if run.variant in PAPER else {}
            rows.append(row)
    return rows


def compare_puzzle(study: Study) -> list[dict]:
    best = plan_rates(study)
    rows = compare(study, "one", [at_one_rate(run) for run in best])
    rows += compare(study, "own", best)
    rows += compare(study, "own, of fewer steps", plan_steps(study))
    return rows


def compare_table(study: Study) -> list[dict]:
    return compare(study, "own", [study.steadier(study.best_own_rates(variant, TABLE)) for variant in PAPER])


def compare_shapes(study: Study) -> list[dict]:
    best = [[study.steadier(study.best_one_rate(variant, shape)) for variant in SHAPES_ROWS] for shape in SHAPES]
    rows = [row for runs in best for row in compare(study, "one", runs)]
    return [{name: value for name, value in row.items() if name != "paper"} for row in rows]


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


def losses_of(study: Study, row: dict) -> dict[int, float]:
    """The reported losses of a row of `compare`, by seed."""
    run = replace(FIRST, **{name: row[name] for name in ("variant", "lr", "depth_lr", "layers", "width")})
    return {seed: result["loss"] for seed in SEEDS if (result := study.find(replace(run, seed=seed)))}


def draw_table(figure, study: Study, rows: list[dict]):
    """Paired differences from PreNorm, in the paper's order from its best row down."""
    axis = figure.subplots()
    base, *others = rows
    others = sorted(others, key=lambda row: -row["paper"])
    plain = losses_of(study, base)
    axis.axvline(0, color="0.6", linestyle="--")
    for place, row in enumerate(others):
        axis.plot([row["low"], row["high"]], [place, place], color="black", linewidth=1.2)
        differences = [loss - plain[seed] for seed, loss in losses_of(study, row).items() if seed in plain]
        axis.plot(differences, [place] * len(differences), "o", color="tab:blue", markersize=4, fillstyle="none")
        axis.plot(row["difference"], place, "D", color="black", markersize=5)
    labels = [f"{row['variant']}  ({row['paper']:+.3f})" for row in others]
    axis.set_yticks(range(len(others)), labels)
    axis.set(
        xlabel="held-out loss minus PreNorm's: mean, 95 % interval, seeds", ylabel="variant (the paper's difference)"
    )


def draw_shapes(figure, study: Study, rows: list[dict]):
    """Loss against width per layer: shallow and wide to the right."""
    axis = figure.subplots()
    for variant, (color, marker, line) in zip(SHAPES_ROWS, (("0.5", "s", "--"), ("black", "o", "-"))):
        found = [row for row in rows if row["variant"] == variant]
        ratios = [row["width"] / row["layers"] for row in found]
        axis.plot(ratios, [row["loss"] for row in found], color=color, linestyle=line, marker=marker, label=variant)
        for ratio, row in zip(ratios, found):
            seeds = losses_of(study, row).values()
            axis.plot([ratio] * len(seeds), seeds, marker, color=color, markersize=4, fillstyle="none", linestyle="")
    axis.set_xscale("log")
    ticks = {
        shape.width / shape.layers: f"{shape.width / shape.layers:.3g}\n{shape.layers} x {shape.width}"
        for shape in SHAPES
    }
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.minorticks_off()
    axis.set(xlabel="width / decoder layers, and both", ylabel="held-out loss: mean and seeds")
    axis.legend()


def draw_puzzle_rates(figure, study: Study):
    axes = figure.subplots(1, 2)
    draw_rates(axes[0], study, FIRST)
    if study.find(replace(LARGER, lr=RATES[2])):
        draw_rates(axes[1], study, LARGER)


def draw_puzzle_entropies(figure, study: Study):
    axes = figure.subplots(1, 2)
    for axis, rate_of, title in zip(axes, (at_one_rate, replace), ("One rate for everything", "Own depth rates")):
        draw_entropies(axis, study, rate_of)
        axis.set_title(title)


def draw(path: Path, draw_on: Callable, *arguments, size: tuple[float, float] = (11, 4.6)):
    # Without pyplot: no display, and the user's backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw_on(figure, *arguments)
    figure.savefig(path, dpi=110)


def write_table(rows: list[dict], path: Path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def part_of(run: dict) -> str:
    """The part of the report that a run belongs to, by the model's shape."""
    shape = (run["layers"], run["width"])
    if shape == (TABLE.layers, TABLE.width):
        return "table"
    return "shapes" if shape in {(other.layers, other.width) for other in SHAPES} else "puzzle"


def print_rows(name: str, rows: list[dict]):
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    print(f"{name}\n\n{markdown_table(list(rows[0]), cells)}\n")
    if name == "table":
        columns = [torch.tensor([row[column] for row in rows]) for column in ("difference", "paper")]
        if found := rank_correlation(*columns):
            print(f"rank correlation with the paper: {found.value:.2f} ({found.low:.2f} to {found.high:.2f})\n")


def report(study: Study, folder: Path):
    """Writes the parts whose rates are chosen, and names a run that each of the others lacks."""
    tables, missing = {}, {}
    for name, rows_of in {"puzzle": compare_puzzle, "table": compare_table, "shapes": compare_shapes}.items():
        try:
            tables[name] = rows_of(study)
        except MissingRun as error:
            missing[name] = error
    if not tables:
        raise missing["puzzle"]
    folder.mkdir(parents=True, exist_ok=True)
    results = [json.loads(path.read_text()) for path in sorted(study.folder.glob("*.json"))]
    for name, rows in tables.items():
        write_table([flat(each) for each in results if part_of(each["run"]) == name], folder / f"{name}-runs.csv")
        write_table(rows, folder / f"{name}-rows.csv")
        print_rows(name, rows)
    if "puzzle" in tables:
        draw(folder / "puzzle-rates.png", draw_puzzle_rates, study)
        draw(folder / "puzzle-entropy.png", draw_puzzle_entropies, study)
    if "table" in tables:
        draw(folder / "table.png", draw_table, study, tables["table"], size=(8, 5))
    if "shapes" in tables:
        draw(folder / "shapes.png", draw_shapes, study, tables["shapes"], size=(8, 4.6))
    for name, error in missing.items():
        print(f"{name} is left out: {error}")


def build_parser() -> ToolParser:
    parser = ToolParser(
        prog="ablation_puzzle.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "report"], help="train what has no result, or draw what has one")
    parser.add_shared("--output", required=True, help="folder of the results, one file per run")
    parser.add_shared("--text", help="folder of *.txt files, for `run`")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="for `run`")
    parser.add_argument(
        "--share", type=positive_number, default=1.0, help="of the study's own number of steps, in every run"
    )
    parser.add_argument("--report", type=Path, help="folder for tables and pictures, for `report`")
    return parser


def run(args: argparse.Namespace) -> Result:
    """Trains what has no result yet, or writes tables and pictures of what has one."""
    needed = "text" if args.action == "run" else "report"
    if getattr(args, needed) is None:
        raise ValueError(f"`{args.action}` needs --{needed}, which is not given.")
    if args.action == "report":
        report(Study(args.output, share=args.share), args.report)
        return Result("", None)
    study = Study(args.output, Data(args.text), args.share)
    for stage in args.stages:
        print(f"--- {stage}", flush=True)
        for wanted in STAGES[stage](study):
            study.result(wanted)
    return Result("", None)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    return run_tool(parser.prog, run, parser.parse_args(argv), interrupted="interrupted; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
