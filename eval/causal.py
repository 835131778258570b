# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What every depth connection is worth: the change in loss when it is removed, exactly and to first order.

Letters: B batch, T tokens, D hidden size, L sublayers, N blocks, n sources of a mix, R ablated variants.

*Exact effects* share all that lies before a decoder layer: the depth state there is kept, and the variants that differ in
that layer's two mixes run on together, as a batch, through the remaining layers. *Estimates* are the derivative of the loss
with respect to each connection's gate at 1 (see [`modeling_attnres.eval.ablation`]), from one forward and one backward.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_attnres.depth_attention_attnres import DepthRead, State

from .ablation import (
    Connection,
    GatedStream,
    check_ablation,
    check_gates,
    connections,
    num_sources,
    open_gated_stream,
    run_layers,
)


# Tokens of all variants that run together: more of them gain nothing, and take memory.
TOKENS_TOGETHER = 2048
# Logits that are held at a time.
LOGITS_TOGETHER = 2**24


def blank_map(config) -> torch.Tensor:
    """`[L + 1, N + 1]` of NaN in fp64: a row per sublayer and one for the output mix, a column per source."""
    return torch.full((config.num_sublayers + 1, config.num_blocks + 1), float("nan"), dtype=torch.float64)


# --- Losses ----------------------------------------------------------------------------------------------------------


