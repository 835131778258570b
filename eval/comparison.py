# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Joins the runs of several models on their items and fills the rows of the comparison."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from . import paired
from .alike import check_alike
from .benchmarks import REPORT
from .records import BITS, Items, Run, RunError


@dataclass
class Model:
    """One side of a comparison: a model, once or several times with other training seeds."""

    name: str
    runs: list[Run]


@dataclass(frozen=True)
class RowKey:
    """What a row compares: the tasks whose items it pools, and one metric of theirs."""

    title: str
    tasks: tuple[str, ...]
    metric: str
    filter: str


@dataclass(frozen=True)
class Row:
    """One benchmark, one variant against the baseline.

    Args:
        shots: `None` if the pooled tasks differ.
        baseline, variant: scores, the mean over training seeds; `*_se` their standard errors over items.
        difference: variant minus baseline, items paired.
        holm: the p-value of `difference`, corrected over all rows of the comparison.
        higher_is_better: `False` for bits per byte.
        chance: the score of blind choice.
        gold_baseline, gold_variant: bits per byte of the gold answers, `None` where they were not scored.
        gold_difference, gold_holm: as for the score.
        seeds: the spread over training seeds.
    """

    key: RowKey
    shots: int | None
    items: int
    baseline: float
    baseline_se: float
    variant: float
    variant_se: float
    difference: paired.Difference
    holm: float
    higher_is_better: bool
    chance: float
    gold_baseline: float | None
    gold_variant: float | None
    gold_difference: paired.Difference | None
    gold_holm: float | None
    seeds: paired.SeedSpread

    @property
    def in_average(self) -> bool:
        """Whether the row is a share of right answers, which macro averages are made of."""
        return self.higher_is_better and self.key.metric != BITS and 0 <= min(self.baseline, self.variant) <= 1


@dataclass(frozen=True)
class Average:
    """A macro average over the rows of right answers: raw, or centred as `(score - chance) / (1 - chance)`."""

    title: str
    rows: int
    baseline: float
    variant: float
    difference: paired.Difference


@dataclass
class Comparison:
    """`rows` and `averages` by the variant's name, in the order given."""

    baseline: Model
    variants: list[Model]
    rows: dict[str, list[Row]]
    averages: dict[str, list[Average]]
    resamples: int
    seed: int


def select_tasks(runs: Sequence[Run], names: Sequence[str] | None) -> list[str]:
    """The tasks to compare, all of which every run has.

    Args:
        names: tasks or groups; by default every task, and then all runs must have the same.

    Raises:
        RunError: if a run lacks one.
    """
    first = runs[0]
    if names is None:
        for run in runs[1:]:
            if not set(first.tasks) & set(run.tasks):
                raise RunError(f"{first.folder} and {run.folder} have no task in common")
            if different := sorted(set(first.tasks) ^ set(run.tasks)):
                raise RunError(
                    f"{first.folder} and {run.folder} do not have the same tasks; only one has "
                    f"{', '.join(different)}. Name those to compare by --tasks"
                )
        return list(first.tasks)
    for run in runs:
        if missing := [name for name in names if not run.leaves(name)]:
            raise RunError(f"{run.folder} has no task or group {', '.join(missing)}; it has {', '.join(run.tasks)}")
    return list(dict.fromkeys(leaf for name in names for leaf in first.leaves(name)))


def row_keys(run: Run, tasks: Sequence[str], all_metrics: bool) -> list[RowKey]:
    """The rows for these tasks: the report's benchmarks first, then the others one by one.

    Raises:
        RunError: if a task has no metric that can be compared item by item.
    """
    keys, left = [], list(tasks)
    for benchmark in REPORT:
        leaves = run.leaves(benchmark.name)
        if leaves and all(leaf in left for leaf in leaves):
            pairs = [(benchmark.metric, benchmark.filter)]
            if all_metrics:
                pairs = list(run.measured(leaves[0]))
            keys += [RowKey(_title(benchmark.title, *pair, all_metrics), tuple(leaves), *pair) for pair in pairs]
            left = [task for task in left if task not in leaves]
    for task in left:
        pairs = list(run.measured(task))
        if not pairs:
            raise RunError(f"{run.folder}: task {task} has no metric that can be compared item by item")
        alias = run.results["configs"][task].get("task_alias", task)
        keys += [
            RowKey(_title(alias, *pair, all_metrics), (task,), *pair) for pair in (pairs if all_metrics else pairs[:1])
        ]
    return keys


def _title(title: str, metric: str, filter_name: str, all_metrics: bool) -> str:
    return f"{title}: {metric}, {filter_name}" if all_metrics else title


def items_of(model: Model, key: RowKey) -> list[Items]:
    """The row's items, once per training seed of the model."""
    for run in model.runs:
        for task in key.tasks:
            if (key.metric, key.filter) not in run.measured(task):
                raise RunError(f"{run.folder}: task {task} was not scored by {key.metric} with filter {key.filter}")
    return [Items.pooled([run.items(task, key.metric, key.filter) for task in key.tasks]) for run in model.runs]


