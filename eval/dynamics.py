# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Training dynamics over depth: how large every decoder layer's output is, and its gradient (the paper's Figure 5).

Letters: B batch, T tokens, D hidden size.
"""

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass
class LayerDynamics:
    """Two figures per decoder layer, in order of depth.

    Attributes:
        output_magnitude: root mean square over channels of what the layer leaves behind, averaged over tokens: the
            residual stream of a PreNorm model, the open block's partial sum of an AttnRes model.
        gradient_norm: L2 norm of the loss's gradient with respect to all parameters of the layer.
    """

    output_magnitude: list[float]
    gradient_norm: list[float]

    @property
    def magnitude_ratio(self) -> float:
        """Largest output magnitude over the smallest: 1 if nothing grows with depth."""
        return max(self.output_magnitude) / min(self.output_magnitude)

    @property
    def gradient_variation(self) -> float:
        """Coefficient of variation of the gradient norms: 0 if all layers are trained alike."""
        return statistics.pstdev(self.gradient_norm) / statistics.fmean(self.gradient_norm)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of an AttnRes or a plain PreNorm model.

    Raises:
        ValueError: if the model keeps its layers elsewhere than Transformers' decoders do.
    """
    decoder = model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(f"`model` must be a decoder with a list of `layers`, got {type(model).__name__}.")
    return decoder.layers


def measure_dynamics(model: PreTrainedModel, input_ids: torch.Tensor) -> LayerDynamics:
    """One forward and backward of next-token loss over `input_ids` `[B, T]`, in evaluation mode.

    The model is left as it was: its mode, and its parameters' `grad`. Frozen parameters count as well.

    Raises:
        ValueError: see [`decoder_layers`]; or if the parameters are sharded by FSDP.
    """
    layers = decoder_layers(model)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    if any(type(parameter.data).__name__ == "DTensor" for parameter in parameters):
        raise ValueError("`model` must hold whole parameters, got parameters sharded over processes.")
    magnitudes: list[float] = []

    def record(layer, arguments, keywords, output):
        magnitudes.append(
            float(_left_behind(keywords.get("depth"), output).detach().float().square().mean(-1).sqrt().mean())
        )

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    training, frozen = model.training, [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            # Not `backward()`: gradients that a training loop has collected stay as they are.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.train(training)
    return LayerDynamics(magnitudes, _norm_per_layer(layers, gradients))


def _left_behind(depth, output) -> torch.Tensor:
    """The residual stream after a PreNorm layer; after an AttnRes layer, which was given a `depth`, its latest source."""
    if depth is not None:
        return depth.split(depth.outward(output[:-3]))[1][-1]
    return output[0] if isinstance(output, tuple) else output


def _norm_per_layer(layers: nn.ModuleList, gradients: tuple[torch.Tensor | None, ...]) -> list[float]:
    remaining = iter(gradients)
    norms = []
    for layer in layers:
        found = [gradient for gradient in (next(remaining) for _ in layer.parameters()) if gradient is not None]
        norms.append(float(torch.stack([gradient.float().norm() for gradient in found]).norm()) if found else 0.0)
    return norms


def save_dynamics(dynamics: dict[str, LayerDynamics], path: Path) -> list[Path]:
    """Draws both figures over depth, one line per model, and writes the numbers beside the picture.

    Args:
        dynamics: the models by their titles.
        path: the PNG to write; the numbers go to the CSV of the same name.

    Returns:
        The files written.
    """
    # Without pyplot: no display, and the user's backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    labels = (("output_magnitude", "output magnitude (RMS)"), ("gradient_norm", "gradient norm"))
    for panel, (name, label) in zip(panels, labels):
        for title, measured in dynamics.items():
            values = getattr(measured, name)
            panel.plot(range(len(values)), values, marker="o", markersize=3, label=title)
        panel.set(xlabel="decoder layer", ylabel=label, yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    table = path.with_suffix(".csv")
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "decoder_layer", "output_magnitude", "gradient_norm"])
        for title, measured in dynamics.items():
            for index, pair in enumerate(zip(measured.output_magnitude, measured.gradient_norm)):
                writer.writerow([title, index, *(f"{value:.6g}" for value in pair)])
    return [path, table]
