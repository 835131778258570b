# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Reads what lm-eval wrote for one run: its results, and each item's scores and gold-answer likelihood."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from . import provenance


class RunError(ValueError):
    """A run that cannot be made, read or compared; the message says why and is meant for the user."""


BITS = "bits_per_byte"

# What is read of lm-eval's files whatever the task.
RESULT_FIELDS = {"results": dict, "configs": dict, "config": dict}
SAMPLE_FIELDS = {"doc_hash": str, "filter": str, "metrics": list, "resps": list, "arguments": dict, "target": str}


@dataclass(frozen=True)
class Items:
    """One metric of one task under one filter, item by item, in the order of the keys.

    Args:
        keys: `(task, document's index, hash of the document)`.
        values: `[n]` float64. The score is their mean weighted by `weights`.
        weights: `[n]` float64: ones, or bytes for bits per byte.
        chance: `[n]`: one over the number of choices; 0 where nothing is chosen.
        gold_bits: `[n]`: minus log2 of the probability of the gold answer, `None` if it was not scored.
        gold_bytes: `[n]`: its length in bytes.
    """

    keys: tuple[tuple, ...]
    values: np.ndarray
    weights: np.ndarray
    chance: np.ndarray
    gold_bits: np.ndarray | None = None
    gold_bytes: np.ndarray | None = None

    @staticmethod
    def pooled(parts: list["Items"]) -> "Items":
        """The items of several tasks as those of one."""

        def joined(name: str) -> np.ndarray | None:
            arrays = [getattr(part, name) for part in parts]
            return None if any(array is None for array in arrays) else np.concatenate(arrays)

        keys = tuple(key for part in parts for key in part.keys)
        names = ("values", "weights", "chance", "gold_bits", "gold_bytes")
        return Items(keys, **{name: joined(name) for name in names})


