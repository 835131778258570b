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
"""`attnres-bench`: the cost of attention over depth beside the PreNorm base and the paper's Figure 2."""

import argparse
from pathlib import Path

import torch
from transformers.utils import logging

from .counting import operations_per_sublayer, prefill_peak_bytes, saved_for_backward
from .models import DTYPES, PRESETS, VARIANTS, Lineup, build_lineup, check_equality
from .report import environment, format_table, write_csv, write_json
from .timing import Timing, ratio, time_decode, time_prefill, time_training


MODES = ("prefill", "decode", "train", "counts")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnres-bench", description=__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default="135M", help="shape of the backbone")
    parser.add_argument("--mode", choices=MODES, nargs="+", default=["prefill"])
    parser.add_argument("--variants", choices=list(VARIANTS), nargs="+", default=["figure2", "block", "block-sum"])
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--batch", type=_positive, default=1)
    parser.add_argument("--tokens", type=_positive, default=512, help="prompt, sequence or KV cache length")
    parser.add_argument("--rounds", type=_positive, default=None, help="default: 9, or 150 tokens of decode")
    parser.add_argument("--threads", type=_positive, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="folder for results.json and results.csv")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def timing_rows(case: str, timings: dict[str, Timing]) -> list[dict]:
    """One row per variant: medians, and median and quartiles of its ratios to the base and to Figure 2."""
    rows = []
    for name, timing in timings.items():
        to_base, to_base_wall = ratio(timing, timings["base"]), ratio(timing, timings["base"], "wall")
        to_figure2 = ratio(timing, timings["figure2"]).median if "figure2" in timings else None
        rows.append(
            {
                "case": case,
                "variant": name,
                "cpu ms": 1e3 * timing.median_cpu,
                "wall ms": 1e3 * timing.median_wall,
                "/ base": to_base.median,
                "low": to_base.low,
                "high": to_base.high,
                "/ base (wall)": to_base_wall.median,
                "/ Figure 2": to_figure2,
            }
        )
    return rows


def count_rows(lineup: Lineup, tokens: int, batch: int) -> list[dict]:
    """One row per variant: operations a sublayer, bytes kept for backward, peak bytes of prefill and training."""
    rows, base = [], None
    for name, model in lineup.models.items():
        operations = operations_per_sublayer(lineup, name)
        kept = saved_for_backward(lineup, name, tokens, batch)
        peak = prefill_peak_bytes(lineup, name, tokens, batch)
        base = base or (kept, peak)
        rows.append(
            {
                "variant": name,
                "operations": operations.compute,
                "views": operations.views,
                "saved / base": kept.saved / base[0].saved,
                "retained / base": kept.retained / base[0].retained,
                "prefill peak MB": peak / 2**20,
                "peak / base": peak / base[1],
            }
        )
    return rows


def main(argv: list[str] | None = None):
    arguments = build_parser().parse_args(argv)
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    lineup = build_lineup(PRESETS[arguments.preset], arguments.variants, DTYPES[arguments.dtype], seed=arguments.seed)
    for model in lineup.models.values():
        model.eval()
    errors = check_equality(lineup)
    print("equality gate passed:", ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))

    results: dict = {"environment": environment(arguments.threads), "equality": errors}
    name = f"{arguments.preset} {arguments.dtype} b{arguments.batch} t{arguments.tokens}"
    timers = {"prefill": (time_prefill, 9), "decode": (time_decode, 150), "train": (time_training, 9)}
    for mode in arguments.mode:
        if mode == "counts":
            rows = count_rows(lineup, arguments.tokens, arguments.batch)
        else:
            timer, rounds = timers[mode]
            timings = timer(
                lineup, arguments.batch, arguments.tokens, arguments.rounds or rounds, description=f"{mode} {name}"
            )
            rows = timing_rows(f"{mode} {name}", timings)
        print(format_table(rows), end="\n\n", flush=True)
        results[mode] = rows
        if arguments.output is not None:
            write_csv(arguments.output / f"{mode}.csv", rows)
            write_json(arguments.output / "results.json", results)


if __name__ == "__main__":
    main()
