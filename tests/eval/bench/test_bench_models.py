# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import pytest

from modeling_attnres.command_line import DTYPES
from modeling_attnres.eval.bench.models import (
    PRESETS,
    VARIANTS,
    EqualityGateError,
    build_lineup,
    check_equality,
)


def test_every_variant_runs_on_the_parameters_of_the_base():
    lineup = build_lineup(PRESETS["tiny"], list(VARIANTS))

    base = {parameter.data_ptr() for parameter in lineup.models["base"].parameters()}
    depth = {lineup.query.data_ptr(), lineup.key_norm.data_ptr()}
    for name in VARIANTS:
        assert {parameter.data_ptr() for parameter in lineup.models[name].parameters()} == base | depth


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_passes_and_reports_every_variant(dtype):
    errors = check_equality(build_lineup(PRESETS["tiny"], list(VARIANTS), DTYPES[dtype]))

    assert list(errors) == list(VARIANTS)
    bound = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]
    assert all(0 < error < bound for error in errors.values())


@pytest.mark.parametrize("name", ["block", "full", "block-sum", "full-sum"])
def test_gate_stops_a_variant_that_computes_something_else(name):
    lineup = build_lineup(PRESETS["tiny"], [name])
    # Another epsilon: the queries stay shared, the mixes differ a little.
    lineup.models[name].model.depth_attention.eps = 1e-3

    with pytest.raises(EqualityGateError, match=f"'{name}' is .* away from Figure 2"):
        check_equality(lineup)


def test_gate_stops_a_sum_form_that_is_not_anchored_at_the_base():
    lineup = build_lineup(PRESETS["tiny"], ["block-sum"])

    # Exact for the queries it is compared with, and off by a little at zero queries.
    def shift(module, args, outputs):
        if not lineup.query.any():
            outputs.logits += 1e-3

    lineup.models["block-sum"].register_forward_hook(shift)

    with pytest.raises(EqualityGateError, match="zero queries does not give the logits"):
        check_equality(lineup)
    assert lineup.query.any()


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match=r"`variants` must be out of .* got \['mlp'\]"):
        build_lineup(PRESETS["tiny"], ["block", "mlp"])
