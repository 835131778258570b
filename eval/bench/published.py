# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The published set: every figure the project promises, measured and set beside its bars.

Letters: T tokens, D hidden size, L sublayers, S sublayers per block, N blocks.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from modeling_attnres.command_line import DTYPES, dtype_name

from .counting import chunked_summaries_bytes, operations_per_sublayer, saved_for_backward
from .launch_tables import case_of, why_not_compiled
from .launches import overhead
from .models import PRESETS, Lineup, Shape, build_lineup, check_equality
from .timing import (
    Ratio,
    Timing,
    mixer_actions,
    ratio,
    take_turns,
    time_compiled,
    time_decode,
    time_prefill,
    time_training,
)


SHAPE = PRESETS["135M"]
# Compiling thirty layers takes minutes a side; eight have the same graph per layer.
COMPILED_SHAPE = dataclasses.replace(SHAPE, num_layers=8)
# As shallow and narrow as 32K tokens of quadratic attention allow: the summaries' bytes are linear in D and N.
CHUNKED_SHAPE = Shape(16, 2, 1, 1, 32, 64, sublayers_per_block=2)
CHUNKED_TOKENS, CHUNK = 32768, 2048

SUM_TIMING_MARGIN = 0.03

SWEEP_TOKENS = (128, 256, 512, 1024, 2048)
SWEEP_BLOCKS = {2: 30, 4: 16, 8: 8, 15: 4}  # N -> S at L = 60
SWEEP_SUBLAYERS = (16, 32, 60, 120)


@dataclass(frozen=True)
class Bar:
    """A figure to beat: smaller is better, `must` is promised and `aim` hoped for.

    The `"sum"` form may be `sum_margin` above what `"mean"` measured, or be held to a bar of its own, `sum_must`.
    """

    name: str
    must: float
    aim: float
    sum_margin: float | None = None
    sum_must: float | None = None


BARS = {
    bar.name: bar
    for bar in (
        Bar("prefill 512 fp32", 1.03, 1.01, SUM_TIMING_MARGIN),
        Bar("prefill 512 bf16", 1.07, 1.03, SUM_TIMING_MARGIN),
        Bar("prefill 2048 bf16", 1.04, 1.02, SUM_TIMING_MARGIN),
        Bar("training step 512 fp32, Block", 1.04, 1.02, SUM_TIMING_MARGIN),
        Bar("training step 512 fp32, Full", 1.11, 1.06, SUM_TIMING_MARGIN),
        Bar("decode fp32, batch 1", 1.07, 1.03, SUM_TIMING_MARGIN),
        Bar("decode fp32, batch 8", 1.05, 1.02, SUM_TIMING_MARGIN),
        Bar("decode bf16, batch 1", 1.10, 1.04, SUM_TIMING_MARGIN),
        Bar("decode bf16, batch 8", 1.05, 1.02, SUM_TIMING_MARGIN),
        Bar("compiled prefill", 1.04, 1.02, SUM_TIMING_MARGIN),
        Bar("compiled decode", 1.04, 1.02, SUM_TIMING_MARGIN),
        Bar("operations per sublayer", 6.4, 4.0, sum_must=12.0),
        Bar("saved for backward, Block", 1.12, 1.10),
        Bar("saved for backward, Full", 1.12, 1.10),
        Bar("mixer / Figure 2 at T = 512", 1 / 5, 1 / 10),
        Bar("mixer / Figure 2 at T = 2048", 1 / 12, 1 / 20),
        Bar("mixer growth, N 4 to 15", 2.0, 1.7),
        Bar("mixer growth, T 512 to 2048", 4.4, 4.0),
        Bar("summaries of 32K tokens in chunks of 2K", 1 / 14, 1 / 16),
        # Counted for a GPU, 8B in bf16, per sublayer beyond the base; hoped for is what one kernel per merge would take.
        Bar("GPU prefill, launches", 10.0, 1.25),
        Bar("GPU prefill, D", 7.0, 6.5),
        Bar("GPU training, D forward and backward", 28.0, 16.1),
        Bar("GPU checkpointing, Block", 1.11, 1.05),
        Bar("GPU checkpointing, Full", 1.25, 1.1),
        Bar("GPU decode, launches", 5.2, 1.0, sum_must=7.2),
        Bar("GPU compiled prefill, kernels", 1.3, 1.06),
        Bar("GPU compiled decode, kernels", 1.8, 1.6),
        Bar("GPU compiled training forward, kernels", 2.0, 1.75),
        Bar("GPU compiled training backward, kernels", 3.2, 3.06),
    )
}


