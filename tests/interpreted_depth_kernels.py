"""The kernels of depth attention under Triton's interpreter, on the CPU, against fp64.

`test_depth_kernels_attnres.py` runs this file in a process of its own, because Triton must not have been imported before
it is told to interpret. By hand: `TRITON_INTERPRET=1 python -m pytest tests/interpreted_depth_kernels.py`.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from modeling_attnres.depth_kernels_attnres import available, merge


FORMS = ("mean", "sum")
# A power of two, multiples of 16 bytes in fp32 alone and not, a real width; tokens that fill nothing.
SHAPES = [(7, 64), (33, 96), (1, 100), (7, 100), (2, 576)]
# Errors in norm, relative. fp32: some roundings of 6e-8. bf16: results and what backward reads of the mix are rounded,
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


def relative_error(result, exact):
    return ((result.double() - exact).norm() / exact.norm()).item()


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

    arguments = {"row": draw(), "stat": torch.randn(shape[:-1]), "query": torch.randn(shape[-1]) * query_scale}
    arguments["norm_floor"] = torch.tensor(0.3)
    arguments["recent"] = None if adds == "opens" else 3 * draw()
    if adds:
        arguments["output"] = draw()
    if form == "sum":
        arguments |= {"stream": draw(), "num_sources": 5}
    if norm:
        arguments |= {"norm_weight": 1 + 0.1 * draw().flatten(0, -2)[0], "norm_eps": 1e-5}
    return arguments


def exact_merge(row, stat, query, recent, norm_floor, output=None, stream=None, dtype=None, **others):
    """The reference in fp64, but with sums rounded to `dtype` as they are stored."""
    if output is not None:
        recent = output if recent is None else rounded(recent + output, dtype)
        stream = None if stream is None else rounded(stream + output, dtype)
    return merge(row, stat, query, recent, norm_floor, stream=stream, **others)


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
        assert value.dtype == (torch.float32 if name == "relative" else dtype)
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", [False, True], ids=["mix", "normed"])
@pytest.mark.parametrize("adds", [None, "opens", "output"])
@pytest.mark.parametrize(
    "gradients_of", [("mix",), ("normed",), ("relative",), ("recent", "mix"), ("stream", "mix")], ids="-".join
)
def test_merge_of_some_arguments_and_gradients(form, norm, adds, gradients_of):
    if ("normed" in gradients_of and not norm) or ("stream" in gradients_of and form == "mean"):
        pytest.skip("no such output")
    arguments = merge_arguments((2, 3, 64), torch.float32, form, adds, norm)
    assert_merge_is_exact(arguments, torch.float32, gradients_of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adds", [None, "opens", "output"])
@pytest.mark.parametrize("has_row", [False, True], ids=["no-row", "zero-row"])
def test_merge_with_zero_queries_hands_on_the_plain_stream(has_row, adds, dtype):
    arguments = merge_arguments((7, 100), dtype, "sum", adds, norm=True, query_scale=0.0)
    arguments["stat"].zero_()
    arguments["row"] = torch.zeros_like(arguments["row"]) if has_row else None
    result = merge(**arguments, impl="triton")
    stream = arguments["stream"] + arguments["output"] if adds else arguments["stream"]
    assert torch.equal(result.mix, stream)
    assert torch.equal(result.stream, stream)
