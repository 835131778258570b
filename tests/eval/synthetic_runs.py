# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Writes folders as `attnres-eval run` leaves them, from given scores."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np


DATE = "2026-01-31T12-00-00.000000"


def multiple_choice(task: str, correct: list[int], choices: int = 4) -> list[dict]:
    """Samples whose gold answer is choice `doc_id % choices`, likeliest where `correct` is 1."""
    samples = []
    for doc_id, right in enumerate(correct):
        gold = doc_id % choices
        best = gold if right else (gold + 1) % choices
        likelihoods = [-1.0 if index == best else -2.0 for index in range(choices)]
        samples.append(
            sample(
                task,
                doc_id,
                metrics={"acc": float(right)},
                target=str(gold),
                arguments=[("Q:", f" option {index}") for index in range(choices)],
                resps=[[[str(value), "False"]] for value in likelihoods],
            )
        )
    return samples


def whole_texts(task: str, bits: list[float], sizes: list[int]) -> list[dict]:
    """Samples of a rolling likelihood: `bits` per byte of texts of `sizes` bytes."""
    return [
        sample(
            task,
            doc_id,
            metrics={"bits_per_byte": [-value * math.log(2) * size, size]},
            target="text",
            arguments=[("text",)],
            resps=[[str(-value * math.log(2) * size)]],
        )
        for doc_id, (value, size) in enumerate(zip(bits, sizes))
    ]


def sample(task, doc_id, metrics, target, arguments, resps, filter_name="none") -> dict:
    return {
        "doc_id": doc_id,
        "target": target,
        "arguments": {
            f"gen_args_{index}": {f"arg_{place}": part for place, part in enumerate(parts)}
            for index, parts in enumerate(arguments)
        },
        "resps": resps,
        "filter": filter_name,
        "metrics": list(metrics),
        "doc_hash": hashlib.sha256(f"{task} {doc_id}".encode()).hexdigest(),
        **metrics,
    }


def mean(samples: list[dict], metric: str, filter_name: str) -> float:
    values = [item[metric] for item in samples if item["filter"] == filter_name]
    if metric == "bits_per_byte":
        return -sum(value for value, _ in values) / sum(size for _, size in values) / math.log(2)
    return float(np.mean(values))


def write_run(folder: Path, tasks: dict[str, list[dict]], groups: dict | None = None, **changes) -> Path:
    """
    Args:
        tasks: samples by task.
        changes: entries of the results to replace.
    """
    folder.mkdir(parents=True)
    results = {
        "results": {
            task: {
                f"{metric},{item['filter']}": mean(samples, metric, item["filter"])
                for item in samples
                for metric in item["metrics"]
            }
            for task, samples in tasks.items()
        },
        "group_subtasks": groups or {},
        "configs": {
            task: {
                "task_alias": f"Alias of {task}",
                "dataset_path": f"data/{task}",
                "test_split": "test",
                "metric_list": [{"metric": metric, "aggregation": "mean"} for metric in samples[0]["metrics"]],
            }
            for task, samples in tasks.items()
        },
        "versions": dict.fromkeys(tasks, 1.0),
        "n-shot": dict.fromkeys(tasks, 3),
        "higher_is_better": {
            task: {metric: metric != "bits_per_byte" for metric in samples[0]["metrics"]}
            for task, samples in tasks.items()
        },
        "task_hashes": {
            task: hashlib.sha256("".join(item["doc_hash"] for item in samples).encode()).hexdigest()
            for task, samples in tasks.items()
        },
        "config": {
            "model_dtype": "torch.float32",
            "model_sha": "",
            "batch_size": "8",
            "limit": None,
            "gen_kwargs": {},
            **{f"{name}_seed": 1234 for name in ("random", "numpy", "torch", "fewshot")},
        },
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.23.0",
        "model_name": "tiny",
        "chat_template_sha": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": None,
        **changes,
    }
    (folder / f"results_{DATE}.json").write_text(json.dumps(results))
    for task, samples in tasks.items():
        lines = "".join(json.dumps(item) + "\n" for item in samples)
        (folder / f"samples_{task}_{DATE}.jsonl").write_text(lines)
    return folder