@dataclass(frozen=True)
class Figure:
    """A measured row: of our `"mean"` form, of `"sum"`, and of Figure 2 where it has one."""

    name: str
    mean: Ratio
    sum: Ratio | None = None
    figure2: Ratio | None = None

    def row(self) -> dict:
        """The figure beside its bars; `met` names the best bar it keeps."""
        bar, value = BARS[self.name], round(self.mean.median, 4)
        met = "aim" if value <= bar.aim else "must" if value <= bar.must else "SHORT"
        return {
            "row": self.name,
            "value": self.mean.median,
            "low": self.mean.low,
            "high": self.mean.high,
            "must": bar.must,
            "aim": bar.aim,
            "met": met,
            "sum": self.sum and self.sum.median,
            "sum must": self._sum_bar(bar),
            "Figure 2": self.figure2 and self.figure2.median,
        }

    def _sum_bar(self, bar: Bar) -> float | None:
        if bar.sum_margin is not None and self.sum is not None:
            return self.mean.median + bar.sum_margin
        return bar.sum_must


def _gated(dtype: str, variants: list[str], shape: Shape = SHAPE) -> Lineup:
    lineup = build_lineup(shape, variants, DTYPES[dtype_name(dtype)])
    check_equality(lineup)
    return lineup


def _figure(name: str, timings: dict[str, Timing], ours: str = "block") -> Figure:
    ratios = {variant: ratio(timing, timings["base"]) for variant, timing in timings.items()}
    return Figure(name, ratios[ours], ratios.get(f"{ours}-sum"), ratios.get("figure2"))


def _prefill() -> tuple[list[Figure], dict]:
    figures, raw = [], {}
    for dtype, cases in (("fp32", ((512, 7),)), ("bf16", ((512, 7), (2048, 3)))):
        lineup = _gated(dtype, ["figure2", "block", "block-sum"])
        for tokens, rounds in cases:
            name = f"prefill {tokens} {dtype}"
            raw[name] = time_prefill(lineup, 1, tokens, rounds, name)
            figures.append(_figure(name, raw[name]))
    return figures, raw


def _training() -> tuple[list[Figure], dict]:
    name = "training step 512 fp32"
    lineup = _gated("fp32", ["figure2", "block", "full", "block-sum", "full-sum"])
    timings = time_training(lineup, 1, 512, rounds=3, description=name)
    full = {variant: timing for variant, timing in timings.items() if variant != "figure2"}
    return [_figure(f"{name}, Block", timings), _figure(f"{name}, Full", full, "full")], {name: timings}


def _decode() -> tuple[list[Figure], dict]:
    figures, raw = [], {}
    for dtype in ("fp32", "bf16"):
        lineup = _gated(dtype, ["figure2", "block", "block-sum"])
        for batch, rounds in ((1, 80), (8, 40)):
            name = f"decode {dtype}, batch {batch}"
            raw[name] = time_decode(lineup, batch, 512, rounds, description=name)
            figures.append(_figure(name, raw[name]))
    return figures, raw


def _compiled() -> tuple[list[Figure], dict]:
    lineup = _gated("fp32", ["block", "block-sum"], COMPILED_SHAPE)
    prefill, decode = time_compiled(lineup, 1, 512, rounds=10, description="compiled")
    raw = {"compiled prefill": prefill, "compiled decode": decode}
    return [_figure(name, timings) for name, timings in raw.items()], raw


def _counts() -> tuple[list[Figure], dict]:
    operations, saved = operations_figures(SHAPE.narrow()), saved_figures(SHAPE)
    return [*operations, *saved, chunked_figure(CHUNKED_SHAPE, CHUNKED_TOKENS, CHUNK)], {}


def operations_figures(shape: Shape) -> list[Figure]:
    """Compute operations of a forward per sublayer beyond the base; they do not depend on the width."""
    variants = ("block", "block-sum", "figure2")
    lineup = build_lineup(shape, list(variants))
    values = [_exactly(operations_per_sublayer(lineup, variant).compute) for variant in variants]
    return [Figure("operations per sublayer", *values)]


def saved_figures(shape: Shape, tokens: int = 128) -> list[Figure]:
    """Bytes kept for backward over the base's; all but the folded queries is proportional to the number of tokens."""
    # The vocabulary has no part in it: logits are not saved, and the embedding saves token ids.
    lineup = build_lineup(
        dataclasses.replace(shape, vocab_size=64), ["block", "block-sum", "figure2", "full", "full-sum"]
    )
    base = saved_for_backward(lineup, "base", tokens).saved
    values = {
        variant: _exactly(saved_for_backward(lineup, variant, tokens).saved / base)
        for variant in lineup.models
        if variant != "base"
    }
    return [
        Figure("saved for backward, Block", values["block"], values["block-sum"], values["figure2"]),
        Figure("saved for backward, Full", values["full"], values["full-sum"]),
    ]


