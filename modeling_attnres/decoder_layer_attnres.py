# Copyright 2026 The modeling-attnres maintainers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A decoder layer whose residual adds attend over depth, and the loop over such layers.

Letters: B batch, T tokens, D hidden size, S sublayers per block, n sources of a mix.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer

from .backbone_attnres import LAYER_ARGUMENTS, LayerPlan, layer_attention_mask
from .compat_attnres import CACHE
from .depth_attention_attnres import DepthRead, DepthStream


class AttnResDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer of the backbone (its submodules, under their own names) whose residual adds attend over depth.

    Args:
        layer: the backbone's decoder layer.
        plan: which child plays which part, as found by probing.
        layer_idx: index of the decoder layer; it holds sublayers `2 * layer_idx` and `2 * layer_idx + 1`.
        sublayers_per_block: S.
    """

    def __init__(self, layer: nn.Module, plan: LayerPlan, layer_idx: int, sublayers_per_block: int):
        super().__init__()
        for name in (plan.mixer_norm, plan.mixer, plan.feed_forward_norm, plan.feed_forward):
            self.add_module(name, getattr(layer, name))
        self.plan = plan
        # Most token mixers take every argument of their layer under its own name.
        self.passes_all = plan.passes_kwargs and plan.mixer_arguments == {name: name for name in LAYER_ARGUMENTS}
        self.mixer_starts_block = 2 * layer_idx % sublayers_per_block == 0
        self.feed_forward_starts_block = (2 * layer_idx + 1) % sublayers_per_block == 0

    def forward(
        self,
        *tensors: torch.Tensor,
        norm_floor: torch.Tensor,
        form: Any,
        reads: tuple[DepthRead, DepthRead] | None = None,
        num_sources: int = 0,
        output_depth_weights: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor | None, ...]:
        """
        Args:
            tensors: the depth state as seen from outside (`form.outward`): under `"sum"` the residual stream comes
                first, as in a plain decoder layer, under `"mean"` what was last written to. Without `reads`, the
                layer's two folded queries `[2, D]` and `num_sources` sources `[B, T, D]` follow, so that gradient
                checkpointing recomputes phase 1 with the layer. All that carries a gradient is positional: reentrant
                checkpointing drops any other.
            norm_floor: scalar from [`DepthAttention`].
            form: how mixes over depth are computed in this forward.
            reads: what phase 1 found for the token mixer and the feed-forward.
            kwargs: the backbone's keyword arguments (masks, positions, cache).

        Returns:
            The new depth state as seen from outside, the token mixer's mix `[B, T, D]`, and the two mixes' weights
            `[B, T, n]` (or `None`).
        """
        if reads is None:
            num_state = len(tensors) - 1 - num_sources
            tensors, queries, sources = tensors[:num_state], tensors[num_state], tensors[num_state + 1 :]
            reads = form.read_sources(queries, sources, norm_floor)
        state = form.outward(tensors)
        mixer_read, feed_forward_read = reads

        mixer_input, mixer_logit = form.phase_two(mixer_read, norm_floor, *state)
        output = self._mix_tokens(getattr(self, self.plan.mixer_norm)(mixer_input), kwargs)
        state = form.advance(mixer_read, state, _as_wide_as(mixer_input, output), self.mixer_starts_block)

        hidden_states, feed_forward_logit = form.phase_two(feed_forward_read, norm_floor, *state)
        output = getattr(self, self.plan.feed_forward)(getattr(self, self.plan.feed_forward_norm)(hidden_states))
        if isinstance(output, tuple):  # a mixture of experts that returns its routing too
            output = output[0]
        state = form.advance(
            feed_forward_read, state, _as_wide_as(mixer_input, output), self.feed_forward_starts_block
        )

        weights = (None, None)
        if output_depth_weights:
            weights = (
                form.mix_weights(mixer_read, mixer_logit),
                form.mix_weights(feed_forward_read, feed_forward_logit),
            )
        return *form.outward(state), mixer_input, *weights

    def _mix_tokens(self, hidden_states: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """Calls the token mixer with the arguments its own layer would give it."""
        if not self.passes_all:
            arguments = {name: kwargs.get(source) for name, source in self.plan.mixer_arguments.items()}
            if self.plan.passes_kwargs:
                arguments.update({name: value for name, value in kwargs.items() if name not in LAYER_ARGUMENTS})
            kwargs = arguments
        output = getattr(self, self.plan.mixer)(hidden_states, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class AttnResDecoderLayers(nn.ModuleList):
    """The decoder layers of a model, none of which can be taken away: depth attention reads them all.

    A server that splits a model by its list of layers puts empty modules in the place of those that other ranks have, and
    would go on to answer with what is left.
    """

    def __setitem__(self, index: int, module: nn.Module):
        if not any(isinstance(part, AttnResDecoderLayer) for part in module.modules()):
            raise ValueError(
                f"Decoder layer {index} must stay a layer of depth attention, which reads all layers before it, got "
                f"{type(module).__name__}; for pipeline parallelism use `modeling_attnres.parallel`, in a server tensor "
                "parallelism."
            )
        super().__setitem__(index, module)


def is_recomputed(layer: nn.Module, training: bool) -> bool:
    """Whether a decoder layer may run again in backward: by the library's own checkpointing, or by what it lies in."""
    if not isinstance(layer, AttnResDecoderLayer):  # in a wrapper, such as torch's for activation checkpointing
        return torch.is_grad_enabled()
    return training and layer.gradient_checkpointing


