# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-bench --gpu-day`: everything that only a GPU can answer, in one call of less than twenty minutes.

Exactness comes first and ends the day where it is not given: times of a wrong computation mean nothing.

Letters: B batch, T tokens, M = B * T, D hidden size, n sources, R queries scored together.
"""

import functools
import importlib
import importlib.util
import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from modeling_attnres.compat_attnres import CACHE

from .clocks import GpuClock, ProcessorClock
from .models import PRESETS, EqualityGateError, Lineup, Shape, build_lineup, check_equality, random_tokens
from .report import environment, format_markdown, timing_rows, write_json, write_text
from .timing import time_decode


EXACT_SHAPE = replace(PRESETS["135M"], num_layers=8)
TRAIN_SHAPE = replace(PRESETS["8B"], num_layers=12)  # without checkpointing, more layers would not fit
KERNELS = "modeling_attnres.depth_kernels_attnres"


class InexactError(RuntimeError):
    """Two computations that must agree do not."""


@dataclass(frozen=True)
class Day:
    """What is run, and at which sizes; the defaults are for a GPU with 80 GB.

    Attributes:
        exact_shape, exact_tokens: of the comparisons with the PreNorm base.
        backend: of `torch.compile`.
        hidden_size, num_sources, num_queries, num_tokens: D, n, R and M of products and kernels.
        decode_shape, decode_batches, past, new_tokens: of decoding; tokens in the cache and tokens generated.
        train_shape, train_batch, train_tokens: of training steps.
        rounds: measurements of each case.
    """

    device: torch.device
    clock: GpuClock | ProcessorClock
    exact_shape: Shape = EXACT_SHAPE
    exact_tokens: int = 256
    backend: str = "inductor"
    hidden_size: int = 4096
    num_sources: tuple[int, ...] = tuple(range(2, 10))
    num_queries: tuple[int, ...] = (8, 9)
    num_tokens: tuple[int, ...] = (4096, 16384, 32768, 131072)
    decode_shape: Shape = PRESETS["8B"]
    decode_batches: tuple[int, ...] = (1, 32, 64)
    past: int = 512
    new_tokens: int = 64
    train_shape: Shape = TRAIN_SHAPE
    train_batch: int = 2
    train_tokens: int = 4096
    rounds: int = 10

    def seconds(self, action: Callable[[], object], warmup: int = 2) -> float:
        """Median seconds on the device."""
        for _ in range(warmup):
            action()
        return statistics.median(self.clock.measure(action)[0] for _ in range(self.rounds))


@dataclass(frozen=True)
class Step:
    """One question.

    Attributes:
        name: of its table.
        budget: seconds after which no further case is begun.
        run: yields a row per case.
    """

    name: str
    budget: float
    run: Callable[[Day], Iterator[dict]]


# --- (a) Exactness ---------------------------------------------------------------------------------------------------


def exactness(day: Day) -> Iterator[dict]:
    """Every form against Figure 2 in fp64; then "sum" with zero queries against the base, bit for bit.

    Raises:
        InexactError: at the first difference.
    """
    variants = ["block-sum", "full-sum"]
    for dtype in (torch.float32, torch.bfloat16):
        lineup = build_lineup(day.exact_shape, ["block", "full", *variants], dtype, device=day.device)
        try:
            errors = check_equality(lineup)
        except EqualityGateError as error:
            raise InexactError(f"{_name(dtype)}: {error}") from error
        for variant, error in errors.items():
            yield {"case": "eager against Figure 2 in fp64", "dtype": _name(dtype), "variant": variant, "error": error}
        del lineup
    for compiled, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        lineup = build_lineup(day.exact_shape, variants, dtype, query_std=0.0, device=day.device)
        results = {name: list(_outputs(day, lineup, name, compiled)) for name in lineup.models}
        for variant in variants:
            for (part, ours), (_, base) in zip(results[variant], results["base"]):
                error = (ours.double() - base.double()).abs().max().item()
                case = f"{'compiled' if compiled else 'eager'} {part}"
                if not torch.equal(ours, base):
                    raise InexactError(f"{case}, {_name(dtype)}: '{variant}' is {error:.2e} away from the base.")
                yield {"case": f"{case} against the base", "dtype": _name(dtype), "variant": variant, "error": error}


def _outputs(day: Day, lineup: Lineup, name: str, compiled: bool) -> Iterator[tuple[str, torch.Tensor]]:
    model = lineup.models[name]
    ids = random_tokens(lineup.shape, 2, day.exact_tokens, lineup.device)
    run = model
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, dynamic=False, backend=day.backend)
    with torch.no_grad():
        yield "prefill", run(input_ids=ids, use_cache=False).logits
    yield "training forward", run(input_ids=ids, use_cache=False).logits.detach()
    if not compiled:  # decoding with a growing cache is not compiled
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True)[CACHE]
            yield "decode", model(input_ids=ids[:, -1:], use_cache=True, **{CACHE: cache}).logits


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- (b) The batched product of phase 1 ------------------------------------------------------------------------------


def products(day: Day) -> Iterator[dict]:
    """`[M, R, n] x [M, n, D]`, and what it would take if it moved its bytes as fast as a copy does."""
    speed = bandwidth(day)
    yield {"case": "copy", "TB/s": speed / 1e12}
    for tokens, n, queries in itertools.product(day.num_tokens, day.num_sources, day.num_queries):
        size = {"device": day.device, "dtype": torch.bfloat16}
        weights, sources = torch.rand(tokens, queries, n, **size), torch.rand(n, tokens, day.hidden_size, **size)
        out = torch.empty(tokens, queries, day.hidden_size, **size)
        per_token = sources.transpose(0, 1)
        seconds = day.seconds(lambda a=weights, b=per_token, out=out: torch.bmm(a, b, out=out))
        yield {
            "case": "bmm",
            "M": tokens,
            "n": n,
            "R": queries,
            **_rate(seconds, weights.nbytes + sources.nbytes + out.nbytes, speed),
        }


def bandwidth(day: Day) -> float:
    """Bytes per second that a copy of as much as the largest product reads and writes."""
    source = torch.zeros(max(day.num_tokens), day.hidden_size, device=day.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / day.seconds(lambda: target.copy_(source))


def _rate(seconds: float, num_bytes: int, speed: float) -> dict:
    return {"ms": 1e3 * seconds, "TB/s": num_bytes / seconds / 1e12, "time / copy's": seconds * speed / num_bytes}


# --- (c) Decoding ----------------------------------------------------------------------------------------------------


def decoding(day: Day) -> Iterator[dict]:
    """Eager steps of each batch size, then `generate` with a static cache, which compiles by itself on a GPU."""
    lineup = build_lineup(day.decode_shape, ["block", "block-sum"], torch.bfloat16, device=day.device)
    for batch in day.decode_batches:
        yield from timing_rows(
            f"eager, batch {batch}", time_decode(lineup, batch, day.past, day.rounds), day.clock.label
        )
    ids = random_tokens(lineup.shape, 1, day.past, lineup.device)
    for name, model in lineup.models.items():
        torch._dynamo.reset()

        def generate(model=model):
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=day.new_tokens,
                min_new_tokens=day.new_tokens,
                do_sample=False,
                pad_token_id=0,
                cache_implementation="static",
            )

        generate()  # compiles
        first, again = generate(), generate()
        if first.shape[1] != day.past + day.new_tokens or not torch.equal(first, again):
            raise InexactError(f"Static-cache `generate` of '{name}' does not give the same tokens twice.")
        _, wall = day.clock.measure(generate)
        yield {"case": "generate, static cache, batch 1", "variant": name, "wall ms": 1e3 * wall / day.new_tokens}


# --- (d) Training ----------------------------------------------------------------------------------------------------


def training(day: Day) -> Iterator[dict]:
    """Forward and backward, with and without gradient checkpointing: time and peak memory."""
    lineup = build_lineup(day.train_shape, ["block", "block-sum", "full"], torch.bfloat16, device=day.device)
    ids = random_tokens(lineup.shape, day.train_batch, day.train_tokens, lineup.device)
    for checkpointing in (False, True):
        base = None
        for name, model in lineup.models.items():
            row = {"case": "with checkpointing" if checkpointing else "without checkpointing", "variant": name}
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable()

            def step(model=model):
                model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.float().sum().backward()
                lineup.clear_gradients()

            try:
                peak, seconds = day.clock.peak_bytes(step), day.seconds(step)
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
            else:
                base = seconds if name == "base" else base
                row |= {"ms": 1e3 * seconds, "/ base": base and seconds / base, "peak GB": peak / 2**30}
            lineup.clear_gradients()
            model.eval()
            if checkpointing:
                model.gradient_checkpointing_disable()
            day.clock.free()
            yield row


# --- (e) Kernels -----------------------------------------------------------------------------------------------------


def kernels(day: Day) -> Iterator[dict]:
    """The optional kernels against torch: first that they agree, then the time of both.

    Raises:
        InexactError: where a kernel is off, or the anchored sum of zero scores is not the plain stream.
    """
    if importlib.util.find_spec(KERNELS) is None:
        yield {"case": "no kernels"}
        return
    module, speed = importlib.import_module(KERNELS), bandwidth(day)
    for case, num_bytes, call in _kernel_cases(day, module, day.num_tokens[1]):
        results = {}
        for impl in ("torch", "triton"):
            try:
                results[impl] = call(impl)
            except ValueError as error:
                yield {"case": case, "impl": impl, "note": str(error)}
        if len(results) == 2:
            _check_kernel(case, results["torch"], results["triton"])
        for impl in results:
            seconds = day.seconds(functools.partial(call, impl))
            yield {"case": case, "impl": impl, **_rate(seconds, num_bytes, speed)}


def _kernel_cases(day: Day, module, tokens: int) -> Iterator[tuple[str, int, Callable]]:
    wide = {"device": day.device, "dtype": torch.float32}
    row, recent, output, stream = (
        torch.randn(tokens, day.hidden_size, device=day.device).to(torch.bfloat16) for _ in range(4)
    )
    query, zeros = torch.randn(day.hidden_size, **wide) * 0.02, torch.zeros(tokens, **wide)
    floor, weight = torch.tensor(0.1, **wide), torch.ones(day.hidden_size, device=day.device, dtype=torch.bfloat16)
    last = {"output": output, "norm_weight": weight, "norm_eps": 1e-6}
    yield (
        "merge, mean",
        6 * row.nbytes,
        lambda impl: module.merge(row, zeros, query, recent, floor, **last, impl=impl),
    )
    sums = last | {"stream": stream, "num_sources": 5}
    yield (
        "merge, sum",
        8 * row.nbytes,
        lambda impl: module.merge(row, zeros, query, recent, floor, **sums, impl=impl),
    )
    no_query = torch.zeros_like(query)
    yield (
        "merge, sum, zero queries",
        7 * row.nbytes,
        lambda impl: _merge_of_zeros(module, no_query, zeros, recent, floor, sums, impl),
    )
    for n, queries in itertools.product((min(day.num_sources), max(day.num_sources)), day.num_queries[:1]):
        scores = torch.randn(n, queries, tokens, **wide)
        sources = torch.randn(n, tokens, day.hidden_size, device=day.device).to(torch.bfloat16)
        for form in ("mean", "sum"):
            yield (
                f"phase 1, {form}, n {n}, R {queries}",
                scores.nbytes + sources.nbytes + queries * row.nbytes,
                lambda impl, scores=scores, sources=sources, form=form: module.phase_one_rows(
                    scores, sources, form, impl=impl
                ),
            )


def _merge_of_zeros(module, query, stat, recent, floor, sums: dict, impl: str):
    merged = module.merge(None, stat, query, recent, floor, **sums, impl=impl)
    if not torch.equal(merged.mix, sums["stream"] + sums["output"]):
        raise InexactError(f"merge, sum, zero queries: the mix of impl='{impl}' is not the plain stream.")
    return merged


def _check_kernel(case: str, expected: Iterable, got: Iterable):
    # Results are in bf16, of 8 bits: two roundings of the largest value.
    tolerance = 2 * torch.finfo(torch.bfloat16).eps
    for position, (reference, result) in enumerate(zip(expected, got)):
        if reference is None:
            continue
        reference, result = reference.double(), result.double()
        largest = reference.abs().max().clamp_min(torch.finfo(torch.float32).tiny)  # zeros must be met exactly
        error = ((result - reference).abs().max() / largest).item()
        if not error <= tolerance:
            raise InexactError(
                f"{case}: result {position} of the kernel is {error:.2e} away, more than {tolerance:.2e}."
            )


# --- The day ---------------------------------------------------------------------------------------------------------

STEPS = (
    Step("a. Exactness", 300, exactness),
    Step("b. The batched product of phase 1", 180, products),
    Step("c. Decoding", 240, decoding),
    Step("d. Training", 240, training),
    Step("e. Kernels", 120, kernels),
)


@dataclass
class Report:
    """What has been found so far, by step; `failures` says what went wrong."""

    output: Path
    tables: dict[str, list[dict]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def write(self, facts: dict):
        """Writes `gpu-day.json` and `gpu-day.md`."""
        content = {"environment": facts, "tables": self.tables, "failures": self.failures}
        write_json(self.output / "gpu-day.json", content)
        parts = ["# A day on a GPU", ", ".join(f"{name} {value}" for name, value in facts.items()), *self.failures]
        for name, rows in self.tables.items():
            parts += [f"## {name}", format_markdown(rows) if rows else "Nothing."]
        write_text(self.output / "gpu-day.md", "\n\n".join(parts) + "\n")


def run_day(day: Day, output: Path, steps: tuple[Step, ...] = STEPS) -> int:
    """Runs the steps one after the other and writes what they find after each.

    An inexact result ends the day; any other error ends its step alone.

    Returns:
        0, or 1 if anything failed.
    """
    report = Report(output)
    facts = environment(torch.get_num_threads(), day.device)
    for step in steps:
        rows = report.tables.setdefault(step.name, [])
        started = time.monotonic()
        try:
            for row in step.run(day):
                rows.append(row)
                elapsed = time.monotonic() - started
                print(f"{step.name} [{elapsed:.0f} s]: {row}", file=sys.stderr, flush=True)
                if elapsed > step.budget:
                    rows.append({"note": f"stopped after {elapsed:.0f} s"})
                    break
        except InexactError as error:
            report.failures.append(f"Inexact: {error}")
        except Exception as error:  # the steps do not depend on one another
            traceback.print_exc()
            report.failures.append(f"{step.name} failed: {type(error).__name__}: {error}")
        day.clock.free()
        report.write(facts)
        if any(failure.startswith("Inexact") for failure in report.failures):
            break
    for failure in report.failures:
        print(failure, file=sys.stderr)
    return 1 if report.failures else 0