def chunked_figure(shape: Shape, tokens: int, chunk: int) -> Figure:
    """Peak bytes of the block summaries in a chunked prefill over those of one prefill."""
    values = [
        _exactly(
            chunked_summaries_bytes(shape, tokens, chunk, form) / chunked_summaries_bytes(shape, tokens, tokens, form)
        )
        for form in ("mean", "sum")
    ]
    return Figure("summaries of 32K tokens in chunks of 2K", *values)


def _exactly(value: float) -> Ratio:
    return Ratio(value, value, value)


def _launches() -> tuple[list[Figure], dict]:
    figures = [
        launch_figure("GPU prefill, launches", "prefill", "forward"),
        launch_figure("GPU prefill, D", "prefill", "forward_d"),
        launch_figure("GPU training, D forward and backward", "train", "both_d"),
        launch_figure("GPU checkpointing, Block", "checkpoint", "ratio"),
        launch_figure("GPU checkpointing, Full", "checkpoint", "ratio", "full"),
        launch_figure("GPU decode, launches", "decode", "forward"),
    ]
    if reason := why_not_compiled():
        print(reason)
        return figures, {}
    return figures + [compiled_figure(name) for name in COMPILED], {}


def launch_figure(name: str, mode: str, measure: str, variant: str = "block") -> Figure:
    """A measure of [`Overhead`] at the 8B shape."""
    costs = [overhead(case_of(mode), form) for form in (variant, f"{variant}-sum")]
    return Figure(name, *(_exactly(getattr(cost, measure)) for cost in costs))


# name -> (mode, part)
COMPILED = {
    "GPU compiled prefill, kernels": ("prefill", "forward"),
    "GPU compiled decode, kernels": ("decode", "forward"),
    "GPU compiled training forward, kernels": ("train", "forward"),
    "GPU compiled training backward, kernels": ("train", "backward"),
}


def compiled_figure(name: str) -> Figure:
    """Kernels of compiled code, one of `COMPILED`."""
    from .compiled_launches import extra_kernels  # only here: it needs internals of the compiler

    mode, part = COMPILED[name]
    kernels = [extra_kernels(case_of(mode), variant) for variant in ("block", "block-sum")]
    return Figure(name, *(_exactly(getattr(both, part)) for both in kernels))


def _mixer() -> tuple[list[Figure], dict]:
    raw = sweep_mixers(SHAPE, SWEEP_TOKENS, SWEEP_BLOCKS, SWEEP_SUBLAYERS)
    figures = [
        Figure(f"mixer / Figure 2 at T = {tokens}", *_against(raw[f"mixer T={tokens}"], "figure2"))
        for tokens in (512, 2048)
    ]
    for name, small, large in (
        ("mixer growth, N 4 to 15", "mixer N=4", "mixer N=15"),
        ("mixer growth, T 512 to 2048", "mixer T=512", "mixer T=2048"),
    ):
        growth = {form: ratio(raw[large][form], raw[small][form]) for form in ("mean", "sum", "figure2")}
        figures.append(Figure(name, growth["mean"], growth["sum"], growth["figure2"]))
    return figures, raw


def _against(timings: dict[str, Timing], reference: str) -> list[Ratio]:
    return [ratio(timings[form], timings[reference]) for form in ("mean", "sum")]


def sweep_mixers(
    shape: Shape, tokens: tuple[int, ...], blocks: dict[int, int], sublayers: tuple[int, ...], rounds: int = 5
) -> dict[str, dict[str, Timing]]:
    """Depth attention alone against T, N and depth, everything else as in `shape` at T = 512.

    All cases take turns in the same rounds, so that growth too is a ratio within a round.

    Args:
        tokens: values of T.
        blocks: N -> S at the shape's depth.
        sublayers: values of L.

    Returns:
        Timings of `"mean"`, `"sum"` and `"figure2"` by case: `"mixer T=..."`, `"mixer N=..."`, `"mixer L=..."`.
    """
    depth, size, dim = shape.num_sublayers, shape.sublayers_per_block, shape.hidden_size
    at = min(tokens, key=lambda value: abs(value - 512))
    cases = {f"mixer T={value}": (depth, size, dim, value) for value in tokens}
    cases |= {f"mixer N={value}": (depth, block, dim, at) for value, block in blocks.items()}
    cases |= {f"mixer L={value}": (value, size, dim, at) for value in sublayers}
    actions = {(name, form): action for name, case in cases.items() for form, action in mixer_actions(*case).items()}
    with torch.no_grad():
        timings = take_turns(actions, rounds, description="mixer")
    return {name: {form: timings[name, form] for form in ("mean", "sum", "figure2")} for name in cases}


GROUPS: dict[str, Callable[[], tuple[list[Figure], dict]]] = {
    "counts": _counts,
    "launches": _launches,
    "mixer": _mixer,
    "decode": _decode,
    "prefill": _prefill,
    "training": _training,
    "compiled": _compiled,
}