@dataclass
class Run:
    """One run of lm-eval.

    Args:
        folder: as given by the user.
        results_path: its `results_*.json`; the samples lie beside it.
        results: the content of that file.
        provenance: the content of `provenance.json`; empty for a run made by lm-eval alone.
    """

    folder: Path
    results_path: Path
    results: dict
    provenance: dict
    _samples: dict[str, list[dict]] = field(default_factory=dict)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.results["configs"])

    def leaves(self, name: str) -> list[str]:
        """The tasks of a group, of its groups, and so on; of a task, itself; of an unknown name, none."""
        groups = self.results.get("group_subtasks", {})
        if groups.get(name):
            return [leaf for child in groups[name] for leaf in self.leaves(child)]
        return [name] if name in self.tasks else []

    def samples(self, task: str) -> list[dict]:
        """
        Raises:
            RunError: if the task's samples are missing, empty or unreadable.
        """
        if task not in self._samples:
            date = self.results_path.stem.removeprefix("results_")
            path = self.results_path.parent / f"samples_{task}_{date}.jsonl"
            if not path.is_file():
                raise RunError(f"{self.folder}: no samples of task {task} ({path.name}); lm-eval needs --log_samples")
            try:
                samples = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            except ValueError as error:
                raise RunError(f"{path} is not JSON lines: {error}") from error
            if not samples:
                raise RunError(f"{path} is empty")
            for number, sample in enumerate(samples, start=1):
                _check_fields(f"{path}, line {number}", sample, SAMPLE_FIELDS)
            self._samples[task] = samples
        return self._samples[task]

    def measured(self, task: str) -> Iterator[tuple[str, str]]:
        """The task's `(metric, filter)` pairs that are a mean over items or bits per byte."""
        pairs = {(metric, sample["filter"]): None for sample in self.samples(task) for metric in sample["metrics"]}
        for metric, filter_name in pairs:
            values = (s.get(metric) for s in self.samples(task) if s["filter"] == filter_name)
            # One number is enough: items without one are refused later, not passed over with the whole metric.
            if metric == BITS or (any(map(_is_number, values)) and self._is_mean(task, metric)):
                yield metric, filter_name

    def _is_mean(self, task: str, metric: str) -> bool:
        """Whether lm-eval averages this metric; one that its config does not name is averaged by default."""
        for entry in self.results["configs"][task].get("metric_list") or ():
            if entry["metric"] == metric:
                return entry.get("aggregation", "mean") == "mean"
        return True

    def items(self, task: str, metric: str, filter_name: str) -> Items:
        """
        Raises:
            RunError: if a score or a gold answer's likelihood is missing or not finite, if a likelihood is not a
                number, if an item comes twice, or if the items do not add up to the score that lm-eval reported.
        """
        samples = sorted(
            (sample for sample in self.samples(task) if sample["filter"] == filter_name),
            key=lambda sample: (int(sample["doc_id"]), sample["doc_hash"]),
        )
        keys = tuple((task, int(sample["doc_id"]), sample["doc_hash"]) for sample in samples)
        if len(set(keys)) < len(keys):
            raise RunError(f"{self.folder}: an item of task {task} comes twice in its samples")
        scored = [self._score(task, metric, sample) for sample in samples]
        values, weights = (np.array(column, dtype=float) for column in zip(*scored))
        self._check_sum(task, metric, filter_name, float(np.average(values, weights=weights)))
        gold_bits, gold_bytes = (None, None) if metric == BITS else self._gold(task, samples)
        return Items(keys, values, weights, np.array([chance(sample) for sample in samples]), gold_bits, gold_bytes)

    def _score(self, task: str, metric: str, sample: dict) -> tuple[float, float]:
        """An item's value and weight."""
        where = f"{self.folder}: task {task}, item {sample['doc_id']}, metric {metric}"
        value, weight = sample.get(metric), 1.0
        if value is None:
            raise RunError(f"{where}: no score")
        if metric == BITS:
            if not (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[1] > 0):
                raise RunError(f"{where}: the score must be a log-likelihood and a number of bytes, got {value}")
            log_likelihood, weight = value
            value = -log_likelihood / math.log(2) / weight
        if not _is_number(value) or not math.isfinite(value):
            raise RunError(f"{where}: the score is {value}")
        return float(value), float(weight)

    def _gold(self, task: str, samples: list[dict]) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """[`gold_answers`], with every likelihood that they were chosen by looked at first."""
        for sample in samples:
            answers = [float(response[0][0]) for response in sample["resps"]] if requests(sample) else []
            if any(map(math.isnan, answers)):
                raise RunError(
                    f"{self.folder}: task {task}, item {sample['doc_id']}: the log-likelihood of an answer is nan"
                )
        gold = gold_answers(samples)
        if gold is None:
            return None, None
        for sample, bits in zip(samples, gold[0]):
            if not math.isfinite(bits):
                raise RunError(
                    f"{self.folder}: task {task}, item {sample['doc_id']}: "
                    f"the log-likelihood of the gold answer is {-bits}"
                )
        return gold

    def _check_sum(self, task: str, metric: str, filter_name: str, score: float):
        reported = self.results["results"][task].get(f"{metric},{filter_name}")
        if not isinstance(reported, int | float) or not math.isclose(score, reported, rel_tol=1e-6, abs_tol=1e-9):
            raise RunError(
                f"{self.folder}: the samples of task {task} come to {metric} = {score:.6g}, "
                f"its results say {reported}; the files are not of one run"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def load_run(folder: Path) -> Run:
    """
    Raises:
        RunError: if the folder does not hold exactly one run.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder")
    found = sorted(folder.rglob("results_*.json"))
    if len(found) != 1:
        hint = "name one of their folders" if found else "give the --output folder of `attnres-eval run`"
        raise RunError(f"{folder} holds {len(found)} runs of lm-eval (results_*.json), needs exactly one: {hint}")
    record = found[0].parent / provenance.FILE_NAME
    results, provenance_record = read_json(found[0]), read_json(record) if record.is_file() else {}
    _check_fields(str(found[0]), results, RESULT_FIELDS)
    _check_fields(str(record), provenance_record, {})
    return Run(folder, found[0], results, provenance_record)


def _check_fields(where: str, content: object, fields: dict[str, type]):
    """Raises `RunError` unless `content` is an object with these fields, of these kinds."""
    if not isinstance(content, dict):
        raise RunError(f"{where} must be a JSON object, got {type(content).__name__}")
    for name, kind in fields.items():
        if not isinstance(content.get(name), kind):
            found = type(content[name]).__name__ if name in content else "none"
            raise RunError(f"{where} was not written by lm-eval: its {name} must be {kind.__name__}, got {found}")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from error


def requests(sample: dict) -> list[tuple[str, str]]:
    """The `(context, continuation)` pairs whose likelihood was asked for; none for generation and whole texts."""
    pairs = [tuple(arguments.values()) for arguments in sample["arguments"].values()]
    scored = all(isinstance(response[0], list) and len(response[0]) == 2 for response in sample["resps"])
    if not scored or not all(len(pair) == 2 for pair in pairs):
        return []
    # For mutual information, every choice is asked for again at the end, without its context.
    return [pair for pair in pairs if pair[0]] or pairs


def chance(sample: dict) -> float:
    """The expected accuracy of choosing blindly."""
    pairs = requests(sample)
    return 1 / len(pairs) if len(pairs) > 1 else 0.0


def gold_answers(samples: list[dict]) -> tuple[np.ndarray, np.ndarray] | None:
    """Bits `[n]` and bytes `[n]` of the gold answers, `None` where their likelihoods were not asked for."""
    pairs = [requests(sample) for sample in samples]
    # Tasks that vary the context instead of the continuation have no gold continuation.
    if not all(pair and len({context for context, _ in pair}) == 1 for pair in pairs):
        return None
    chosen = gold_indices(samples, [[continuation for _, continuation in pair] for pair in pairs])
    if chosen is None:
        return None
    likelihoods = [float(sample["resps"][index][0][0]) for sample, index in zip(samples, chosen)]
    lengths = [len(pair[index][1].encode()) for pair, index in zip(pairs, chosen)]
    return -np.array(likelihoods) / math.log(2), np.array(lengths, dtype=float)


def gold_indices(samples: list[dict], choices: list[list[str]]) -> list[int] | None:
    """Which choice is the gold answer. lm-eval logs it as text, be it an index or the choice itself.

    Where both readings are possible for all items, the one that reproduces the logged accuracies is taken.
    """
    readings = []
    for reading in (_as_index, _as_text):
        indices = [reading(sample["target"], texts) for sample, texts in zip(samples, choices)]
        if None not in indices and indices not in readings:
            readings.append(indices)
    if len(readings) > 1:
        readings = [indices for indices in readings if _reproduces(samples, indices)]
    return readings[0] if len(readings) == 1 else None


def _as_index(target: str, choices: list[str]) -> int | None:
    if len(choices) == 1:
        return 0
    return int(target) if target.isdecimal() and int(target) < len(choices) else None


def _as_text(target: str, choices: list[str]) -> int | None:
    places = [index for index, text in enumerate(choices) if text.strip() == target.strip()]
    return places[0] if len(places) == 1 else None


def _reproduces(samples: list[dict], indices: list[int]) -> bool:
    for sample, index in zip(samples, indices):
        likelihoods = [float(response[0][0]) for response in sample["resps"]]
        if "acc" not in sample or float(np.argmax(likelihoods) == index) != float(sample["acc"]):
            return False
    return True