def _in_parts(model: PreTrainedModel, sequences: int, tokens: int) -> Iterator[slice]:
    """Slices of `sequences` whose logits are not too many at a time."""
    step = max(1, LOGITS_TOGETHER // (tokens * model.config.vocab_size))
    return (slice(first, first + step) for first in range(0, sequences, step))


def _part_loss(model: PreTrainedModel, mix: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats by sequence `[B]` that the output mix `[B, T, D]` leaves for the next tokens `[B, T - 1]`, summed."""
    logits = model.get_output_embeddings()(model.get_decoder().norm(mix[:, :-1])).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).sum(-1)


def sequence_losses(model: PreTrainedModel, mix: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean nats per predicted token, by sequence.

    Args:
        mix: `[B, T, D]`, the output mix.
        input_ids: `[B, T]`.

    Returns:
        `[B]` in fp64.
    """
    targets = input_ids[:, 1:]
    parts = [_part_loss(model, mix[part], targets[part]).double() for part in _in_parts(model, *mix.shape[:2])]
    return torch.cat(parts) / targets.shape[1]


# --- Exact effects ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """Everything that lies before a decoder layer.

    Attributes:
        layer: index of the decoder layer.
        state: the depth state, each `[B, T, D]`.
        sources: the finished sources, each `[B, T, D]`.
    """

    layer: int
    state: State
    sources: Sequence[torch.Tensor]

    def repeated(self, times: int) -> "Snapshot":
        state, sources = ([tensor.repeat(times, 1, 1) for tensor in part] for part in (self.state, self.sources))
        return Snapshot(self.layer, tuple(state), sources)


def _run(decoder: PreTrainedModel, start: Snapshot, last: int, gates: dict, ablate: str) -> tuple[GatedStream, State]:
    """The decoder layers from `start` to before `last`."""
    hidden = start.sources[0]
    depth = open_gated_stream(decoder, hidden, gates, ablate, sublayers=(2 * start.layer, 2 * last))
    depth.resume(start.sources)
    return depth, run_layers(decoder, depth, start.state, hidden)


def _variants(
    model: PreTrainedModel, start: Snapshot, removed: Sequence[Connection], input_ids: torch.Tensor, ablate: str
) -> torch.Tensor:
    """The losses `[R]` of the model without each of R connections, which belong to the layer of `start` or come later."""
    decoder, batch = model.get_decoder(), len(input_ids)
    gates: dict[int, torch.Tensor] = {}
    for variant, (sublayer, source) in enumerate(removed):
        if sublayer not in gates:
            shape = (num_sources(model.config, sublayer), len(removed) * batch, 1)
            gates[sublayer] = torch.ones(shape, device=input_ids.device)
        gates[sublayer][source, variant * batch : (variant + 1) * batch] = 0
    depth, state = _run(decoder, start.repeated(len(removed)), decoder.config.num_hidden_layers, gates, ablate)
    losses = sequence_losses(model, depth.mix_output(state)[0], input_ids.repeat(len(removed), 1))
    return losses.view(len(removed), batch).mean(-1)


@torch.no_grad()
def causal_effects(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    ablate: str = "remove",
    wanted: Collection[Connection] | None = None,
    tokens_together: int = TOKENS_TOGETHER,
) -> tuple[torch.Tensor, float]:
    """The effect of every depth connection: the loss without it minus the loss with it.

    Args:
        model: an AttnRes language model, in evaluation mode.
        input_ids: `[B, T]`, T at least 2.
        ablate: what removal is, see [`modeling_attnres.eval.ablation`].
        wanted: the connections to remove, one at a time; all if not given.
        tokens_together: how many tokens of variants run together, at least one variant.

    Returns:
        `[L + 1, N + 1]` in fp64, mean nats per predicted token, NaN where there is no such connection or it was not wanted;
        and the loss of the model.

    Raises:
        ValueError: for connections that the model has not, or an `ablate` that does not go with it.
    """
    config, decoder = model.config, model.get_decoder()
    wanted = connections(config) if wanted is None else sorted(set(wanted))
    for connection in wanted:
        check_gates(config, {connection: 0.0}, ablate)
    check_ablation(config, ablate)
    effects, num_layers = blank_map(config), config.num_hidden_layers
    by_layer: list[list[Connection]] = [[] for _ in range(num_layers)]
    for connection in wanted:  # those of the output mix run with the last layer's
        by_layer[min(connection[0] // 2, num_layers - 1)].append(connection)

    embedding = decoder.depth_input(decoder.embed_tokens(input_ids))
    snapshot = Snapshot(0, (embedding,) * decoder.depth_form.anchored, [embedding])
    rows = max(1, tokens_together // input_ids.numel())
    # On terminals only, as every bar here.
    with tqdm(total=len(wanted), desc="Removing connections", leave=False, disable=None) as progress:
        for layer, removed in enumerate(by_layer):
            for first in range(0, len(removed), rows):
                part = removed[first : first + rows]
                effects[tuple(zip(*part))] = _variants(model, snapshot, part, input_ids, ablate).cpu()
                progress.update(len(part))
            depth, state = _run(decoder, snapshot, layer + 1, {}, ablate)
            snapshot = Snapshot(layer + 1, state, depth.sources)
    loss = sequence_losses(model, depth.mix_output(state)[0], input_ids).mean().item()
    return effects - loss, loss


# --- Estimates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordedMix:
    """One mix of a forward: `mix` `[B, T, D]` with its graph, `weights` `[B, T, n]`, the n `sources` `[B, T, D]`."""

    mix: torch.Tensor
    weights: torch.Tensor
    sources: tuple[torch.Tensor, ...]


class RecordedStream(GatedStream):
    """A stream that keeps every mix, in order of sublayers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recorded: list[RecordedMix] = []

    def mix(self, read: DepthRead, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        mix, found = super().mix(read, *state)
        sources = (*self.sources, *self.split(state)[1])
        self.recorded.append(RecordedMix(mix, self.mix_weights(read, found).detach(), sources))
        return mix, found


@torch.no_grad()
def gate_derivatives(mix: RecordedMix, gradient: torch.Tensor, anchored: bool, ablate: str) -> torch.Tensor:
    """The derivative of the loss by each gate of a mix, at gates of 1.

    With `h = sum_i w_i v_i`, `dh / dg_i` is `w_i (v_i - h)` under "mean", where the rest of the weights takes what a source
    loses; `w_i v_i + (1 - w_i) h / n` under "sum", where it is also rescaled to their new number; and `(w_i - 1) v_i` for
    `ablate="plain"`.

    Args:
        mix: of n sources.
        gradient: `[B, T, D]`, of the loss by the mix.
        anchored: whether the model's form is "sum".

    Returns:
        `[n]` in fp64.
    """
    weights, n = mix.weights.movedim(-1, 0), len(mix.sources)
    gradient = gradient.to(weights.dtype)
    of_sources = torch.stack([(source.to(weights.dtype) * gradient).sum(-1) for source in mix.sources])
    of_mix = (mix.mix.to(weights.dtype) * gradient).sum(-1)
    if ablate == "plain":
        by_token = (weights - 1) * of_sources
    elif anchored:
        by_token = weights * of_sources + (1 - weights) * of_mix / n
    else:
        by_token = weights * (of_sources - of_mix)
    return by_token.sum((1, 2), dtype=torch.float64)


def causal_estimates(model: PreTrainedModel, input_ids: torch.Tensor, *, ablate: str = "remove") -> torch.Tensor:
    """The effects of [`causal_effects`] to first order, all from one forward and one backward.

    The gate of a connection goes from 1 to 0, so its effect is about minus the derivative of the loss by the gate.

    Args:
        model: an AttnRes language model, in evaluation mode. Its parameters get no gradients.
        input_ids, ablate: as in [`causal_effects`].

    Returns:
        `[L + 1, N + 1]` in fp64, NaN where there is no such connection.

    Raises:
        ValueError: if `ablate` does not go with the model.
    """
    config, decoder = model.config, model.get_decoder()
    check_ablation(config, ablate)
    with torch.enable_grad():
        # The graph begins here, and not at the parameters, whose gradients nobody asks for.
        embedding = decoder.depth_input(decoder.embed_tokens(input_ids)).detach().requires_grad_()
        depth = open_gated_stream(decoder, embedding, {}, ablate, stream=RecordedStream)
        output, _ = depth.mix_output(run_layers(decoder, depth, depth.start(embedding), embedding))
        gradients = [_output_gradient(model, output, input_ids)]
        inner = [recorded.mix for recorded in depth.recorded[1:-1]]
        gradients = [*torch.autograd.grad(output, inner, gradients), *gradients]
    estimates = blank_map(config)
    for sublayer, (recorded, gradient) in enumerate(zip(depth.recorded[1:], gradients, strict=True), 1):
        derivatives = gate_derivatives(recorded, gradient, decoder.depth_form.anchored, ablate)
        estimates[sublayer, : len(derivatives)] = -derivatives.cpu()
    return estimates


def _output_gradient(model: PreTrainedModel, output: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """The gradient `[B, T, D]` of the mean loss by the output mix, without all logits at a time."""
    gradients = []
    for part in _in_parts(model, *output.shape[:2]):
        mix = output[part].detach().requires_grad_()
        loss = _part_loss(model, mix, input_ids[part, 1:]).sum() / input_ids[:, 1:].numel()
        gradients += torch.autograd.grad(loss, mix)
    return torch.cat(gradients)
