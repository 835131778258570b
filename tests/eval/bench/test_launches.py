# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from modeling_attnres.eval.bench.launch_tables import LABELS, case_of, eager_rows
from modeling_attnres.eval.bench.launches import H100, MODES, Case, LaunchCounter, count, launch_rows, overhead
from modeling_attnres.eval.bench.models import PRESETS
from modeling_attnres.eval.bench.published import BARS as PROMISED
from modeling_attnres.eval.bench.report import format_markdown


SHAPE = PRESETS["8B"]


@dataclass(frozen=True)
class Bar:
    """What a variant may cost beyond the base: `measure` of [`Overhead`] is at most `most`."""

    mode: str
    variant: str
    measure: str
    most: float


def must(name: str, form: str = "mean") -> float:
    bar = PROMISED[f"GPU {name}"]
    return bar.must if form == "mean" else bar.sum_must


# The promised figures, and between them what today's code costs, so that it does not grow unseen.
BARS = (
    Bar("prefill", "block", "forward", must("prefill, launches")),
    Bar("prefill", "block", "forward_d", must("prefill, D")),
    Bar("prefill", "block", "forward", 9.0),
    Bar("prefill", "block", "forward_d", 6.1),
    Bar("prefill", "block-sum", "forward", 14.4),
    Bar("prefill", "block-sum", "forward_d", 13.6),
    Bar("decode", "block", "forward", must("decode, launches")),
    Bar("decode", "full", "forward", must("decode, launches")),
    Bar("decode", "block-sum", "forward", must("decode, launches", "sum")),
    Bar("decode", "full-sum", "forward", must("decode, launches", "sum")),
    Bar("train", "block", "both_d", must("training, D forward and backward")),
    Bar("train", "block", "forward", 9.3),
    Bar("train", "block", "backward", 31.8),
    Bar("train", "block-sum", "forward", 14.5),
    Bar("train", "block-sum", "backward", 35.7),
    Bar("train", "block-sum", "both_d", 41.0),
    Bar("checkpoint", "block", "ratio", must("checkpointing, Block")),
    Bar("checkpoint", "block", "ratio", 1.075),
    Bar("checkpoint", "full", "ratio", must("checkpointing, Full")),
    Bar("checkpoint", "full", "ratio", 1.22),
)


@pytest.mark.parametrize("bar", BARS, ids=lambda bar: f"{bar.mode}-{bar.variant}-{bar.measure}-{bar.most}")
def test_costs_keep_their_bars(bar):
    cost = overhead(case_of(bar.mode), bar.variant)

    assert getattr(cost, bar.measure) <= bar.most
    assert cost.syncs == 0


@pytest.mark.parametrize("variant", ["block", "block-sum", "full"])
def test_launches_do_not_grow_with_the_number_of_tokens(variant):
    shape = replace(SHAPE, num_layers=8)
    few, many = (count(Case(shape, "prefill", batch=1, tokens=tokens), variant)[0] for tokens in (256, 1024))

    assert many.launches - few.launches == {}


# --- The counter itself ----------------------------------------------------------------------------------------------


def test_launches_bytes_and_time_of_single_operations():
    values, row = torch.ones(8, 4), torch.ones(1, 4)

    with LaunchCounter() as counter:
        torch.add(values, row.expand(8, 4)).view(2, 16).t()
        torch.empty(3)
        values.zero_()
        torch.logsumexp(values, 0)

    cost = counter.cost
    assert cost.launches == {"add": 1, "zero_": 1, "logsumexp": 9}
    # An expanded row is read once; what is overwritten is not read.
    assert cost.bytes == {"add": (32 + 4 + 32) * 4, "zero_": 32 * 4, "logsumexp": (32 + 4) * 4}
    assert cost.seconds == pytest.approx({"add": 5e-6, "zero_": 5e-6, "logsumexp": 45e-6})
    assert not cost.syncs


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 6e14), (torch.float32, 5e13)])
def test_large_products_are_bound_by_arithmetic_and_large_sums_by_memory(dtype, rate):
    matrix = torch.empty(8192, 8192, dtype=dtype, device="meta")

    with LaunchCounter() as counter:
        matrix @ matrix
        matrix + 1
        torch.baddbmm(matrix[None], matrix[None], matrix[None])

    assert counter.cost.seconds["mm"] == pytest.approx(2 * 8192**3 / rate)
    assert counter.cost.seconds["baddbmm"] == pytest.approx(2 * 8192**3 / rate)
    assert counter.cost.seconds["add"] == pytest.approx(2 * 8192**2 * dtype.itemsize / H100.bytes_per_second)


def test_an_embedding_reads_the_rows_it_copies():
    table, ids = torch.ones(1000, 4), torch.zeros(1, 2, dtype=torch.long)

    with LaunchCounter() as counter:
        nn.functional.embedding(ids, table)

    assert counter.cost.bytes == {"embedding": (8 + 8) * 4 + 2 * 8}


def test_waiting_for_the_device_is_found():
    with LaunchCounter() as counter:
        torch.ones(1).item()

    assert counter.cost.syncs.total() == 1


# --- Models ----------------------------------------------------------------------------------------------------------


def test_figure_2_costs_what_its_code_says():
    # Ten operations a sublayer but the first, with the output mix, and a sum for each sublayer that opens no block, where
    # the base has one for every sublayer. Two of the ten, the first product and the stack, depend on what is shared.
    cost = overhead(Case(PRESETS["tiny"], "prefill", batch=1, tokens=8, dtype=torch.float32), "figure2")

    assert cost.forward == pytest.approx(9.75)
    assert cost.backward == 0


def test_attention_is_one_launch_in_every_model():
    case = Case(PRESETS["tiny"], "train", batch=2, tokens=8)
    for variant in ("base", "block", "figure2"):
        forward, backward = count(case, variant)
        assert forward.launches["attention"] == backward.launches["attention_backward"] == 4


def test_rows_of_every_mode():
    rows = launch_rows(PRESETS["tiny"], ["block", "figure2"], 2, 16, torch.bfloat16)

    assert [(row["mode"], row["variant"]) for row in rows] == [
        (mode, variant)
        for mode in MODES
        for variant in ("block", "figure2")
        if (mode, variant) != ("checkpoint", "figure2")
    ]
    assert all(row["time / base"] > 1 for row in rows)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"`mode` must be one of .*, got 'training'"):
        Case(SHAPE, "training")


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "variants"), [("8B", list(LABELS)), ("135M", ["block", "block-sum", "full"])])
def test_documented_tables_are_current(preset, variants):
    page = (Path(__file__).parents[3] / "docs" / "performance.md").read_text(encoding="utf-8")

    assert format_markdown(eager_rows(PRESETS[preset], variants)) in page


def test_tables_show_the_base_and_what_is_added_to_it():
    base, block, figure2 = eager_rows(PRESETS["tiny"], ["block", "figure2"])

    assert (base[""], base["prefill"].endswith(" ms")) == ("base itself", True)
    assert block["prefill"].startswith("+")
    assert block["launches a sublayer, forward / backward"].count("+") == 2
    assert figure2["with checkpointing"] == ""
