# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from modeling_attnres.eval.bench import published
from modeling_attnres.eval.bench.compiled_launches import Kernels
from modeling_attnres.eval.bench.counting import operations_per_sublayer
from modeling_attnres.eval.bench.launches import Case
from modeling_attnres.eval.bench.models import PRESETS, build_lineup
from modeling_attnres.eval.bench.published import (
    BARS,
    SHAPE,
    Figure,
    chunked_figure,
    operations_figures,
    saved_figures,
    sweep_mixers,
)
from modeling_attnres.eval.bench.timing import Ratio


@pytest.mark.parametrize(("value", "met"), [(1.005, "aim"), (1.02, "must"), (1.031, "SHORT")])
def test_a_figure_is_judged_by_its_bars(value, met):
    row = Figure("prefill 512 fp32", Ratio(value, value, value), sum=Ratio(1.04, 1.0, 1.1)).row()

    assert (row["met"], row["must"], row["aim"]) == (met, 1.03, 1.01)
    assert row["sum must"] == pytest.approx(value + 0.03)
    assert row["Figure 2"] is None


def test_sum_is_held_to_its_own_count_of_operations():
    row = Figure("operations per sublayer", Ratio(5.0, 5.0, 5.0), sum=Ratio(13.0, 13.0, 13.0)).row()

    assert (row["sum"], row["sum must"]) == (13.0, 12.0)


def test_saved_bytes_keep_their_bars_and_figure_2_its_known_cost():
    block, full = saved_figures(SHAPE, tokens=32)

    assert max(block.mean.median, block.sum.median) <= BARS[block.name].must
    assert full.mean.median <= BARS[full.name].must
    assert full.sum.median <= 1.13  # its phase 1 keeps more per source
    assert block.figure2.median == pytest.approx(2.63, abs=0.01)


def test_operations_of_a_sublayer_keep_their_bars():
    (figure,) = operations_figures(SHAPE.narrow())  # at the depth of the published shape

    assert figure.mean.median <= BARS[figure.name].must
    assert figure.sum.median <= BARS[figure.name].sum_must
    assert figure.figure2.median == pytest.approx(9.87, abs=0.01)


def test_a_decoded_token_takes_fewer_operations_still():
    lineup = build_lineup(SHAPE.narrow(), ["block", "block-sum", "full"])
    counts = {name: operations_per_sublayer(lineup, name, tokens=1, past=4).compute for name in lineup.models}

    # Scaling to unit norm, product, softmax, product; for sums an excess, and the stream beside the open block.
    assert counts.pop("base") == 0
    assert counts == pytest.approx({"block": 4.2, "block-sum": 6.2, "full": 4.2}, abs=0.05)


def test_summaries_of_a_chunked_prefill_keep_their_bar():
    figure = chunked_figure(published.CHUNKED_SHAPE, tokens=512, chunk=32)

    assert max(figure.mean.median, figure.sum.median) <= BARS[figure.name].must


def test_sweep_covers_tokens_blocks_and_depth():
    timings = sweep_mixers(PRESETS["tiny"], (4, 8), {2: 4}, (4, 8), rounds=1)

    assert list(timings) == ["mixer T=4", "mixer T=8", "mixer N=2", "mixer L=4", "mixer L=8"]


@pytest.mark.parametrize("group", ["prefill", "training", "decode", "mixer"])
def test_every_timing_group_yields_rows_with_bars(group, monkeypatch):
    tiny = dataclasses.replace(PRESETS["tiny"], num_layers=2)
    monkeypatch.setattr(published, "SHAPE", tiny)
    monkeypatch.setattr(published, "SWEEP_BLOCKS", {4: 1, 15: 1})
    monkeypatch.setattr(published, "SWEEP_SUBLAYERS", (4,))
    monkeypatch.setattr("modeling_attnres.eval.bench.timing.take_turns", _one_round)
    monkeypatch.setattr(published, "take_turns", _one_round)
    monkeypatch.setattr(published, "_gated", lambda *args: published.build_lineup(tiny, args[1]))

    figures, timings = published.GROUPS[group]()

    assert timings
    assert all(figure.row()["must"] == BARS[figure.name].must and figure.mean.median > 0 for figure in figures)


@pytest.mark.parametrize("reason", ["no Triton", None])
def test_launches_stand_beside_their_bars(reason, monkeypatch, capsys):
    monkeypatch.setattr(published, "case_of", lambda mode: Case(PRESETS["tiny"], mode, batch=1, tokens=8))
    monkeypatch.setattr(published, "why_not_compiled", lambda: reason)
    monkeypatch.setattr("modeling_attnres.eval.bench.compiled_launches.extra_kernels", lambda *args: Kernels(1.5, 3.0))

    figures, _ = published.GROUPS["launches"]()

    rows = {row["row"]: row for row in (figure.row() for figure in figures)}
    assert list(rows) == [name for name in BARS if name.startswith("GPU ") and not (reason and "compiled" in name)]
    assert all(row["sum"] is not None and row["value"] > 0 for row in rows.values())
    if reason:
        assert capsys.readouterr().out == "no Triton\n"
    else:
        assert rows["GPU compiled training backward, kernels"]["value"] == 3.0
        assert rows["GPU compiled decode, kernels"]["met"] == "aim"


def _one_round(actions, *args, **kwargs):
    return {name: _timed(action) for name, action in actions.items()}


def _timed(action):
    action()
    return published.Timing([1.0], [1.0])
