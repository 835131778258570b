# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What a GPU would be asked to do, counted without one: kernel launches, bytes, and an estimate of the time.

A model runs on the device `meta`, whose tensors have a shape and a dtype but no data. Fake tensors on `cuda` would be
closer, but slicing them and differentiating through them needs a PyTorch that was built with CUDA. So code that treats a
processor differently must ask for `cpu`: everything else, `meta` included, then counts as an accelerator.

Attention is a stub of one launch, in the base and in the variants, and logits are computed for one token.

Letters: B batch, T tokens, M = B * T, D hidden size, L sublayers.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM

from modeling_attnres import AttnResConfig, BlockSummaries

from .figure2 import Figure2ForCausalLM
from .models import VARIANTS, Shape


# --- One launch in place of attention --------------------------------------------------------------------------------

STUB = "attnres_bench_stub"


@torch.library.custom_op("attnres_bench::attention", mutates_args=())
def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.transpose(1, 2).contiguous()


@torch.library.custom_op("attnres_bench::attention_backward", mutates_args=())
def _attention_backward(
    gradient: torch.Tensor, output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.clone(), key.clone(), value.clone()


_attention.register_fake(
    lambda query, key, value: torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
)
_attention_backward.register_fake(
    lambda gradient, output, query, key, value: tuple(torch.empty_like(tensor) for tensor in (query, key, value))
)
_attention.register_autograd(
    lambda ctx, gradient: _attention_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output, *inputs),
)


def _attention_forward(module, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, None]:
    return _attention(query, key, value), None


AttentionInterface.register(STUB, _attention_forward)  # for which the library then makes no mask


# --- The counter -----------------------------------------------------------------------------------------------------

# Not views, but nothing is launched either.
NO_LAUNCH = {
    "_unsafe_view",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "is_same_size",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
}
# Operations that PyTorch's CUDA code computes with several kernels.
LAUNCHES = {
    "constant_pad_nd": 2,
    "embedding_dense_backward": 4,
    "logsumexp": 9,
    "select_backward": 2,
    "slice_backward": 2,
}
# They overwrite their first argument, or use its shape only.
READ_NO_INPUT = {
    "copy_",
    "fill_",
    "full_like",
    "new_full",
    "new_ones",
    "new_zeros",
    "ones_like",
    "zero_",
    "zeros_like",
}
# The host waits for the device.
SYNCS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero"}


@dataclass(frozen=True)
class Accelerator:
    """What an operation costs: the slowest of its launches, its bytes and its floating point operations.

    Attributes:
        launch_seconds: from one launch to the next, if the host does nothing else.
        bytes_per_second: of the memory.
        flops, flops_fp32: per second, of matrix products in half precision and in fp32.
    """

    launch_seconds: float
    bytes_per_second: float
    flops: float
    flops_fp32: float

    def seconds(self, launches: int, num_bytes: int, flops: int, dtype: torch.dtype | None) -> float:
        rate = self.flops if dtype in (torch.bfloat16, torch.float16) else self.flops_fp32
        return max(launches * self.launch_seconds, num_bytes / self.bytes_per_second, flops / rate)


H100 = Accelerator(launch_seconds=5e-6, bytes_per_second=3.35e12, flops=6e14, flops_fp32=5e13)


@dataclass
class Cost:
    """What was counted, by the name of the operation.

    Attributes:
        launches: kernels.
        bytes: read and written, each input and output once.
        seconds: the estimate of [`Accelerator`].
        syncs: operations for which the host waits.
    """

    launches: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)
    syncs: Counter = field(default_factory=Counter)


class LaunchCounter(TorchDispatchMode):
    """Counts what reaches the dispatcher while it is entered; `cost` is what it found."""

    def __init__(self, accelerator: Accelerator = H100):
        super().__init__()
        self.accelerator, self.cost = accelerator, Cost()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in SYNCS:
            self.cost.syncs[name] += 1
        elif not func.is_view and name not in NO_LAUNCH and func.namespace != "prim":
            self._add(func, name, args, kwargs, result)
        return result

    def _add(self, func, name, args, kwargs, result):
        launches = LAUNCHES.get(name, 1)
        read = _tensors((args[1:] if name in READ_NO_INPUT else args, kwargs | {"out": None}))
        if name == "embedding":  # of the table, the rows that it copies
            read = (result, args[1])
        num_bytes = sum(_extent(tensor) for tensor in (*read, *_tensors(result)))
        formula = flop_registry.get(getattr(torch.ops.aten, name.removesuffix("_"), None))
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        dtype = next((tensor.dtype for tensor in _tensors(args)), None)
        self.cost.launches[name] += launches
        self.cost.bytes[name] += num_bytes
        self.cost.seconds[name] += self.accelerator.seconds(launches, num_bytes, flops, dtype)


def _tensors(values) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


def _extent(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in memory: what is expanded lies there once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride]
    return functools.reduce(int.__mul__, sizes, 1) * tensor.element_size()


# --- The models ------------------------------------------------------------------------------------------------------

MODES = ("prefill", "decode", "train", "checkpoint")


