# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The comparison as tables for the terminal and Markdown, and as JSON."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from modeling_attnres.tables import aligned_table, markdown_table

from .alike import model_arguments
from .comparison import Average, Comparison, Model, Row
from .paired import Difference


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        return f"**{self.title}**\n\n{markdown_table(self.header, self.rows, numbers=True)}\n"

    def text(self) -> str:
        return f"{self.title}\n{aligned_table(self.header, self.rows)}\n"


def percent(row: Row | Average) -> bool:
    """Whether a row is shown in percent: shares of right answers, as opposed to bits per byte."""
    return isinstance(row, Average) or row.in_average


def number(value: float, in_percent: bool, sign: bool = False) -> str:
    digits = 2 if in_percent else 4
    value = round(value * 100 if in_percent else value, digits) or 0.0  # no minus before a zero
    return f"{value:{'+' if sign else ''}.{digits}f}"


def p_text(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def difference_cells(item: Difference, in_percent: bool) -> tuple[str, str, str]:
    """Difference, paired standard error, 95 % interval."""
    interval = f"[{number(item.low, in_percent, sign=True)}, {number(item.high, in_percent, sign=True)}]"
    return number(item.value, in_percent, sign=True), number(item.se, in_percent), interval


def score_table(comparison: Comparison, variant: Model) -> Table:
    header = ("task", "shots", "metric", "n", comparison.baseline.name, variant.name)
    header += ("difference", "paired SE", "95 % CI", "p", "p (Holm)")
    rows = []
    for row in comparison.rows[variant.name]:
        in_percent = percent(row)
        arrow = "↑" if row.higher_is_better else "↓"
        scores = (
            f"{number(value, in_percent)} ± {number(se, in_percent)}"
            for value, se in ((row.baseline, row.baseline_se), (row.variant, row.variant_se))
        )
        rows.append(
            (
                row.key.title,
                "" if row.shots is None else str(row.shots),
                f"{row.key.metric} {arrow}{' %' if in_percent else ''}",
                str(row.items),
                *scores,
                *difference_cells(row.difference, in_percent),
                f"{p_text(row.difference.p_value)} {'M' if row.difference.test == 'McNemar' else 'B'}",
                p_text(row.holm),
            )
        )
    for average in comparison.averages[variant.name]:
        scores = (number(value, True) for value in (average.baseline, average.variant))
        cells = difference_cells(average.difference, True)
        rows.append(
            (average.title, "", "↑ %", f"{average.rows} rows", *scores, *cells, p_text(average.difference.p_value), "")
        )
    return Table(f"Scores: {variant.name} against {comparison.baseline.name}", header, rows)


def gold_table(comparison: Comparison, variant: Model) -> Table:
    """Bits per byte of the gold answers; lower is better."""
    header = ("task", "n", comparison.baseline.name, variant.name)
    header += ("difference", "paired SE", "95 % CI", "p", "p (Holm)")
    rows = [
        (
            row.key.title,
            str(row.items),
            number(row.gold_baseline, False),
            number(row.gold_variant, False),
            *difference_cells(row.gold_difference, False),
            f"{p_text(row.gold_difference.p_value)} B",
            p_text(row.gold_holm),
        )
        for row in comparison.rows[variant.name]
        if row.gold_difference is not None
    ]
    return Table("Gold answers, bits per byte ↓", header, rows)


def seed_table(comparison: Comparison, variant: Model) -> Table:
    """Spread over training seeds: another source of error than the items, so it stands apart."""
    header = ("task", f"SD over seeds, {comparison.baseline.name}", f"SD over seeds, {variant.name}")
    header += ("difference", "Welch 95 % CI", "p")
    rows = []
    for row in comparison.rows[variant.name]:
        in_percent, seeds = percent(row), row.seeds
        interval, p_value = "-", "-"
        if seeds.low is not None:
            interval = f"[{number(seeds.low, in_percent, sign=True)}, {number(seeds.high, in_percent, sign=True)}]"
            p_value = p_text(seeds.p_value)
        deviations = ("-" if sd is None else number(sd, in_percent) for sd in (seeds.baseline, seeds.variant))
        difference = number(row.difference.value, in_percent, sign=True)
        rows.append((row.key.title, *deviations, difference, interval, p_value))
    count = f"{len(comparison.baseline.runs)} and {len(variant.runs)}"
    return Table(f"Training seeds ({count}), the same items", header, rows)


def tables(comparison: Comparison, variant: Model) -> list[Table]:
    """Scores; gold answers if any were scored; training seeds if a model has several."""
    found = [score_table(comparison, variant), gold_table(comparison, variant)]
    if max(len(comparison.baseline.runs), len(variant.runs)) > 1:
        found.append(seed_table(comparison, variant))
    return [table for table in found if table.rows]


def footer(comparison: Comparison, variants: Sequence[Model] | None = None) -> list[str]:
    """How to read the tables, and what the runs depend on: one line each."""
    lines = [
        "± is the standard error over items; differences pair each item with itself. p: M exact McNemar, B paired "
        f"bootstrap ({comparison.resamples} resamples, seed {comparison.seed}). Holm's correction is over all rows "
        "of a kind. Centred: (score - chance) / (1 - chance).",
    ]
    for model in (comparison.baseline, *(comparison.variants if variants is None else variants)):
        lines += [f"{model.name}: {run_line(facts)}" for facts in map(run_facts, model.runs)]
    versions = {name: importlib.metadata.version(name) for name in ("modeling-attnres", "scipy", "statsmodels")}
    lines.append("Compared with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    return lines


def run_facts(run) -> dict:
    """The provenance of one run. What plain lm-eval does not record is `None`."""
    config, record, arguments = run.results["config"], run.provenance, model_arguments(run)
    return {
        "model": record.get("model") or run.results.get("model_name"),
        "adapter": record.get("peft") or record.get("delta") or arguments.get("peft") or arguments.get("delta"),
        "model_hash": record.get("model_hash") or config.get("model_sha") or None,
        "dtype": str(config.get("model_dtype")).removeprefix("torch."),
        "parameters": config.get("model_num_parameters"),
        "batch_size": config.get("batch_size"),
        "seeds": {name: config.get(f"{name}_seed") for name in ("random", "numpy", "torch", "fewshot")},
        "limit": config.get("limit"),
        "date": run.results.get("date"),
        "seconds": record.get("seconds"),
        "threads": record.get("threads"),
        "versions": record.get("versions")
        or {
            "lm-eval": run.results.get("lm_eval_version"),
            "transformers": run.results.get("transformers_version"),
        },
    }


def run_line(facts: dict) -> str:
    model_hash = facts["model_hash"]
    parts = [
        f"model {facts['model']}{' with ' + facts['adapter'] if facts['adapter'] else ''}",
        f"SHA-256 {model_hash[:12]}" if model_hash else "model hash not recorded",
        f"dtype {facts['dtype']}",
        f"batch size {facts['batch_size']}",
        "seeds " + "/".join(str(seed) for seed in facts["seeds"].values()),
        *([f"limit {facts['limit']:g}"] if facts["limit"] else []),
        *([f"{facts['seconds']:.0f} s on {facts['threads']} thread(s)"] if facts["seconds"] else []),
        *(f"{name} {version}" for name, version in facts["versions"].items()),
    ]
    return ", ".join(parts)


def text_report(comparison: Comparison) -> str:
    parts = [table.text() for variant in comparison.variants for table in tables(comparison, variant)]
    return "\n".join([*parts, *footer(comparison)]) + "\n"


def markdown_report(comparison: Comparison, variants: Sequence[Model] | None = None) -> str:
    """
    Args:
        variants: of the comparison, all by default.
    """
    chosen = comparison.variants if variants is None else variants
    parts = [table.markdown() for variant in chosen for table in tables(comparison, variant)]
    return "\n".join([*parts, *(f"<sub>{line}</sub>\n" for line in footer(comparison, chosen))])


def json_report(comparison: Comparison) -> dict:
    """All figures of the tables, unrounded: scores as shares (not percent), differences as variant minus baseline."""
    return {
        "baseline": comparison.baseline.name,
        "variants": [
            {
                "name": variant.name,
                "rows": [asdict(row) for row in comparison.rows[variant.name]],
                "averages": [asdict(average) for average in comparison.averages[variant.name]],
            }
            for variant in comparison.variants
        ],
        "resamples": comparison.resamples,
        "seed": comparison.seed,
        "runs": {
            model.name: [run_facts(run) for run in model.runs] for model in (comparison.baseline, *comparison.variants)
        },
    }
