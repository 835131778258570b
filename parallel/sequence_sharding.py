# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Sequence sharding: tensor parallelism whose depth sources are cut along the tokens.

Plain tensor parallelism keeps the residual stream, and with it the block summaries, whole on every rank: N * T * D
elements. Depth attention never looks across tokens, so here each of the P ranks holds T / P tokens of everything that
lies between two sublayers: the summaries, the open block, the stream, the mixes. Around a sublayer

    shard -> phase 2 -> norm -> all-gather -> token mixer or feed-forward -> reduce-scatter -> shard

which moves as many bytes as the all-reduce that it takes the place of. Sharded weights, kernels and collectives are the
library's: what is here is a variant of the backbone's plan, [`sequence_parallel_plan`], and the styles that it names.

Letters: B batch, T tokens, D hidden size, N blocks, P ranks.
"""

import inspect
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, RowwiseParallel, TensorParallelLayer

from modeling_attnres import AttnResConfig, AttnResForCausalLM, AttnResPreTrainedModel


# --- Moving between whole sequences and shards -----------------------------------------------------------------------


def shard_tokens(whole: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's tokens of a tensor that every rank has whole; the backward gathers.

    Args:
        whole: `[B, T, ...]`, the same on all ranks of `mesh`.

    Returns:
        `[B, ceil(T / P), ...]`. Where P does not divide T the last shards end in zeros.
    """
    return _placed(_pad_tokens(whole, mesh), mesh, Replicate()).redistribute(placements=[Shard(1)]).to_local()


def gather_tokens(shard: torch.Tensor, mesh: DeviceMesh, num_tokens: int) -> torch.Tensor:
    """The whole of a tensor that lies in shards; the backward takes this rank's part of the gradient all ranks have.

    Args:
        shard: `[B, ceil(T / P), ...]`.
        num_tokens: T, without what pads the last shards.

    Returns:
        `[B, T, ...]`.
    """
    whole = _placed(shard, mesh, Shard(1)).full_tensor()
    return whole if whole.shape[1] == num_tokens else whole[:, :num_tokens].contiguous()


