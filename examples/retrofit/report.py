# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of the runs that are done. Losses are over all predicted tokens of the test blocks."""

import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from .arms import ARMS, FORMS, MAIN_FORM, PRENORM
from .schedule import FORM_ARM, Run, Study, form_of, sweep_run


# What is subtracted from what; the second of each pair is the baseline. "" is the model before training.
COMPARISONS = (
    ("attnres-lora", "lora"),
    ("attnres-full", "full"),
    ("queries", "lora"),
    ("queries", ""),
)
SMOOTHED = 5  # steps


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval by Student's t; the interval of one value is NaN."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Estimate":
        mean = float(np.mean(values))
        if len(values) < 2:
            return cls(mean, math.nan, math.nan)
        half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
        return cls(mean, mean - float(half), mean + float(half))


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed.

    Attributes:
        records: by seed.
    """

    records: dict[int, dict]

    @classmethod
    def read(cls, study: Study, domain: str, arm: str, form: str | None = None) -> "Group":
        """The finished seeds of an arm. Without training one record stands for every seed."""
        form = form or (form_of(arm) if arm else PRENORM)
        runs = {
            seed: Run("seeds", domain, form, arm, seed) if arm else Run("before", domain, form)
            for seed in range(study.seeds)
        }
        found = {seed: study.read(run) for seed, run in runs.items()}
        return cls({seed: record for seed, record in found.items() if record})

    @property
    def nats(self) -> np.ndarray:
        """`[seeds, blocks]`, of every block."""
        return np.array([record["losses"] for record in self.records.values()])

    @property
    def num_bytes(self) -> np.ndarray:
        return np.array(next(iter(self.records.values()))["num_bytes"])

    def only(self, seeds: set[int]) -> "Group":
        return Group({seed: record for seed, record in self.records.items() if seed in seeds})


def paired(variant: Group, baseline: Group, tokens: int) -> dict[str, Estimate]:
    """The difference in nats per token and in bits per byte over seeds, and in nats over test blocks.

    Both models of a pair saw the same batches. Over blocks, every block's difference is averaged over seeds first.
    """
    seeds = variant.records.keys() & baseline.records.keys()
    difference = variant.only(seeds).nats - baseline.only(seeds).nats
    bits = difference.sum(1) / math.log(2) / variant.num_bytes.sum()
    return {
        "nats": Estimate.of(difference.mean(1) / tokens),
        "bits": Estimate.of(bits),
        "blocks": Estimate.of(difference.mean(0) / tokens),
    }


def arms_table(study: Study) -> list[dict]:
    rows = []
    for domain in study.domains:
        for arm in ("", *ARMS):
            group = Group.read(study, domain, arm)
            if not group.records:
                continue
            nats = group.nats.mean(1) / (study.settings.tokens - 1)
            records = list(group.records.values())
            row = {"domain": domain, "arm": ARMS[arm].label if arm else "before training"}
            row |= {"parameters": records[0].get("trained_parameters", 0), "rate": records[0].get("rate") or ""}
            row |= {"query rate": records[0].get("query_rate") or "", "seeds": len(records) if arm else ""}
            row |= {
                "nats per token": nats.mean(),
                "standard deviation": statistics.stdev(nats) if len(nats) > 1 and arm else "",
            }
            row["bits per byte"] = group.nats.sum(1).mean() / math.log(2) / group.num_bytes.sum()
            for clock, name in (("cpu", "CPU seconds"), ("wall", "wall seconds")):
                row[name] = statistics.median(record["train_seconds"][clock] for record in records) if arm else ""
            rows.append(row)
    return rows


def differences_table(study: Study) -> list[dict]:
    rows = []
    for domain in study.domains:
        for arm, base in COMPARISONS:
            variant, baseline = Group.read(study, domain, arm), Group.read(study, domain, base)
            if not variant.records.keys() & baseline.records.keys():
                continue
            found = paired(variant, baseline, study.settings.tokens - 1)
            row = {"domain": domain, "variant": ARMS[arm].label, "minus": ARMS[base].label if base else "before"}
            row["seeds"] = len(variant.records.keys() & baseline.records.keys())
            for name, column in (("nats", "nats per token"), ("bits", "bits per byte"), ("blocks", "over blocks")):
                estimate = found[name]
                row |= {column: estimate.mean} if name != "blocks" else {}
                row |= {f"{column}, low": estimate.low, f"{column}, high": estimate.high}
            rows.append(row)
    return rows


def sweep_table(study: Study) -> list[dict]:
    """Validation loss by learning rate."""
    rows = []
    for name, arm in ARMS.items():
        chosen = study.chosen_rate(name)
        for rate in arm.rates:
            if record := study.read(sweep_run(study.first_domain, name, rate)):
                nats = np.mean(record["losses"]) / (study.settings.tokens - 1)
                row = {"arm": arm.label, "rate": rate, "query rate": record["query_rate"] or ""}
                rows.append({**row, "validation, nats per token": nats, "chosen": rate == chosen})
    return rows


def forms_table(study: Study) -> list[dict]:
    """The other forms of AttnRes, at the main form's rates: before training, and paired with the main form."""
    rows, domain, tokens = [], study.first_domain, study.settings.tokens - 1
    main = Group.read(study, domain, FORM_ARM)
    for form, (depth_weights, sublayers) in FORMS.items():
        group = Group.read(study, domain, FORM_ARM, form)
        before = study.read(Run("before", domain, form))
        if not group.records or not before:
            continue
        seeds = set(range(2)) & group.records.keys() & main.records.keys()
        nats = group.only(seeds).nats.mean(1) / tokens
        differences = nats - main.only(seeds).nats.mean(1) / tokens
        row = {"depth weights": depth_weights, "sublayers per block": sublayers}
        row["before training"] = np.mean(before["losses"]) / tokens
        row |= {f"seed {seed}": value for seed, value in zip(sorted(seeds), nats)}
        row["minus sum, 8"] = differences.mean()
        row["CPU seconds"] = statistics.median(r["train_seconds"]["cpu"] for r in group.records.values())
        rows.append(row)
    return rows


