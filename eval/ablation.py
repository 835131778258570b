# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A forward with some depth connections weakened or removed.

Letters: B batch, T tokens, D hidden size, L sublayers, S sublayers per block, n sources of a mix.

A *depth connection* is a pair (sublayer, source): the weight that a sublayer's mix gives one of its sources. Sublayers are
counted from 0, the output mix is the last, number L. Source 0 is the embedding, then come the finished blocks in order;
the open block's partial sum is the last source.

A *gate* g is a factor on a connection: 1 leaves it alone, 0 removes it. With a the softmax of a mix, `ablate` says what a
gate does to its weights:

    "remove"    w_i = t g_i a_i / sum_j(g_j a_j),    t = 1 under "mean", t = sum_j(g_j) under "sum"
    "plain"     w_i = g_i n a_i + (1 - g_i),         under "sum" only

So "remove" takes sources out of the softmax and lets the rest sum to 1, or to how many are left. "plain" sets single weights
back to the 1 that they have in a plain residual stream, and leaves the other weights alone.
"""

import math
from collections.abc import Collection, Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_attnres.block_summaries_attnres import BlockSummaries
from modeling_attnres.configuration_attnres import AttnResConfig
from modeling_attnres.decoder_layer_attnres import backbone_inputs, run_decoder_layers
from modeling_attnres.depth_attention_attnres import DepthRead, DepthStream, State, plan_depth
from modeling_attnres.depth_variants_attnres import normed_scores
from modeling_attnres.depth_weights_attnres import accumulation_dtype, without_autocast


Connection = tuple[int, int]
ABLATIONS = ("remove", "plain")


# --- Connections -----------------------------------------------------------------------------------------------------


def num_sources(config: PreTrainedConfig, sublayer: int) -> int:
    """n of a sublayer's mix, or of the output mix for `sublayer=L`."""
    return 1 + math.ceil(sublayer / config.sublayers_per_block)


def connections(config: PreTrainedConfig) -> list[Connection]:
    """Every connection that can be removed, in order. Sublayer 0 has one source, and none to spare."""
    return [
        (sublayer, source)
        for sublayer in range(1, config.num_sublayers + 1)
        for source in range(num_sources(config, sublayer))
    ]


def check_ablation(config: PreTrainedConfig, ablate: str = "remove"):
    """Raises `ValueError` unless connections of a model with this config can be removed in this way."""
    if config.model_type != AttnResConfig.model_type:
        raise ValueError(f"`model` must have attention over depth, got one of type {config.model_type!r}.")
    if config.depth_attention_type != "softmax":
        raise ValueError(
            "`model` must mix by one softmax over depth per sublayer (depth_attention_type 'softmax'), got "
            f"{config.depth_attention_type!r}, for whose weights gates are not defined."
        )
    if ablate not in ABLATIONS:
        raise ValueError(f"`ablate` must be one of {', '.join(map(repr, ABLATIONS))}, got {ablate!r}.")
    if ablate == "plain" and config.depth_weights != "sum":
        raise ValueError(
            "`ablate='plain'` sets weights back to the plain residual stream's 1, which only a model with "
            f"depth_weights 'sum' is anchored at; got a model with {config.depth_weights!r}."
        )


def check_gates(config: PreTrainedConfig, gates: Mapping[Connection, float], ablate: str = "remove"):
    """Raises `ValueError` unless a model with this config has all these connections, and every mix keeps a source."""
    check_ablation(config, ablate)
    kept: dict[int, set[int]] = {}
    for connection, gate in gates.items():
        _check_connection(config, connection)
        if not 0 <= gate < math.inf:
            raise ValueError(f"The gate of connection {connection} must be a number of at least 0, got {gate!r}.")
        sublayer, source = connection
        kept.setdefault(sublayer, set(range(num_sources(config, sublayer))))
        if gate == 0:
            kept[sublayer].discard(source)
    for sublayer, sources in kept.items():
        if not sources and ablate == "remove":
            raise ValueError(f"Sublayer {sublayer} must keep at least one of its sources, got all of them removed.")


