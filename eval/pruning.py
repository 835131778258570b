# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Which parts of depth a model can do without: the effect of each part on the loss, and the loss without several.

Letters: B batch, T tokens, D hidden size, L sublayers, S sublayers per block.

A *unit* is what is dropped or kept as a whole:

    "sublayer"  its output is 0. Its source, if it is alone in its block, is a source of zeros, which still has a weight
    "layer"     a decoder layer, with its two sublayers' queries. Those after it move up, also across borders of blocks
    "block"     the decoder layers of a block, with the block's source. All other blocks stay what they are

The effect of a unit is the loss without it minus the loss with it. Every forward here runs the model's own parts.
"""

import math
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_attnres.block_summaries_attnres import BlockSummaries
from modeling_attnres.decoder_layer_attnres import backbone_inputs, run_decoder_layers
from modeling_attnres.depth_streams_attnres import open_stream

from .ablation import check_ablation
from .causal import TOKENS_TOGETHER, sequence_losses


UNITS = ("sublayer", "layer", "block")
CHOICES = ("least effect", "random", "last")


# --- Units -----------------------------------------------------------------------------------------------------------


def units(config: PreTrainedConfig, unit: str) -> list[range]:
    """The sublayers of every unit of a model, in order."""
    size = {"sublayer": 1, "layer": 2, "block": config.sublayers_per_block}[unit]
    last = config.num_sublayers
    return [range(first, min(first + size, last)) for first in range(0, last, size)]


def check_unit(config: PreTrainedConfig, unit: str, drops: Collection[int]):
    """Raises `ValueError` unless a model with this config can do without so many units, for each of `drops`."""
    check_ablation(config)
    if unit not in UNITS:
        raise ValueError(f"`unit` must be one of {', '.join(map(repr, UNITS))}, got {unit!r}.")
    if unit == "block" and config.sublayers_per_block % 2:
        raise ValueError(
            "`unit='block'` needs blocks of whole decoder layers, an even number of sublayers; got "
            f"sublayers_per_block={config.sublayers_per_block}."
        )
    count = len(units(config, unit))
    for drop in drops:
        if not 1 <= drop < count:
            raise ValueError(f"`drop` must be from 1 to {count - 1} of the model's {count} {unit}s, got {drop}.")


def dropped_sublayers(config: PreTrainedConfig, unit: str, dropped: Collection[int]) -> set[int]:
    """The sublayers of the units of these numbers."""
    of_units = units(config, unit)
    return {sublayer for number in dropped for sublayer in of_units[number]}


def kept_layers(config: PreTrainedConfig, unit: str, dropped: Collection[int]) -> list[int]:
    """The decoder layers that are left; under `"sublayer"` all are."""
    gone = set() if unit == "sublayer" else dropped_sublayers(config, unit, dropped)
    return [layer for layer in range(config.num_hidden_layers) if 2 * layer not in gone]


# --- A forward without units -----------------------------------------------------------------------------------------


class Silent(nn.Module):
    """A token mixer or feed-forward whose output is 0."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def _layers_left(model: PreTrainedModel, unit: str, dropped: Collection[int]) -> list[nn.Module]:
    """Decoder layers of the model's own parts, at their new places."""
    config, decoder = model.config, model.get_decoder()
    gone = dropped_sublayers(config, unit, dropped)
    layers = []
    for index in kept_layers(config, unit, dropped):
        layer = decoder.layers[index]
        plan = layer.plan
        names = (plan.mixer_norm, plan.mixer, plan.feed_forward_norm, plan.feed_forward)
        parts = {name: getattr(layer, name) for name in names}
        for sublayer, name in ((2 * index, plan.mixer), (2 * index + 1, plan.feed_forward)):
            if sublayer in gone:
                parts[name] = Silent()
        layers.append(type(layer)(SimpleNamespace(**parts), plan, len(layers), config.sublayers_per_block))
    return layers


def query_rows(config: PreTrainedConfig, unit: str, dropped: Collection[int]) -> list[int]:
    """Which of the rows `[L + 1]` of folded queries the sublayers that are left have, and the output mix."""
    kept = kept_layers(config, unit, dropped)
    return [row for layer in kept for row in (2 * layer, 2 * layer + 1)] + [config.num_sublayers]


