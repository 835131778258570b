# Copyright 2026 The modeling-attnres maintainers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Forest plot: every row's difference with its 95 % interval."""

import csv
from pathlib import Path

from matplotlib.figure import Figure

from .comparison import Average, Comparison, Row
from .report import percent


ROW_INCHES = 0.3
BETTER, WORSE, UNCLEAR = "tab:blue", "tab:red", "0.45"


def color(row: Row | Average) -> str:
    """By what the interval excludes."""
    sign = -1 if isinstance(row, Row) and not row.higher_is_better else 1
    low, high = sorted((sign * row.difference.low, sign * row.difference.high))
    return BETTER if low > 0 else WORSE if high < 0 else UNCLEAR


def draw(axes, rows: list[Row | Average], scale: float, label: str):
    places = range(len(rows))
    for place, row in zip(places, rows):
        difference = row.difference
        arms = [[scale * (difference.value - difference.low)], [scale * (difference.high - difference.value)]]
        marker = "D" if isinstance(row, Average) else "o"
        axes.errorbar(
            scale * difference.value, place, xerr=arms, fmt=marker, markersize=5, capsize=3, color=color(row)
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [row.title if isinstance(row, Average) else row.key.title for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)


def panels(comparison: Comparison) -> list[tuple[str, list[Row | Average], list[Row]]]:
    """Per variant: its name, its shares of right answers with their averages, its bits per byte."""
    found = []
    for variant in comparison.variants:
        rows = comparison.rows[variant.name]
        shares = [row for row in rows if percent(row)] + comparison.averages[variant.name]
        found.append((variant.name, shares, [row for row in rows if not percent(row)]))
    return found


def forest_plot(comparison: Comparison, path: Path):
    """Writes the plot as PNG: a column per variant, percent and bits per byte on axes of their own."""
    columns = panels(comparison)
    heights = [max(len(column[index]) for column in columns) for index in (1, 2)]
    used = [index for index in (0, 1) if heights[index]]
    # Without pyplot: no display, no global state.
    size = (7.5 * len(columns), ROW_INCHES * sum(heights) + 1.2 * len(used) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    ratios = [heights[index] + 1 for index in used]
    grid = figure.subplots(len(used), len(columns), height_ratios=ratios, squeeze=False)
    base = comparison.baseline.name
    labels = (f"difference from {base}, points of percent", f"difference from {base}, bits per byte (less is better)")
    for column, (name, *parts) in enumerate(columns):
        grid[0][column].set_title(name)
        for line, index in enumerate(used):
            draw(grid[line][column], parts[index], (100, 1)[index], labels[index])
    figure.savefig(path, dpi=150, format="png")


def write_numbers(comparison: Comparison, path: Path):
    """Writes the plot's numbers as CSV; shares are not in percent."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("variant", "row", "metric", "difference", "low", "high", "p"))
        for name, *parts in panels(comparison):
            for row in (row for part in parts for row in part):
                title, metric = (row.title, "share") if isinstance(row, Average) else (row.key.title, row.key.metric)
                item = row.difference
                writer.writerow((name, title, metric, item.value, item.low, item.high, item.p_value))
