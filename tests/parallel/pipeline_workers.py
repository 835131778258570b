# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What single ranks do in the pipeline tests."""

import gc
import os
import signal
import time
import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tiny_backbones import tiny_inputs, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleLoopedBFS

from modeling_attnres.parallel import gather_state_dict, pipeline_stages, reduce_shared_gradients
from modeling_attnres.parallel.count_bytes import count_caching, count_step
from modeling_attnres.parallel.generation import generate_greedily
from modeling_attnres.parallel.stage_module import merge_stage_tensors


MICRO_BATCHES = 4
SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "looped": ScheduleLoopedBFS,  # GPipe for several stages per rank
}


@dataclass(frozen=True)
class Case:
    """A model, how it is cut, and the schedule that runs it."""

    sublayers_per_block: int = 2
    depth_weights: str = "mean"
    virtual_stages: int = 1
    schedule: str = "1f1b"
    splits: tuple[int, ...] | None = None
    caching: str = "all"
    dtype: torch.dtype = torch.float64
    num_layers: int = 6
    model_type: str = "llama"
    tied: bool = False
    checkpointing: str | None = None
    padded: bool = False
    frozen: bool = False


def build_model(case: Case):
    """A tiny model in training mode whose arithmetic is that of its dtype throughout."""
    model = tiny_model(
        case.model_type,
        case.sublayers_per_block,
        case.depth_weights,
        num_hidden_layers=case.num_layers,
        tie_word_embeddings=case.tied,
    ).to(case.dtype)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):  # the library's computes in fp32 even in an fp64 model
            parent, _, child = name.rpartition(".")
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=case.dtype)
            norm.weight = module.weight
            setattr(model.get_submodule(parent), child, norm)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    if case.frozen:  # the first stages have nothing to train
        model.requires_grad_(False)
        model.model.layers[-2].requires_grad_(True)
    return model.train()


