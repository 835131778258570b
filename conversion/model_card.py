# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The model card of a converted checkpoint: Hugging Face front matter, how to load, and the proof."""

import json
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .report import ConversionReport


_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({folder}, trust_remote_code=True)
```

With the package `modeling-attnres` installed and imported, `trust_remote_code` is not needed."""


def write_model_card(folder: Path, report: ConversionReport, source_card: Path):
    """Writes `README.md`.

    Args:
        source_card: the source's `README.md`, whose license and languages carry over; need not exist.
    """
    inherited = _front_matter(source_card)
    kept = {key: inherited[key] for key in ("license", "license_name", "license_link", "language") if key in inherited}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["attention-residuals", "attnres"],
        **({"base_model": report.base_model} if report.base_model else {}),
        **kept,
    )
    body = "\n\n".join(
        [_title(report), _LOAD.format(folder=json.dumps(report.out_name)), _settings(report), _proof(report)]
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(folder / "README.md")


def _front_matter(card: Path) -> dict:
    if not card.is_file():
        return {}
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError, UnicodeDecodeError):
        return {}  # a card without readable front matter has no license to carry over


def _title(report: ConversionReport) -> str:
    return (
        f"# {report.out_name}\n\n`{report.source_name}` ({report.model_type}) with Attention Residuals "
        "([arXiv 2603.15031](https://arxiv.org/abs/2603.15031)): every sublayer reads a learned softmax mix over the "
        "outputs of the blocks before it, where the PreNorm model reads their plain sum. Converted by "
        f"[modeling-attnres](https://pypi.org/project/modeling-attnres/) {report.version}."
    )


def _settings(report: ConversionReport) -> str:
    rows = [
        ("blocks", f"{report.num_blocks} of {report.sublayers_per_block} sublayers ({report.num_sublayers} in all)"),
        ("depth weights", f"`{report.depth_weights}`"),
        ("queries", "zero" if report.queries_are_zero else "trained"),
        ("parameters", f"{report.num_parameters:,}, of which {report.parameters_added:,} are depth attention"),
        ("dtype", report.dtype),
        *([("decoded", f"{report.decoded_weights:,} weights, from MXFP4")] if report.decoded_weights else []),
        ("tokenizer", report.tokenizer.replace("|", "\\|")),
    ]
    return "## Settings\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _proof(report: ConversionReport) -> str:
    if not report.parity:
        return f"## Check\n\n{report.check}"
    header = "| input | tokens | max logit difference | largest logit | KL (nats) | top-1 agreement |\n|---|---|---|---|---|---|"
    rows = [
        f"| {name} | {row['tokens']} | {row['max_logit_difference']:.3g} | {row['max_logit']:.3g} | "
        f"{row['kl_divergence']:.3g} | {row['top1_agreement']:.1%} |"
        for name, row in report.parity.items()
    ]
    return f"## Check\n\n{report.check}\n\n{header}\n" + "\n".join(rows)
