# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
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
from modeling_attnres.tables import aligned_table, markdown_table
from modeling_attnres.text_files import write_text

from .clocks import clock_for
from .counting import operations_per_sublayer, prefill_peak_bytes, saved_for_backward, training_peak_bytes
from .launches import LaunchCounter
from .models import Lineup
from .timing import Timing, prefill_actions, ratio, training_actions


def environment(threads: int, device: torch.device | str = "cpu") -> dict[str, str | int]:
    """What the figures depend on besides the code."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if torch.device(device).type == "cuda" else {}
    return gpu | {
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


def timing_rows(case: str, timings: dict[str, Timing], label: str = "cpu") -> list[dict]:
    """One row per variant: medians, and its ratios to the base and to Figure 2.

    `label` names the device's time. Ratios are medians over the rounds (`low` and `high` are their quartiles); `fastest` compares the fastest rounds.
    """
    rows = []
    for name, timing in timings.items():
        to_base, to_base_wall = ratio(timing, timings["base"]), ratio(timing, timings["base"], "wall")
        to_figure2 = ratio(timing, timings["figure2"]).median if "figure2" in timings else None
        rows.append(
            {
                "case": case,
                "variant": name,
                f"{label} ms": 1e3 * timing.quartiles("cpu")[1],
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


def add_traffic(rows: list[dict], lineup: Lineup, mode: str, batch: int, tokens: int):
    """Adds to [`timing_rows`] of prefill or training the peak of memory, and the bytes that operations read and write.

    Adds `"peak MB"`, beyond the parameters, and `"TB/s"`, those bytes over the time in the row.
    """
    clock, training = clock_for(lineup.device), mode == "train"
    actions = (training_actions if training else prefill_actions)(lineup, batch, tokens)
    for row in rows:
        action = actions[row["variant"]]
        with torch.set_grad_enabled(training):
            row["peak MB"] = clock.peak_bytes(action) / 2**20
            lineup.clear_gradients()
            with LaunchCounter() as counter:
                action()
            lineup.clear_gradients()
        row["TB/s"] = counter.cost.bytes.total() / row[f"{clock.label} ms"] / 1e9


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
    return aligned_table(header, [[_cell(row[name]) for name in header] for row in rows])


def format_markdown(rows: Sequence[dict]) -> str:
    """Rows as a Markdown table; a row may lack columns."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    return markdown_table(header, [[_cell(row.get(name)) for name in header] for row in rows])


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write_json(path: Path, content: dict):
    """Writes `content` in one piece: the file is complete or not there."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[dict]):
    """One line per row; columns are the keys of the first."""
    with tempfile.SpooledTemporaryFile(mode="w+", newline="") as buffer:
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        buffer.seek(0)
        write_text(path, buffer.read())
