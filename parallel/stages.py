# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism on `torch.distributed.pipelining`, with cross-stage caching of block summaries.

Letters: B batch of one micro-batch, T tokens, D hidden size, P ranks, V virtual stages per rank, C = P * V stages.
Stage k runs on rank k mod P, as `ScheduleInterleaved1F1B` wants it.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from modeling_attnres.depth_attention_attnres import DepthAttention
from modeling_attnres.modeling_attnres import AttnResForCausalLM
from modeling_attnres.parallel.cache import CrossStageCache
from modeling_attnres.parallel.layout import PipelineLayout, stage_boundaries
from modeling_attnres.parallel.stage_module import AttnResStageModule, merge_stage_tensors


class AttnResPipelineStage(PipelineStage):
    """A `PipelineStage` whose rank keeps sources for its later virtual stages. Made by [`pipeline_stages`].

    Args:
        module: this stage's part of the model.
        cache: the cache of the rank, shared by its stages.
        micro_batch_shape: (B, T) of the token ids of a micro-batch.
        device: where the module lies.
        group: the process group of the pipeline.
        shares_embeddings: whether the model's head is tied to its embedding.
    """

    def __init__(
        self,
        module: AttnResStageModule,
        cache: CrossStageCache,
        micro_batch_shape: tuple[int, int],
        device: torch.device,
        group: dist.ProcessGroup,
        shares_embeddings: bool,
    ):
        layout, stage, text_config = module.layout, module.stage, module.config.text_config
        self.cache, self.layout, self.shares_embeddings = cache, layout, shares_embeddings
        self.micro_batch_shape = tuple(micro_batch_shape)
        self._micro_batch = 0
        # The shapes are known, so the schedule needs no forward to infer them.
        dtype = module.model.depth_attention.query.dtype

        def example(width: int) -> torch.Tensor:
            return torch.empty(*micro_batch_shape, width, dtype=dtype, device="meta", requires_grad=True)

        hidden = example(text_config.hidden_size)
        self._sent_as = (hidden.shape, hidden.dtype)
        inputs = (hidden,) * layout.tensors_received(stage)
        if module.is_first:
            inputs = (torch.empty(micro_batch_shape, dtype=torch.long, device="meta"),)
        if module.is_last:
            outputs = (example(text_config.vocab_size),)
        else:
            outputs = (hidden,) * layout.tensors_received(stage + 1)
        super().__init__(module, stage, layout.num_stages, device, input_args=inputs, output_args=outputs, group=group)

    @property
    def is_last_of_rank(self) -> bool:
        """Whether this rank has no later virtual stage."""
        return self.stage_index + self.layout.num_ranks >= self.num_stages

    def rank_of(self, stage: int) -> int:
        """The global rank that runs a stage."""
        return dist.get_global_rank(self.group, stage % self.layout.num_ranks)

    def run(self, micro_batch: int, *tensors: torch.Tensor, **kwargs):
        """The stage's forward: reads this rank's cache, adds to it, and returns what the next stage receives."""
        cached = self.cache.read(micro_batch)
        outputs, kept = super().forward_maybe_with_nosync(*tensors, cached=cached, **kwargs)
        self.cache.file(micro_batch, self.stage_index, kept)
        return outputs

    def forward_maybe_with_nosync(self, *args, **kwargs):
        outputs = self.run(self._micro_batch, *args, **kwargs)
        if not self.is_last:
            self._check_outputs(outputs)
        return outputs

    def _check_outputs(self, outputs: tuple[torch.Tensor, ...]):
        # The receiver has already allocated its buffers: a tensor of another shape would arrive garbled, or never.
        for output in outputs:
            if (output.shape, output.dtype) != self._sent_as:
                raise ValueError(
                    f"Stage {self.stage_index} was built to send tensors of {self._sent_as}, and has one of "
                    f"{(output.shape, output.dtype)} to send. (Autocast is not supported.)"
                )

    def forward_one_chunk(
        self, fwd_chunk_id: int, args, *further, **kwargs
    ):  # the arguments after these differ between versions of torch
        if self.is_first and tuple(args[0].shape) != self.micro_batch_shape:
            raise ValueError(
                f"A micro-batch must have the shape {self.micro_batch_shape} that `pipeline_stages` was given as "
                f"`micro_batch_shape`, got {tuple(args[0].shape)}."
            )
        self._micro_batch = fwd_chunk_id
        output = super().forward_one_chunk(fwd_chunk_id, args, *further, **kwargs)
        if self.is_last_of_rank and not self.has_backward:
            self.cache.drop(fwd_chunk_id)
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args, **kwargs):
        self._micro_batch = bwd_chunk_id
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False):
        """As in `PipelineStage`; what later virtual stages did with this stage's sources enters with its outputs."""
        if backward_type != "full":
            raise NotImplementedError(
                "Schedules that split the backward (zero bubble) are not supported with cross-stage caching; use "
                "ScheduleGPipe, Schedule1F1B or ScheduleInterleaved1F1B."
            )
        sources, gradients = self.cache.release(self._micro_batch, self.stage_index)
        if sources:
            bwd_kwargs = {
                **bwd_kwargs,
                "stage_output": (*bwd_kwargs["stage_output"], *sources),
                "output_grads": (*bwd_kwargs["output_grads"], *gradients),
            }
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)

    def clear_runtime_states(self):
        super().clear_runtime_states()
        self.cache.clear()


