# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import csv

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from tiny_backbones import tiny_inputs, tiny_model

from modeling_attnres.eval.depth_weights import mean_depth_weights, save_depth_heatmap


@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
def test_mean_weights_are_the_models_own(depth_weights):
    model = tiny_model("llama", 3, depth_weights)
    input_ids = tiny_inputs()
    matrix = mean_depth_weights(model, input_ids)
    assert matrix.shape == (9, 4)
    with torch.no_grad():
        weights = model(input_ids, output_depth_weights=True).depth_weights
    for row, mix in zip(matrix, weights):
        n = mix.shape[-1]
        total = n if depth_weights == "sum" else 1
        torch.testing.assert_close(row[:n], mix.mean((0, 1)) / total, rtol=1e-4, atol=1e-6)
        assert torch.isnan(row[n:]).all()


def test_heatmap_has_its_numbers_beside_it(tmp_path):
    matrix = mean_depth_weights(tiny_model("llama", 2, query_std=0.0), tiny_inputs())
    picture, table = save_depth_heatmap({"zero queries": matrix}, tmp_path / "figures" / "depth.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert table.name == "depth-zero-queries.csv"
    rows = list(csv.reader(table.open()))
    assert rows[0] == ["reader", "embedding", "block_0", "block_1", "block_2", "block_3"]
    assert [row[0] for row in rows[1:4]] == ["mixer_0", "feed_forward_0", "mixer_1"]
    assert rows[1][1:] == ["1.000000", "", "", "", ""]
    assert rows[-1] == ["output", *["0.200000"] * 5]


def test_a_relative_picture_shows_equal_weights_as_one(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "imshow", lambda self, values, **kwargs: drawn.append((values, kwargs["norm"])) or image)
    image = ScalarMappable()
    equal = mean_depth_weights(tiny_model("llama", 2, query_std=0.0), tiny_inputs())
    other = mean_depth_weights(tiny_model("llama", 2), tiny_inputs())
    _, table, _ = save_depth_heatmap({"equal": equal, "other": other}, tmp_path / "depth.png", relative=True)
    mixers, _, other_mixers, _ = (values for values, _ in drawn)
    torch.testing.assert_close(mixers[mixers.isfinite()], torch.ones_like(mixers[mixers.isfinite()]))
    torch.testing.assert_close(other_mixers[:, 2], other[4] * 3, equal_nan=True)  # layer 2 reads three sources
    norm = drawn[0][1]
    assert norm.vmin < 1 < norm.vmax
    # The numbers beside it are the weights themselves.
    assert list(csv.reader(table.open()))[3][1:3] == ["0.500000", "0.500000"]
