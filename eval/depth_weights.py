# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Depth-attention pictures: which sources every sublayer reads, averaged over tokens (the paper's Figure 8).

Letters: B batch, T tokens, L sublayers, N blocks.
"""

import csv
from pathlib import Path

import torch

from modeling_attnres import AttnResForCausalLM


@torch.no_grad()
def mean_depth_weights(model: AttnResForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """Depth weights of a model on a text, averaged over its tokens.

    Args:
        model: an AttnRes language model.
        input_ids: `[B, T]`.

    Returns:
        `[L + 1, N + 1]` in fp32, one row per sublayer and one for the output mix, each summing to 1; NaN where a
        source does not exist yet.
    """
    weights = model(input_ids, use_cache=False, logits_to_keep=1, output_depth_weights=True).depth_weights
    matrix = torch.full((len(weights), model.config.num_blocks + 1), float("nan"))
    for row, mix in zip(matrix, weights):
        average = mix.mean(dim=(0, 1))
        row[: len(average)] = average / average.sum()
    return matrix


def save_depth_heatmap(matrices: dict[str, torch.Tensor], path: Path, relative: bool = False) -> list[Path]:
    """Draws depth weights, token mixers and feed-forwards apart, and writes the numbers beside the picture.

    Args:
        matrices: title to a matrix of [`mean_depth_weights`]; one row of panels each.
        path: the PNG to write; each matrix goes to `{path stem}-{title}.csv` beside it.
        relative: whether to draw each weight times its sublayer's number of sources. Equal weights are 1 then, which
            under `depth_weights="sum"` is the plain residual stream.

    Returns:
        The files written.
    """
    # Without pyplot: no display, and the user's backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3 * len(matrices)) if relative else (11, 4.6 * len(matrices)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(matrices), 2, squeeze=False)
    shown = matrices
    if relative:
        shown = {title: matrix * matrix.isfinite().sum(1, keepdim=True) for title, matrix in matrices.items()}
    values = torch.cat([matrix[1:].flatten() for matrix in shown.values()])
    values = values[values.isfinite()]
    # A square-root scale: many sources share the weight, and their differences should show.
    scale = Normalize(values.min(), values.max()) if relative else PowerNorm(0.5, vmin=0, vmax=values.max())
    for row, (title, matrix) in zip(axes, shown.items()):
        parts = (
            ("token mixers", matrix[0:-1:2]),
            ("feed-forwards and output", torch.cat([matrix[1:-1:2], matrix[-1:]])),
        )
        for axis, (part, values) in zip(row, parts):
            image = axis.imshow(values.T, aspect="auto", origin="lower", cmap="viridis", norm=scale)
            axis.set(title=f"{title}: {part}", xlabel="decoder layer", ylabel="source (0 = embedding)")
        figure.colorbar(image, ax=list(row), label="weight x sources (1 = equal)" if relative else "mean weight")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return [path, *(_save_csv(matrix, path, title) for title, matrix in matrices.items())]


def _save_csv(matrix: torch.Tensor, path: Path, title: str) -> Path:
    target = path.with_name(f"{path.stem}-{title.replace(' ', '-')}.csv")
    names = [f"{'mixer' if index % 2 == 0 else 'feed_forward'}_{index // 2}" for index in range(len(matrix) - 1)]
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["reader", "embedding", *(f"block_{block}" for block in range(matrix.shape[1] - 1))])
        for name, row in zip([*names, "output"], matrix.tolist()):
            writer.writerow([name, *("" if value != value else f"{value:.6f}" for value in row)])
    return target
