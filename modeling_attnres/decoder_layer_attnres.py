# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A decoder layer whose residual adds attend over depth, and the loop over such layers.

Letters: B batch, T tokens, D hidden size, S sublayers per block, n sources of a mix.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer

from .compat_attnres import CACHE
from .depth_attention_attnres import DepthRead, DepthStream, State


# What the model's loop hands to every decoder layer; a backbone that feeds its layers anything else is refused.
LAYER_ARGUMENTS = ("attention_mask", "position_ids", CACHE, "use_cache", "position_embeddings")


@dataclass(frozen=True)
class LayerPlan:
    """How one decoder layer of the backbone is driven.

    Attributes:
        mixer_norm, mixer, feed_forward_norm, feed_forward: names of the layer's four children.
        mixer_arguments: the token mixer's argument name -> the layer's argument name it is fed from.
        passes_kwargs: whether further keyword arguments reach the token mixer.
    """

    mixer_norm: str
    mixer: str
    feed_forward_norm: str
    feed_forward: str
    mixer_arguments: dict[str, str] = field(hash=False)
    passes_kwargs: bool


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
        self.plan, self.layer_idx = plan, layer_idx
        # Most token mixers take every argument of their layer under its own name.
        self.passes_all = plan.passes_kwargs and plan.mixer_arguments == {name: name for name in LAYER_ARGUMENTS}
        self.mixer_starts_block = 2 * layer_idx % sublayers_per_block == 0
        self.feed_forward_starts_block = (2 * layer_idx + 1) % sublayers_per_block == 0

    def forward(
        self,
        *tensors: torch.Tensor,
        depth: DepthStream,
        reads: Sequence | None = None,
        num_again: int = 0,
        output_depth_weights: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor | None, ...]:
        """
        Args:
            tensors: the depth state as seen from outside (`depth.outward`): under `"sum"` the residual stream comes
                first, as in a plain decoder layer, under `"mean"` what was last written to. Without `reads`, the
                `num_again` tensors of `depth.inputs_again` follow, so that gradient checkpointing recomputes phase 1
                with the layer. All that carries a gradient is positional: reentrant checkpointing drops any other.
            depth: the depth side of this forward.
            reads: what phase 1 found for the token mixer and the feed-forward.
            kwargs: the backbone's keyword arguments (masks, positions, cache).

        Returns:
            The new depth state as seen from outside, the token mixer's mix `[B, T, D]`, and the two mixes' weights
            `[B, T, n]` (or `None`).
        """
        if reads is None:
            tensors, again = tensors[:-num_again], tensors[-num_again:]
            reads = depth.read_again(*again, first=2 * self.layer_idx)
        state = depth.outward(tensors)
        mixer_read, feed_forward_read = reads
        if not torch.compiler.is_compiling():  # code compiled for one layer serves all of them
            self._check_call(depth, mixer_read, state)

        mixer_norm, feed_forward_norm = getattr(self, self.plan.mixer_norm), getattr(self, self.plan.feed_forward_norm)
        mixer_input, normed, mixer_found = depth.mix_and_norm(mixer_read, mixer_norm, state)
        output = _in_dtype_of(mixer_input, self._mix_tokens(normed, kwargs))

        state, _, normed, feed_forward_found = depth.advance_and_mix(
            mixer_read, feed_forward_read, feed_forward_norm, state, output, self.mixer_starts_block
        )
        output = getattr(self, self.plan.feed_forward)(normed)
        if isinstance(output, tuple):  # a mixture of experts that returns its routing too
            output = output[0]
        output = _in_dtype_of(mixer_input, output)
        state = depth.advance(feed_forward_read, state, output, self.feed_forward_starts_block)

        weights = (None, None)
        if output_depth_weights:
            weights = (
                depth.mix_weights(mixer_read, mixer_found),
                depth.mix_weights(feed_forward_read, feed_forward_found),
            )
        return *depth.outward(state), mixer_input, *weights

    def _check_call(self, depth: DepthStream, read: Any, state: State):
        """Raises `ValueError` if `read` is another layer's, or `state` is not whole.

        Code that calibrates layer by layer (GPTQ) calls layers with what it caught of the model's own calls.
        """
        if not isinstance(read, DepthRead):  # of a stream that keeps its state to itself
            return
        num_tensors = depth.form.anchored + (not self.mixer_starts_block)
        if read.sublayer != 2 * self.layer_idx or len(state) != num_tensors:
            raise ValueError(
                f"Decoder layer {self.layer_idx} must be called by its model, which hands it the {num_tensors} tensors of "
                f"the depth state and what its own queries found; got {len(state)}, and what those of layer "
                f"{read.sublayer // 2} found. Layers of depth attention cannot be run one by one, as calibrated quantization "
                "does; quantize without calibration."
            )

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
    would go on to answer with what is left. The last layers may go: the output is then read by the query of the first
    sublayer that is left out.
    """

    def __setitem__(self, index: int, module: nn.Module):
        if not any(isinstance(part, AttnResDecoderLayer) for part in module.modules()):
            raise ValueError(
                f"Decoder layer {index} must stay a layer of depth attention, which reads all layers before it, got "
                f"{type(module).__name__}; for pipeline parallelism use `modeling_attnres.parallel`, in a server tensor "
                "parallelism."
            )
        super().__setitem__(index, module)

    def __delitem__(self, index: int | slice):
        kept = list(range(len(self)))
        del kept[index]
        if kept != list(range(len(kept))):
            raise ValueError(
                f"Only the last of {len(self)} decoder layers can be taken away: each has queries over depth that belong "
                f"to its place; got {index}."
            )
        super().__delitem__(index)

    def insert(self, index: int, module: nn.Module):
        raise ValueError(
            f"No decoder layer can be inserted: each has queries over depth that belong to its place; got {index}."
        )


def is_recomputed(layer: nn.Module, training: bool) -> bool:
    """Whether a decoder layer may run again in backward: by the library's own checkpointing, or by what it lies in."""
    if not isinstance(layer, AttnResDecoderLayer):  # in a wrapper, such as torch's for activation checkpointing
        return torch.is_grad_enabled()
    return training and layer.gradient_checkpointing