def is_run_apart(layer: nn.Module, training: bool) -> bool:
    """Whether more than the loop has a hand in how a decoder layer runs, so that the depth state must be tensors.

    It is recomputed, or compiled by itself, or hooks look at and replace what it takes and returns.
    """
    if is_recomputed(layer, training) or not isinstance(layer, AttnResDecoderLayer):
        return True
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    compiled = layer._compiled_call_impl is not None
    return (
        compiled or "_hf_hook" in vars(layer) or any(_is_foreign(hook) for group in hooks for hook in group.values())
    )


def _is_foreign(hook: Any) -> bool:
    """Whether a hook is not FSDP2's, which gathers and frees weights and leaves the depth state alone."""
    return not (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp.")


def _as_wide_as(stream: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Under autocast a sublayer's output is narrower than the stream; sources are kept as wide as that."""
    return output if output.dtype == stream.dtype else output.to(stream.dtype)


def backbone_inputs(
    backbone: nn.Module,
    text_config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
) -> tuple[list, dict]:
    """Every decoder layer's attention mask, and the keyword arguments that the layers share.

    Args:
        backbone: holds `rotary_emb`, if the backbone has one.
        inputs_embeds: any hidden states `[B, T, D]`: only their shape, dtype and device count.
    """
    if position_ids is None:
        past_seen_tokens = cache.get_seq_length() if cache is not None else 0
        position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
        position_ids = position_ids.unsqueeze(0)
    masks = attention_mask
    if not isinstance(masks, dict):  # `generate` prepares them when the cache is static
        masks = create_masks_for_generate(text_config, inputs_embeds, masks, cache, position_ids)
    masks = [layer_attention_mask(masks, text_config, index) for index in range(text_config.num_hidden_layers)]
    layer_kwargs = {"position_ids": position_ids, CACHE: cache}
    if hasattr(backbone, "rotary_emb"):
        layer_kwargs["position_embeddings"] = backbone.rotary_emb(inputs_embeds, position_ids=position_ids)
    return masks, layer_kwargs


def run_decoder_layers(
    layers: Sequence[AttnResDecoderLayer] | Mapping[int, AttnResDecoderLayer],
    depth: DepthStream,
    state: tuple[torch.Tensor, ...],
    masks: Sequence[Any],
    training: bool,
    wanted: Container[int] = (),
    **layer_kwargs,
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Runs the decoder layers of `depth.groups`: the loop of [`AttnResModel`], or a pipeline stage's part of it.

    Args:
        layers: the decoder layers by their index in the model.
        state: the depth state at the first of them.
        masks: every decoder layer's attention mask.
        wanted: indices of the layers whose token mixer's mix is to be kept.
        layer_kwargs: the keyword arguments that the layers share.

    Returns:
        The depth state after the last layer; per layer the token mixer's mix `[B, T, D]`, or `None` where it is not
        wanted; per sublayer the weights `[B, T, n]`, or `None` where `output_depth_weights` does not ask for them.
    """
    hidden_states, depth_weights = [], []
    for first, last in depth.groups:
        group = range(first // 2, last // 2)
        recompute = any(is_recomputed(layers[index], training) for index in group)
        reads = None if recompute else depth.read(first, last)
        for index in group:
            depth_inputs, depth_kwargs = _layer_reads(depth, reads, index, first)
            *outward, mix, mixer_weights, feed_forward_weights = layers[index](
                *depth.form.outward(state),
                *depth_inputs,
                norm_floor=depth.norm_floor,
                form=depth.form,
                **depth_kwargs,
                attention_mask=masks[index],
                **layer_kwargs,
            )
            state = depth.form.outward(tuple(outward))
            hidden_states.append(mix if index in wanted else None)  # a mix not asked for is freed here
            depth_weights += (mixer_weights, feed_forward_weights)
        state = depth.close(state, next_sublayer=last)
    return state, hidden_states, depth_weights


def _layer_reads(depth: DepthStream, reads: list[DepthRead] | None, index: int, first: int) -> tuple[tuple, dict]:
    """Phase 1 of decoder layer `index` as its inputs: done, or as sources for a layer that recomputes it."""
    sublayer = 2 * index
    if reads is None:
        return (depth.queries[sublayer : sublayer + 2], *depth.sources), {"num_sources": len(depth.sources)}
    return (), {"reads": reads[sublayer - first : sublayer - first + 2]}
