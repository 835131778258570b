# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The loss table of a pruned model: figures, CSV, picture and lines for a terminal."""

import argparse
import csv
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from .pruned_checkpoint import Saved
from .pruning import CHOICES, Advantage, Cut


# By marker and line too, so that they can be told apart without colour.
STYLES = {
    "least effect": {"marker": "o", "color": "tab:blue", "linestyle": "-"},
    "random": {"marker": "s", "color": "tab:orange", "linestyle": "--"},
    "last": {"marker": "^", "color": "0.35", "linestyle": ":"},
}


def figures(
    args: argparse.Namespace,
    table: Sequence[Cut],
    effects: Sequence[float],
    advantages: dict[int, Advantage],
    chosen: Cut,
    saved: Saved,
    written: Cut,
) -> dict:
    """Everything that was measured, as plain data.

    Args:
        effects: of every unit, on the text that they are ranked on.
        advantages: by number of units.
        chosen: what was dropped.
        written: the same, of the checkpoint that was written.
    """
    nothing, *cuts = table
    rows = [
        {"drop": len(cut.dropped), "choice": cut.choice, "draw": cut.draw, "dropped": list(cut.dropped)}
        | {"loss": cut.loss, "difference": cut.loss - nothing.loss}
        for cut in cuts
    ]
    return {
        "unit": args.unit,
        "dropped": list(chosen.dropped),
        "tokens_ranked": args.sequences * args.tokens,
        "tokens_held_out": args.held_out * args.tokens,
        "loss": {"before": nothing.loss, "after": chosen.loss, "written": written.loss},
        "parameters": asdict(saved),
        "cpu_seconds": {"before": nothing.cpu_seconds, "after": written.cpu_seconds},
        "effects": list(effects),
        "table": rows,
        "better_than_random": {str(drop): asdict(found) for drop, found in advantages.items()},
    }


def write_rows(table: Sequence[Cut], path: Path):
    """Writes a row per choice; the first drops nothing."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("drop", "choice", "draw", "dropped", "loss", "difference"))
        for cut in table:
            dropped = " ".join(map(str, cut.dropped))
            difference = cut.loss - table[0].loss
            writer.writerow((len(cut.dropped), cut.choice, cut.draw, dropped, f"{cut.loss:.6f}", f"{difference:.6f}"))


def draw_table(table: Sequence[Cut], label: str, path: Path):
    """Draws what dropping units adds to the loss, every random draw as a mark and their mean as a line."""
    # Without pyplot: no display, and the user's backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    # Choices differ by orders of magnitude, and a choice may cost nothing or less.
    axis.set_yscale("symlog", linthresh=0.1, subs=(2, 5))
    added = {
        choice: [(len(cut.dropped), cut.loss - table[0].loss) for cut in table if cut.choice == choice]
        for choice in CHOICES
    }
    for choice, points in added.items():
        drops = sorted({drop for drop, _ in points})
        means = [_mean(value for of, value in points if of == drop) for drop in drops]
        axis.plot(drops, means, label="random, mean of draws" if choice == "random" else choice, **STYLES[choice])
    axis.scatter(*zip(*added["random"]), marker="s", s=14, facecolors="none", edgecolors=STYLES["random"]["color"])
    axis.axhline(0, color="black", linewidth=1)
    values = [value for points in added.values() for _, value in points]
    axis.set_ylim(min(1.3 * min(values), -0.02), max(1.5 * max(values), 0.1))
    plain = FuncFormatter(lambda value, _: f"{value:.8f}".rstrip("0").rstrip("."))
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(plain)
    axis.set_xticks(drops)
    axis.set(xlabel=label, ylabel="added to the held-out loss, nats per token")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(0, 1.1), ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def _mean(values: Collection[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def describe(found: dict, out: Path) -> str:
    """The figures as lines for a terminal."""
    parameters, loss, seconds = found["parameters"], found["loss"], found["cpu_seconds"]
    lines = [
        f"dropped     {found['unit']}s {', '.join(map(str, found['dropped']))}",
        f"parameters  {parameters['before']:,} before, {parameters['after']:,} after, {parameters['zeroed']:,} of them "
        "set to zero",
        f"CPU time    {seconds['before']:.2f} s before, {seconds['after']:.2f} s after, for {found['tokens_held_out']} "
        "tokens",
        f"loss        {loss['before']:.4f} before, {loss['after']:.4f} after (held-out text)",
        "units dropped   least effect   random (mean)   last   better than random, 95 % over draws, over text",
    ]
    for drop, advantage in found["better_than_random"].items():
        rows = [row for row in found["table"] if row["drop"] == int(drop)]
        means = [_mean(row["difference"] for row in rows if row["choice"] == choice) for choice in CHOICES]
        numbers = "   ".join(f"{value:+.4f}" for value in means)
        intervals = ", ".join("[{:+.4f}, {:+.4f}]".format(*advantage[name]) for name in ("draws", "sequences"))
        lines.append(f"{drop:>13}   {numbers}   {advantage['value']:+.4f}, {intervals}")
    return "\n".join([*lines, f"-> {out}"])
