# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The kernels of depth attention under Triton's interpreter, on the CPU, against fp64.

`test_depth_kernels_attnres.py` runs this file in a process of its own, because Triton must not have been imported before
it is told to interpret. By hand: `TRITON_INTERPRET=1 python -m pytest tests/interpreted_depth_kernels.py`.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from test_depth_kernels_attnres import (
    FORMS,
    QUERY_SCALES,
    assert_group_is_naive,
    decode_arguments,
    random_group,
    relative_error,
)
from triton.runtime import interpreter

from modeling_attnres import depth_kernels_attnres
from modeling_attnres.depth_decode_kernel_attnres import decode_mix
from modeling_attnres.depth_kernels_attnres import available, merge, phase_one_rows, phase_one_rows_backward


DOCUMENT = (Path(__file__).parents[1] / "docs/kernels.md").read_text(encoding="utf-8")
TRAFFIC = DOCUMENT.split("## Launches and memory")[1].split("\n## ")[0]
# A power of two, multiples of 16 bytes in fp32 alone and not, a real width; tokens that fill nothing.
SHAPES = [(7, 64), (33, 96), (1, 100), (7, 100), (2, 576)]
# Relative errors in norm. fp32: some roundings of 6e-8. bf16: results and what backward reads of the mix are rounded,
# 2^-9 each; the gradients of the scores come from differences of rounded tensors.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
GRADIENT_TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-6}

_convert_float = interpreter._convert_float


def _to_nearest(data, source, target, rounding):
    """The interpreter truncates fp32 to bf16; devices round to nearest even."""
    if source == tl.float32 and target == tl.bfloat16:
        return torch.from_numpy(np.array(data, np.float32)).bfloat16().view(torch.uint16).numpy()
    return _convert_float(data, source, target, rounding)


interpreter._convert_float = _to_nearest


def wide(tensor):
    """`tensor` in fp64 as a leaf with a gradient, or what it is if it is none."""
    if not torch.is_tensor(tensor):
        return tensor
    return tensor.detach().double().requires_grad_(tensor.dim() > 0)


def rounded(tensor, dtype):
    """`tensor` in fp64 with the values that it has in `dtype`, and its own gradient."""
    return tensor + (tensor.detach().to(dtype).double() - tensor.detach())


def merge_arguments(shape, dtype, form, adds, norm, query_scale=0.1):
    """Of a merge in which the output is added to the recent source ("output"), opens a block ("opens"), or is not given."""

    def draw():
        return torch.randn(shape).to(dtype)

    arguments = {"row": draw(), "offset": torch.randn(shape[:-1]), "query": torch.randn(shape[-1]) * query_scale}
    arguments["norm_floor"] = torch.tensor(0.3)
    arguments["recent"] = None if adds == "opens" else 3 * draw()
    if adds:
        arguments["output"] = draw()
    if form == "sum":
        arguments |= {"stream": draw(), "num_sources": 5}
    if norm:
        arguments |= {"norm_weight": 1 + 0.1 * draw().flatten(0, -2)[0], "norm_eps": 1e-5}
    return arguments


def exact_merge(row, offset, query, recent, norm_floor, output=None, stream=None, dtype=None, **others):
    """The reference in fp64, but with sums rounded to `dtype` as they are stored."""
    if output is not None:
        recent = output if recent is None else rounded(recent + output, dtype)
        stream = None if stream is None else rounded(stream + output, dtype)
    return merge(row, offset, query, recent, norm_floor, stream=stream, **others)


def assert_merge_is_exact(arguments, dtype, gradients_of=None):
    """Compares outputs, and the gradients of the outputs named (of all if not given) for random cotangents."""
    leaves = {name: x.requires_grad_(x.dim() > 0) if torch.is_tensor(x) else x for name, x in arguments.items()}
    exact_leaves = {name: wide(x) for name, x in leaves.items()}
    result, exact = merge(**leaves, impl="triton"), exact_merge(**exact_leaves, dtype=dtype)
    total, exact_total = 0, 0
    for name, value, exact_value in zip(result._fields, result, exact):
        if exact_value is None:
            assert value is None
            continue
        assert value.dtype == (torch.float32 if name == "logit" else dtype)
        if name in ("recent", "stream"):
            assert torch.equal(value.double(), exact_value), name
        else:
            assert relative_error(value, exact_value) < TOLERANCE[dtype], name
        if gradients_of is None or name in gradients_of:
            cotangent = torch.randn(value.shape).to(dtype)
            total += (value.double() * cotangent.double()).sum()
            exact_total += (exact_value * cotangent.double()).sum()
    total.backward()
    exact_total.backward()
    for name, leaf in leaves.items():
        if torch.is_tensor(leaf) and leaf.requires_grad:
            exact_gradient = exact_leaves[name].grad
            if exact_gradient is None or not exact_gradient.any():
                assert leaf.grad is None or not leaf.grad.any(), name
            else:
                assert leaf.grad.dtype == leaf.dtype
                assert relative_error(leaf.grad, exact_gradient) < GRADIENT_TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge(shape, form, dtype):
    assert_merge_is_exact(merge_arguments(shape, dtype, form, "output", norm=True), dtype)


