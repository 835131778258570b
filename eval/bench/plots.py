# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a sweep: cost of depth attention against tokens, blocks and depth."""

from pathlib import Path

from .timing import Timing


AXES = {"T": "tokens T (L = {L}, S = {S})", "N": "blocks N (T = 512, L = {L})", "L": "sublayers L (T = 512, S = {S})"}
CURVES = {
    "mean": ("two-phase, mean", "C0", "o"),
    "sum": ("two-phase, sum", "C2", "s"),
    "figure2": ("Figure 2", "C3", "^"),
}


def plot_sweep(timings: dict[str, dict[str, Timing]], path: Path, num_sublayers: int, sublayers_per_block: int):
    """Three log-log panels of CPU milliseconds per forward: medians, with quartiles as a band.

    Args:
        timings: from `published.sweep_mixers`.
        path: the PNG to write.
        num_sublayers, sublayers_per_block: what the sweep held fixed, for the labels.
    """
    # Without pyplot: no display, and the user's backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4))
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, (axis, label) in zip(panels, AXES.items()):
        cases = {
            int(name.partition("=")[2]): case for name, case in timings.items() if name.startswith(f"mixer {axis}=")
        }
        for form, (title, colour, marker) in CURVES.items():
            quartiles = [cases[value][form].quartiles("cpu") for value in cases]
            low, median, high = ([1e3 * entry[part] for entry in quartiles] for part in range(3))
            panel.plot(list(cases), median, color=colour, marker=marker, label=title)
            panel.fill_between(list(cases), low, high, color=colour, alpha=0.2, linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(list(cases), [str(value) for value in cases])
        panel.minorticks_off()
        panel.set_xlabel(label.format(L=num_sublayers, S=sublayers_per_block))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("depth attention, CPU ms per forward")
    panels[0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