def _check_connection(config: PreTrainedConfig, connection: Connection):
    if not isinstance(connection, tuple) or len(connection) != 2 or not all(type(part) is int for part in connection):
        raise ValueError(f"A depth connection must be a pair (sublayer, source) of whole numbers, got {connection!r}.")
    sublayer, source = connection
    if not 0 <= sublayer <= config.num_sublayers:
        raise ValueError(
            f"A depth connection's sublayer must be from 1 to {config.num_sublayers} (the output mix), got {connection}."
        )
    if not 0 <= source < num_sources(config, sublayer):
        raise ValueError(
            f"Sublayer {sublayer} has the sources 0 to {num_sources(config, sublayer) - 1}, got {connection}."
        )
    if sublayer == 0:
        raise ValueError(f"Sublayer 0 reads the embedding alone, which cannot be removed; got {connection}.")


# --- The stream ------------------------------------------------------------------------------------------------------


class GatedRead(DepthRead):
    """What phase 1 leaves for one sublayer, and the gates of its connections: `[n, B or 1, 1]`, or `None` for none."""

    def __init__(self, gates: torch.Tensor | None, **found):
        super().__init__(**found)
        self.gates = gates


class GatedStream(DepthStream):
    """A [`DepthStream`] some of whose mixes have gates. Mixes without gates are the model's own, bit for bit.

    Args:
        gates: by sublayer (L for the output mix), `[n, B or 1, 1]`. Where all n gates of a sequence are 1, its mix is the
            model's own too.
        ablate: what a gate does, see the module.

    The other arguments are those of [`DepthStream`].
    """

    def __init__(self, *args, gates: Mapping[int, torch.Tensor], ablate: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.gates, self.ablate = gates, ablate

    def read_again(self, *found: torch.Tensor, first: int) -> list[DepthRead]:
        reads = super().read_again(*found, first=first)
        return [GatedRead(self.gates.get(sublayer), **vars(read)) for sublayer, read in enumerate(reads, first)]

    def mix(self, read: GatedRead, *state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        mix, found = super().mix(read, *state)
        if read.gates is not None:
            mix = self._gated(mix, read, torch.stack((*self.sources, *self.split(state)[1])))
        return mix, found

    @without_autocast
    def _gated(self, mix: torch.Tensor, read: GatedRead, sources: torch.Tensor) -> torch.Tensor:
        """The mix of `sources` `[n, B, T, D]` with gates, in place of `mix` `[B, T, D]`; computed as it is written."""
        values = sources.to(read.query.dtype)
        scores = normed_scores(read.query.squeeze(0), values, read.norm_floor)
        if self.ablate == "plain":
            # What a weight is beyond 1, exactly 0 where all scores are equal: the mix then stays what it is, bit for bit.
            beyond, _ = self.form.phase_one(scores)
            return (mix - ((1 - read.gates) * beyond).unsqueeze(-1).mul(values).sum(0)).to(mix.dtype)
        weights = torch.softmax(scores + read.gates.log(), dim=0)
        if self.form.anchored:
            weights = weights * read.gates.sum(0)
        gated = (weights.unsqueeze(-1) * values).sum(0).to(mix.dtype)
        return torch.where((read.gates == 1).all(0).unsqueeze(-1), mix, gated)


def open_gated_stream(
    decoder: PreTrainedModel,
    embedding: torch.Tensor,
    gates: Mapping[int, torch.Tensor],
    ablate: str,
    sublayers: tuple[int, int] | None = None,
    stream: type[GatedStream] = GatedStream,
) -> GatedStream:
    """The depth side of a forward with gates.

    Args:
        decoder: an [`AttnResModel`].
        embedding: `[B, T, D]`, or any hidden states: only their shape, dtype and device count.
        sublayers: the run `[first, last)` that is computed, whole decoder layers; all L if not given.
        stream: the class of stream.

    The other arguments are those of [`GatedStream`].
    """
    config = decoder.config
    num_sublayers, sublayers_per_block = config.num_sublayers, config.sublayers_per_block
    queries, norm_floor = (tensor.to(embedding.device) for tensor in decoder.depth_attention(embedding))
    # The sources must be separate tensors between two layers: no stream that writes its bank there.
    plan = plan_depth(embedding, num_sublayers, sublayers_per_block, undivided=False)
    return stream(
        decoder.depth_form,
        queries[: num_sublayers + 1],
        norm_floor,
        BlockSummaries(),
        sublayers_per_block,
        plan,
        sublayers,
        gates=gates,
        ablate=ablate,
    )


def run_layers(
    decoder: PreTrainedModel,
    depth: GatedStream,
    state: State,
    hidden: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> State:
    """Runs the decoder layers of `depth`, from the depth state at the first to the one after the last.

    Args:
        hidden: any hidden states `[B, T, D]`: only their shape, dtype and device count.
        attention_mask, position_ids: as for the model.
    """
    masks, layer_kwargs = backbone_inputs(decoder, decoder.config, hidden, attention_mask, position_ids, None)
    state, _, _ = run_decoder_layers(
        decoder.layers, depth, state, masks, decoder.training, use_cache=False, **layer_kwargs
    )
    return state


# --- A forward -------------------------------------------------------------------------------------------------------


def decode_gated(
    decoder: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    gates: Mapping[Connection, float],
    ablate: str = "remove",
    stream: type[GatedStream] = GatedStream,
    **inputs,
) -> tuple[torch.Tensor, GatedStream]:
    """A forward with gates up to the head.

    Args:
        decoder: an [`AttnResModel`].
        inputs_embeds: `[B, T, D]`.
        stream: the class of stream.
        inputs: `attention_mask`, `position_ids`, as for the model.

    The other arguments are those of [`forward_gated`].

    Returns:
        what the head reads `[B, T, D]`, and the stream that has run.
    """
    embedding = decoder.depth_input(inputs_embeds)
    by_sublayer: dict[int, torch.Tensor] = {}
    for (sublayer, source), gate in gates.items():
        if sublayer not in by_sublayer:
            shape = (num_sources(decoder.config, sublayer), 1, 1)
            by_sublayer[sublayer] = embedding.new_ones(shape, dtype=accumulation_dtype(embedding.dtype))
        by_sublayer[sublayer][source] = gate
    depth = open_gated_stream(decoder, embedding, by_sublayer, ablate, stream=stream)
    state = run_layers(decoder, depth, depth.start(embedding), embedding, **inputs)
    return decoder.norm(depth.mix_output(state)[0]), depth


def forward_gated(
    model: PreTrainedModel,
    gates: Mapping[Connection, float],
    *,
    ablate: str = "remove",
    input_ids: torch.LongTensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
) -> torch.Tensor:
    """The logits `[B, T, V]` of a model whose depth connections have gates.

    Without a gate other than 1 this is the model's own forward.

    Args:
        model: an AttnRes language model, `depth_attention_type="softmax"`.
        gates: the gates by connection, at least 0; connections that are not named have 1.
        ablate: what a gate does, `"remove"` or `"plain"`, see the module.
        input_ids, inputs_embeds, attention_mask, position_ids: as for the model.

    Raises:
        ValueError: if the model has no such connection, a mix would have no source left, or `ablate` does not go with the
            model.
    """
    check_gates(model.config, gates, ablate)
    gates = {connection: gate for connection, gate in gates.items() if gate != 1}
    inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
    if not gates:
        return model(input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=False, **inputs).logits
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given, got both or none.")
    decoder = model.get_decoder()
    embedding = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    hidden, _ = decode_gated(decoder, embedding, gates, ablate, **inputs)
    return model.get_output_embeddings()(hidden)


def forward_without(
    model: PreTrainedModel, removed: Collection[Connection], *, ablate: str = "remove", **inputs
) -> torch.Tensor:
    """The logits `[B, T, V]` of a model without some of its depth connections, however many at once.

    With nothing removed this is the model's own forward, bit for bit.

    Args:
        removed: the connections (sublayer, source).
        ablate: `"remove"` sets their weights to 0 and lets the rest sum to 1, or under `"sum"` to how many are left;
            `"plain"` sets their weights to 1.
        inputs: `input_ids` or `inputs_embeds`, `attention_mask`, `position_ids`, as for the model.

    Raises:
        ValueError: as [`forward_gated`].
    """
    return forward_gated(model, dict.fromkeys(removed, 0.0), ablate=ablate, **inputs)
