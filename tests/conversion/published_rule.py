# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Depth attention as Kimi K3 and flash-linear-attention publish it, transcribed around the library's layers."""

import torch
from torch import nn


EPS = 1e-5


def published_mix(sources: list[torch.Tensor], proj: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    values = torch.stack(sources).float()
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + EPS)
    probabilities = (keys * (norm.float() * proj.float().squeeze(0))).sum(-1).softmax(0)
    return (probabilities.unsqueeze(-1) * values).sum(0)


class PublishedLayer(nn.Module):
    """A decoder layer as Kimi K3 and flash-linear-attention publish it: it takes and returns the running prefix.

    `units` decide where blocks begin: whole layers for K3, sublayers for fla.
    """

    def __init__(self, layer, index: int, tensors: dict, names: tuple[str, str], bank: list, sublayers_per_block: int):
        super().__init__()
        self.layer, self.index, self.tensors, self.names, self.bank = layer, index, tensors, names, bank
        self.sublayers_per_block = sublayers_per_block

    def mix(self, prefix, name: str):
        stem = f"model.layers.{self.index}.{name}"
        return published_mix(
            [*self.bank, prefix], *(self.tensors[f"{stem}_{part}.weight"] for part in ("proj", "norm"))
        )

    def sublayer(self, prefix, number: int, run):
        if number == 0:
            self.bank.clear()  # a new forward
        mixed = prefix if number == 0 else self.mix(prefix, self.names[number % 2])
        if number % self.sublayers_per_block == 0:
            self.bank.append(prefix)
            return run(mixed)
        return prefix + run(mixed)

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        def attend(mixed):
            output = self.layer.self_attn(hidden_states=self.layer.input_layernorm(mixed), **kwargs)
            return output[0] if isinstance(output, tuple) else output

        prefix = self.sublayer(hidden_states, 2 * self.index, attend)
        return self.sublayer(
            prefix, 2 * self.index + 1, lambda mixed: self.layer.mlp(self.layer.post_attention_layernorm(mixed))
        )


def published_model(model, tensors: dict, names: tuple[str, str], output: str, sublayers_per_block: int):
    """The library's PreNorm model with its layers' residual adds replaced by the published rule."""
    bank: list[torch.Tensor] = []
    layers = [
        PublishedLayer(layer, index, tensors, names, bank, sublayers_per_block)
        for index, layer in enumerate(model.model.layers)
    ]
    model.model.layers = nn.ModuleList(layers)
    final_norm = model.model.norm
    model.model.norm = nn.Module()
    parts = [tensors[f"model.{output}_{part}.weight"] for part in ("proj", "norm")]
    model.model.norm.forward = lambda prefix: final_norm(published_mix([*bank, prefix], *parts))
    return model
