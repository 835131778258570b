# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch

from modeling_attnres.eval.bench.compiled_launches import (
    Kernels,
    count_calls,
    count_compiled,
    extra_kernels,
    pretended_h100,
)
from modeling_attnres.eval.bench.launch_tables import case_of, why_not_compiled
from modeling_attnres.eval.bench.launches import Case
from modeling_attnres.eval.bench.models import PRESETS
from modeling_attnres.eval.bench.published import BARS, COMPILED, compiled_figure


needs_triton = pytest.mark.skipif(why_not_compiled() is not None, reason=str(why_not_compiled()))


def test_calls_are_counted_in_code():
    code = """
def call(args):
        # Topologically Sorted: torch.ops.aten.mm.default(, extern_kernels.mm(
        buf0 = empty_strided_cuda((4, 8), (8, 1), torch.bfloat16)
        triton_poi_fused_add_0.run(arg0_1, buf0, 32, stream=raw_stream0)
            extern_kernels.mm(buf0, arg1_1, out=buf1)
        buf2 = torch.ops.attnres_bench.attention.default(buf1, buf1, buf1)
        buf3 = buf2
"""

    assert count_calls(code) == 3


def test_without_triton_the_reason_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert why_not_compiled().endswith("Triton is not installed (pip install --no-deps triton==3.7.1).")


@needs_triton
def test_the_pretended_device_is_gone_afterwards():
    with pretended_h100():
        assert torch.cuda.get_device_properties(0).name == "NVIDIA H100"
        assert torch.cuda.is_available()

    assert torch.cuda.is_available() == (torch.cuda.device_count() > 0)


@needs_triton
def test_kernels_of_a_small_base():
    shape = replace(PRESETS["tiny"], num_layers=2)

    # A layer is seven products, attention, two rotations, the gate and two norms; a norm and the head come on top.
    assert count_compiled(Case(shape, "prefill", batch=4, tokens=64), "base") == Kernels(forward=2 * 13 + 2)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", COMPILED)
def test_extra_kernels_keep_their_bars(name):
    assert compiled_figure(name).mean.median <= BARS[name].must


# Kernels per sublayer, forward and backward, that today's code adds.
TODAY = {
    ("prefill", "block"): (0.75, 0),
    ("prefill", "block-sum"): (0.75, 0),
    ("decode", "block"): (0.75, 0),
    ("decode", "block-sum"): (0.75, 0),
    ("train", "block"): (0.875, 3.0),
    ("train", "block-sum"): (0.875, 3.375),
}


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(("mode", "variant"), TODAY)
def test_extra_kernels_do_not_grow(mode, variant):
    kernels = extra_kernels(case_of(mode), variant)
    forward, backward = TODAY[mode, variant]

    assert (kernels.forward <= forward, kernels.backward <= backward) == (True, True)
