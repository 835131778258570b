# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Table, picture and rank correlations of what depth connections are worth.

Letters: L sublayers, N blocks, n pairs.
"""

import csv
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


COLUMNS = ("sublayer", "source", "weight", "effect", "estimate")
LEVEL = 0.95
# Effects are drawn on a logarithmic scale over so many powers of ten below the largest.
DECADES = 4


@dataclass(frozen=True)
class CausalMap:
    """What the depth connections of one model are worth on a text; every map is `[L + 1, N + 1]`.

    Attributes:
        weights: mean weight over tokens, as the model uses it (a mix's sum to 1, or to their number under "sum"); NaN where
            there is no such connection.
        effects, estimates: mean nats per predicted token, NaN also where not computed; `None` if not asked for.
        ablate: what removal is, see [`modeling_attnres.eval.ablation`].
        loss: of the model, `None` without effects.
    """

    weights: torch.Tensor
    effects: torch.Tensor | None
    estimates: torch.Tensor | None
    ablate: str
    loss: float | None


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of n pairs, with its 95 % percentile bootstrap interval over the pairs."""

    value: float
    low: float
    high: float
    pairs: int


def _spearman(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    from scipy import stats  # here and below: heatmaps do without

    ranks = [stats.rankdata(values, axis=axis) for values in (first, second)]
    first, second = (rank - rank.mean(axis, keepdims=True) for rank in ranks)
    spread = np.sqrt((first**2).sum(axis) * (second**2).sum(axis))
    # A sample of equal values has no ranks.
    return np.divide((first * second).sum(axis), spread, out=np.full_like(spread, np.nan), where=spread > 0)


def rank_correlation(
    first: torch.Tensor, second: torch.Tensor, resamples: int = 9999, seed: int = 0
) -> RankCorrelation | None:
    """The rank correlation of two maps where both are finite; `None` for fewer than three pairs, or equal values."""
    from scipy import stats

    both = first.isfinite() & second.isfinite()
    pairs = tuple(values[both].double().numpy() for values in (first, second))
    if len(pairs[0]) < 3 or any(np.ptp(values) == 0 for values in pairs):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", stats.DegenerateDataWarning
        )  # of resamples of one pair repeated, left out below
        drawn = stats.bootstrap(
            pairs,
            _spearman,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=1000,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    low, high = np.nanquantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return RankCorrelation(float(_spearman(*pairs)), float(low), float(high), len(pairs[0]))


def correlations(found: CausalMap) -> dict[str, RankCorrelation | None]:
    """The rank correlations of the table's columns, by name; `None` where a column has no order."""
    columns = {"weight": found.weights, "estimate": found.estimates, "effect": found.effects}
    pairs = (("weight", "effect"), ("weight", "estimate"), ("estimate", "effect"))
    return {
        f"{first}_{second}": rank_correlation(columns[first], columns[second])
        for first, second in pairs
        if columns[first] is not None and columns[second] is not None
    }


# --- Table -----------------------------------------------------------------------------------------------------------


def write_table(found: CausalMap, path: Path):
    """A row per connection, sublayers from 0 and the output mix last; cells that were not computed are empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for sublayer, source in found.weights.isfinite().nonzero().tolist():
            cells = [f"{found.weights[sublayer, source]:.6f}"]
            for values in (found.effects, found.estimates):
                value = float("nan") if values is None else values[sublayer, source].item()
                cells.append("" if value != value else f"{value:.8g}")
            writer.writerow([sublayer, source, *cells])


# --- Picture ---------------------------------------------------------------------------------------------------------


def draw_map(found: CausalMap, title: str, path: Path):
    """Writes a PNG: weights, effects and estimates above one another on the same axes."""
    # Without pyplot: no display, and the user's backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    verb = "removal" if found.ablate == "remove" else "a weight of 1"
    panels = [(f"{title}: mean weight", found.weights, Normalize(0, _largest([found.weights])))]
    worth = [values for values in (found.effects, found.estimates) if values is not None]
    for name, values in (("effect", found.effects), ("estimated effect", found.estimates)):
        if values is not None:
            text = f"{title}: {name} of {verb} on the loss, nats per token (dots: the loss falls)"
            panels.append((text, values, _logarithmic(_largest(worth))))
    figure = Figure(figsize=(8, 2.6 * len(panels) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for axis, (name, values, norm) in zip(axes, panels):
        _draw_panel(figure, axis, values, norm)
        axis.set_title(name, fontsize=11)
        axis.set_ylabel("source")
    axes[-1].set_xlabel(f"sublayer (0 to {len(found.weights) - 2}; {len(found.weights) - 1} is the output mix)")
    figure.savefig(path, dpi=130)


def _largest(maps: list[torch.Tensor]) -> float:
    """The largest size of a finite value, for a scale."""
    sizes = torch.cat([values[values.isfinite()].abs() for values in maps])
    return max(float(sizes.max()), 1e-8) if len(sizes) else 1.0


def _logarithmic(largest: float):
    from matplotlib.colors import LogNorm

    return LogNorm(largest * 10**-DECADES, largest, clip=True)


def _draw_panel(figure, axis, values: torch.Tensor, norm):
    """A heatmap over sublayers and sources; a dot marks what the loss is better without."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    image = axis.imshow(
        values.abs().T, aspect="auto", origin="lower", cmap="viridis", norm=norm, interpolation="nearest"
    )
    sublayers, sources = (values < 0).nonzero(as_tuple=True)
    axis.scatter(sublayers, sources, s=5, color="white", edgecolors="black", linewidths=0.5)
    axis.locator_params(integer=True)
    bar = figure.colorbar(image, ax=axis, pad=0.01)
    if type(norm).__name__ == "LogNorm":
        bar.locator, bar.minorlocator = LogLocator(numticks=DECADES + 2), LogLocator(numticks=1)
        bar.formatter = FuncFormatter(lambda value, _: f"{value:.8f}".rstrip("0").rstrip("."))
        bar.update_ticks()
