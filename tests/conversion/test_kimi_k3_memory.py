# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Decoding experts takes memory for one of them, whatever their number: measured at the released experts' size."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from k3_folders import EXPERTS, PREFIX, QUANTISATION, SINGLE, TINY, edit_config, layers, random_folder
from safetensors.torch import load_file, save_file


MEASURE = Path(__file__).with_name("measure_conversion.py")
WIDTH, INNER, NUM_EXPERTS = 3584, 3072, 32  # of the released model, which has 896 experts
EXPERT_BYTES = 2 * WIDTH * INNER  # one of an expert's three weights, in bf16


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A model of two layers, one of them with experts that are as wide as the released ones, packed."""
    folder = tmp_path_factory.mktemp("packed") / "k3"
    small = {"num_experts": 1, "num_experts_per_token": 1, "routed_expert_hidden_size": WIDTH}
    random_folder(folder, 1, **{**TINY, **layers(2, [2]), **EXPERTS, **small})
    tensors = load_file(folder / SINGLE)
    experts = f"{PREFIX}model.layers.1.block_sparse_moe.experts."
    moe = experts.removesuffix("experts.")
    replaced = (experts, f"{moe}shared_experts.")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(replaced)}
    tensors[f"{moe}gate.weight"] = torch.randn(NUM_EXPERTS, TINY["hidden_size"])
    tensors[f"{moe}gate.e_score_correction_bias"] = torch.zeros(NUM_EXPERTS)
    for expert in range(NUM_EXPERTS):
        for part, (rows, columns) in {"w1": (INNER, WIDTH), "w2": (WIDTH, INNER), "w3": (INNER, WIDTH)}.items():
            name = f"{experts}{expert}.{part}.weight"
            tensors[f"{name}_packed"] = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
            tensors[f"{name}_scale"] = torch.randint(110, 120, (rows, columns // 32), dtype=torch.uint8)
    save_file(tensors, folder / SINGLE)
    text = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": INNER, "num_shared_experts": 0}
    edit_config(folder, text={**text, "dtype": "bfloat16", "quantization_config": QUANTISATION})
    yield folder
    shutil.rmtree(folder.parent)


@pytest.mark.slow  # 5 GB of disk, a minute
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("options", [(), ("--no-check",)], ids=["checked", "unchecked"])
def test_peak_memory_is_that_of_one_expert(packed, options):
    out = packed.parent / "out"
    figures = json.loads(run_python(MEASURE, packed, out, *options, folder=packed.parent).stdout.splitlines()[-1])
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    shutil.rmtree(out)
    print(f"\n{(packed / SINGLE).stat().st_size / 1e9:.2f} GB packed, {written / 1e9:.2f} GB written; {figures}")
    assert written > 3 * NUM_EXPERTS * EXPERT_BYTES
    if options:
        # One weight decoded, its packed half and its bytes on their way to the file; the rest is the interpreter's.
        assert figures["peak_bytes_beyond_imports"] < 5 * EXPERT_BYTES
    else:
        # To run the result, the library merges a layer's experts.
        assert figures["peak_bytes_beyond_imports"] < 2.5 * 3 * NUM_EXPERTS * EXPERT_BYTES
