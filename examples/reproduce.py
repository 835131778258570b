# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The paper's claims at a scale that a CPU trains: the runs of docs/reproduction.md, and its tables and pictures.

    python examples/reproduce.py commands --text path/to/texts --output runs > runs.sh
    xargs --arg-file runs.sh --delimiter '\\n' --max-procs 2 -I{} sh -c {}
    python examples/reproduce.py report --output runs --report docs/reproduction

`commands` prints one call of pretrain.py per run that is not finished; `report` reads what is. The figures of every run are
kept in runs.csv beside the tables, so that a report needs the folders of new runs alone.
"""

import argparse
import csv
import json
import math
import shlex
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from modeling_attnres.command_line import Result, ToolParser, run_tool
from modeling_attnres.tables import markdown_table
from modeling_attnres.training import read_metrics


sys.path.insert(0, str(Path(__file__).parent))

from seeds import interval, spread


VARIANTS = ("prenorm", "block", "full")
SEEDS = (0, 1, 2)
STEPS = 400

# name -> arguments of pretrain.py, and the paper's validation loss at 436M (Table 4)
ABLATIONS = {
    "static": ("llama-800k-full", "depth_attention_type=static", 1.749),
    "sigmoid": ("llama-800k-full", "depth_attention_type=sigmoid", 1.741),
    "no-key-norm": ("llama-800k-full", "depth_attention_type=no_key_norm", 1.743),
    "sliding-window": ("llama-800k-full", "depth_attention_type=sliding_window", 1.764),
    "input-dependent": ("llama-800k-full", "depth_attention_type=input_dependent", 1.731),
    "block-s4-heads16": ("llama-800k-block", "depth_attention_type=multi_head", 1.752),
    "block-s4-no-key-norm": ("llama-800k-block", "depth_attention_type=no_key_norm", 1.750),
    "block-s2": ("llama-800k-block", "sublayers_per_block=2", 1.746),
    "block-s8": ("llama-800k-block", "sublayers_per_block=8", 1.748),
    "block-s16": ("llama-800k-block", "sublayers_per_block=16", 1.753),
    "block-s32": ("llama-800k-block", "sublayers_per_block=32", 1.757),
}
PAPER = {"prenorm": 1.766, "full": 1.737, "block": 1.746}
NARROW = json.dumps(
    {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 1, "num_key_value_heads": 1},
    separators=(",", ":"),
)
# Sizes of the power-law fit: name -> (preset, overrides)
SIZES = {"200k": ("llama-800k", f"text_config={NARROW}"), "800k": ("llama-800k", ""), "2m": ("llama-2m", "")}


def runs() -> dict[str, tuple[str, str, int]]:
    """Every run's folder, preset, override and seed."""
    found = {f"small/{name}-{seed}": (f"llama-800k-{name}", "", seed) for seed in SEEDS for name in VARIANTS}
    # The later seeds were run days after the rest, and reruns differ in the third digit: they have a PreNorm of their own.
    found |= {f"ablation/prenorm-{seed}": ("llama-800k-prenorm", "", seed) for seed in SEEDS[1:]}
    found |= {
        f"ablation/{name}-{seed}": (preset, override, seed)
        for seed in SEEDS
        for name, (preset, override, _) in ABLATIONS.items()
    }
    for size, (preset, override) in SIZES.items():
        if size != "800k":  # among the first ones
            found |= {f"sizes/{size}-{name}-0": (f"{preset}-{name}", override, 0) for name in VARIANTS}
    return found


def print_commands(text: Path, output: Path, steps: int):
    script = Path(__file__).with_name("pretrain.py")
    for name, (preset, override, seed) in runs().items():
        if not (output / name / "summary.json").exists():
            command = ["python", str(script), "--preset", preset, "--seed", str(seed), "--steps", str(steps)]
            command += ["--text", str(text), "--output", str(output / name)]
            command += ["--eval-every", "200", "--save-every", str(steps)]
            print(shlex.join([*command, *(["--set", override] if override else [])]))


