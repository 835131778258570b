# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`device_map="auto"` over two devices, which a CPU has not: they are pretended, in a process of its own."""

import pytest
from two_devices import CASES, pretend_backend


pytestmark = pytest.mark.skipif(pretend_backend is None, reason="this torch cannot pretend devices")
FIRST, SECOND = "pretend:0", "pretend:1"


@pytest.fixture
def found(ranks):
    return ranks["two_devices"][0]


def test_layers_lie_on_both_devices(found):
    counts = {name: case["layers"].count(FIRST) for name, case in found.items()}
    assert set(counts.values()) == {1, 3}
    for case in found.values():
        assert case["layers"] == sorted(case["layers"])
        # The embedding enters the depth stream where it is; the queries may lie at the other end.
        assert case["map"]["model.depth_input"] == case["map"]["model.embed_tokens"] == FIRST
        assert case["map"]["model.depth_attention"] == SECOND


@pytest.mark.parametrize("name", CASES)
def test_summaries_stay_beside_the_embedding(found, name):
    # No operation met tensors of two devices: the run would have failed.
    case = found[name]
    assert case["bank"] == case["returned_summaries"] == case["logits"] == FIRST
    assert len(case["weights"]) == 9