def is_run_apart(layer: nn.Module, training: bool) -> bool:
    """Whether more than the loop has a hand in how a decoder layer runs, so that the depth state must be tensors.

    It is recomputed, or compiled by itself, or hooks or a `forward` of somebody else's look at and replace what it takes
    and returns.
    """
    if is_recomputed(layer, training) or not isinstance(layer, AttnResDecoderLayer):
        return True
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    compiled = layer._compiled_call_impl is not None
    replaced = "_hf_hook" in vars(layer) or "forward" in vars(layer)
    return compiled or replaced or any(_is_foreign(hook) for group in hooks for hook in group.values())


def _is_foreign(hook: Any) -> bool:
    """Whether a hook is not FSDP2's, which gathers and frees weights and leaves the depth state alone."""
    return not (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp.")


def _in_dtype_of(stream: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Casts an autocast output back to the stream's dtype."""
    return output if output.dtype == stream.dtype else output.to(stream.dtype)


def layer_attention_mask(masks: Any, config: PreTrainedConfig, layer_idx: int) -> Any:
    """The mask of one layer out of `create_masks_for_generate`'s result, which is a dict where layer types differ."""
    return masks[config.layer_types[layer_idx]] if isinstance(masks, dict) else masks


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
    state: State,
    masks: Sequence[Any],
    training: bool,
    wanted: Container[int] = (),
    **layer_kwargs,
) -> tuple[State, list[torch.Tensor | None], list[torch.Tensor | None]]:
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
            again = depth.inputs_again(2 * index) if recompute else ()
            *outward, mix, mixer_weights, feed_forward_weights = layers[index](
                *depth.outward(state),
                *again,
                depth=depth,
                reads=None if recompute else reads[2 * index - first : 2 * index - first + 2],
                num_again=len(again),
                attention_mask=masks[index],
                **layer_kwargs,
            )
            state = depth.outward(tuple(outward))
            hidden_states.append(mix if index in wanted else None)  # a mix not asked for is freed here
            depth_weights += (mixer_weights, feed_forward_weights)
        state = depth.close(state, next_sublayer=last)
    return state, hidden_states, depth_weights
