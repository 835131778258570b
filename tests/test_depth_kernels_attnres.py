# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The references of the depth kernels against naive depth attention; their arguments; and, where Triton is installed, the
kernels themselves, each way in a process of its own."""

import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from modeling_attnres import depth_launch_attnres, naive_depth_attention
from modeling_attnres.depth_decode_kernel_attnres import decode_mix
from modeling_attnres.depth_kernels_attnres import available, merge, phase_one_rows, phase_one_rows_backward


FORMS = ("mean", "sum")
EPS = 1e-5
# Weights that are equal, that differ, and that are nearly one-hot.
QUERY_SCALES = {"zero": 0.0, "random": 0.3, "one-hot": 20.0}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: make test-kernels")


class PhaseOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, sources, form, impl):
        ctx.save_for_backward(scores, sources)
        ctx.form, ctx.impl = form, impl
        return phase_one_rows(scores, sources, form, impl)

    @staticmethod
    def backward(ctx, rows_gradient, offset_gradient):
        scores, sources = ctx.saved_tensors
        sources_gradient = torch.zeros_like(sources)
        arguments = (rows_gradient, offset_gradient, scores, sources, ctx.form, sources_gradient, ctx.impl)
        return phase_one_rows_backward(*arguments), sources_gradient, None, None


def random_group(query_scale, dtype=torch.float64, num_sources=3, num_rows=4, num_tokens=2, hidden_size=100):
    """Finished sources, the outputs of the sublayers of a group, their queries and key norms."""
    sources = torch.randn(num_sources, num_tokens, hidden_size) * torch.tensor([1.0, 3.0, 0.3]).view(-1, 1, 1)
    outputs = torch.randn(num_rows, num_tokens, hidden_size)
    query = query_scale * torch.randn(num_rows, hidden_size) / math.sqrt(hidden_size)
    key_norm = 1 + 0.1 * torch.randn(num_rows, hidden_size)
    return [tensor.to(dtype).requires_grad_() for tensor in (sources, outputs, query, key_norm)]


def fold(query, key_norm):
    """Folded queries and the floor of the norms, so that a score is a quotient."""
    hidden_size = query.shape[-1]
    return query * key_norm * math.sqrt(hidden_size), query.new_full((), math.sqrt(hidden_size * EPS))


def mixes_of_group(sources, outputs, query, key_norm, form, impl):
    """`[R, M, D]`: phase 1 for all, then merge by merge; each output is added in the merge that follows it."""
    queries, floor = fold(query, key_norm)
    norms = torch.sqrt(sources.square().sum(-1, keepdim=True) + floor.square())
    rows, offsets = PhaseOne.apply(((sources @ queries.T) / norms).movedim(-1, 1), sources, form, impl)
    options = {"stream": sources.sum(0), "num_sources": len(sources) + 1} if form == "sum" else {}
    recent, mixes = None, []
    for row, offset, folded, output in zip(rows, offsets, queries, outputs):
        merged = merge(row, offset, folded, recent, floor, output=output, impl=impl, **options)
        recent = merged.recent
        if form == "sum":
            options["stream"] = merged.stream
        mixes.append(merged.mix)
    return torch.stack(mixes)


def naive_mixes_of_group(sources, outputs, query, key_norm, form):
    mixes = []
    for row in range(len(query)):
        stacked = torch.cat([sources, outputs[: row + 1].sum(0, keepdim=True)])
        mixes.append(naive_depth_attention(stacked.unsqueeze(1), query[row], key_norm[row], EPS, form)[0].squeeze(0))
    return torch.stack(mixes)


def relative_error(result, exact):
    """In norm; the error itself where the exact result is zero."""
    return (result.double() - exact).norm().item() / (exact.norm().item() or 1.0)


def assert_group_is_naive(group, form, impl, tolerance):
    exact_group = [tensor.detach().double().requires_grad_() for tensor in group]
    mixes, exact = mixes_of_group(*group, form, impl), naive_mixes_of_group(*exact_group, form)
    assert relative_error(mixes.detach(), exact.detach()) < tolerance
    cotangent = torch.randn(mixes.shape)
    (mixes * cotangent).sum().backward()
    (exact * cotangent).sum().backward()
    for tensor, exact_tensor in zip(group, exact_group):
        if exact_tensor.grad.any():  # zero queries: key norms have no gradient
            assert relative_error(tensor.grad, exact_tensor.grad) < tolerance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("query_scale", QUERY_SCALES.values(), ids=QUERY_SCALES)
def test_references_of_a_group_are_naive_depth_attention(query_scale, form):
    assert_group_is_naive(random_group(query_scale), form, "torch", tolerance=1e-11)  # fp64, a few hundred roundings


@pytest.mark.parametrize("form", FORMS)
def test_reference_of_phase_one_has_the_gradient_of_finite_differences(form):
    scores = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    sources = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: PhaseOne.apply(*inputs, form, "torch"), (scores, sources))


def decode_arguments(form, query_scale=0.3, dtype=torch.float64, tokens=(2, 1), hidden_size=100, num_slots=4):
    sources, _, query, key_norm = random_group(query_scale, dtype=dtype, num_tokens=math.prod(tokens), num_rows=1)
    slots = torch.cat([sources.detach(), torch.full_like(sources[:1], math.nan)])[..., :hidden_size]
    (query,), floor = fold(query.detach()[:, :hidden_size], key_norm.detach()[:, :hidden_size])
    arguments = {"sources": slots.unflatten(1, tokens).contiguous(), "query": query, "norm_floor": floor}
    if form == "sum":
        arguments["stream"] = arguments["sources"][:3].sum(0)
    return arguments


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("opens_block", [False, True], ids=["adds", "opens"])
def test_reference_of_decoding_is_naive_depth_attention(opens_block, form):
    arguments = decode_arguments(form)
    output = torch.randn_like(arguments["sources"][0])
    expected = arguments["sources"].clone()
    num_sources = 4 if opens_block else 3
    expected[num_sources - 1] = output if opens_block else expected[num_sources - 1] + output
    result = decode_mix(num_sources=num_sources, output=output, opens_block=opens_block, **arguments)
    # `query` is folded: with a key norm of 1 / sqrt(D) it is the naive form's.
    key_norm = torch.full_like(arguments["query"], 1 / math.sqrt(len(arguments["query"])))
    mix, weights = naive_depth_attention(expected[:num_sources], arguments["query"], key_norm, EPS, form)
    assert torch.equal(arguments["sources"][:num_sources], expected[:num_sources])
    torch.testing.assert_close(result.mix, mix, rtol=1e-12, atol=1e-12)  # fp64 rounding
    torch.testing.assert_close(
        result.weights.movedim(0, -1) * (1 if form == "mean" else num_sources), weights, rtol=1e-12, atol=1e-12
    )
    if form == "sum":
        assert torch.equal(result.stream, arguments["stream"] + output)


def test_norm_is_that_of_llama():
    rms_norm = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(64, eps=EPS).bfloat16()
    torch.nn.init.normal_(rms_norm.weight)
    row, recent = torch.randn(2, 3, 64).bfloat16()
    weight = rms_norm.weight.detach()
    arguments = (row, torch.randn(3), torch.randn(64), recent, torch.tensor(0.1))
    merged = merge(*arguments, norm_weight=weight, norm_eps=EPS)
    assert torch.equal(merged.normed, rms_norm(merged.mix))


def test_kernels_are_imported_only_when_asked_for():
    program = """
