# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The model without some units of depth, as a checkpoint holds it, and what must be true of its files.

Letters: L sublayers.
"""

import copy
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..conversion.checkpoint import open_checkpoint
from .pruning import dropped_sublayers, kept_layers, query_rows


# Fields of a config with an entry per decoder layer. A field that is missing here is found out by the losses.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
DEPTH = ("depth_attention.query", "depth_attention.key_norm")


class PruningError(ValueError):
    """A check of the pruned checkpoint failed; nothing was written."""


@dataclass(frozen=True)
class Saved:
    """Parameters of the checkpoints, by their files.

    Attributes:
        before, after: how many there are.
        zeroed: how many of those after were set to zero.
    """

    before: int
    after: int
    zeroed: int


@torch.no_grad()
def pruned_model(model: PreTrainedModel, unit: str, dropped: Collection[int]) -> PreTrainedModel:
    """`model` without some units, to be saved. Under `"sublayer"` it is `model` itself with weights set to zero.

    With all weights of a sublayer zero, so is its output: the last thing that it does is a product with a weight.

    Raises:
        PruningError: if the config without some layers makes a model of other layers.
    """
    if unit == "sublayer":
        layers = model.get_decoder().layers
        for sublayer in dropped:
            layer = layers[sublayer // 2]
            part = getattr(layer, layer.plan.feed_forward if sublayer % 2 else layer.plan.mixer)
            for parameter in part.parameters():
                parameter.zero_()
        return model
    kept = kept_layers(model.config, unit, dropped)
    config = copy.deepcopy(model.config)
    count = config.num_hidden_layers
    for name in PER_LAYER:
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == count:
            setattr(config, name, [values[layer] for layer in kept])
    sublayers_per_block = min(config.sublayers_per_block, 2 * len(kept))
    config.num_hidden_layers = len(kept)
    config.sublayers_per_block = sublayers_per_block
    with torch.device("meta"):
        pruned = type(model)(config)
    rows = _stored_rows(model.config, unit, dropped)
    weights = {}
    for name, tensor in model.state_dict().items():
        if (place := _new_name(name, kept)) is not None:
            weights[place] = tensor[rows] if name.endswith(DEPTH) else tensor
    try:
        pruned.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise PruningError(
            f"A model of the decoder layers that are left has other weights than they have: {error}. Nothing was written."
        ) from error
    pruned.tie_weights()
    pruned.generation_config = model.generation_config
    return pruned


def _stored_rows(config: PreTrainedConfig, unit: str, dropped: Collection[int]) -> list[int]:
    """Rows of `query` and `key_norm` that are left: row l - 1 serves sublayer l, and the first one left needs none."""
    return [row - 1 for row in query_rows(config, unit, dropped)[1:]]


def _new_name(name: str, kept: list[int]) -> str | None:
    """A tensor's name when only the decoder layers `kept` are left; `None` if it goes with its layer."""
    found = LAYER.search(name)
    if found is None:
        return name
    layer = int(found[2])
    if layer not in kept:
        return None
    return f"{name[: found.start()]}{found[1]}layers.{kept.index(layer)}.{name[found.end() :]}"


def check_written(source: Path, written: Path, config: PreTrainedConfig, unit: str, dropped: Collection[int]) -> Saved:
    """Compares the files: every tensor is the source's, bit for bit, but for what was dropped.

    Args:
        config: of the source.

    Raises:
        PruningError: naming a tensor that is missing, new or another.
    """
    before, after = open_checkpoint(source).tensors, open_checkpoint(written).tensors
    kept, rows = kept_layers(config, unit, dropped), _stored_rows(config, unit, dropped)
    gone = dropped_sublayers(config, unit, dropped) if unit == "sublayer" else set()
    expected = {place: tensor for name, tensor in before.items() if (place := _new_name(name, kept)) is not None}
    if different := sorted(expected.keys() ^ after.keys()):
        raise PruningError(f"The checkpoint must have every tensor that is left; it differs by {different[0]}.")
    zeroed, silent = 0, {sublayer // 2 for sublayer in gone}
    for name, tensor in expected.items():
        values, found = tensor.read(), after[name].read()
        if name.endswith(DEPTH):
            values = values[rows]
        if values.dtype == found.dtype and torch.equal(values, found):
            continue
        layer = LAYER.search(name)
        if layer is None or int(layer[2]) not in silent or found.shape != values.shape or found.any():
            raise PruningError(
                f"The checkpoint must have every tensor that is left as it was; '{name}' differs ({values.dtype} "
                f"before, {found.dtype} after)."
            )
        zeroed += found.numel()
    sizes = [sum(torch.Size(tensor.shape).numel() for tensor in side.values()) for side in (before, after)]
    return Saved(*sizes, zeroed)