# Which outputs have a gradient decides which tensors the backward is compiled with.
GRADIENTS_OF = {
    "mean": [(False, ("mix",)), (True, ("normed",)), (True, ("logit",)), (True, ("recent", "normed"))],
    "sum": [(False, ("mix",)), (True, ("normed",)), (False, ("logit", "mix")), (True, ("stream", "mix", "normed"))],
}


@pytest.mark.parametrize("adds", [None, "opens", "output"])
@pytest.mark.parametrize(
    ("form", "norm", "gradients_of"),
    [(form, *case) for form, cases in GRADIENTS_OF.items() for case in cases],
    ids=str,
)
def test_merge_of_some_arguments_and_gradients(form, norm, gradients_of, adds):
    arguments = merge_arguments((2, 3, 64), torch.float32, form, adds, norm)
    assert_merge_is_exact(arguments, torch.float32, gradients_of)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("query_scale", [0.0, 30.0], ids=["equal", "one-hot"])
def test_merge_of_equal_and_of_one_hot_scores(query_scale, form):
    arguments = merge_arguments((7, 100), torch.float32, form, "output", norm=True, query_scale=query_scale)
    if query_scale == 0:
        arguments["offset"] = torch.full((7,), -math.log(4.0) if form == "mean" else 0.0)
    gradients_of = ("normed",) if query_scale == 0 else ("recent",)  # the others' are differences near 0
    assert_merge_is_exact(arguments, torch.float32, gradients_of)