class Record:
    """The figures of finished runs, by the name of their folder.

    Args:
        output: folder of the runs.
        path: of a table of figures that a folder, if it is there, takes precedence over.
    """

    FIGURES = {"held_out_loss": float, "parameters": int, "training_tokens": int, "day": str}

    def __init__(self, output: Path, path: Path):
        self.figures = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    self.figures[row["run"]] = {name: kind(row[name]) for name, kind in self.FIGURES.items()}
        for name in runs():
            summary = output / name / "summary.json"
            if summary.exists():
                day = datetime.fromtimestamp(summary.stat().st_mtime, UTC).date().isoformat()
                found = json.loads(summary.read_text()) | {"day": day}
                self.figures[name] = {figure: found[figure] for figure in self.FIGURES}

    def by_seed(self, name: str, folder: str) -> dict[int, float]:
        """The losses of a variant, for the seeds that have run."""
        found = {seed: self.figures.get(f"{folder}/{name}-{seed}") for seed in SEEDS}
        return {seed: figures["held_out_loss"] for seed, figures in found.items() if figures}

    def rows(self) -> list[dict]:
        return [{"run": name, **self.figures[name]} for name in runs() if name in self.figures]


def seeds_table(record: Record) -> list[dict]:
    """Mean and spread over seeds, and the paired difference from PreNorm: same seed, weights, batches and steps.

    Of the variants that all seeds have run of, and of none before PreNorm is one of them.
    """
    losses = {
        name: list(found.values()) for name in VARIANTS if len(found := record.by_seed(name, "small")) == len(SEEDS)
    }
    rows = []
    for name, values in losses.items() if "prenorm" in losses else ():
        differences = [value - base for value, base in zip(values, losses["prenorm"])]
        row = {"variant": name, **{f"seed {seed}": value for seed, value in zip(SEEDS, values)}}
        row |= {"mean": statistics.fmean(values), "standard deviation": statistics.stdev(values)}
        row |= {"difference": statistics.fmean(differences), "its standard deviation": statistics.stdev(differences)}
        rows.append(row)
    return rows


def ablation_table(record: Record) -> list[dict]:
    """Of every row that has run: mean loss over its seeds, and the mean paired difference with its 95 % interval."""
    paper = PAPER | {name: loss for name, (_, _, loss) in ABLATIONS.items()}
    first = record.by_seed("prenorm", "small")
    bases = {"small": first, "ablation": {0: first[0]} if 0 in first else {}}
    bases["ablation"] |= record.by_seed("prenorm", "ablation")
    rows = []
    for name in paper:
        folder = "small" if name in VARIANTS else "ablation"
        losses, base = record.by_seed(name, folder), bases[folder]
        differences = [loss - base[seed] for seed, loss in losses.items() if seed in base]
        if differences:
            row = {"variant": name, **{f"seed {seed}": losses.get(seed, math.nan) for seed in SEEDS}}
            row |= {"seeds": len(differences), "held-out loss": statistics.fmean(losses.values())}
            row |= {"standard deviation": spread(list(losses.values()))}
            row |= {"difference from PreNorm": statistics.fmean(differences)}
            row |= dict(zip(("low", "high"), interval(differences)))
            rows.append(row | {"paper": paper[name], "paper's difference": paper[name] - PAPER["prenorm"]})
    return rows


def sizes_table(record: Record) -> tuple[list[dict], dict[str, tuple[float, float]]]:
    """Loss by training compute `6 * parameters * tokens`, and per variant the fit `loss = a * PFLOP^b`."""
    rows, fits = [], {}
    for name in VARIANTS:
        for size in SIZES:
            folder = f"small/{name}-0" if size == "800k" else f"sizes/{size}-{name}-0"
            if found := record.figures.get(folder):
                compute = 6 * found["parameters"] * found["training_tokens"] / 1e15
                rows.append({"variant": name, "size": size, "PFLOP": compute, "held-out loss": found["held_out_loss"]})
        points = [(row["PFLOP"], row["held-out loss"]) for row in rows if row["variant"] == name]
        if len(points) == len(SIZES):
            slope, offset = np.polyfit(*np.log(np.array(points)).T, 1)
            fits[name] = (float(np.exp(offset)), float(slope))
    return rows, fits