def loss_fn(logits, labels):
    """Next-token cross-entropy in the dtype of the logits (the library's is in fp32)."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def batch_for(case: Case):
    """Token ids `[B, T]` and the keyword arguments of the model."""
    input_ids = tiny_inputs(2 * MICRO_BATCHES, 6)
    if not case.padded:
        return input_ids, {}
    mask = torch.ones_like(input_ids)
    mask[::2, :2] = 0
    return input_ids, {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def single_process(case: Case):
    """Losses per micro-batch, and gradients by name, of the model in one piece."""
    model = build_model(case)
    input_ids, kwargs = batch_for(case)
    losses = []
    for index, part in enumerate(input_ids.chunk(MICRO_BATCHES)):
        part_kwargs = {name: tensor.chunk(MICRO_BATCHES)[index] for name, tensor in kwargs.items()}
        loss = loss_fn(model(part, **part_kwargs).logits, part)
        (loss / MICRO_BATCHES).backward()
        losses.append(loss.detach())
    return torch.stack(losses), {name: parameter.grad for name, parameter in model.named_parameters()}


def build_stages(mesh, case: Case, micro_batch_shape=(2, 6)):
    return pipeline_stages(
        build_model(case),
        mesh,
        micro_batch_shape,
        virtual_stages=case.virtual_stages,
        splits=case.splits,
        caching=case.caching,
        shared_embeddings=case.tied,
    )


def build_schedule(stages, case: Case):
    schedule_class = SCHEDULES[case.schedule]
    multiple = schedule_class in (ScheduleInterleaved1F1B, ScheduleLoopedBFS)
    return schedule_class(stages if multiple else stages[0], MICRO_BATCHES, loss_fn)


def run_step(schedule, stages, input_ids, kwargs) -> list[torch.Tensor]:
    """One step on this rank; the losses, on the rank of the last stage."""
    losses = []
    inputs = (input_ids,) if stages[0].is_first else ()
    last = {"target": input_ids, "losses": losses} if stages[-1].is_last else {}
    schedule.step(*inputs, **last, **kwargs)
    return losses


def gather(stages, local: dict) -> dict | None:
    """Per-stage values of all ranks in order of stages, on rank 0."""
    parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(local, parts)
    if parts is None:
        return None
    merged = {index: value for part in parts for index, value in part.items()}
    return dict(sorted(merged.items()))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-30)).item()


def training_errors(mesh, cases: list[Case]) -> list[dict]:
    """On rank 0: the largest relative errors of losses and gradients, and what the caches still hold."""
    results = []
    for case in cases:
        stages = build_stages(mesh, case)
        losses = run_step(build_schedule(stages, case), stages, *batch_for(case))
        if case.tied:
            reduce_shared_gradients(stages)
        gradients = gather(
            stages,
            {
                stage.stage_index: {n: p.grad for n, p in stage.submod.named_parameters() if p.requires_grad}
                for stage in stages
            },
        )
        extra = gather(stages, {stages[-1].stage_index: (losses, len(stages[0].cache))})
        if gradients is None:
            continue
        expected_losses, expected = single_process(case)
        losses = next(losses for losses, _ in extra.values() if losses)
        found = merge_stage_tensors(gradients.values())
        expected = {name: gradient for name, gradient in expected.items() if gradient is not None}
        if case.tied:
            assert torch.equal(found.pop("lm_head.weight"), found["model.embed_tokens.weight"])
        assert found.keys() == expected.keys()
        results.append(
            {
                "case": case,
                "loss": relative_error(torch.stack(losses).detach(), expected_losses),
                "gradient": max(relative_error(found[name], expected[name]) for name in expected),
                "cached": sum(cached for _, cached in extra.values()),
            }
        )
    return results


def bytes_sent(mesh, cases: list[Case]) -> list[tuple]:
    """Per case, in vectors `[D]` per token: counted forward and backward, and by the layout (state, sources)."""
    results = []
    for case in cases:
        stages = build_stages(mesh, case)
        input_ids = batch_for(case)[0][:4]  # two micro-batches
        vector = input_ids.numel() * 32 * case.dtype.itemsize
        forward, backward = count_step(stages, input_ids, 2)
        layout = stages[0].layout
        states = sum(map(layout.state_tensors, range(layout.num_stages)))
        sources = sum(len(layout.received_sources(stage)) for stage in range(layout.num_stages))
        results.append((forward / vector, backward / vector, states, sources))
    return results


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_over_steps(mesh, case: Case, steps: int) -> dict:
    """Resident memory after a fifth of the steps and after all, sources still cached, and filed sources that outlived their step."""
    shape = (4, 64)
    stages = build_stages(mesh, case, shape)
    schedule = build_schedule(stages, case)
    input_ids = tiny_inputs(shape[0] * MICRO_BATCHES, shape[1])
    filed, cached, resident = [], [], {}
    file = stages[0].cache.file

    def recording_file(micro_batch, stage, sources):
        filed.extend(weakref.ref(source) for source in sources)
        file(micro_batch, stage, sources)

    stages[0].cache.file = recording_file
    for step in range(1, steps + 1):
        run_step(schedule, stages, input_ids, {})
        for stage in stages:
            stage.submod.zero_grad()
        cached.append(len(stages[0].cache))
        if step in (steps // 5, steps):
            gc.collect()
            resident[step] = resident_bytes()
    source_bytes = shape[0] * shape[1] * 32 * case.dtype.itemsize
    return {
        "filed": len(filed),
        "filed_bytes": len(filed) * source_bytes,
        "cached": max(cached),
        # The outputs of a step stay with torch's stages until the next step begins.
        "alive": sum(reference() is not None for reference in filed[: -len(filed) // steps]),
        "grown": resident[steps] - resident[steps // 5],
    }


def generation_matches(mesh, cases: list[Case], num_micro_batches: int) -> list[bool]:
    """Whether greedy generation, with and without padding, equals the single process's `generate`."""
    results = []
    for case in cases:
        model = tiny_model(
            case.model_type, case.sublayers_per_block, case.depth_weights, num_hidden_layers=case.num_layers
        )
        input_ids = tiny_inputs(4, 6)
        mask = torch.ones_like(input_ids)
        mask[0, :2] = 0
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "pad_token_id": 5}
        endless = model.generate(input_ids, eos_token_id=None, **options)
        eos_token_id = endless[0, 8].item()  # a token that comes up, so that one sequence ends early
        ended = model.generate(input_ids, **{**options, "eos_token_id": eos_token_id, "pad_token_id": eos_token_id})
        stages = pipeline_stages(
            model, mesh, (2, 6), case.virtual_stages, case.splits, case.caching, shared_embeddings=True
        )
        for eos, expected in ((None, endless), (eos_token_id, ended)):
            found = generate_greedily(stages, input_ids, 8, mask, eos, num_micro_batches)
            results.append(torch.equal(found, expected) and len(stages[0].cache) == 0)
    return results


def forward_only(mesh, case: Case) -> float:
    """On the last rank: error of the logits that `schedule.eval` returns, after a training step and without one."""
    stages = build_stages(mesh, case)
    schedule = build_schedule(stages, case)
    input_ids, kwargs = batch_for(case)
    run_step(schedule, stages, input_ids, kwargs)
    inputs = (input_ids,) if stages[0].is_first else ()
    target = {"target": input_ids} if stages[-1].is_last else {}
    logits = schedule.eval(*inputs, **target, **kwargs)
    assert len(stages[0].cache) == 0
    if logits is None:
        return 0.0
    return relative_error(logits, build_model(case)(input_ids, **kwargs).logits)


