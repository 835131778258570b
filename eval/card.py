# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Evaluation results in a model card: `model-index` metadata and a section with the comparison's tables."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from .comparison import Comparison, Model
from .records import RunError
from .report import markdown_report, percent


BEGIN, END = "<!-- attnres-eval: begin -->", "<!-- attnres-eval: end -->"


def eval_results(comparison: Comparison, variant: Model) -> list[EvalResult]:
    """The variant's scores as the Hub's metadata: shares in percent, bits per byte as they are."""
    results = []
    for row in comparison.rows[variant.name]:
        config = variant.runs[0].results["configs"][row.key.tasks[0]]
        scale = 100 if percent(row) else 1
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=config.get("dataset_path") or row.key.tasks[0],
                dataset_name=row.key.title,
                dataset_config=config.get("dataset_name") if len(row.key.tasks) == 1 else None,
                dataset_split=config.get("test_split") or config.get("validation_split"),
                dataset_args={} if row.shots is None else {"num_few_shot": row.shots},
                metric_type=row.key.metric,
                metric_name=row.key.metric if row.key.filter == "none" else f"{row.key.metric} ({row.key.filter})",
                metric_value=round(scale * row.variant, 4),
                metric_args={"standard_error": round(scale * row.variant_se, 4), "items": row.items},
            )
        )
    return results


def model_index(comparison: Comparison, variant: Model) -> list[dict]:
    """The variant's `model-index`, as it stands in a model card's metadata."""
    return eval_results_to_model_index(variant.name, eval_results(comparison, variant))


def results_section(comparison: Comparison, variant: Model) -> str:
    return f"{BEGIN}\n## Evaluation\n\n{markdown_report(comparison, [variant])}{END}\n"


def updated_card(path: Path, comparison: Comparison, variant: Model) -> ModelCard:
    """A model card with section and metadata, in place of those of an earlier call; the rest stays as it is.

    Args:
        path: the card as it is; a new one if there is none.

    Raises:
        RunError: if the card has one of the section's marks without the other.
    """
    card = ModelCard.load(path) if path.exists() else ModelCard(f"---\n---\n# {variant.name}\n")
    section, text = results_section(comparison, variant), card.text
    if text.count(BEGIN) != text.count(END) or text.count(BEGIN) > 1:
        raise RunError(f"{path}: expected one pair of {BEGIN} and {END}, or none")
    if BEGIN in text:
        text = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}\n?", lambda _: section, text, flags=re.DOTALL)
    else:
        text = f"{text.rstrip()}\n\n{section}"
    ours = eval_results(comparison, variant)
    data = card.data
    data.eval_results = [
        result for result in data.eval_results or [] if not any(result.is_equal_except_value(new) for new in ours)
    ] + ours
    data.model_name = data.model_name or variant.name
    card.text = text
    return card
