# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What runs must have in common to be compared: everything that decides what a model is asked and how it is scored.

The lists name what may differ; whatever they do not name, an argument of a later version included, must be equal.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from .records import Run, RunError


# Model arguments that say which model is meant (remote code is the model's own)...
MODEL_ARGUMENTS = ("pretrained", "model", "trust_remote_code")
# ...and where it runs, in portions of what size: the scores of an item do not depend on these.
PLACEMENT_ARGUMENTS = (
    *("device", "batch_size", "max_batch_size"),
    *("parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder"),
)
# Entries of `config` in lm-eval's results that say which model it was, where it ran, and how errors were estimated.
FREE_CONFIG = (
    *("model_num_parameters", "model_sha", "peft_sha", "delta_sha"),
    *("device", "batch_size", "batch_sizes", "use_cache", "bootstrap_iters"),
)
# Names of one class in lm-eval.
BACKENDS = {"hf-auto": "hf", "huggingface": "hf"}
# Entries of a task's config that only make its documents and prompts, whose hash is compared, or only name things.
FREE_TASK_CONFIG = (
    *("task", "task_alias", "tag", "group", "class", "metadata", "unsafe_code"),
    *("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "process_docs"),
    *("training_split", "validation_split", "test_split", "fewshot_split", "num_fewshot", "fewshot_config"),
    *("doc_to_text", "doc_to_target", "doc_to_choice", "doc_to_image", "doc_to_audio", "gen_prefix"),
    *("description", "use_prompt", "target_delimiter", "fewshot_delimiter"),
)
TITLES = {
    "model": "backend (--model)",
    "gen_kwargs": "generation arguments",
    "fewshot_seed": "few-shot seed",
    "generation_kwargs": "generation arguments",
}
SETTINGS = {
    "lm-eval version": "lm_eval_version",
    "longest input in tokens (give both runs one --model_args max_length)": "max_length",
    "chat template (hash)": "chat_template_sha",
    "system instruction (hash)": "system_instruction_sha",
    "few-shot as chat turns": "fewshot_as_multiturn",
}
TASK_SETTINGS = {"version": "versions", "shots": "n-shot", "hash of items": "task_hashes"}
RULE = (
    "the runs were not made alike; of what lm-eval was given, only the model "
    f"({', '.join(MODEL_ARGUMENTS)}) and its placement ({', '.join(PLACEMENT_ARGUMENTS)}) may differ:"
)


def model_arguments(run: Run) -> dict:
    """The run's `--model_args`, which Python callers may have given as `name=value,name=value`."""
    arguments = run.results.get("config", {}).get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(",") if part)
    return arguments


def _settings(run: Run, tasks: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Every setting that must be equal, by the name that an error gives it."""
    results = run.results
    for title, name in SETTINGS.items():
        yield title, results.get(name)
    for name, value in model_arguments(run).items():
        if name not in MODEL_ARGUMENTS and name not in PLACEMENT_ARGUMENTS:
            yield f"model argument {name}", value
    for name, value in results.get("config", {}).items():
        if name == "model":
            value = BACKENDS.get(value, value)
        if name not in FREE_CONFIG and name != "model_args":
            yield TITLES.get(name, name), value
    for task in tasks:
        for title, section in TASK_SETTINGS.items():
            yield f"{title} of {task}", results.get(section, {}).get(task)
        for name, value in results.get("configs", {}).get(task, {}).items():
            if name not in FREE_TASK_CONFIG:
                yield f"{TITLES.get(name, name)} of {task}", value


def _plain(value: object) -> object:
    """A value as it can be compared: none given is `{}`, `""` or null; numbers and names may be written as text."""
    if isinstance(value, dict | list) or value is None or value == "":
        return value or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).removeprefix("torch.")


def check_alike(runs: Sequence[Run], tasks: Sequence[str]):
    """
    Raises:
        RunError: naming every setting in which a run differs from the first, and both values.
    """
    first, differences = runs[0], []
    ours = dict(_settings(first, tasks))
    for run in runs[1:]:
        theirs = dict(_settings(run, tasks))
        for title in dict.fromkeys((*ours, *theirs)):
            a, b = ours.get(title), theirs.get(title)
            if _plain(a) != _plain(b):
                differences.append(f"{title}: {first.folder} has {a}, {run.folder} has {b}")
    differences += _shared_caches(runs)
    if differences:
        raise RunError("\n  ".join([RULE, *differences]))


def _shared_caches(runs: Sequence[Run]) -> list[str]:
    """lm-eval's `--use_cache` knows requests, not models: a second model is given the first one's answers."""
    users: dict[str, Run] = {}
    found = []
    for run in runs:
        cache = run.results.get("config", {}).get("use_cache")
        if not cache:
            continue
        other = users.setdefault(str(Path(cache)), run)
        if not _same_model(other, run):
            found.append(
                f"use_cache: {other.folder} and {run.folder} both have {cache}, where the answers of one model are "
                "taken for those of another; it needs a file for each model"
            )
    return found


def _same_model(*runs: Run) -> bool:
    hashes = {run.provenance.get("model_hash") for run in runs}
    if None not in hashes:
        return len(hashes) == 1
    return len({str(model_arguments(run).get("pretrained")) for run in runs}) == 1
