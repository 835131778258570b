# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The table of supported backbones is what probing finds."""

import json
import re
from pathlib import Path

import pytest
import transformers
from tiny_backbones import BACKBONES

from modeling_attnres import supported_backbones
from modeling_attnres.conversion import backbone_table
from modeling_attnres.conversion.backbone_table import BEGIN, END, build_parser, describe_backbone, main
from modeling_attnres.text_files import split_at_marks


PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
JUDGED = {
    "attnres": "never listed",
    "gemma2": "Backbone 'gemma2' cannot carry depth attention: its layers <are> others.",
    "kimi_k3_text": None,
    "lfm2_moe": "Backbone 'lfm2_moe' cannot be judged: its default configuration does not build (reason).",
    "mistral": None,
    "olmo2": "Backbone 'olmo2' cannot carry depth attention: its layers <are> others.",
}


@pytest.mark.skipif(
    f"Transformers {transformers.__version__}: " not in PAGE.read_text(encoding="utf-8"),
    reason="docs/backbones.md is about another version of Transformers",
)
def test_the_page_lists_what_is_supported_and_why_the_others_are_not():
    _, table, _ = split_at_marks(PAGE, BEGIN, END)
    assert table == "\n" + backbone_table.to_markdown(*backbone_table.find_backbones())
    assert tuple(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)) == supported_backbones()
    assert set(BACKBONES) <= set(supported_backbones())


def test_a_row_tells_what_the_default_configuration_builds():
    row = describe_backbone("qwen3_next")
    assert (row.architecture, row.experts) == ("Qwen3NextForCausalLM", "yes")
    assert row.token_mixers == ("full attention", "linear attention")
    assert describe_backbone("llama").experts == ""
    assert describe_backbone("mistral").token_mixers == ("sliding attention",)
    assert describe_backbone("qwen2").token_mixers == ("full attention",)  # its window is switched off
    assert describe_backbone("deepseek_v3").token_mixers == ("latent full attention",)
    row = describe_backbone("kimi_k3_text")
    assert (row.experts, row.remarks) == ("if configured", "comes with this package")


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(backbone_table, "judged_backbones", lambda: JUDGED)
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}old{END}\nbelow\n", encoding="utf-8")
    return page


def test_a_page_is_renewed_between_its_markers(page, capsys):
    assert main(["--document", str(page)]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"above\n{BEGIN}\nTransformers {transformers.__version__}: 2 supported, 2 ref")
    assert "| its layers &lt;are> others | `gemma2`, `olmo2` |" in text
    assert text.endswith(f"`lfm2_moe`.\n{END}\nbelow\n")
    assert "attnres" not in text
    assert [path.name for path in page.parent.iterdir()] == ["page.md"]


def test_the_table_is_printed_without_a_page(page, capsys):
    assert main([]) == 0
    assert "| `mistral` | `MistralForCausalLM` |" in capsys.readouterr().out
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model_type"] for row in found["supported"]] == ["kimi_k3_text", "mistral"]
    assert found["refused"] == {"its layers <are> others": ["gemma2", "olmo2"]}


@pytest.mark.parametrize("content", [None, "no markers"])
def test_a_wrong_page_is_refused(page, content, capsys):
    page.unlink()
    if content is not None:
        page.write_text(content)
    assert main(["--document", str(page)]) == 2
    assert capsys.readouterr().err.startswith(f"{build_parser().prog}: error: `--document` must ")
    assert (page.read_text() if content is not None else None) == content
