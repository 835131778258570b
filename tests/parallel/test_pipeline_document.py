# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The code in docs/pipeline.md runs."""

import re
from pathlib import Path

from pipeline_workers import run_code
from processes import run_ranks
from tiny_backbones import tiny_model


DOCUMENT = (Path(__file__).parents[2] / "docs/pipeline.md").read_text(encoding="utf-8")


def test_code_runs(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "my-attnres-model")
    train, shard, generate = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    for result in run_ranks(run_code, 2, tmp_path / "ranks", [train, generate], str(tmp_path)):
        assert result == {"steps": 2, "generated": True}
    for result in run_ranks(run_code, 4, tmp_path / "sharded", [shard], str(tmp_path)):
        assert result["stages"] == ["FSDPAttnResStageModule"] * 2
    assert (tmp_path / "trained/model.safetensors").exists()