def runs_table(study: Study) -> list[dict]:
    rows = []
    for run in study.runs:
        record = study.read(run)
        if record and run.stage != "sweep":
            nats = sum(record["losses"])
            row = {"domain": run.domain, "form": run.form, "arm": run.arm or "before training"}
            row |= {"seed": run.seed if run.arm else "", "rate": record.get("rate") or ""}
            row["nats per token"] = nats / len(record["losses"]) / (study.settings.tokens - 1)
            row["bits per byte"] = nats / math.log(2) / sum(record["num_bytes"])
            rows.append(row)
    return rows


def zero_step_difference(study: Study) -> float:
    """The largest difference of a test block's loss between PreNorm and its conversion, before training, in nats."""
    differences = [0.0]
    for domain in study.domains:
        pair = [study.read(Run("before", domain, form)) for form in (PRENORM, MAIN_FORM)]
        if all(pair):
            differences += [abs(a - b) for a, b in zip(pair[0]["losses"], pair[1]["losses"])]
    return max(differences)


def new_figure(**kwargs):
    # Without pyplot: no display, and the user's backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **kwargs)
    FigureCanvasAgg(figure)
    return figure


def draw_differences(study: Study, path: Path):
    """A panel per domain, a line per comparison: the seeds, and their mean with both intervals."""
    figure = new_figure(figsize=(8, 1.2 + 1.6 * len(study.domains)))
    panels = figure.subplots(len(study.domains), 1, squeeze=False, sharex=True)[:, 0]
    pairs = [pair for pair in COMPARISONS if pair[1] and pair[0] != "queries"]
    tokens = study.settings.tokens - 1
    for panel, domain in zip(panels, study.domains):
        for place, (arm, base) in enumerate(pairs):
            variant, baseline = Group.read(study, domain, arm), Group.read(study, domain, base)
            seeds = variant.records.keys() & baseline.records.keys()
            if not seeds:
                continue
            single = (variant.only(seeds).nats - baseline.only(seeds).nats).mean(1) / tokens
            found = paired(variant, baseline, tokens)
            panel.plot(single, [place - 0.22] * len(single), "o", color="0.55", markersize=4, label="one seed each")
            styles = (("nats", 0.0, "black", "s", "seeds"), ("blocks", 0.22, "tab:blue", "D", "test blocks"))
            for name, shift, color, marker, label in styles:
                estimate = found[name]
                errors = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]
                panel.errorbar(
                    estimate.mean,
                    place + shift,
                    xerr=errors,
                    fmt=marker,
                    color=color,
                    capsize=4,
                    markersize=5,
                    label=f"mean, 95 % over {label}",
                )
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(pairs)), [f"{ARMS[a].label}\nminus {ARMS[b].label}" for a, b in pairs])
        panel.set_ylim(len(pairs) - 0.5, -0.5)
        panel.set_title(domain, loc="left")
        panel.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel("difference in test loss, nats per token (left of 0: AttnRes is better)")
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=120)