def test_merge_of_strided_tensors():
    arguments = merge_arguments((6, 64), torch.float32, "sum", "output", norm=True)
    expected = merge(**arguments, impl="triton")
    strided = {
        name: x.mT.contiguous().mT if torch.is_tensor(x) and x.dim() == 2 else x for name, x in arguments.items()
    }
    for value, strided_value in zip(expected, merge(**strided, impl="triton"), strict=True):
        assert torch.equal(value, strided_value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adds", [None, "opens", "output"])
@pytest.mark.parametrize("has_row", [False, True], ids=["no-row", "zero-row"])
def test_merge_with_zero_queries_hands_on_the_plain_stream(has_row, adds, dtype):
    arguments = merge_arguments((7, 100), dtype, "sum", adds, norm=True, query_scale=0.0)
    arguments["offset"].zero_()
    arguments["row"] = torch.zeros_like(arguments["row"]) if has_row else None
    result = merge(**arguments, impl="triton")
    stream = arguments["stream"] + arguments["output"] if adds else arguments["stream"]
    assert torch.equal(result.mix, stream)
    assert torch.equal(result.stream, stream)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("query_scale", QUERY_SCALES.values(), ids=QUERY_SCALES)
def test_kernels_of_a_group_are_naive_depth_attention(query_scale, form):
    group = random_group(query_scale, torch.float32)
    # One-hot weights have gradients that are differences of nearly equal numbers.
    assert_group_is_naive(group, form, "triton", tolerance=2e-6 if query_scale < 1 else 2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_sources", "num_rows", "shape"), [(1, 1, (1, 64)), (5, 9, (7, 96)), (9, 8, (1, 2, 576))])
def test_phase_one(num_sources, num_rows, shape, form, dtype):
    scores, offset_gradient = torch.randn(num_sources, num_rows, *shape[:-1]), torch.randn(num_rows, *shape[:-1])
    sources, held = torch.randn(2, num_sources, *shape).to(dtype)
    rows_gradient = torch.randn(num_rows, *shape).to(dtype)
    inputs = (rows_gradient, offset_gradient, scores, sources)
    exact_held = held.double()
    exact_rows, exact_offset = phase_one_rows(scores.double(), sources.double(), form)
    exact = phase_one_rows_backward(*(x.double() for x in inputs), form, exact_held)
    without_offset = phase_one_rows_backward(rows_gradient.double(), None, *(x.double() for x in inputs[2:]), form)

    rows, offset = phase_one_rows(scores, sources, form, impl="triton")
    assert relative_error(rows, exact_rows) < TOLERANCE[dtype]
    assert rows.dtype == dtype
    assert relative_error(offset, exact_offset) < TOLERANCE[torch.float32]
    scores_gradient = phase_one_rows_backward(*inputs, form, held, impl="triton")
    assert relative_error(held, exact_held) < TOLERANCE[dtype]
    torch.testing.assert_close(scores_gradient.double(), exact, rtol=1e-5, atol=1e-5 * num_rows)  # sums over D in fp32
    scores_gradient = phase_one_rows_backward(rows_gradient, None, scores, sources, form, impl="triton")
    torch.testing.assert_close(scores_gradient.double(), without_offset, rtol=1e-5, atol=1e-5 * num_rows)


def test_phase_one_with_equal_scores_is_exactly_zero():
    scores, sources = torch.full((5, 3, 7), 3.7), 100 * torch.randn(5, 7, 96)
    rows, offset = phase_one_rows(scores, sources, "sum", impl="triton")
    assert not rows.any()
    assert torch.equal(offset, scores[0] / -2)


def test_phase_one_with_one_hot_scores():
    scores, sources = torch.randn(5, 3, 7), torch.randn(5, 7, 96).bfloat16()
    scores[2] += 200
    rows, offset = phase_one_rows(scores, sources, "mean", impl="triton")
    assert torch.equal(rows, sources[2].expand_as(rows))
    assert torch.equal(offset, -scores[2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("query_scale", QUERY_SCALES.values(), ids=QUERY_SCALES)
@pytest.mark.parametrize("adds", [None, "opens", "adds"])
@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, (7, 1, 100)), (torch.bfloat16, (1, 5, 64))], ids=str)
def test_decode(dtype, shape, adds, query_scale, form):
    arguments = decode_arguments(form, query_scale, torch.float32, shape[:-1], shape[-1])
    if form == "sum":
        arguments["stream"] = arguments["stream"].to(dtype)
    arguments |= {"num_sources": 4 if adds == "opens" else 3, "opens_block": adds == "opens", "norm_eps": 1e-5}
    arguments["norm_weight"] = torch.randn(shape[-1]).to(dtype)
    arguments |= {"output": torch.randn(shape).to(dtype)} if adds else {"dtype": dtype}
    exact_arguments = {name: x.double() if torch.is_tensor(x) else x for name, x in arguments.items()}
    exact_arguments["sources"] = exact_arguments["sources"].clone()
    if form == "sum" and adds:  # its sum is rounded as it is stored
        stream = (arguments["stream"] + arguments["output"]).double()
        exact_arguments["stream"] = stream - exact_arguments["output"]
    exact = decode_mix(**exact_arguments | {"dtype": torch.float64})

    result = decode_mix(**arguments, impl="triton")
    for name, value, exact_value in zip(result._fields, result, exact):
        if exact_value is None:
            assert value is None
        else:
            wide_enough = torch.float32 if name == "weights" else dtype
            assert value.dtype == wide_enough
            assert relative_error(value, exact_value) < TOLERANCE[wide_enough], name
    torch.testing.assert_close(arguments["sources"].double(), exact_arguments["sources"], equal_nan=True)
    if form == "sum" and query_scale == 0:
        stream = arguments["stream"] + arguments["output"] if adds else arguments["stream"]
        assert torch.equal(result.mix, stream)
        assert torch.equal(result.stream, stream)


def test_available_under_the_interpreter():
    assert available(torch.device("cpu"), torch.bfloat16, 8192, num_sources=32, num_rows=16) is None


class Traffic:
    """Stands in for the interpreter's memory: counts what is read and written by address, so that a cached one counts once."""

    def __init__(self, memory):
        self.memory, self.addresses = memory, {}

    def load(self, pointers, mask, other, dtype):
        self.note("read", pointers, mask, np.dtype(dtype).itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self.note("written", pointers, mask, values.dtype.itemsize)
        return self.memory.store(pointers, values, mask)

    def note(self, kind, pointers, mask, size):
        pointers, mask = np.broadcast_arrays(pointers, mask)
        self.addresses.setdefault((kind, size), []).append(pointers[mask])

    def bytes(self):
        return sum(size * np.unique(np.concatenate(parts)).size for (_, size), parts in self.addresses.items())


@pytest.fixture
def moved(monkeypatch):
    """Calls a function and returns its result, and what its kernels moved, in elements of D in bf16 per token."""

    def measure(function, tokens, hidden_size):
        traffic = Traffic(memory)
        with monkeypatch.context() as patch:
            patch.setattr(interpreter, "_interpreter", traffic)
            result = function()
        return result, traffic.bytes() / (2 * tokens * hidden_size)

    memory = interpreter._interpreter
    return measure


def documented(kernel):
    (row,) = re.findall(rf"^\| {kernel} \|.*$", TRAFFIC, re.MULTILINE)
    return row


def test_documented_traffic_of_the_merge(moved, monkeypatch):
    monkeypatch.setattr(depth_kernels_attnres, "BACKWARD_PROGRAMS", 1)
    tokens, hidden_size, found = 16, 1024, {}
    for form in FORMS:
        arguments = merge_arguments((tokens, hidden_size), torch.bfloat16, form, "output", norm=True)
        leaves = {name: x.requires_grad_(x.dim() > 0) if torch.is_tensor(x) else x for name, x in arguments.items()}
        merged, forward = moved(lambda leaves=leaves: merge(**leaves, impl="triton"), tokens, hidden_size)
        total = merged.normed.sum() + merged.recent.sum() + (merged.stream.sum() if form == "sum" else 0)
        _, backward = moved(total.backward, tokens, hidden_size)
        found[form] = (forward, backward)
    # Query, norm weight, sums over tokens and scalars come on top; they are less than half of D at 16 tokens.
    assert documented("merge") == f"| merge | 1 | {int(found['mean'][0])} | {int(found['sum'][0])} |"
    assert (
        documented("merge, backward") == f"| merge, backward | 2 | {int(found['mean'][1])} | {int(found['sum'][1])} |"
    )
    assert all(figure % 1 < 0.5 for figures in found.values() for figure in figures)


@torch.no_grad()
def test_documented_traffic_of_phase_one_and_of_decoding(moved):
    tokens, hidden_size, num_sources, num_rows = 2, 2048, 5, 8
    scores, sources = (
        torch.randn(num_sources, num_rows, tokens),
        torch.randn(num_sources, tokens, hidden_size).bfloat16(),
    )
    for form in FORMS:
        (rows, _), forward = moved(
            lambda form=form: phase_one_rows(scores, sources, form, impl="triton"), tokens, hidden_size
        )
        arguments = (rows, None, scores, sources, form, torch.zeros_like(sources), "triton")
        _, backward = moved(lambda arguments=arguments: phase_one_rows_backward(*arguments), tokens, hidden_size)
        assert forward == pytest.approx(num_sources + num_rows, abs=0.1)  # and scores
        assert backward == pytest.approx(3 * num_sources + num_rows, abs=0.1)
    bank = torch.randn(num_sources, tokens, hidden_size)
    arguments = {
        "output": sources[0],
        "norm_weight": torch.ones(hidden_size).bfloat16(),
        "norm_eps": 1e-5,
        "impl": "triton",
    }
    query, floor = torch.randn(hidden_size), torch.tensor(0.1)
    _, mean = moved(lambda: decode_mix(bank, num_sources, query, floor, **arguments), tokens, hidden_size)
    _, anchored = moved(
        lambda: decode_mix(bank, num_sources, query, floor, stream=sources[1], **arguments), tokens, hidden_size
    )
    shared = (2 + 1) / tokens  # query in fp32 and norm weight
    assert mean == pytest.approx(2 * num_sources + 5 + shared, abs=0.1)
    assert anchored == pytest.approx(2 * num_sources + 7 + shared, abs=0.1)
    assert documented("phase 1") == "| phase 1 | 1 / R | n / R + 1 | n / R + 1 |"
    assert documented("phase 1, backward") == "| phase 1, backward | 1 / R | 3 n / R + 1 | 3 n / R + 1 |"
    assert documented("decode") == "| decode | 1 | 2 n + 5 | 2 n + 7 |"


@pytest.mark.parametrize("form", FORMS)
def test_sums_are_rounded_before_they_are_scored_and_mixed(form):
    arguments = merge_arguments((7, 100), torch.bfloat16, form, "output", norm=True)
    merged = merge(**arguments, impl="triton")
    output = arguments.pop("output")
    arguments |= {name: arguments[name] + output for name in ("recent", "stream") if name in arguments}
    for value, of_sums in zip(merged, merge(**arguments, impl="triton"), strict=True):
        assert value is of_sums is None or torch.equal(value, of_sums)
