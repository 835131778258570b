"""`device_map="auto"` over two devices, which a CPU has not: they are pretended, in a process of its own."""

import json
from pathlib import Path

import pytest
from fresh_process import run_python


HERE = Path(__file__).parent
FIRST, SECOND = "pretend:0", "pretend:1"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_devices")
    run_python(HERE / "two_devices.py", folder / "found.json", folder=folder)
    return json.loads((folder / "found.json").read_text())


def test_layers_lie_on_both_devices(found):
    counts = {name: case["layers"].count(FIRST) for name, case in found.items()}
    assert set(counts.values()) == {1, 3}
    for case in found.values():
        assert case["layers"] == sorted(case["layers"])
        # The embedding enters the depth stream where it is; the queries may lie at the other end.
        assert case["map"]["model.depth_input"] == case["map"]["model.backbone.embed_tokens"] == FIRST
        assert case["map"]["model.depth_attention"] == SECOND


@pytest.mark.parametrize("name", ["prefill", "prefill-odd-sum", "training", "training-full", "recomputing"])
def test_summaries_stay_beside_the_embedding(found, name):
    # No operation met tensors of two devices: the run would have failed.
    case = found[name]
    assert case["bank"] == case["returned_summaries"] == case["logits"] == FIRST
    assert len(case["weights"]) == 9
