# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import csv
import json

from matplotlib import pyplot

from modeling_attnres.eval.bench.plots import plot_sweep
from modeling_attnres.eval.bench.report import environment, format_table, timing_rows, write_csv, write_json
from modeling_attnres.eval.bench.timing import Timing


def test_rows_compare_with_the_base_and_figure_2():
    timings = {
        "base": Timing([1.0, 2.0], [1.0, 2.0]),
        "figure2": Timing([2.0, 4.0], [4.0, 8.0]),
        "block": Timing([1.5, 3.0], [1.0, 2.0]),
    }

    block = timing_rows("case", timings)[-1]

    assert (block["variant"], block["cpu ms"]) == ("block", 2250.0)
    assert (block["/ base"], block["/ base (wall)"], block["/ Figure 2"]) == (1.5, 1.0, 0.75)


def test_table_is_aligned():
    table = format_table([{"name": "a", "value": 1.23456}, {"name": "longer", "value": None}])

    assert table.splitlines() == ["name    value", "-------------", "a       1.235", "longer"]


def test_files_are_written_in_one_piece(tmp_path):
    write_csv(tmp_path / "new" / "rows.csv", [{"case": "x", "value": 1.5}])
    write_json(tmp_path / "new" / "rows.json", {"environment": environment(threads=1)})

    with open(tmp_path / "new" / "rows.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"case": "x", "value": "1.5"}]
    stored = json.loads((tmp_path / "new" / "rows.json").read_text())["environment"]
    assert stored["threads"] == 1
    assert {"processor", "torch", "transformers", "modeling_attnres"} <= set(stored)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["rows.csv", "rows.json"]


def test_sweep_is_drawn(tmp_path):
    entry = {form: Timing([1.0, 2.0], [1.0, 2.0]) for form in ("mean", "sum", "figure2")}
    cases = {f"mixer {axis}={value}": entry for axis in "TNL" for value in (8, 16)}

    plot_sweep(cases, tmp_path / "mixer.png", num_sublayers=60, sublayers_per_block=8)

    assert pyplot.imread(tmp_path / "mixer.png").shape[:2] == (480, 1440)