import sys, torch
from modeling_attnres import depth_decode_kernel_attnres, depth_kernels_attnres
depth_kernels_attnres.phase_one_rows(torch.zeros(1, 1, 2), torch.zeros(1, 2, 64), "mean")
sys.exit("modeling_attnres.depth_triton_attnres" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], timeout=120, check=True)


REASONS = {
    "dtype": ((torch.device("cuda"), torch.float64, 64), "they compute in fp32, and torch.float64 is none of"),
    "width": ((torch.device("cuda"), torch.float32, 8193), "a hidden size of 8193 is not between 1 and 8192"),
    "sources": ((torch.device("cuda"), torch.float32, 64, 33), "33 sources by 1 rows are not between 1 and 32 by 16"),
    "device": ((torch.device("cpu"), torch.float32, 64), "cpu is not a CUDA device"),
}


@pytest.mark.parametrize(("arguments", "reason"), REASONS.values(), ids=REASONS)
def test_available_says_why_not(arguments, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(depth_launch_attnres.importlib.util, "find_spec", lambda name: object())
    assert available(*arguments).startswith(reason)


def test_available_where_triton_is_missing(monkeypatch):
    monkeypatch.setattr(depth_launch_attnres.importlib.util, "find_spec", lambda name: None)
    assert available(torch.device("cpu"), torch.float32, 64).startswith("Triton is not installed")


def test_a_kernel_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"(?s)`impl=\"triton\"` needs tensors that the kernels can run on: .*"):
        phase_one_rows(torch.zeros(1, 1, 2), torch.zeros(1, 2, 64), "mean", impl="triton")