def optimizer_steps(mesh, case: Case, steps: int) -> float | None:
    """On rank 0: error of the gathered weights after some steps of AdamW, against the model in one piece."""
    stages = build_stages(mesh, case)
    schedule = build_schedule(stages, case)
    input_ids, kwargs = batch_for(case)
    optimizer = torch.optim.AdamW([p for stage in stages for p in stage.submod.parameters()], lr=1e-2)
    for _ in range(steps):
        run_step(schedule, stages, input_ids, kwargs)
        reduce_shared_gradients(stages)
        optimizer.step()
        optimizer.zero_grad()
    weights = gather_state_dict(stages)
    if weights is None:
        return None
    model = build_model(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        for part in input_ids.chunk(MICRO_BATCHES):
            (loss_fn(model(part).logits, part) / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model.state_dict()
    model.load_state_dict(weights)  # every name and shape is there
    return max(relative_error(weights[name], expected[name]) for name in expected)


def sharded_errors(mesh, case: Case) -> float | None:
    """On rank 0: error of weights after a step of SGD of a pipeline of 2 ranks, each sharded over 2 by FSDP2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stages = build_stages(mesh["pp"], case)
    for stage in stages:
        for layer in stage.submod.model.layers.values():
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(stage.submod, mesh=mesh["dp"])
    schedule = build_schedule(stages, case)
    optimizer = torch.optim.SGD([p for stage in stages for p in stage.submod.parameters()], lr=1.0)
    run_step(schedule, stages, *batch_for(case))
    reduce_shared_gradients(stages)
    optimizer.step()
    weights = gather_state_dict(stages)
    if weights is None:
        return None
    _, gradients = single_process(case)
    expected = dict(build_model(case).named_parameters())
    return max(relative_error(weights[name], expected[name] - gradients[name]) for name in expected)


def refusals(mesh, attempts: list[dict]) -> list[str]:
    """The messages of what `pipeline_stages` raises for arguments and changes of the model, one after another."""
    messages = []
    for attempt in attempts:
        attempt = dict(attempt)
        model = tiny_model("qwen3_moe", num_hidden_layers=4)
        if attempt.pop("mixed_dtypes", False):
            model.lm_head.double()
        if attempt.pop("tied", False):
            model.lm_head.weight = model.get_input_embeddings().weight
        if attempt.pop("router_loss", False):
            model.config.text_config.output_router_logits = True
        if attempt.pop("other_depth_attention", False):
            model.model.depth_attention = nn.Sequential(model.model.depth_attention)
        if attempt.pop("base_model", False):
            model = model.model
        arguments = {"micro_batch_shape": (2, 6), **attempt}
        if arguments.get("splits") == "rank":  # other arguments on every rank
            arguments["splits"] = [1 + mesh.get_rank()]
        try:
            pipeline_stages(model, mesh, **arguments)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def step_refusals(mesh) -> list[str]:
    """Messages of what only shows in a step: another shape than declared, a schedule that splits the backward."""
    from torch.distributed.pipelining import ScheduleInterleavedZeroBubble

    messages = []
    case = Case(virtual_stages=2, num_layers=4, dtype=torch.float32)
    stages = build_stages(mesh, case)
    if stages[0].is_first:
        try:
            stages[0].forward_one_chunk(0, (tiny_inputs(3, 6),))
        except ValueError as error:
            messages.append(str(error))
    stages = build_stages(mesh, case)
    schedule = ScheduleInterleavedZeroBubble(stages, MICRO_BATCHES, loss_fn)
    try:
        run_step(schedule, stages, *batch_for(case))
    except (NotImplementedError, RuntimeError) as error:
        messages.append(str(error))
    return messages


def step_until_failure(mesh, case: Case, victim: int, stalls: float = 0) -> dict:
    """Steps on; `victim` kills itself in the third step, or `stalls` for seconds. How the others learn of it, and when."""
    stages = build_stages(mesh, case)
    schedule = build_schedule(stages, case)
    input_ids, kwargs = batch_for(case)

    def fail(*args, **options):
        if not stalls:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(stalls)

    for step in range(100):
        if step == 2 and mesh.get_rank() == victim:
            stages[0].run = fail
        started = time.monotonic()
        try:
            run_step(schedule, stages, input_ids, kwargs)
        except RuntimeError as error:
            return {"step": step, "seconds": time.monotonic() - started, "message": str(error)}
    return {}


def generation_refusals(mesh) -> list[str]:
    """Messages of what `generate_greedily` raises for its arguments, and for a model in training mode."""
    stages = pipeline_stages(tiny_model("llama", num_hidden_layers=4), mesh, (4, 6))
    messages = []
    for training, arguments in (
        (False, {"max_new_tokens": 2, "num_micro_batches": 3}),
        (False, {"max_new_tokens": 0}),
        (True, {"max_new_tokens": 2}),
    ):
        stages[0].submod.train(training)
        try:
            generate_greedily(stages, tiny_inputs(4, 6), **arguments)
        except ValueError as error:
            messages.append(str(error))
    return messages


def run_code(mesh, blocks: list[str], folder: str) -> dict:
    """Runs the document's Python blocks in `folder`, one namespace for all; what they did."""
    os.chdir(folder)
    namespace = {}
    for block in blocks:
        exec(compile(block, "pipeline.md", "exec"), namespace)
    if "tokens" not in namespace:
        return {"stages": [type(stage.submod).__name__ for stage in namespace["stages"]]}
    expected = namespace["model"].generate(
        torch.arange(3, 11).view(2, 4), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    return {"steps": namespace["step"] + 1, "generated": torch.equal(namespace["tokens"], expected)}


def count_rows(mesh, options) -> list[dict]:
    """What the command of `count_bytes` counts with these options."""
    return count_caching(mesh, options.virtual_stages, options.layers_per_stage, options.sublayers_per_block)