@dataclass(frozen=True)
class Case:
    """One forward, or forward and backward, of a model.

    Attributes:
        mode: `"prefill"`, `"decode"` (one token per sequence), `"train"`, or `"checkpoint"` (training under gradient
            checkpointing).
    """

    shape: Shape
    mode: str
    batch: int = 4
    tokens: int = 4096
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {MODES}, got {self.mode!r}.")

    @property
    def trains(self) -> bool:
        return self.mode in ("train", "checkpoint")

    @property
    def tokens_at_once(self) -> int:
        """M, the tokens of one forward."""
        return self.batch * (1 if self.mode == "decode" else self.tokens)


def model_without_data(case: Case, variant: str) -> nn.Module:
    """`"base"` or one of `VARIANTS` on `meta`, set up for the case's mode."""
    implementation, sublayers_per_block, depth_weights = VARIANTS.get(variant, ("base", None, "mean"))
    sublayers_per_block = sublayers_per_block or case.shape.sublayers_per_block
    config = case.shape.text_config()
    if implementation == "attnres":
        config = AttnResConfig(
            text_config=config, sublayers_per_block=sublayers_per_block, depth_weights=depth_weights
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=case.dtype, attn_implementation=STUB)
        if implementation == "figure2":
            size = (case.shape.num_sublayers, case.shape.hidden_size)
            query, key_norm = (nn.Parameter(torch.empty(size, dtype=case.dtype)) for _ in range(2))
            arguments = (config.rms_norm_eps, sublayers_per_block, depth_weights == "sum")
            model = Figure2ForCausalLM(model, query, key_norm, *arguments)
    if case.mode == "checkpoint":
        model.gradient_checkpointing_enable()
    return model.train(case.trains)


def model_arguments(case: Case) -> dict:
    """What the model is called with."""
    input_ids = torch.empty(case.batch, case.tokens_at_once // case.batch, dtype=torch.long, device="meta")
    return {"input_ids": input_ids, "use_cache": False, "logits_to_keep": 1}


@functools.cache
def count(case: Case, variant: str) -> tuple[Cost, Cost]:
    """Counts the forward and the backward (empty where there is none) of `"base"` or one of `VARIANTS`; remembers them."""
    model, arguments = model_without_data(case, variant), model_arguments(case)
    backward = LaunchCounter()
    with torch.set_grad_enabled(case.trains):
        if case.mode == "decode":
            if VARIANTS.get(variant, ("base",))[0] == "attnres":
                arguments["block_summaries"] = BlockSummaries()
            model(**arguments)  # the step before, which allocates
        with LaunchCounter() as forward:
            logits = model(**arguments).logits
        if case.trains:
            with backward:
                logits.backward(torch.empty_like(logits))
    return forward.cost, backward.cost


# --- Figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overhead:
    """What a variant costs beyond the base.

    Attributes:
        forward, backward: launches per sublayer.
        forward_d, backward_d: elements of D per token and sublayer, read and written, net of the residual add.
        ratio: estimated time over the base's.
        base_seconds: estimated time of the base.
        syncs: how often the host waits, of the variant alone.
    """

    forward: float
    backward: float
    forward_d: float
    backward_d: float
    ratio: float
    base_seconds: float
    syncs: int

    @property
    def both_d(self) -> float:
        """Elements of D of forward and backward together."""
        return self.forward_d + self.backward_d

    def row(self, case: Case, variant: str) -> dict:
        """The figures as a row of a table."""
        return {
            "mode": case.mode,
            "variant": variant,
            "launches fwd": self.forward,
            "launches bwd": self.backward,
            "D fwd": self.forward_d,
            "D bwd": self.backward_d,
            "time / base": self.ratio,
            "base ms": 1e3 * self.base_seconds,
            "syncs": self.syncs,
        }


def overhead(case: Case, variant: str) -> Overhead:
    """Counts `variant` and the base, and takes the difference per sublayer."""
    base, ours = count(case, "base"), count(case, variant)
    sublayers = case.shape.num_sublayers
    bytes_of_d = case.shape.hidden_size * case.tokens_at_once * case.dtype.itemsize
    launches = [(mine.launches.total() - other.launches.total()) / sublayers for mine, other in zip(ours, base)]
    elements = [(mine.bytes.total() - other.bytes.total()) / sublayers / bytes_of_d for mine, other in zip(ours, base)]
    seconds, base_seconds = (sum(cost.seconds.total() for cost in costs) for costs in (ours, base))
    syncs = sum(cost.syncs.total() for cost in ours)
    return Overhead(*launches, *elements, seconds / base_seconds, base_seconds, syncs)


def launch_rows(shape: Shape, variants: list[str], batch: int, tokens: int, dtype: torch.dtype) -> list[dict]:
    """One row per mode and variant; decoding is counted for one sequence."""
    cases = [Case(shape, mode, 1 if mode == "decode" else batch, tokens, dtype) for mode in MODES]
    # Figure 2 runs the stock layers itself, without checkpointing.
    pairs = [
        (case, name)
        for case in cases
        for name in variants
        if (case.mode, VARIANTS[name][0]) != ("checkpoint", "figure2")
    ]
    return [overhead(case, name).row(case, name) for case, name in tqdm(pairs, desc="launches", leave=False)]