ROW, OFFSET, QUERY, FLOOR = torch.zeros(2, 8), torch.zeros(2), torch.zeros(8), torch.tensor(0.1)
SCORES, SOURCES = torch.zeros(3, 1, 2), torch.zeros(3, 2, 8)
WRONG = {
    "no recent": (lambda: merge(ROW, OFFSET, QUERY, None, FLOOR), "`recent` or `output` must be given, got neither"),
    "no row": (lambda: merge(None, OFFSET, QUERY, ROW, FLOOR), '`row` must be given for "mean"'),
    "no n": (
        lambda: merge(None, OFFSET, QUERY, ROW, FLOOR, stream=ROW),
        "`num_sources` must be at least 2 with `stream`, got None",
    ),
    "no eps": (
        lambda: merge(ROW, OFFSET, QUERY, ROW, FLOOR, norm_weight=QUERY),
        "`norm_weight` and `norm_eps` must be given together, got norm_eps=None",
    ),
    "shape": (
        lambda: merge(ROW, OFFSET, QUERY, ROW, FLOOR, output=ROW[:1]),
        r"`output` must be \[2, 8\], torch.float32, cpu, got \[1, 8\], torch.float32, cpu",
    ),
    "dtype": (
        lambda: merge(ROW.half(), OFFSET.half(), QUERY, ROW.half(), FLOOR),
        r"`offset` must be \[2\], torch.float32, cpu, got \[2\], torch.float16, cpu",
    ),
    "impl": (
        lambda: merge(ROW, OFFSET, QUERY, ROW, FLOOR, impl="cuda"),
        '`impl` must be "torch" or "triton", got .cuda.',
    ),
    "form": (lambda: phase_one_rows(SCORES, SOURCES, "max"), '`form` must be "mean" or "sum", got .max.'),
    "scores": (
        lambda: phase_one_rows(SCORES[:2], SOURCES, "sum"),
        r"`scores` must be \[3, 1, 2\], .* got \[2, 1, 2\]",
    ),
    "gradient": (
        lambda: phase_one_rows(SCORES.clone().requires_grad_(), SOURCES, "sum"),
        r"`phase_one_rows` is not differentiable and needs torch.no_grad\(\), got gradients for \['scores'\]",
    ),
    "in place": (
        lambda: phase_one_rows_backward(SOURCES[:1], None, SCORES, SOURCES, "sum", SOURCES.mT.contiguous().mT),
        "`sources_gradient` is written in place and must be contiguous, got strides",
    ),
    "slots": (lambda: decode_mix(SOURCES, 4, QUERY, FLOOR), "`num_sources` must be between 1 and the 3 slots, got 4"),
    "nothing opens": (
        lambda: decode_mix(SOURCES, 3, QUERY, FLOOR, opens_block=True),
        "`output` must be given with `opens_block`, got None",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_documented_example_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    document = (Path(__file__).parents[1] / "docs/kernels.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["impl"] == "torch"  # on CPU tensors
    assert names["merged"].mix.shape == names["merged"].recent.shape == (32, 576)


def run_tests(name: str, **environment: str):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    process = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, process.stdout[-10000:] + process.stderr[-2000:]


@needs_triton
def test_kernels_under_the_interpreter():
    run_tests("interpreted_depth_kernels.py", TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile(tmp_path):
    run_tests("compiled_depth_kernels.py", TRITON_CACHE_DIR=str(tmp_path))
