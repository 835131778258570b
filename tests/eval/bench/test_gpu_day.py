# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json
import types
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from modeling_attnres.eval.bench import gpu_day
from modeling_attnres.eval.bench.clocks import ProcessorClock
from modeling_attnres.eval.bench.gpu_day import STEPS, Day, InexactError, Step, run_day
from modeling_attnres.eval.bench.models import PRESETS


TINY = replace(PRESETS["tiny"], num_layers=2)


class FakeClock(ProcessorClock):
    """Every action takes a millisecond."""

    label = "gpu"

    def __init__(self):
        self.freed = 0

    def measure(self, action):
        action()
        return 1e-3, 2e-3

    def free(self):
        self.freed += 1


@pytest.fixture
def day():
    return Day(
        torch.device("cpu"),
        FakeClock(),
        exact_shape=TINY,
        exact_tokens=6,
        backend="aot_eager",
        hidden_size=8,
        num_sources=(2, 3),
        num_queries=(2,),
        num_tokens=(4, 8),
        decode_shape=TINY,
        decode_batches=(1, 2),
        past=4,
        new_tokens=3,
        train_shape=TINY,
        train_batch=1,
        train_tokens=6,
        rounds=2,
    )


@pytest.fixture
def uncompiled(monkeypatch):
    """Tracing a dozen models takes a minute."""

    def compile_(model, *, fullgraph, dynamic, backend):
        assert (fullgraph, dynamic, backend) == (True, False, "aot_eager")
        return model

    monkeypatch.setattr(torch, "compile", compile_)


def rows_of(name: str, day: Day) -> list[dict]:
    (step,) = [step for step in STEPS if step.name.startswith(name)]
    return list(step.run(day))


def test_the_day_fits_into_twenty_minutes():
    assert sum(step.budget for step in STEPS) < 20 * 60


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exact_forms_pass(day, compiles, request):
    if not compiles:
        request.getfixturevalue("uncompiled")

    rows = rows_of("a", day)

    against_base = [row for row in rows if row["case"].endswith("against the base")]
    assert {row["case"] for row in against_base} == {
        "eager prefill against the base",
        "eager training forward against the base",
        "eager decode against the base",
        "compiled prefill against the base",
        "compiled training forward against the base",
    }
    assert {(row["dtype"], row["variant"]) for row in against_base} == {
        (dtype, variant) for dtype in ("float32", "bfloat16") for variant in ("block-sum", "full-sum")
    }
    assert all(row["error"] == 0 for row in against_base)
    assert len(rows) - len(against_base) == 2 * 4  # Figure 2: both dtypes, both sizes of blocks, both forms


def test_the_first_inexact_output_ends_the_day(day, monkeypatch, tmp_path, capsys):
    build = gpu_day.build_lineup

    def shifted(*args, query_std=0.03, **kwargs):
        lineup = build(*args, query_std=query_std, **kwargs)
        if query_std == 0:
            lineup.models["block-sum"].register_forward_hook(_shift)
        return lineup

    monkeypatch.setattr(gpu_day, "build_lineup", shifted)

    assert run_day(day, tmp_path) == 1
    content = json.loads((tmp_path / "gpu-day.json").read_text())
    assert list(content["tables"]) == ["a. Exactness"]
    (failure,) = content["failures"]
    assert failure.startswith("Inexact: eager prefill, float32: 'block-sum' is 1.00e-03 away from the base.")
    assert failure in capsys.readouterr().err
    assert failure in (tmp_path / "gpu-day.md").read_text()


def _shift(module, args, outputs):
    outputs.logits = outputs.logits.clone()
    outputs.logits[0, 0, 0] += 1e-3


def test_a_form_that_is_not_figure_2_is_inexact(day, monkeypatch):
    def gate(lineup):
        raise gpu_day.EqualityGateError("'block' is 1.0 away from Figure 2")

    monkeypatch.setattr(gpu_day, "check_equality", gate)

    with pytest.raises(InexactError, match=r"float32: 'block' is 1\.0 away"):
        rows_of("a", day)


def test_products_are_set_beside_a_copy(day):
    copy, *rows = rows_of("b", day)

    # 8 tokens of 8 elements in bf16, read and written in a millisecond.
    assert copy["TB/s"] == pytest.approx(2 * 8 * 8 * 2 / 1e-3 / 1e12)
    assert [(row["M"], row["n"], row["R"]) for row in rows] == [(4, 2, 2), (4, 3, 2), (8, 2, 2), (8, 3, 2)]
    moved = 2 * (8 * 2 * 3 + 3 * 8 * 8 + 8 * 2 * 8)
    assert rows[-1]["ms"] == pytest.approx(1)
    assert rows[-1]["TB/s"] == pytest.approx(moved / 1e-3 / 1e12)
    assert rows[-1]["time / copy's"] == pytest.approx(2 * 8 * 8 * 2 / moved)


def test_decoding_steps_and_generates(day):
    rows = rows_of("c", day)

    assert [(row["case"], row["variant"]) for row in rows] == [
        (case, variant)
        for case in ("eager, batch 1", "eager, batch 2", "generate, static cache, batch 1")
        for variant in ("base", "block", "block-sum")
    ]
    assert all(row["wall ms"] > 0 for row in rows)
    assert rows[-1]["wall ms"] == pytest.approx(2 / day.new_tokens)


