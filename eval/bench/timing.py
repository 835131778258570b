# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The clock: variants take turns round by round, so that whatever disturbs the machine disturbs all of them.

Letters: B batch, T tokens, D hidden size, L sublayers, S sublayers per block.
"""

import copy
import functools
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import Cache, StaticCache

from modeling_attnres import AttnResConfig, BlockSummaries, attention_residuals
from modeling_attnres.compat_attnres import CACHE

from .clocks import clock_for
from .figure2 import figure2_stack
from .models import EqualityGateError, Lineup, random_tokens


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, one entry per round.

    Attributes:
        cpu: of the process; on a GPU, between the events around an action.
        wall: of the clock on the wall.
    """

    cpu: list[float]
    wall: list[float]

    def quartiles(self, clock: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile; `clock` is `"cpu"` or `"wall"`."""
        return _quartiles(getattr(self, clock))


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a variant's time over another's, round by round."""

    median: float
    low: float
    high: float


def ratio(timing: Timing, reference: Timing, clock: str = "cpu") -> Ratio:
    """How much longer than `reference` a variant took; `clock` is `"cpu"` or `"wall"`."""
    pairs = zip(getattr(timing, clock), getattr(reference, clock), strict=True)
    low, median, high = _quartiles([mine / other for mine, other in pairs])
    return Ratio(median, low, high)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def take_turns(
    actions: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    after: Callable[[], object] | None = None,
    description: str = "",
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Times every action once per round, starting each round with another one.

    Args:
        actions: what to time.
        rounds, warmup: rounds that count, and rounds before them that do not.
        after: called after every action, off the clock.
        device: whose time it is.

    Returns:
        One [`Timing`] per action.
    """
    names, clock = list(actions), clock_for(device)
    timings = {name: Timing([], []) for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # do not scan objects that are already alive in every round
    gc.disable()
    try:
        for index in tqdm(range(warmup + rounds), desc=description, leave=False):
            gc.collect()
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                cpu, wall = clock.measure(actions[name])
                if after is not None:
                    after()
                if index >= warmup:
                    timings[name].cpu.append(cpu)
                    timings[name].wall.append(wall)
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return timings


def prefill_actions(lineup: Lineup, batch: int, tokens: int) -> dict[str, Callable[[], object]]:
    """Prefill of every model as `generate` does it: a fresh KV cache, logits of the last token only."""
    input_ids = random_tokens(lineup.shape, batch, tokens, lineup.device)
    return {
        name: lambda model=model: model(input_ids=input_ids, use_cache=True, logits_to_keep=1)
        for name, model in lineup.models.items()
    }


def training_actions(lineup: Lineup, batch: int, tokens: int) -> dict[str, Callable[[], object]]:
    """Forward, loss and backward of every model; the gradients are left for the caller to clear."""
    input_ids = random_tokens(lineup.shape, batch, tokens, lineup.device)
    return {
        name: lambda model=model: model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        for name, model in lineup.models.items()
    }


def time_prefill(lineup: Lineup, batch: int, tokens: int, rounds: int, description: str = "") -> dict[str, Timing]:
    """Times [`prefill_actions`]."""
    actions = prefill_actions(lineup, batch, tokens)
    with torch.no_grad():
        return take_turns(actions, rounds, description=description, device=lineup.device)


def time_decode(
    lineup: Lineup, batch: int, past: int, rounds: int, warmup: int = 10, description: str = ""
) -> dict[str, Timing]:
    """One token per variant and round on a KV cache that starts at `past` tokens: all decode the same positions.

    The cache is filled once, by the base: what is in it does not change the time.
    """
    prompt, token = (
        random_tokens(lineup.shape, batch, past, lineup.device),
        random_tokens(lineup.shape, batch, 1, lineup.device),
    )
    actions = {}
    with torch.no_grad():
        filled = lineup.models["base"](input_ids=prompt, use_cache=True, logits_to_keep=1)[CACHE]
        for name, model in lineup.models.items():
            step = _step(model, token, copy.deepcopy(filled))
            if model.config.model_type == AttnResConfig.model_type:
                step = functools.partial(step, block_summaries=BlockSummaries())  # as `generate` does
            actions[name] = step
        return take_turns(actions, rounds, warmup=warmup, description=description, device=lineup.device)


def time_compiled(
    lineup: Lineup, batch: int, tokens: int, rounds: int, description: str = ""
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Prefill and decode of every model under `torch.compile(fullgraph=True)` with a static KV cache.

    Returns:
        Timings of prefill and of decode.

    Raises:
        EqualityGateError: if a compiled model does not give the logits of its eager self.
    """
    rounds_of_decode, warmup = 10 * rounds, 10
    prompt, token = (
        random_tokens(lineup.shape, batch, tokens, lineup.device),
        random_tokens(lineup.shape, batch, 1, lineup.device),
    )
    prefills, decodes, caches = {}, {}, []
    with torch.no_grad():
        for name, model in tqdm(lineup.models.items(), desc="compiling", leave=False):
            cache = _static_cache(lineup, batch, tokens + rounds_of_decode + warmup + 1)
            caches.append(cache)
            # The model's own code is compiled, not the wrapper: one graph for the prompt's length, one for one token.
            compiled = torch.compile(model, fullgraph=True, dynamic=False)
            prefills[name], decodes[name] = _step(compiled, prompt, cache), _step(compiled, token, cache)
            _check_compiled(name, prefills[name]().logits, model(input_ids=prompt, logits_to_keep=1).logits)
            decodes[name]()

        def empty_caches():
            for cache in caches:
                cache.reset()

        empty_caches()
        prefill = take_turns(
            prefills, rounds, after=empty_caches, description=f"prefill {description}", device=lineup.device
        )
        for step in prefills.values():
            step()
        decode = take_turns(
            decodes, rounds_of_decode, warmup=warmup, description=f"decode {description}", device=lineup.device
        )
    return prefill, decode


def _step(model, input_ids: torch.Tensor, cache: Cache) -> Callable[..., object]:
    return functools.partial(model, input_ids=input_ids, use_cache=True, logits_to_keep=1, **{CACHE: cache})


def _static_cache(lineup: Lineup, batch: int, length: int) -> StaticCache:
    base = lineup.models["base"]
    cache = StaticCache(config=base.config, max_cache_len=length)
    cache.early_initialization(
        batch_size=batch,
        num_heads=base.config.num_key_value_heads,
        head_dim=base.config.head_dim,
        dtype=base.dtype,
        device=base.device,
    )
    return cache


def _check_compiled(name: str, logits: torch.Tensor, eager: torch.Tensor):
    # Fused kernels round elsewhere; in a random model that grows to a few hundred units in the last place.
    tolerance = 500 * torch.finfo(eager.dtype).eps if eager.dtype == torch.float32 else 0.1
    error = ((logits - eager).abs().max() / eager.abs().max()).item()
    if not error <= tolerance:
        raise EqualityGateError(
            f"Compiled, '{name}' is {error:.2e} away from its eager logits, more than the tolerance {tolerance:.2e}."
        )


def time_training(lineup: Lineup, batch: int, tokens: int, rounds: int, description: str = "") -> dict[str, Timing]:
    """Times [`training_actions`]; clearing the gradients is off the clock."""
    actions = training_actions(lineup, batch, tokens)
    try:
        for model in lineup.models.values():
            model.train()
        return take_turns(actions, rounds, after=lineup.clear_gradients, description=description, device=lineup.device)
    finally:
        for model in lineup.models.values():
            model.eval()


def mixer_actions(
    num_sublayers: int,
    sublayers_per_block: int,
    hidden_size: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> dict[str, Callable[[], object]]:
    """Depth attention alone, to be timed without gradients: the sublayers hand back ready tensors.

    Returns:
        Actions for `"mean"` and `"sum"` (two-phase) and `"figure2"`.
    """
    generator = torch.Generator().manual_seed(0)
    embedding, *outputs = (torch.randn(batch, tokens, hidden_size, generator=generator).to(dtype) for _ in range(5))
    # A few tensors in turn stay in the processor's cache, as the output of a real sublayer does.
    sublayers = [lambda _, output=outputs[index % 4]: output for index in range(num_sublayers)]
    query = (torch.randn(num_sublayers, hidden_size, generator=generator) * 0.03).to(dtype)
    key_norm = torch.ones(num_sublayers, hidden_size, dtype=dtype)
    arguments = (embedding, sublayers, query, key_norm, 1e-6, sublayers_per_block)
    mean_bank, sum_bank = BlockSummaries(), BlockSummaries()  # kept from call to call, as `generate` does
    return {
        "mean": lambda: attention_residuals(*arguments, "mean", block_summaries=mean_bank),
        "sum": lambda: attention_residuals(*arguments, "sum", block_summaries=sum_bank),
        "figure2": lambda: figure2_stack(*arguments),
    }
