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
"""The clock: variants take turns round by round, so that whatever disturbs the machine disturbs all of them.

Letters: B batch, T tokens, D hidden size, L sublayers, S sublayers per block.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from modeling_attnres import BlockSummaries, attention_residuals

from .figure2 import figure2_stack
from .models import Lineup


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, one entry per round."""

    cpu: list[float]
    wall: list[float]

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)

    @property
    def median_wall(self) -> float:
        return statistics.median(self.wall)


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a variant's time over another's, round by round."""

    median: float
    low: float
    high: float


def ratio(timing: Timing, reference: Timing, clock: str = "cpu") -> Ratio:
    """How much longer than `reference` a variant took; `clock` is `"cpu"` (process time) or `"wall"`."""
    pairs = zip(getattr(timing, clock), getattr(reference, clock), strict=True)
    values = [mine / other for mine, other in pairs]
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)


def take_turns(
    actions: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    after: Callable[[], object] | None = None,
    description: str = "",
) -> dict[str, Timing]:
    """Times every action once per round, starting each round with another one.

    Args:
        actions: what to time.
        rounds, warmup: rounds that count, and rounds before them that do not.
        after: called after every action, off the clock.

    Returns:
        One [`Timing`] per action.
    """
    names = list(actions)
    timings = {name: Timing([], []) for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is alive now need not be looked through in every round
    gc.disable()
    try:
        for index in tqdm(range(warmup + rounds), desc=description, leave=False):
            gc.collect()
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                wall, cpu = time.perf_counter(), time.process_time()
                actions[name]()
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
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


def time_prefill(lineup: Lineup, batch: int, tokens: int, rounds: int, description: str = "") -> dict[str, Timing]:
    """Prefill as `generate` does it: a fresh KV cache, logits of the last token only."""
    input_ids = _tokens(lineup, batch, tokens)
    actions = {
        name: lambda model=model: model(input_ids=input_ids, use_cache=True, logits_to_keep=1)
        for name, model in lineup.models.items()
    }
    with torch.inference_mode():
        return take_turns(actions, rounds, description=description)


def time_decode(
    lineup: Lineup, batch: int, past: int, rounds: int, warmup: int = 10, description: str = ""
) -> dict[str, Timing]:
    """One token per variant and round on a KV cache that starts at `past` tokens: all decode the same positions."""
    prompt, token = _tokens(lineup, batch, past), _tokens(lineup, batch, 1)
    with torch.inference_mode():
        actions = {name: _decoder(model, prompt, token) for name, model in lineup.models.items()}
        return take_turns(actions, rounds, warmup=warmup, description=description)


def _decoder(model, prompt: torch.Tensor, token: torch.Tensor) -> Callable[[], object]:
    cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
    arguments = {"input_ids": token, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    if hasattr(model, "config") and model.config.model_type == "attnres":
        arguments["block_summaries"] = BlockSummaries()  # as `generate` does
    return lambda: model(**arguments)


def time_training(lineup: Lineup, batch: int, tokens: int, rounds: int, description: str = "") -> dict[str, Timing]:
    """Forward, loss and backward; clearing the gradients is off the clock."""
    input_ids = _tokens(lineup, batch, tokens)

    def clear():
        for parameter in (*lineup.models["base"].parameters(), lineup.query, lineup.key_norm):
            parameter.grad = None

    actions = {
        name: lambda model=model: model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        for name, model in lineup.models.items()
    }
    try:
        for model in lineup.models.values():
            model.train()
        return take_turns(actions, rounds, after=clear, description=description)
    finally:
        for model in lineup.models.values():
            model.eval()


def time_mixers(
    num_sublayers: int,
    sublayers_per_block: int,
    hidden_size: int,
    tokens: int,
    rounds: int,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    depth_weights: tuple[str, ...] = ("mean", "sum"),
    figure2: bool = True,
    description: str = "",
) -> dict[str, Timing]:
    """Depth attention alone: the sublayers hand back ready tensors.

    Returns:
        Timings of `"mean"` and `"sum"` (two-phase) and `"figure2"`.
    """
    generator = torch.Generator().manual_seed(0)
    embedding, *outputs = (torch.randn(batch, tokens, hidden_size, generator=generator).to(dtype) for _ in range(5))
    # A few tensors in turn stay in the processor's cache, as the output of a real sublayer does.
    sublayers = [lambda _, output=outputs[index % 4]: output for index in range(num_sublayers)]
    query = (torch.randn(num_sublayers, hidden_size, generator=generator) * 0.03).to(dtype)
    key_norm = torch.ones(num_sublayers, hidden_size, dtype=dtype)
    arguments = (embedding, sublayers, query, key_norm, 1e-6, sublayers_per_block)
    actions = {form: lambda form=form: attention_residuals(*arguments, form) for form in depth_weights}
    if figure2:
        actions["figure2"] = lambda: figure2_stack(*arguments)
    with torch.inference_mode():
        return take_turns(actions, rounds, warmup=2, description=description)


def _tokens(lineup: Lineup, batch: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(lineup.shape.vocab_size, (batch, tokens), generator=generator)