def smoothed(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps (from 1) and the running mean of `losses` `[steps]`."""
    width = min(SMOOTHED, len(losses))
    values = np.convolve(losses, np.ones(width) / width, "valid")
    return np.arange(len(values)) + (width + 1) / 2, values


def draw_curves(study: Study, path: Path):
    """A column per domain: training loss over steps, and below it minus that of PreNorm, LoRA on the same batches."""
    figure = new_figure(figsize=(9, 6.4))
    grid = figure.subplots(2, len(study.domains), squeeze=False, sharex=True)
    styles = {"queries": ("0.6", "-"), "lora": ("tab:blue", "-"), "attnres-lora": ("tab:blue", "--")}
    styles |= {"full": ("darkred", "-"), "attnres-full": ("darkred", "--")}
    for column, domain in zip(grid.T, study.domains):
        baseline = Group.read(study, domain, "lora").records
        for arm, (color, line) in styles.items():
            records = Group.read(study, domain, arm).records
            seeds = records.keys() & baseline.keys()
            if not seeds:
                continue
            losses = np.array([records[seed]["train_losses"] for seed in seeds])
            differences = losses - [baseline[seed]["train_losses"] for seed in seeds]
            for panel, values in zip(column, (losses, differences)):
                panel.plot(*smoothed(values.mean(0)), line, color=color, label=ARMS[arm].label)
                panel.grid(alpha=0.3)
        column[0].set_title(domain, loc="left")
        column[1].set_xlabel(f"step (mean of {SMOOTHED} steps and of the seeds)")
    grid[0, 0].set_ylabel("training loss, nats per token")
    grid[1, 0].set_ylabel("minus PreNorm, LoRA")
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110)


def cell(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def write_table(rows: list[dict], path: Path):
    """Writes a CSV file and prints the table in Markdown; nothing for no rows."""
    if not rows:
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n{path.name}\n\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(cell(value) for value in row.values()) + " |")


def report(study: Study, folder: Path):
    """Writes `retrofit-*.csv` and `retrofit-*.png`.

    Raises:
        ValueError: if no run of an arm is done.
    """
    tables = {"arms": arms_table(study), "differences": differences_table(study), "sweep": sweep_table(study)}
    tables |= {"forms": forms_table(study), "runs": runs_table(study)}
    if not tables["differences"]:
        raise ValueError(f"`--output` must hold finished runs of two arms that are compared, got {study.folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        write_table(rows, folder / f"retrofit-{name}.csv")
    print(f"\nlargest difference of a block's loss before training: {zero_step_difference(study)} nats")
    draw_differences(study, folder / "retrofit-differences.png")
    draw_curves(study, folder / "retrofit-curves.png")
