# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The part of an AttnRes model that one pipeline stage runs, as a module.

Letters: B batch, T tokens, D hidden size, L sublayers (two per decoder layer), S sublayers per block.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.cache_utils import Cache

from modeling_attnres.block_summaries_attnres import BlockSummaries
from modeling_attnres.compat_attnres import slice_logits_to_keep
from modeling_attnres.decoder_layer_attnres import backbone_inputs, run_decoder_layers
from modeling_attnres.depth_attention_attnres import DepthAttention, DepthStream
from modeling_attnres.depth_streams_attnres import open_stream
from modeling_attnres.modeling_attnres import AttnResForCausalLM
from modeling_attnres.parallel.layout import PipelineLayout


# Each stage owns the rows of its own sublayers' queries; every other parameter lies on one stage as it is.
_DEPTH_PREFIX = "model.depth_attention."


class AttnResStageModule(nn.Module):
    """Some consecutive decoder layers of an [`AttnResForCausalLM`], with the embedding or the head at the ends.

    Its submodules are the model's own, under the model's own names; only the depth queries and key norms are new
    parameters, the rows that this stage's sublayers (and on the last stage the output mix) read.

    Args:
        model: the whole model; dropping it afterwards frees the other stages' parts.
        layout: what crosses the boundaries.
        stage: index of the stage.
    """

    def __init__(self, model: AttnResForCausalLM, layout: PipelineLayout, stage: int):
        super().__init__()
        self.config, self.layout, self.stage = model.config, layout, stage
        self.is_first, self.is_last = stage == 0, stage == layout.num_stages - 1
        self.layers = layout.layers(stage)
        whole = model.model
        self.depth_form = whole.depth_form
        self.model = nn.Module()
        if self.is_first:
            self.model.embed_tokens = whole.embed_tokens
        self.model.layers = nn.ModuleDict({str(index): whole.layers[index] for index in self.layers})
        if hasattr(whole, "rotary_emb"):
            self.model.rotary_emb = whole.rotary_emb
        if self.is_last:
            self.model.norm, self.lm_head = whole.norm, model.lm_head
        self.model.depth_attention = self._own_queries(whole.depth_attention)
        self.train(model.training)

    def _own_queries(self, depth_attention: DepthAttention) -> DepthAttention:
        # Row l - 1 serves sublayer l, the last row the output mix; sublayer 0 needs none.
        self.first_row = max(2 * self.layers.start - 1, 0)
        rows = slice(self.first_row, 2 * self.layers.stop - (not self.is_last))
        query, key_norm = depth_attention.query, depth_attention.key_norm
        with torch.device("meta"):
            own = DepthAttention(*query[rows].shape, depth_attention.eps)
        own.query = nn.Parameter(query.detach()[rows].clone(), requires_grad=query.requires_grad)
        own.key_norm = nn.Parameter(key_norm.detach()[rows].clone(), requires_grad=key_norm.requires_grad)
        return own

    def forward(
        self,
        *tensors: torch.Tensor,
        cached: tuple[torch.Tensor, ...] = (),
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """
        Args:
            tensors: on the first stage the token ids `[B, T]`; on any other what the stage before sent, each
                `[B, T, D]`: the depth state, then the sources that this rank's cache lacks.
            cached: the sources `[B, T, D]` that this rank's cache holds, which are the first ones.
            attention_mask, position_ids: `[B, T]` as for the model, the same on every stage.
            cache: a KV cache for the layers of this stage.
            logits_to_keep: how many last positions the last stage computes logits for; 0 for all.

        Returns:
            what the next stage receives (on the last stage the logits), and what this rank's cache is to keep.
        """
        if self.is_first:
            tensors = (self.model.embed_tokens(tensors[0]),)
        hidden = tensors[0]
        masks, layer_kwargs = backbone_inputs(self.model, self.config, hidden, attention_mask, position_ids, cache)
        depth = self._depth_stream(hidden)
        if self.is_first:
            state = depth.start(hidden)
        else:
            num_state = self.layout.state_tensors(self.stage)
            state = tensors[:num_state]
            depth.resume((*cached, *tensors[num_state:]))
        layers = {index: self.model.layers[str(index)] for index in self.layers}
        use_cache = cache is not None
        state, _, _ = run_decoder_layers(
            layers, depth, state, masks, self.training, use_cache=use_cache, **layer_kwargs
        )
        if self.is_last:
            hidden = slice_logits_to_keep(self.model.norm(depth.mix_output(state)[0]), logits_to_keep)
            return self.lm_head(hidden), ()
        sent = self.layout.received_sources(self.stage + 1)
        kept = self.layout.kept_sources(self.stage)
        outputs = (*state, *depth.sources[sent.start : sent.stop])
        return tuple(output.contiguous() for output in outputs), tuple(depth.sources[kept.start : kept.stop])

    def _depth_stream(self, hidden: torch.Tensor) -> DepthStream:
        folded, norm_floor = self.model.depth_attention(hidden)
        # Row 0 of the folded queries belongs to sublayer `first_row`: zeros, or a row that the stage before owns.
        below = self.config.num_sublayers + 1 - self.first_row - len(folded)
        queries = nn.functional.pad(folded, (0, 0, self.first_row, below))
        sublayers = (2 * self.layers.start, 2 * self.layers.stop)
        size = self.config.sublayers_per_block
        return open_stream(
            self.depth_form, hidden, queries, norm_floor, BlockSummaries(), size, undivided=False, sublayers=sublayers
        )


def merge_stage_tensors(stages: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors of all stages by parameter name (a state dict, or gradients), as those of the whole model.

    Args:
        stages: one dict per stage, in order of the stages.
    """
    merged, rows = {}, {}
    for tensors in stages:
        for name, tensor in tensors.items():
            if name.startswith(_DEPTH_PREFIX):
                rows.setdefault(name, []).append(tensor)
            else:
                merged[name] = tensor
    return {**merged, **{name: torch.cat(parts) for name, parts in rows.items()}}