def test_training_is_timed_with_and_without_checkpointing(day, monkeypatch):
    rows = rows_of("d", day)

    assert [(row["case"], row["variant"]) for row in rows] == [
        (f"{with_or_without} checkpointing", variant)
        for with_or_without in ("without", "with")
        for variant in ("base", "block", "block-sum", "full")
    ]
    assert all(row["/ base"] == 1 and row["peak GB"] > 0 for row in rows)
    assert day.clock.freed == 8


def test_a_case_that_does_not_fit_is_noted(day, monkeypatch):
    fits = iter([False, True] * 4)

    def peak_bytes(action):
        if not next(fits):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2**30

    monkeypatch.setattr(day.clock, "peak_bytes", peak_bytes)

    rows = rows_of("d", day)
    assert [row.get("note") for row in rows] == ["out of memory", None] * 4
    assert {row["/ base"] for row in rows[1::2]} == {None}  # the base itself did not fit


# --- Kernels ---------------------------------------------------------------------------------------------------------


Merged = namedtuple("Merged", ["mix", "relative", "recent", "stream", "normed"])


def fake_kernels(off: float = 0.0, available: bool = True):
    """A stand-in for the module of kernels, whose results are `off` by so much."""

    def result(value, impl):
        if impl == "triton" and not available:
            raise ValueError("cpu is not a CUDA device")
        return value + off if impl == "triton" else value

    def merge(row, stat, query, recent, floor, *, output, stream=None, num_sources=None, impl="torch", **norm):
        recent = recent + output
        if stream is None:
            mix = row + recent
        else:
            mix = stream + output if row is None else stream + output + row
        normed = functional.rms_norm(mix, mix.shape[-1:], norm["norm_weight"], norm["norm_eps"])
        return Merged(result(mix, impl), stat, recent, stream, normed)

    def phase_one_rows(scores, sources, form, impl="torch"):
        return result(torch.einsum("nrm,nmd->rmd", scores.to(sources.dtype), sources), impl), scores.amax(0)

    return types.SimpleNamespace(merge=merge, phase_one_rows=phase_one_rows)


def with_kernels(monkeypatch, module):
    monkeypatch.setattr(gpu_day.importlib.util, "find_spec", lambda name: module)
    monkeypatch.setattr(gpu_day.importlib, "import_module", lambda name: module)


def test_without_kernels_the_table_says_so(day, monkeypatch):
    monkeypatch.setattr(gpu_day, "KERNELS", "modeling_attnres.no_such_kernels")

    assert rows_of("e", day) == [{"case": "no kernels"}]


def test_kernels_are_timed_beside_torch(day, monkeypatch):
    with_kernels(monkeypatch, fake_kernels())

    rows = rows_of("e", day)

    cases = ["merge, mean", "merge, sum", "merge, sum, zero queries"]
    cases += [f"phase 1, {form}, n {n}, R 2" for n in (2, 3) for form in ("mean", "sum")]
    assert [(row["case"], row["impl"]) for row in rows] == [
        (case, impl) for case in cases for impl in ("torch", "triton")
    ]
    assert all(row["TB/s"] > 0 for row in rows)


def test_a_kernel_that_cannot_run_is_noted(day, monkeypatch):
    with_kernels(monkeypatch, fake_kernels(available=False))

    notes = [row for row in rows_of("e", day) if "note" in row]
    assert {(row["impl"], row["note"]) for row in notes} == {("triton", "cpu is not a CUDA device")}
    assert len(notes) == 7


@pytest.mark.parametrize(("off", "message"), [(1.0, "merge, mean: result 0 of the kernel is"), (1e-3, "zero queries")])
def test_a_kernel_that_is_off_is_inexact(day, monkeypatch, off, message):
    day = replace(day, hidden_size=256)  # one value is large enough to make the small difference a small part of it
    with_kernels(monkeypatch, fake_kernels(off))

    with pytest.raises(InexactError, match=message):
        rows_of("e", day)


# --- The day as a whole ----------------------------------------------------------------------------------------------


def test_a_whole_day_is_written(day, uncompiled, tmp_path, capsys):
    assert run_day(day, tmp_path) == 0

    content = json.loads((tmp_path / "gpu-day.json").read_text())
    assert list(content["tables"]) == [step.name for step in STEPS]
    assert all(content["tables"].values())
    assert content["failures"] == []
    assert content["environment"]["torch"] == torch.__version__
    page = (tmp_path / "gpu-day.md").read_text()
    assert all(f"## {step.name}" in page for step in STEPS)
    assert "| bmm | " in page
    assert "d. Training [" in capsys.readouterr().err


def test_a_step_that_breaks_does_not_take_the_rest_along(day, tmp_path):
    def breaks(day):
        yield {"case": "one"}
        raise KeyError("two")

    steps = (Step("first", 10, breaks), Step("second", 10, lambda day: iter([{"case": "three"}])))

    assert run_day(day, tmp_path, steps) == 1
    content = json.loads((tmp_path / "gpu-day.json").read_text())
    assert content["tables"] == {"first": [{"case": "one"}], "second": [{"case": "three"}]}
    assert content["failures"] == ["first failed: KeyError: 'two'"]


def test_a_step_stops_when_its_time_is_up(day, tmp_path, monkeypatch):
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(gpu_day.time, "monotonic", lambda: float(next(ticks)))
    steps = (Step("long", 25, lambda day: iter([{"case": index} for index in range(9)])),)

    assert run_day(day, tmp_path, steps) == 0
    rows = json.loads((tmp_path / "gpu-day.json").read_text())["tables"]["long"]
    assert rows == [{"case": 0}, {"case": 1}, {"case": 2}, {"note": "stopped after 30 s"}]