def _placed(tensor: torch.Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    return DTensor.from_local(tensor, mesh, [placement], run_check=False)


def _pad_tokens(whole: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    padding = -whole.shape[1] % mesh.size()
    return nn.functional.pad(whole, (0, 0) * (whole.ndim - 2) + (0, padding)) if padding else whole


# --- Styles ----------------------------------------------------------------------------------------------------------


class ShardTokens(TensorParallelLayer):
    """On a module whose output `[B, T, D]` all ranks have: each goes on with its own tokens."""

    def transform_output_post_forward(self, module, output, mesh):
        return shard_tokens(output, mesh)


class PartialGradient(TensorParallelLayer):
    """On a replicated module that sees this rank's tokens only: the gradients of its parameters are summed.

    They are summed before they are accumulated. (The library's `replicated_with_grad_allreduce` sums what has been
    accumulated, and so counts earlier micro-batches once per rank.)
    """

    def install_forward(self, module, mesh):
        original_forward = module.forward
        hooked: dict[str, nn.Parameter] = {}

        def sum_over_ranks(gradient: torch.Tensor) -> torch.Tensor:
            return _placed(gradient, mesh, Partial()).full_tensor()

        def forward(*args, **kwargs):
            if torch.is_grad_enabled():
                for name, parameter in module.named_parameters(recurse=False):
                    # Deliberately not at installation: loading replaces the parameters.
                    if parameter.requires_grad and hooked.get(name) is not parameter:
                        parameter.register_hook(sum_over_ranks)
                        hooked[name] = parameter
            return original_forward(*args, **kwargs)

        module.forward = forward
        return module


class RowwiseScatter(RowwiseParallel):
    """On the last projection `[B, T, F / P] -> [B, T, D]` of a sublayer: a reduce-scatter in place of the all-reduce.

    The output is a `DTensor`, which says that it is a shard already; [`ShardedLayer`] unwraps it.
    """

    def __init__(self):
        super().__init__(output_layouts=Shard(1), use_local_output=False)

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        if args[0].ndim != 3:
            raise ValueError(
                "Sequence sharding wants a sublayer's last projection to take `[B, T, F]`, got "
                f"{list(args[0].shape)} at a {type(module).__name__}."
            )
        return super().transform_inputs_pre_forward(module, (_pad_tokens(args[0], mesh), *args[1:]), kwargs, mesh)


class ShardedLayer(TensorParallelLayer):
    """On an AttnRes decoder layer: its depth state and mixes are shards, its two sublayers see the whole sequence."""

    def install_forward(self, module, mesh):
        plan, num_tokens = module.plan, None
        original_forward = module.forward

        # Deliberately not a hook: a hook on a layer keeps the depth state in tensors, and S = 1 off its faster path.
        def forward(*args, **kwargs):
            nonlocal num_tokens
            num_tokens = kwargs["position_ids"].shape[-1]
            if module.training and module.gradient_checkpointing and num_tokens % mesh.size():
                # A layer that is recomputed in backward knows the length of its shard only.
                raise ValueError(
                    "Under gradient checkpointing, sequence sharding wants a multiple of the "
                    f"{mesh.size()} ranks as the number of tokens, got {num_tokens}."
                )
            return original_forward(*args, **kwargs)

        def gather(norm, args, output):
            recomputes = module.training and module.gradient_checkpointing
            return gather_tokens(output, mesh, output.shape[1] * mesh.size() if recomputes else num_tokens)

        def scatter(sublayer, args, output):
            first, *rest = output if isinstance(output, tuple) else (output,)
            first = first.to_local() if isinstance(first, DTensor) else shard_tokens(first, mesh)
            return (first, *rest) if isinstance(output, tuple) else first

        # Hooks, because the plan's own styles on these modules replace `forward` and must lie within.
        module.forward = forward
        for norm, sublayer in ((plan.mixer_norm, plan.mixer), (plan.feed_forward_norm, plan.feed_forward)):
            getattr(module, norm).register_forward_hook(gather)
            getattr(module, sublayer).register_forward_hook(scatter)
        return module


SHARDED_OUTPUTS = {"last_hidden_state", "hidden_states", "depth_weights", "block_summaries"}


class WholeOutputs(TensorParallelLayer):
    """On an AttnRes base model: what it returns is whole on every rank."""

    def install_forward(self, module, mesh):
        original_forward = module.forward
        signature = inspect.signature(original_forward)

        def gather(value: Any, num_tokens: int) -> Any:
            if isinstance(value, tuple):
                return tuple(gather(entry, num_tokens) for entry in value)
            return None if value is None else gather_tokens(value, mesh, num_tokens)

        def forward(*args, return_dict: bool | None = None, **kwargs):
            output = original_forward(*args, return_dict=True, **kwargs)
            inputs = signature.bind(*args, **kwargs).arguments
            given = inputs.get("input_ids")
            num_tokens = (inputs["inputs_embeds"] if given is None else given).shape[1]
            for name in sorted(SHARDED_OUTPUTS & output.keys()):
                output[name] = gather(output[name], num_tokens)
            return output.to_tuple() if return_dict is False else output

        module.forward = forward
        return module


STYLES = {
    "attnres_shard_tokens": ShardTokens(),
    "attnres_partial_gradient": PartialGradient(),
    "attnres_rowwise_scatter": RowwiseScatter(),
    "attnres_sharded_layer": ShardedLayer(),
    "attnres_whole_outputs": WholeOutputs(),
}
for _name, _style in STYLES.items():
    ALL_PARALLEL_STYLES.register(_name, _style)


# --- The plan --------------------------------------------------------------------------------------------------------


def sequence_parallel_plan(
    config: AttnResConfig, model_class: type[AttnResPreTrainedModel] = AttnResForCausalLM
) -> dict[str, str]:
    """The tensor parallel plan that shards a model's depth sources along the sequence.

    Forward, backward and generation give what the plain plan gives. A rank keeps `ceil(T / P)` tokens of the block
    summaries, so a prefill's summaries take `N * T / P * D` elements of it. A sublayer whose last projection the
    backbone's plan splits by rows ends in a reduce-scatter; any other (a mixture of experts) is summed as ever, and
    each rank goes on with its part.

    Args:
        config: of the model to load.
        model_class: the class that it will be loaded as: one with a head, because Transformers applies no rule to the
            outermost module.

    Returns:
        Overrides for `DistributedConfig(tp_plan=...)`, which adds the rules of the backbone that stay as they are.

    Raises:
        ValueError: if the backbone has no tensor parallel plan, or its plan rules what this one must; or if the class
            has no head.

    ```python
    >>> from transformers import AutoConfig
    >>> from transformers.distributed import DistributedConfig
    >>> from modeling_attnres import AttnResForCausalLM
    >>> from modeling_attnres.parallel import sequence_parallel_plan

    >>> plan = sequence_parallel_plan(AutoConfig.from_pretrained("my-attnres-model"))
    >>> model = AttnResForCausalLM.from_pretrained(
    ...     "my-attnres-model", distributed_config=DistributedConfig(tp_size=2, tp_plan=plan)
    ... )
    ```
    """
    if not config.text_config.base_model_tp_plan:
        raise ValueError(
            f"Backbone '{config.text_config.model_type}' has no tensor parallel plan to shard a sequence by."
        )
    with torch.device("meta"):
        model = model_class(config)
    if model.base_model is model:
        raise ValueError(
            f"`model_class` must be one with a head, such as AttnResForCausalLM, got {model_class.__name__}."
        )
    base = model.base_model_prefix
    layers = f"{base}.layers.*"
    plan = {
        base: "attnres_whole_outputs",
        f"{base}.depth_input": "attnres_shard_tokens",
        f"{base}.depth_attention": "attnres_partial_gradient",
        layers: "attnres_sharded_layer",
        f"{base}.norm": "attnres_partial_gradient",
    }
    for layer in model.base_model.layers:
        plan[f"{layers}.{layer.plan.mixer_norm}"] = "attnres_partial_gradient"
        plan[f"{layers}.{layer.plan.feed_forward_norm}"] = "attnres_partial_gradient"
    if taken := sorted(plan.keys() & model.tp_plan.keys()):
        raise ValueError(
            f"Backbone '{config.text_config.model_type}' has tensor parallel rules of its own for {', '.join(taken)}: "
            "its sequence cannot be sharded."
        )
    # Where the library sums partial gradients (the norms of split heads), it is to do so before accumulating too.
    partial = [name for name, style in model.tp_plan.items() if style == "replicated_with_grad_allreduce"]
    plan.update(dict.fromkeys(partial, "attnres_partial_gradient"))
    for layer in model.base_model.layers:
        for sublayer in (layer.plan.mixer, layer.plan.feed_forward):
            for name, _ in getattr(layer, sublayer).named_children():
                if model.tp_plan.get(projection := f"{layers}.{sublayer}.{name}") == "rowwise":
                    plan[projection] = "attnres_rowwise_scatter"
    return plan
