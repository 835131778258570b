# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Kernels of compiled code for an H100, counted on a machine without one.

`torch.compile` traces a model on `meta` and derives its backward. Each graph is then moved to a fake `cuda` device, and
Inductor, which is told of an H100, writes code for it. The calls in that code are counted; it is never run. Triton must be
installed, in the version that belongs to PyTorch, and the internals used here are those of PyTorch 2.13.
"""

import contextlib
import copy
import functools
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor import scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _triton
from torch.utils._pytree import tree_map

from .launches import Case, model_arguments, model_without_data


CALL_OF_TRITON = re.compile(r"^ +\w+\.run\(", re.MULTILINE)
CALL_OF_LIBRARY = re.compile(r"^ +(?:\w+ = )?(?:extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", re.MULTILINE)


# --- The pretended device --------------------------------------------------------------------------------------------

H100 = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    L2_cache_size=50 << 20,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    gcnArchName=None,
    is_integrated=0,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
)


class _Driver:
    """What Inductor asks Triton's driver."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def pretended_h100() -> Iterator[None]:
    """Makes torch, Inductor and Triton see one H100 while it is entered."""
    from triton.runtime import driver

    answers = {
        torch.cuda: {
            "is_available": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_properties": H100,
            "get_device_capability": (9, 0),
            "get_device_name": H100.name,
            "is_bf16_supported": True,
            "synchronize": None,
            "_lazy_init": None,
        },
        CudaInterface: {
            "is_available": True,
            "current_device": 0,
            "get_device_properties": H100,
            "get_compute_capability": 90,
            "is_triton_capable": True,
            "raise_if_triton_unavailable": None,
        },
        CudaInterface.Worker: {"current_device": 0, "get_device_properties": H100},
        scheduler: {"has_triton": True},
        _triton: {"has_triton": True},
    }
    with contextlib.ExitStack() as stack:
        for owner, names in answers.items():
            for name, answer in names.items():
                function = functools.partial(_answer, answer)
                stack.enter_context(
                    mock.patch.object(owner, name, staticmethod(function) if isinstance(owner, type) else function)
                )
        stack.enter_context(mock.patch.object(driver, "_active", _Driver()))
        yield


def _answer(answer, *args, **kwargs):
    return answer


# --- Lowering --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """Calls in the generated code of a forward, and of its backward if there is one."""

    forward: float
    backward: float = 0


def generated_code(graph: fx.GraphModule, inputs: list, is_inference: bool) -> str:
    """The code that Inductor writes for a graph that was traced on `meta`, as if it were on an H100."""
    fake_mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    graph = copy.deepcopy(graph)
    with V.set_fake_mode(fake_mode), inductor_config.patch({"triton.autotune_at_compile_time": False}):
        # These two run operations, and fake `cuda` refuses some: they come before the move.
        post_grad_passes(graph, is_inference)
        FakeTensorProp(graph, mode=fake_mode).propagate_dont_convert_inputs(*inputs)
        move = functools.partial(_on, torch.device("cuda:0"), fake_mode)
        for node in graph.graph.nodes:
            node.args, node.kwargs = (fx.node.map_aggregate(part, move) for part in (node.args, node.kwargs))
            node.meta["val"] = tree_map(move, node.meta.get("val"))
        for name, value in [*vars(graph).items(), *graph.named_buffers()]:
            if isinstance(value, torch.Tensor):
                setattr(graph, name, move(value))
        inputs = [move(value) for value in inputs]
        with pretended_h100():
            lowering = GraphLowering(
                graph, example_inputs=inputs, shape_env=fake_mode.shape_env, is_inference=is_inference
            )
            with DebugContext(), V.set_graph_handler(lowering):
                lowering.run(*inputs)
                code, _ = lowering.codegen()
    return code.value


def _on(device: torch.device, fake_mode, value):
    """`value`, or if it is a tensor or a device, what takes its place on `device`."""
    if isinstance(value, torch.Tensor):
        with fake_mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return device if isinstance(value, torch.device) else value


def count_calls(code: str) -> int:
    """Calls of Triton kernels and of library kernels in code that Inductor wrote."""
    return len(CALL_OF_TRITON.findall(code)) + len(CALL_OF_LIBRARY.findall(code))


def _backend(calls: dict[str, int]) -> Callable:
    """A backend of `torch.compile` that adds up the calls of forwards and backwards, and runs the graphs uncompiled."""

    def compiler(part: str, is_inference: bool, graph: fx.GraphModule, inputs: list) -> Callable:
        calls[part] += count_calls(generated_code(graph, inputs, is_inference))
        return make_boxed_func(graph.forward)

    def partition(graph: fx.GraphModule, inputs, **kwargs):
        # This pass replaces whatever a graph returns on `meta` by empty tensors, and so removes the whole graph.
        with inductor_config.patch({"joint_graph_constant_folding": False}):
            joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **kwargs)

    return aot_autograd(
        fw_compiler=functools.partial(compiler, "forward", False),
        bw_compiler=functools.partial(compiler, "backward", False),
        inference_compiler=functools.partial(compiler, "forward", True),
        decompositions=select_decomp_table(),
        partition_fn=partition,
    )


def _no_autocast() -> contextlib.AbstractContextManager:
    """Compiled code does not ask first whether `meta` can have autocast, and torch raises: the answer is no."""
    return mock.patch.object(torch, "is_autocast_enabled", _never)  # a plain function: the compiler reads its code


def _never(device_type: str | None = None) -> bool:
    return False


@functools.cache
def count_compiled(case: Case, variant: str) -> Kernels:
    """Counts the compiled forward, and backward, of `"base"` or one of `VARIANTS`; remembers it."""
    calls = {"forward": 0, "backward": 0}
    torch._dynamo.reset()
    try:
        with _no_autocast(), torch.set_grad_enabled(case.trains):
            model = torch.compile(
                model_without_data(case, variant), backend=_backend(calls), fullgraph=True, dynamic=False
            )
            logits = model(**model_arguments(case)).logits
            if case.trains:
                logits.backward(torch.empty_like(logits))
    finally:
        torch._dynamo.reset()
    return Kernels(**calls)


def extra_kernels(case: Case, variant: str, depths: tuple[int, int] = (4, 8)) -> Kernels:
    """Kernels per sublayer that `variant` has more than the base: their growth between two depths.

    Args:
        depths: numbers of decoder layers.
    """
    shallow, deep = (replace(case, shape=replace(case.shape, num_layers=layers)) for layers in depths)
    sublayers = deep.shape.num_sublayers - shallow.shape.num_sublayers
    growth = {
        name: [
            getattr(count_compiled(deep, name), part) - getattr(count_compiled(shallow, name), part)
            for part in ("forward", "backward")
        ]
        for name in ("base", variant)
    }
    return Kernels(*[(mine - other) / sublayers for mine, other in zip(growth[variant], growth["base"])])
