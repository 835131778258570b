# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A conversion's memory does not grow with the model: measured on 4 GB of weights, beside a plain copy of the files."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from tiny_checkpoints import save_backbone


MEASURE = Path(__file__).with_name("measure_conversion.py")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 16}
    save_backbone(folder / "source", dtype=torch.bfloat16, max_shard_size="500MB", vocab_size=32000, **sizes)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow  # 12 GB of disk, a few minutes
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("options", [(), ("--no-check",)], ids=["checked", "unchecked"])
def test_peak_memory_is_bounded_by_the_largest_shard(large, options):
    source, out = large / "source", large / "out"
    shards = [file.stat().st_size for file in source.glob("*.safetensors")]
    assert sum(shards) > 3.9e9
    start = time.monotonic()
    shutil.copytree(source, large / "copy")
    os.sync()  # a conversion waits for the disk too
    copy_seconds = time.monotonic() - start
    shutil.rmtree(large / "copy")

    figures = json.loads(run_python(MEASURE, source, out, *options, folder=large).stdout.splitlines()[-1])
    shutil.rmtree(out)
    print(
        f"\n{sum(shards) / 1e9:.2f} GB, largest shard {max(shards) / 1e9:.2f} GB, copy {copy_seconds:.1f} s; {figures}"
    )
    assert figures["peak_bytes_beyond_imports"] < 1.3 * max(shards) + 1e9
    assert figures["max_logit_difference"] == (None if options else 0.0)
    assert ("one submodule at a time" in figures["check"]) == (not options)
