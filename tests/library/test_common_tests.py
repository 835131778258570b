# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Transformers' own common tests: an AttnRes model fails none that the plain model passes."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers
from common_tests import import_common_tests, run_common_tests
from tiny_backbones import tiny_backbone

import modeling_attnres
from modeling_attnres import AttnResConfig
from modeling_attnres.model_class_attnres import model_class_for


HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
PREFIXES = {"llama": "Llama", "qwen3_moe": "Qwen3Moe"}
OVERRIDES = {"llama": {}, "qwen3_moe": {"mlp_only_layers": []}}
# The first looks for experts in the source of the base model's module. The second asks whether hidden states are
# recorded by hooks on the layers: the loop here collects them (`test_hidden_states_can_be_requested_by_index`).
SKIPPED_HERE = {"test_moe_models_record_router_logits", "test_can_capture_specific_layers_hidden_states"}


@pytest.fixture(scope="module")
def common(request):
    """The tests of the installed version, out of its source distribution on PyPI (11 MB), kept in pytest's cache."""
    name = f"transformers-{transformers.__version__}"
    cache = Path(request.config.cache.mkdir("transformers-tests"))
    if not (cache / name).exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache)]
        requirement = ["--no-binary", "transformers", f"transformers=={transformers.__version__}"]
        subprocess.run([*command, *requirement], check=True, timeout=600)
        with tarfile.open(cache / f"{name}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
    return import_common_tests(cache / name)


def failures(outcomes: dict[str, str]) -> dict[str, str]:
    return {
        name: outcome
        for name, outcome in outcomes.items()
        if outcome != "passed" and not outcome.startswith("skipped")
    }


def run(
    common, model_type: str, sublayers_per_block: int | None = None, depth_weights: str = "mean"
) -> dict[str, str]:
    """The outcomes of the plain model of a backbone, or of its AttnRes model."""
    backbone = tiny_backbone(model_type, num_hidden_layers=2, **OVERRIDES[model_type])
    # Not every expert is chosen, and one that is not has no gradient.
    attributes = {"test_all_params_have_gradient": "moe" not in model_type}
    if sublayers_per_block is None:
        classes = tuple(getattr(transformers, PREFIXES[model_type] + head) for head in HEADS)
        return run_common_tests(common, lambda: backbone, classes, **attributes)
    config = AttnResConfig(text_config=backbone, sublayers_per_block=sublayers_per_block, depth_weights=depth_weights)
    classes = tuple(model_class_for(getattr(modeling_attnres, f"AttnRes{head}"), config) for head in HEADS)
    return run_common_tests(common, lambda: config, classes, **attributes)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PREFIXES)
def test_what_passes_on_the_plain_model_passes(common, model_type):
    plain = run(common, model_type)
    passed = {name for name, outcome in plain.items() if outcome == "passed"}
    assert len(passed) > 100
    assert not failures(plain)
    for sublayers_per_block, depth_weights in ((1, "mean"), (3, "mean"), (2, "sum")):
        outcomes = run(common, model_type, sublayers_per_block, depth_weights)
        assert failures(outcomes) == {}
        assert {name for name in passed if outcomes[name] != "passed"} <= SKIPPED_HERE
