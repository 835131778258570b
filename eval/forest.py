# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Forest plot: every row's difference with its 95 % interval."""

import csv
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .comparison import Comparison, Model
from .paired import Difference
from .report import percent


ROW_INCHES = 0.3
BETTER, WORSE, UNCLEAR = "tab:blue", "tab:red", "0.45"
SHARES, BITS, GOLD = (
    "percentage points",
    "bits per byte (less is better)",
    "gold answers' bits per byte (less is better)",
)


@dataclass(frozen=True)
class Point:
    """One line of the plot; `difference` is in the metric's own unit, shares not in percent."""

    title: str
    difference: Difference
    higher_is_better: bool
    is_average: bool = False

    @property
    def color(self) -> str:
        """By what the interval excludes."""
        ends = (self.difference.low, self.difference.high)
        low, high = ends if self.higher_is_better else (-ends[1], -ends[0])
        return BETTER if low > 0 else WORSE if high < 0 else UNCLEAR


def panels(comparison: Comparison, variant: Model) -> dict[str, list[Point]]:
    """The variant's lines by the unit of their axis."""
    rows = comparison.rows[variant.name]
    points = {
        unit: [
            Point(row.key.title, row.difference, row.higher_is_better) for row in rows if percent(row) == in_percent
        ]
        for unit, in_percent in ((SHARES, True), (BITS, False))
    }
    points[SHARES] += [
        Point(average.title, average.difference, True, is_average=True)
        for average in comparison.averages[variant.name]
    ]
    points[GOLD] = [Point(row.key.title, row.gold_difference, False) for row in rows if row.gold_difference]
    return points


def draw(axes, points: list[Point], unit: str):
    scale = 100 if unit == SHARES else 1
    for place, point in enumerate(points):
        item = point.difference
        axes.errorbar(
            scale * item.value,
            place,
            xerr=[[scale * (item.value - item.low)], [scale * (item.high - item.value)]],
            fmt="D" if point.is_average else "o",
            markersize=5,
            capsize=3,
            color=point.color,
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(points)), [point.title for point in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.3)


def forest_plot(comparison: Comparison, path: Path):
    """Writes the plot as PNG: a column per variant, every unit on axes of its own."""
    columns = [panels(comparison, variant) for variant in comparison.variants]
    heights = {unit: max(len(column[unit]) for column in columns) for unit in columns[0]}
    heights = {unit: height for unit, height in heights.items() if height}
    # Without pyplot: no display, and the user's backend stays as it is.
    size = (7.5 * len(columns), ROW_INCHES * sum(heights.values()) + 0.8 * len(heights) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [height + 0.5 for height in heights.values()]
    grid = figure.subplots(len(heights), len(columns), height_ratios=ratios, squeeze=False)
    for place, (column, variant) in enumerate(zip(columns, comparison.variants)):
        grid[0][place].set_title(f"{variant.name} minus {comparison.baseline.name}")
        for line, unit in enumerate(heights):
            draw(grid[line][place], column[unit], unit)
    figure.savefig(path, dpi=150, format="png")


def write_numbers(comparison: Comparison, path: Path):
    """Writes the plot's numbers as CSV; shares are not in percent."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("variant", "panel", "row", "difference", "low", "high", "p"))
        for variant in comparison.variants:
            for unit, points in panels(comparison, variant).items():
                panel = "shares" if unit == SHARES else unit.removesuffix(" (less is better)")
                for point in points:
                    item = point.difference
                    writer.writerow((variant.name, panel, point.title, item.value, item.low, item.high, item.p_value))
