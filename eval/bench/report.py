# Copyright 2026 The modeling-attnres maintainers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Tables, JSON, CSV and plots of what was measured."""

import csv
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

import modeling_attnres

from .counting import operations_per_sublayer, prefill_peak_bytes, saved_for_backward, training_peak_bytes
from .models import Lineup
from .timing import Timing, ratio


def environment(threads: int) -> dict[str, str | int]:
    """What the figures depend on besides the code."""
    return {
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "modeling_attnres": modeling_attnres.__version__,
        "command": " ".join(["attnres-bench", *sys.argv[1:]]),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def timing_rows(case: str, timings: dict[str, Timing]) -> list[dict]:
    """One row per variant: medians, and its ratios to the base and to Figure 2.

    Ratios are medians over the rounds (`low` and `high` are their quartiles); `fastest` compares the fastest rounds.
    """
    rows = []
    for name, timing in timings.items():
        to_base, to_base_wall = ratio(timing, timings["base"]), ratio(timing, timings["base"], "wall")
        to_figure2 = ratio(timing, timings["figure2"]).median if "figure2" in timings else None
        rows.append(
            {
                "case": case,
                "variant": name,
                "cpu ms": 1e3 * timing.quartiles("cpu")[1],
                "wall ms": 1e3 * timing.quartiles("wall")[1],
                "/ base": to_base.median,
                "low": to_base.low,
                "high": to_base.high,
                "fastest": min(timing.cpu) / min(timings["base"].cpu),
                "/ base (wall)": to_base_wall.median,
                "/ Figure 2": to_figure2,
            }
        )
    return rows


def count_rows(lineup: Lineup, tokens: int, batch: int) -> list[dict]:
    """One row per variant: operations a sublayer, bytes kept for backward, peak bytes of prefill and training."""
    rows, base = [], {}
    for name in lineup.models:
        operations = operations_per_sublayer(lineup, name)
        kept = saved_for_backward(lineup, name, tokens, batch)
        measured = {
            "saved": kept.saved,
            "retained": kept.retained,
            "prefill peak": prefill_peak_bytes(lineup, name, tokens, batch),
            "training peak": training_peak_bytes(lineup, name, tokens, batch),
        }
        base = base or measured
        row = {"variant": name, "operations": operations.compute, "views": operations.views}
        for quantity, size in measured.items():
            row |= {f"{quantity} MB": size / 2**20, f"{quantity} / base": size / base[quantity]}
        rows.append(row)
    return rows


def format_table(rows: Sequence[dict]) -> str:
    """Rows with the same keys as an aligned text table; floats with three digits."""
    header = list(rows[0])
    cells = [header, *([_cell(row[name]) for name in header] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write_json(path: Path, content: dict):
    """Writes `content` in one piece: the file is complete or not there."""
    _write(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[dict]):
    """One line per row; columns are the keys of the first."""
    with tempfile.SpooledTemporaryFile(mode="w+", newline="") as buffer:
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        buffer.seek(0)
        _write(path, buffer.read())


def _write(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