def pipeline_stages(
    model: AttnResForCausalLM,
    mesh: DeviceMesh,
    micro_batch_shape: tuple[int, int],
    virtual_stages: int = 1,
    splits: Sequence[int] | None = None,
    caching: str = "all",
    shared_embeddings: bool = False,
) -> list[AttnResPipelineStage]:
    """Splits a model into pipeline stages at decoder layers, and returns those of this rank.

    Every rank of `mesh` calls it with the same arguments. The stages hold the model's own modules: drop `model` to
    free what other ranks run, and do not use it any more.

    Args:
        model: the whole model, the same on every rank, on any device.
        mesh: one-dimensional, of P >= 2 ranks; its device type is where the stages are moved.
        micro_batch_shape: (B, T) of the token ids of every micro-batch.
        virtual_stages: V, stages per rank: 1 for `ScheduleGPipe` and `Schedule1F1B`.
        splits: the decoder layer that each stage but the first begins with, P * V - 1 of them; as even as can be if
            not given. Stages need not begin where blocks do.
        caching: which sources a rank keeps for its later virtual stages, see [`PipelineLayout`].
        shared_embeddings: must be `True` for a model whose head is tied to its embedding, and says that
            [`reduce_shared_gradients`] is called before every step of the optimizer.

    Returns:
        The V stages of this rank, in order: `rank, rank + P, ...`.

    Raises:
        ValueError: on any argument that does not fit, before any process waits for another; and on every rank if the
            ranks were given different arguments.
    """
    if mesh.ndim != 1 or mesh.size() < 2:
        raise ValueError(f"`mesh` must have one dimension of at least 2 ranks, got the shape {tuple(mesh.shape)}.")
    if not isinstance(virtual_stages, int) or virtual_stages < 1:
        raise ValueError(f"`virtual_stages` must be a positive integer, got {virtual_stages!r}.")
    if len(micro_batch_shape) != 2 or any(size < 1 for size in micro_batch_shape):
        raise ValueError(f"`micro_batch_shape` must be (batch, tokens), both positive, got {micro_batch_shape!r}.")
    _check_model(model, shared_embeddings)
    config = model.config
    layout = PipelineLayout(
        boundaries=stage_boundaries(config.text_config.num_hidden_layers, mesh.size() * virtual_stages, splits),
        num_ranks=mesh.size(),
        sublayers_per_block=config.sublayers_per_block,
        has_stream=config.depth_weights == "sum",
        caching=caching,
    )
    group = mesh.get_group()
    _check_agreement(layout, tuple(micro_batch_shape), model, group)
    device = torch.device(mesh.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, torch.get_device_module(device).current_device())
    cache, stages, is_tied = CrossStageCache(), [], _has_tied_head(model)
    for stage in range(dist.get_rank(group), layout.num_stages, layout.num_ranks):
        module = AttnResStageModule(model, layout, stage).to(device)
        stages.append(AttnResPipelineStage(module, cache, micro_batch_shape, device, group, is_tied))
    return stages