@torch.no_grad()
def losses_without(
    model: PreTrainedModel, unit: str, dropped: Collection[int], input_ids: torch.Tensor
) -> torch.Tensor:
    """The loss of a model without some units: mean nats per predicted token, `[B]` in fp64.

    Args:
        model: an AttnRes language model, in evaluation mode.
        unit: one of `UNITS`.
        dropped: the units' numbers, from 0.
        input_ids: `[B, T]`.
    """
    layers, rows = _layers_left(model, unit, dropped), query_rows(model.config, unit, dropped)
    step = max(1, TOKENS_TOGETHER // input_ids.shape[1])
    mixes = [_mix_without(model, layers, rows, unit, dropped, part) for part in input_ids.split(step)]
    return torch.cat([sequence_losses(model, mix, part) for mix, part in zip(mixes, input_ids.split(step))])


def _mix_without(model: PreTrainedModel, layers, rows: list[int], unit: str, dropped, input_ids) -> torch.Tensor:
    """The output mix `[B, T, D]` of the decoder layers that are left."""
    config, decoder = model.config, model.get_decoder()
    embedding = decoder.depth_input(decoder.embed_tokens(input_ids))
    masks, layer_kwargs = backbone_inputs(decoder, config, embedding, None, None, None)
    queries, norm_floor = (tensor.to(embedding.device) for tensor in decoder.depth_attention(embedding))
    sublayers_per_block = min(config.sublayers_per_block, 2 * len(layers))
    depth = open_stream(
        decoder.depth_form, embedding, queries[rows], norm_floor, BlockSummaries(), sublayers_per_block
    )
    masks = [masks[layer] for layer in kept_layers(config, unit, dropped)]
    state, _, _ = run_decoder_layers(
        layers, depth, depth.start(embedding), masks, decoder.training, use_cache=False, **layer_kwargs
    )
    return depth.mix_output(state)[0]


def unit_effects(model: PreTrainedModel, unit: str, input_ids: torch.Tensor) -> torch.Tensor:
    """The effect of each unit alone on the loss over `input_ids` `[B, T]`, in fp64, in the units' order."""
    count = len(units(model.config, unit))
    loss = losses_without(model, unit, (), input_ids).mean()
    # On terminals only, as every bar here.
    numbers = tqdm(range(count), desc=f"Dropping each {unit}", leave=False, disable=None)
    return torch.stack([losses_without(model, unit, (number,), input_ids).mean() for number in numbers]) - loss


# --- The loss table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Some units dropped.

    Attributes:
        choice: one of `CHOICES`.
        draw: which of the random choices, 0 for others.
        dropped: the units' numbers.
        losses: by sequence of the held-out text.
        cpu_seconds: of the forwards.
    """

    choice: str
    draw: int
    dropped: tuple[int, ...]
    losses: tuple[float, ...]
    cpu_seconds: float

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class Advantage:
    """How much lower the loss without the units of least effect is than without random ones: value and 95 % intervals.

    Attributes:
        draws: by Student's t over the random draws, the text being what it is.
        sequences: by Student's t over the sequences of the text, paired, the draws being what they are; `None` for a
            single sequence.
    """

    value: float
    draws: tuple[float, float]
    sequences: tuple[float, float] | None


def choices(effects: Sequence[float], drop: int, draws: int, seed: int) -> list[tuple[str, int, tuple[int, ...]]]:
    """What to drop: the units of least effect, different random choices, and the last units; each with its draw.

    There are `draws` random choices, or as many as there are.
    """
    count = len(effects)
    least = sorted(range(count), key=lambda number: effects[number])[:drop]
    generator, drawn = random.Random(f"{seed} {drop}"), []
    while len(drawn) < min(draws, math.comb(count, drop)):
        choice = tuple(sorted(generator.sample(range(count), drop)))
        if choice not in drawn:
            drawn.append(choice)
    of_draws = [("random", draw, choice) for draw, choice in enumerate(drawn)]
    return [("least effect", 0, tuple(sorted(least))), *of_draws, ("last", 0, tuple(range(count - drop, count)))]


def measure_cut(
    model: PreTrainedModel, unit: str, input_ids: torch.Tensor, choice: str, draw: int, dropped: tuple[int, ...]
) -> Cut:
    start = time.process_time()
    losses = tuple(losses_without(model, unit, dropped, input_ids).tolist())
    return Cut(choice, draw, dropped, losses, time.process_time() - start)


def loss_table(
    model: PreTrainedModel,
    unit: str,
    effects: Sequence[float],
    drops: Collection[int],
    input_ids: torch.Tensor,
    draws: int,
    seed: int,
) -> list[Cut]:
    """The losses over `input_ids` `[B, T]` with nothing dropped, and for each number of units by every choice."""
    wanted = [choice for drop in sorted(set(drops)) for choice in choices(effects, drop, draws, seed)]
    progress = tqdm([("nothing", 0, ()), *wanted], desc="Filling the loss table", leave=False, disable=None)
    return [measure_cut(model, unit, input_ids, *choice) for choice in progress]


def advantage(table: Sequence[Cut], drop: int) -> Advantage:
    """The units of least effect against random ones, for `drop` units."""
    from scipy import stats

    (least,) = [cut for cut in table if cut.choice == "least effect" and len(cut.dropped) == drop]
    drawn = [cut for cut in table if cut.choice == "random" and len(cut.dropped) == drop]

    def interval(values: torch.Tensor) -> tuple[float, float] | None:
        if len(values) < 2:
            return None
        half = stats.t.ppf(0.975, len(values) - 1) * values.std().item() / len(values) ** 0.5
        return values.mean().item() - half, values.mean().item() + half

    losses, ours = (
        torch.tensor(values, dtype=torch.float64) for values in ([cut.losses for cut in drawn], least.losses)
    )
    differences = losses - ours  # [draws, sequences]
    return Advantage(differences.mean().item(), interval(differences.mean(1)), interval(differences.mean(0)))