def compare_row(key: RowKey, baseline: Model, variant: Model, resamples: int, seed: int) -> Row:
    """One row, its p-values not yet corrected.

    Raises:
        RunError: if the items of the two models are not the same.
    """
    ours, theirs = items_of(baseline, key), items_of(variant, key)
    first = ours[0]
    for items in (*ours, *theirs):
        if items.keys != first.keys or not np.array_equal(items.weights, first.weights):
            raise RunError(f"{key.title}: the runs do not hold the same items; compare only runs of the same data")
    if len(first.keys) < 2:
        raise RunError(f"{key.title}: a comparison needs at least two items, there is {len(first.keys)}")
    run = baseline.runs[0]
    shots = {run.results["n-shot"].get(task) for task in key.tasks}
    weights = first.weights
    a, b = (np.mean([items.values for items in side], axis=0) for side in (ours, theirs))
    (score_a, se_a), (score_b, se_b) = paired.score(a, weights), paired.score(b, weights)
    difference = paired.compare(a, b, weights, resamples, seed)

    gold_a = gold_b = gold_difference = None
    if all(items.gold_bits is not None for items in (*ours, *theirs)):
        size = first.gold_bytes
        bits_a, bits_b = (np.mean([items.gold_bits for items in side], axis=0) / size for side in (ours, theirs))
        gold_a, gold_b = (float(paired.score(bits, size)[0]) for bits in (bits_a, bits_b))
        gold_difference = paired.compare(bits_a, bits_b, size, resamples, seed)
    return Row(
        key=key,
        shots=shots.pop() if len(shots) == 1 else None,
        items=len(first.keys),
        baseline=float(score_a),
        baseline_se=float(se_a),
        variant=float(score_b),
        variant_se=float(se_b),
        difference=difference,
        holm=difference.p_value,
        higher_is_better=key.metric != BITS
        and run.results["higher_is_better"].get(key.tasks[0], {}).get(key.metric, True),
        chance=float(first.chance.mean()),
        gold_baseline=gold_a,
        gold_variant=gold_b,
        gold_difference=gold_difference,
        gold_holm=gold_difference and gold_difference.p_value,
        seeds=paired.seed_spread(*(_scores(side) for side in (ours, theirs))),
    )


def _scores(side: list[Items]) -> np.ndarray:
    return np.array([paired.score(items.values, items.weights)[0] for items in side])


def averages(rows: list[Row]) -> list[Average]:
    """The macro averages of the rows, empty without at least two rows of right answers."""
    rows = [row for row in rows if row.in_average]
    if len(rows) < 2:
        return []

    def average(title: str, shift: list[float], scale: list[float]) -> Average:
        means = [
            float(np.mean([(getattr(row, side) - s) * f for row, s, f in zip(rows, shift, scale)]))
            for side in ("baseline", "variant")
        ]
        return Average(title, len(rows), *means, paired.average([row.difference for row in rows], scale))

    chances = [row.chance for row in rows]
    return [
        average("Macro average", [0.0] * len(rows), [1.0] * len(rows)),
        average("Macro average, centred", chances, [1 / (1 - chance) for chance in chances]),
    ]


def compare_models(
    models: list[Model],
    tasks: Sequence[str] | None = None,
    all_metrics: bool = False,
    resamples: int = 9999,
    seed: int = 0,
) -> Comparison:
    """Compares every model with the first.

    Args:
        models: at least two, with distinct names.
        tasks: see [`select_tasks`].
        all_metrics: a row for every metric and filter, instead of each task's first.
        resamples: of the paired bootstrap.
        seed: of the paired bootstrap.

    Raises:
        RunError: for runs that cannot be compared; the message names what differs.
    """
    if len(models) < 2:
        raise RunError(f"a comparison needs at least two models, got {len(models)}")
    if len({model.name for model in models}) < len(models):
        raise RunError(f"models need distinct names, got {', '.join(model.name for model in models)}; use --names")
    runs = [run for model in models for run in model.runs]
    selected = select_tasks(runs, tasks)
    check_alike(runs, selected)
    baseline, *variants = models
    keys = row_keys(runs[0], selected, all_metrics)
    rows = {}
    for variant in variants:
        progress = tqdm(keys, desc=variant.name, unit="row", leave=False, disable=None)  # on terminals only
        rows[variant.name] = [compare_row(key, baseline, variant, resamples, seed) for key in progress]
    rows = corrected(rows)
    # Several metrics of one task would count it several times.
    means = {name: [] if all_metrics else averages(rows[name]) for name in rows}
    return Comparison(baseline, variants, rows, means, resamples, seed)


def corrected(rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The rows with Holm's correction: one family of all scores, one of all gold answers' bits per byte."""
    flat = [row for variant_rows in rows.values() for row in variant_rows]
    scores = iter(paired.holm([row.difference.p_value for row in flat]))
    gold = iter(paired.holm([row.gold_difference.p_value for row in flat if row.gold_difference]))
    return {
        name: [
            replace(row, holm=next(scores), gold_holm=next(gold) if row.gold_difference else None)
            for row in variant_rows
        ]
        for name, variant_rows in rows.items()
    }
