# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import csv

import numpy as np
import pytest
import torch
from scipy import stats

from modeling_attnres.eval.causal_report import CausalMap, correlations, draw_map, rank_correlation, write_table


NAN = float("nan")
WEIGHTS = torch.tensor([[1, NAN, NAN], [0.25, 0.75, NAN], [0.5, 0.5, NAN], [0.2, 0.3, 0.5]])
EFFECTS = torch.tensor([[NAN] * 3, [0.1, 0.4, NAN], [NAN, 0.2, NAN], [-0.01, 0.0, 0.3]], dtype=torch.float64)


def test_rank_correlation_is_spearmans_where_both_are_finite():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 8, 10, generator=generator).unbind()
    second = (second + first).round(decimals=0)  # with ties
    first[0, 0], second[1, 1] = NAN, NAN
    both = first.isfinite() & second.isfinite()
    found = rank_correlation(first, second, resamples=999)
    assert found.pairs == 78
    assert found.value == pytest.approx(stats.spearmanr(first[both], second[both]).statistic)
    # An interval by resampling, one sample at a time.
    rng, pairs = np.random.default_rng(1), np.stack([first[both], second[both]])
    drawn = [stats.spearmanr(*pairs[:, rng.integers(0, 78, 78)]).statistic for _ in range(999)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.03)


def test_no_rank_correlation_without_an_order():
    assert rank_correlation(torch.ones(9), torch.arange(9.0)) is None
    assert rank_correlation(torch.arange(2.0), torch.arange(2.0)) is None
    assert rank_correlation(torch.full((9,), NAN), torch.arange(9.0)) is None


def test_table_has_a_row_per_connection_and_empty_cells(tmp_path):
    write_table(CausalMap(WEIGHTS, EFFECTS, None, "remove", 3.0), tmp_path / "causal.csv")
    assert list(csv.reader((tmp_path / "causal.csv").open())) == [
        ["sublayer", "source", "weight", "effect", "estimate"],
        ["0", "0", "1.000000", "", ""],
        ["1", "0", "0.250000", "0.1", ""],
        ["1", "1", "0.750000", "0.4", ""],
        ["2", "0", "0.500000", "", ""],
        ["2", "1", "0.500000", "0.2", ""],
        ["3", "0", "0.200000", "-0.01", ""],
        ["3", "1", "0.300000", "0", ""],
        ["3", "2", "0.500000", "0.3", ""],
    ]


def test_correlations_are_of_the_columns_that_there_are():
    both = correlations(CausalMap(WEIGHTS, EFFECTS, EFFECTS * 2, "remove", 3.0))
    assert both["estimate_effect"].value == pytest.approx(1)
    assert list(correlations(CausalMap(WEIGHTS, None, EFFECTS, "remove", None))) == ["weight_estimate"]
    assert list(correlations(CausalMap(WEIGHTS, EFFECTS, None, "remove", 3.0))) == ["weight_effect"]


def test_pictures_of_any_values(tmp_path):
    blank = torch.full_like(EFFECTS, NAN)
    for effects, estimates in ((EFFECTS * 0, -EFFECTS), (blank, None)):
        draw_map(CausalMap(WEIGHTS, effects, estimates, "plain", 3.0), "a model", tmp_path / "causal.png")
        assert (tmp_path / "causal.png").read_bytes().startswith(b"\x89PNG")