def _has_tied_head(model: AttnResForCausalLM) -> bool:
    return model.lm_head.weight is model.get_input_embeddings().weight


def _check_model(model: AttnResForCausalLM, shared_embeddings: bool):
    if not isinstance(model, AttnResForCausalLM):
        raise ValueError(f"`model` must be an AttnResForCausalLM, got {type(model).__name__}.")
    if model.config.depth_attention_type != "softmax" or type(model.model.depth_attention) is not DepthAttention:
        raise ValueError(
            "Stages take their own rows of a plain `DepthAttention`, and the model's is a "
            f"{type(model.model.depth_attention).__name__} of type {model.config.depth_attention_type!r}."
        )
    if _has_tied_head(model) and not shared_embeddings:
        raise ValueError(
            "The model's head is tied to its embedding, and they lie on different ranks. Pass "
            "`shared_embeddings=True` and call `reduce_shared_gradients(stages)` before every optimizer step."
        )
    if getattr(model.config.text_config, "output_router_logits", False):
        raise ValueError(
            "`output_router_logits=True`: the load-balancing loss needs the router logits of all layers, which no "
            "stage has. Set it to False in the backbone's config."
        )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1:
        raise ValueError(f"All parameters of `model` must have one dtype, got {sorted(map(str, dtypes))}.")


def _check_agreement(layout: PipelineLayout, micro_batch_shape, model: AttnResForCausalLM, group: dist.ProcessGroup):
    """Every rank must cut the same model at the same places, or tensors meet buffers of another count or shape."""
    mine = (layout, micro_batch_shape, str(model.dtype), model.config.text_config.hidden_size)
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    if any(other != everyone[0] for other in everyone):
        listed = "; ".join(f"rank {rank}: {given}" for rank, given in enumerate(everyone))
        raise ValueError(f"The ranks were given different splits, shapes or models: {listed}.")


def reduce_shared_gradients(stages: Sequence[AttnResPipelineStage]):
    """Sums the two gradients of a tied embedding, the first stage's and the head's on the last; all ranks call it.

    Call it once between the last backward and the step of the optimizer, whose updates then keep both copies equal.
    Nothing happens where the head has weights of its own.

    Raises:
        RuntimeError: if a gradient is missing.
    """
    for stage in stages:
        if not stage.shares_embeddings or not (stage.is_first or stage.is_last):
            continue
        module = stage.submod
        weight = module.model.embed_tokens.weight if stage.is_first else module.lm_head.weight
        if weight.grad is None:
            raise RuntimeError(
                "`reduce_shared_gradients` comes after a backward, and the shared weight has no `grad`."
            )
        peer = stage.rank_of(stage.num_stages - 1 if stage.is_first else 0)
        # Data parallelism, if used, shards both alike.
        gradient = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        received = torch.empty_like(gradient)
        exchange = [
            dist.P2POp(dist.isend, gradient.contiguous(), peer, stage.group),
            dist.P2POp(dist.irecv, received, peer, stage.group),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        gradient += received


def gather_state_dict(stages: Sequence[AttnResPipelineStage]) -> dict[str, torch.Tensor] | None:
    """The state dict of the whole model, on the CPU of the pipeline's first rank; `None` on the others, all call it.

    `AttnResForCausalLM.load_state_dict` takes it, and `save_pretrained` then writes a checkpoint. Weights that data
    parallelism shards are put together first.
    """

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()

    group = stages[0].group
    local = {
        stage.stage_index: {name: whole(tensor) for name, tensor in stage.submod.state_dict().items()}
        for stage in stages
    }
    is_target = dist.get_rank(group) == 0
    gathered: list | None = [None] * dist.get_world_size(group) if is_target else None
    dist.gather_object(local, gathered, dst=dist.get_global_rank(group, 0), group=group)
    if gathered is None:
        return None
    by_stage = {index: tensors for part in gathered for index, tensors in part.items()}
    return merge_stage_tensors(by_stage[index] for index in sorted(by_stage))
