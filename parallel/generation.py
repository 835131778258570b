# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Greedy generation over a pipeline: forward only, every stage with the KV cache of its own layers.

Letters: B batch, T tokens of the prompt, D hidden size, P ranks, V virtual stages per rank.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from modeling_attnres.parallel.stages import AttnResPipelineStage


class StageKVCache(DynamicCache):
    """The KV cache of one stage: what it asks of a layer that another stage runs, a layer of its own answers.

    Masks and positions are made from the first layer of each kind in the model, which may lie on another stage; all
    layers of a kind have seen the same tokens.

    Args:
        config: the backbone's config.
        layers: indices of the stage's decoder layers.
    """

    def __init__(self, config: PreTrainedConfig, layers: range):
        super().__init__(config=config)
        own = {type(self.layers[index]): self.layers[index] for index in layers}
        self.layers = [
            layer if index in layers else own.get(type(layer), layer) for index, layer in enumerate(self.layers)
        ]


@torch.no_grad()
def generate_greedily(
    stages: Sequence[AttnResPipelineStage],
    input_ids: torch.Tensor,
    max_new_tokens: int,
    attention_mask: torch.Tensor | None = None,
    eos_token_id: int | None = None,
    num_micro_batches: int = 1,
) -> torch.Tensor:
    """Continues every prompt with the likeliest tokens; all ranks call it with the same arguments.

    Within a step the micro-batches follow one another through the ranks; between two steps the ranks meet, because
    every one learns the new tokens. `micro_batch_shape` of the stages plays no part here.

    Args:
        stages: this rank's, from `pipeline_stages`, in evaluation mode.
        input_ids: `[B, T]` prompts, padded on the left.
        max_new_tokens: the most tokens to add.
        attention_mask: `[B, T]`, 0 for padding.
        eos_token_id: where a sequence ends; it is filled up with this token. `None`: no sequence ends early.
        num_micro_batches: parts that the batch is cut into, a divisor of B: P of them keep every rank busy.

    Returns:
        `[B, T + new tokens]` on every rank; it ends early where every sequence has.

    Raises:
        ValueError: if the micro-batches do not divide the batch, a stage is in training mode, or there is nothing to
            add.
    """
    _check_arguments(stages, input_ids, max_new_tokens, num_micro_batches)
    device, group = stages[0].device, stages[0].group
    sequences = input_ids.to(device)
    mask = torch.ones_like(sequences) if attention_mask is None else attention_mask.to(device)
    config = stages[0].submod.config.text_config
    caches = [[StageKVCache(config, stage.submod.layers) for _ in range(num_micro_batches)] for stage in stages]
    last_rank = dist.get_global_rank(group, dist.get_world_size(group) - 1)
    ended = torch.zeros(len(sequences), 1, dtype=torch.bool, device=device)
    new = sequences
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        tokens = _step(stages, caches, new, mask, positions)
        dist.broadcast(tokens, src=last_rank, group=group)
        if eos_token_id is not None:
            tokens = tokens.masked_fill(ended, eos_token_id)
            ended |= tokens == eos_token_id
        new = tokens
        sequences = torch.cat([sequences, new], dim=1)
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        if ended.all():
            break
    return sequences


def _step(stages, caches, new, mask, positions) -> torch.Tensor:
    """One forward of the tokens `new` `[B, T]` through all stages: the next tokens `[B, 1]`, on the last rank."""
    num_micro_batches = len(caches[0])
    chunks = [tensor.chunk(num_micro_batches) for tensor in (new, mask, positions)]
    tokens, sends = [], []
    for stage, stage_caches in zip(stages, caches, strict=True):
        for micro_batch, (ids, part_mask, part_positions) in enumerate(zip(*chunks, strict=True)):
            inputs = (ids,) if stage.is_first else _receive(stage, ids.shape)
            outputs = stage.run(
                micro_batch,
                *inputs,
                attention_mask=part_mask,
                position_ids=part_positions,
                cache=stage_caches[micro_batch],
                logits_to_keep=1,
            )
            if stage.is_last:
                tokens.append(outputs.argmax(-1))
            else:
                sends += _send(stage, outputs)
    for work, _ in sends:
        work.wait()
    stages[0].cache.clear()
    return torch.cat(tokens) if tokens else new.new_empty(len(new), 1)


def _receive(stage: AttnResPipelineStage, shape: torch.Size) -> tuple[torch.Tensor, ...]:
    source = stage.rank_of(stage.stage_index - 1)
    parameter = stage.submod.model.depth_attention.query
    received = [
        parameter.new_empty(*shape, parameter.shape[-1])
        for _ in range(stage.layout.tensors_received(stage.stage_index))
    ]
    for work in [dist.irecv(tensor, src=source, group=stage.group) for tensor in received]:
        work.wait()
    return tuple(received)


def _send(stage: AttnResPipelineStage, outputs: tuple[torch.Tensor, ...]) -> list[tuple[dist.Work, torch.Tensor]]:
    # Keep each tensor beside its handle: it must live until it is sent.
    target = stage.rank_of(stage.stage_index + 1)
    return [(dist.isend(tensor, dst=target, group=stage.group), tensor) for tensor in outputs]


def _check_arguments(stages, input_ids, max_new_tokens, num_micro_batches):
    if num_micro_batches < 1 or len(input_ids) % num_micro_batches:
        raise ValueError(
            f"`num_micro_batches` must divide the batch of {len(input_ids)} prompts, got {num_micro_batches}."
        )
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be positive, got {max_new_tokens}.")
    if any(stage.submod.training for stage in stages):
        raise ValueError("`stages` must be in evaluation mode: call `stage.submod.eval()` on each.")