def draw(output: Path, sizes: list[dict], fits: dict[str, tuple[float, float]], path: Path):
    # Without pyplot: no display, and the user's backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    curves, scaling = figure.subplots(1, 2)
    for index, name in enumerate(VARIANTS):
        logged = [read_metrics(output / f"small/{name}-{seed}" / "metrics.jsonl") for seed in SEEDS]
        steps = [record["step"] for record in logged[0] if "loss" in record]
        losses = np.array([[record["loss"] for record in records if "loss" in record] for records in logged])
        curves.plot(steps, losses.mean(0), color=f"C{index}", label=name)
        curves.fill_between(steps, losses.min(0), losses.max(0), color=f"C{index}", alpha=0.2)
        points = [(row["PFLOP"], row["held-out loss"]) for row in sizes if row["variant"] == name]
        label = name
        if name in fits:
            a, b = fits[name]
            line = np.geomspace(min(points)[0], max(points)[0])
            scaling.plot(line, a * line**b, color=f"C{index}")
            label = f"{name}: {a:.2f} $C^{{{b:.3f}}}$"
        scaling.scatter(*zip(*points), color=f"C{index}", label=label)
    curves.set(xlabel="step", ylabel="training loss", title=f"{len(SEEDS)} seeds: mean and range")
    scaling.set(xlabel="training compute, PFLOP", ylabel="held-out loss", xscale="log", yscale="log")
    scaling.yaxis.set_minor_formatter("{x:.2f}")
    curves.legend()
    scaling.legend()
    figure.savefig(path, dpi=110)


def write_table(rows: list[dict], path: Path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    cells = [[f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    print(markdown_table(list(rows[0]), cells), end="\n\n")


def report(output: Path, folder: Path):
    """Tables of the runs in `output` and in `folder`'s runs.csv; the picture of losses needs the folders of its own."""
    record = Record(output, folder / "runs.csv")
    if not record.figures:
        raise ValueError(f"`--output` must hold a finished run, got {output} without one.")
    folder.mkdir(parents=True, exist_ok=True)
    sizes, fits = sizes_table(record)
    tables = {"runs": record.rows(), "seeds": seeds_table(record), "ablation": ablation_table(record), "sizes": sizes}
    for name, rows in tables.items():
        if rows:
            write_table(rows, folder / f"{name}.csv")
    drawn = [output / f"small/{name}-{seed}" / "metrics.jsonl" for name in VARIANTS for seed in SEEDS]
    if missing := [path for path in drawn if not path.exists()]:
        print(f"losses.png is not drawn: there is no {missing[0]}.")
    else:
        draw(output, sizes, fits, folder / "losses.png")


def build_parser() -> ToolParser:
    parser = ToolParser(prog="reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["commands", "report"], help="what to print")
    parser.add_shared("--output", required=True, help="folder of the runs")
    parser.add_shared("--text", help="folder of *.txt files, for `commands`")
    parser.add_shared("--steps", default=STEPS, help="of each run (default: %(default)s)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="folder for tables and pictures, for `report`")
    return parser


def run(args: argparse.Namespace) -> Result:
    if args.action == "commands":
        print_commands(args.text, args.output, args.steps)
    else:
        report(args.output, args.report)
    return Result("", None)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    args = parser.parse_args(argv)
    needed = "text" if args.action == "commands" else "report"
    if getattr(args, needed) is None:
        parser.error(f"`{args.action}` needs --{needed}")
    return run_tool(parser.prog, run, args)


if __name__ == "__main__":
    sys.exit(main())
