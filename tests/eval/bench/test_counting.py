# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from modeling_attnres import BlockSummaries
from modeling_attnres.eval.bench.counting import (
    OperationCounter,
    allocated_bytes,
    bank_storages,
    chunked_summaries_bytes,
    operations_per_sublayer,
    prefill_peak_bytes,
    saved_for_backward,
    training_peak_bytes,
)
from modeling_attnres.eval.bench.models import PRESETS, Shape, build_lineup


@pytest.fixture(scope="module")
def tiny():
    return build_lineup(PRESETS["tiny"], ["figure2", "block", "figure2-full"])


def test_counter_tells_views_and_allocations_from_operations():
    values = torch.ones(4, 4)

    with OperationCounter() as counter:
        torch.add(values, values[0]).view(2, 8).t().unbind(0)
        torch.empty(3)

    assert counter.compute == {"add": 1}
    assert counter.views == {"t": 1, "select": 1, "view": 1, "unbind": 1, "empty": 1}


def test_figure_2_costs_what_its_code_says(tiny):
    # stack, six of the RMSNorm, softmax, two einsums: once per sublayer, sublayer 0 excepted and the output included,
    # plus one addition for every sublayer that does not start a block, less the base's addition for each.
    blocks = 2
    operations = operations_per_sublayer(tiny, "figure2")

    assert operations.compute == pytest.approx(10 - blocks / PRESETS["tiny"].num_sublayers)
    assert operations.by_name["add"] == pytest.approx(1 - blocks / PRESETS["tiny"].num_sublayers)
    assert operations.by_name["_softmax"] == 1
    assert operations_per_sublayer(tiny, "base").compute == 0


def test_operations_of_decode_are_counted_on_a_filled_cache(tiny):
    assert operations_per_sublayer(tiny, "figure2", tokens=1, past=5).by_name["stack"] == 1


def test_peak_and_final_bytes_of_allocations():
    kept = []

    def work():
        first = torch.ones(1000)
        second = first + 1
        del first
        kept.append(second)

    peak, final = allocated_bytes(work)

    assert final == 4000
    assert 8000 <= peak < 8100


def test_saved_bytes_leave_out_parameters_and_count_storages_once(tiny):
    base, figure2 = (saved_for_backward(tiny, name, tokens=16) for name in ("base", "figure2"))
    doubled = saved_for_backward(tiny, "figure2", tokens=16, batch=2)

    assert 1.5 < figure2.saved / base.saved < 2.5
    # What is saved is still allocated, and little else is.
    assert figure2.saved <= figure2.retained <= 1.15 * figure2.saved
    assert 1.9 < doubled.saved / figure2.saved <= 2.0


def test_saved_bytes_count_the_bank(tiny):
    bank = BlockSummaries()
    tiny.models["block"](input_ids=torch.zeros(1, 16, dtype=torch.long), use_cache=False, block_summaries=bank)
    size = sum(storage.nbytes() for storage in bank_storages(bank).values())

    kept = saved_for_backward(tiny, "block", tokens=16)

    assert size >= bank.sources.nbytes
    assert size < kept.saved <= 1.02 * kept.retained


def test_peaks_grow_with_what_a_variant_holds(tiny):
    assert prefill_peak_bytes(tiny, "figure2", 32) > prefill_peak_bytes(tiny, "base", 32)
    parameters = sum(parameter.nbytes for parameter in tiny.models["base"].parameters())
    assert training_peak_bytes(tiny, "figure2", 32) > training_peak_bytes(tiny, "base", 32) > parameters
    assert all(parameter.grad is None for parameter in tiny.models["base"].parameters())


@pytest.mark.parametrize("form", ["mean", "sum"])
def test_chunked_prefill_bounds_the_summaries_by_the_chunk(form):
    shape = Shape(16, 2, 1, 1, 32, 64, sublayers_per_block=2)

    whole, chunked, small = (chunked_summaries_bytes(shape, 1024, chunk, form) for chunk in (1024, 64, 32))

    sources = (1 + 2) * 1024 * 16 * 4
    assert sources <= whole <= 2 * sources
    assert chunked <= whole / 16
    # A chunk that is small enough for a single pass: the 16 channels of a source carry the floor of their norm, and the
    # queries of all five mixes are kept, with a one for each token.
    assert small <= whole / 32 + (3 * 32 + 5 * 16 + 32) * 4
