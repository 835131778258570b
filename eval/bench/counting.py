# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What does not depend on the clock: operations, bytes kept for backward, peak bytes, bytes of the block summaries.

Letters: B batch, T tokens, D hidden size, L sublayers.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_attnres import BlockSummaries
from modeling_attnres.compat_attnres import CACHE

from .models import VARIANTS, Lineup, Shape, build_lineup, random_tokens


# Not views, but nothing is computed either.
_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "resize_", "_unsafe_view")


class OperationCounter(TorchDispatchMode):
    """Counts what reaches the dispatcher: `compute` operations, and `views` (views, metadata and bare allocations)."""

    def __init__(self):
        super().__init__()
        self.compute: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        counter = self.views if func.is_view or name in _ALLOCATIONS else self.compute
        counter[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Operations:
    """Operations per sublayer that a variant adds to the base."""

    compute: float
    views: float
    by_name: dict[str, float]


def operations_per_sublayer(lineup: Lineup, variant: str, tokens: int = 8, past: int = 0) -> Operations:
    """Operations of one forward without gradients, per sublayer, beyond the base's.

    Args:
        variant: name of the model.
        tokens: tokens of the forward.
        past: tokens already in the KV cache.
    """
    counts = {}
    for name in ("base", variant):
        model = lineup.models[name]
        with torch.no_grad():
            cache = None
            if past:
                cache = model(input_ids=random_tokens(lineup.shape, 1, past), use_cache=True)[CACHE]
            with OperationCounter() as counter:
                model(input_ids=random_tokens(lineup.shape, 1, tokens), use_cache=True, **{CACHE: cache})
        counts[name] = counter
    layers = lineup.shape.num_sublayers
    base, ours = counts["base"], counts[variant]
    by_name = {
        name: (ours.compute[name] - base.compute[name]) / layers
        for name in sorted({*ours.compute, *base.compute})
        if ours.compute[name] != base.compute[name]
    }
    compute = (ours.compute.total() - base.compute.total()) / layers
    return Operations(compute, (ours.views.total() - base.views.total()) / layers, by_name)


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that a forward leaves for its backward.

    Attributes:
        saved: bytes of the distinct storages packed by `saved_tensors_hooks` or held by the bank of block summaries,
            parameters excluded.
        retained: bytes allocated during the forward and not given back while its graph is held, whoever holds them.
    """

    saved: int
    retained: int


def saved_for_backward(lineup: Lineup, variant: str, tokens: int, batch: int = 1) -> SavedBytes:
    """Runs a forward with gradients (no loss: it costs the base the same) and measures what it keeps."""
    model, input_ids = lineup.models[variant], random_tokens(lineup.shape, batch, tokens)
    arguments, bank = {"input_ids": input_ids, "use_cache": False}, None
    if VARIANTS.get(variant, ("base",))[0] == "attnres":
        # Backward reads the bank too, and the hooks do not see that.
        bank = arguments["block_summaries"] = BlockSummaries()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(**arguments)
    if bank is not None:  # of which backward reads the sources and their norms
        storages |= {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in (bank.sources, bank.norms)
        }
    saved = sum(storage.nbytes() for storage in storages.values())
    del outputs
    storages.clear()
    held = []
    _, retained = allocated_bytes(lambda: held.append(model(**arguments).logits))
    return SavedBytes(saved, retained)


def allocated_bytes(action: Callable[[], object]) -> tuple[int, int]:
    """Peak and final bytes that PyTorch's allocator handed out during `action`, less what it took back.

    Temporaries inside kernels are counted where they come from PyTorch's allocator; work space of oneDNN and MKL is
    not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = current = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak, current


def prefill_peak_bytes(lineup: Lineup, variant: str, tokens: int, batch: int = 1) -> int:
    """Peak bytes allocated by a prefill, its KV cache included, the model's parameters not."""
    model, input_ids = lineup.models[variant], random_tokens(lineup.shape, batch, tokens)
    with torch.inference_mode():
        peak, _ = allocated_bytes(lambda: model(input_ids=input_ids, use_cache=True, logits_to_keep=1))
    return peak


def training_peak_bytes(lineup: Lineup, variant: str, tokens: int, batch: int = 1) -> int:
    """Peak bytes allocated by forward and backward, the gradients included, the parameters not."""
    model, input_ids = lineup.models[variant], random_tokens(lineup.shape, batch, tokens)
    lineup.clear_gradients()
    peak, _ = allocated_bytes(lambda: model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward())
    lineup.clear_gradients()
    return peak


def bank_storages(bank: BlockSummaries) -> dict[int, torch.UntypedStorage]:
    """The distinct storages that a bank of block summaries holds, by address."""
    storages = {}
    for value in vars(bank).values():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.dim():  # a scalar stands in for the bank in autograd
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return storages


def chunked_summaries_bytes(shape: Shape, tokens: int, chunk: int, depth_weights: str = "mean") -> int:
    """Largest size of the bank of block summaries while `tokens` are prefilled in chunks of `chunk`."""
    variant = "block" if depth_weights == "mean" else "block-sum"
    model = build_lineup(shape, [variant]).models[variant]
    input_ids = random_tokens(shape, 1, tokens)
    bank, cache, peak = BlockSummaries(), None, 0
    with torch.no_grad():
        for step in range(math.ceil(tokens / chunk)):
            part = input_ids[:, step * chunk : (step + 1) * chunk]
            outputs = model(input_ids=part, use_cache=True, logits_to_keep=1, block_summaries=bank, **{CACHE: cache})
            cache = outputs[CACHE]
            peak = max(peak, sum(storage.nbytes() for storage in bank_storages(bank).values()))
    return peak
