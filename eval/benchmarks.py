# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The report's 15 benchmarks: lm-eval's names for them, and which of their figures this project reports.

The report does not state its numbers of shots, so these are ours. `tasks/paper/*.yaml` says the same to lm-eval.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """
    Args:
        title: as the report writes it.
        section: of the report's table.
        name: task or group in lm-eval; a group's items are pooled into one row.
        shots: examples in the prompt.
        metric: the figure reported.
        filter: lm-eval's name for how an answer is cut out of the generated text; `"none"` without generation.
    """

    title: str
    section: str
    name: str
    shots: int
    metric: str
    filter: str = "none"


REPORT = (
    Benchmark("MMLU", "General", "mmlu", 5, "acc"),
    Benchmark("MMLU-Pro", "General", "mmlu_pro", 5, "exact_match", "custom-extract"),
    Benchmark("GPQA-Diamond", "General", "gpqa_diamond_zeroshot", 0, "acc"),
    Benchmark("BBH", "General", "bbh_cot_fewshot", 3, "exact_match", "get-answer"),
    Benchmark("ARC-C", "General", "arc_challenge", 25, "acc_norm"),
    Benchmark("HellaSwag", "General", "hellaswag", 10, "acc_norm"),
    Benchmark("TriviaQA", "General", "triviaqa", 5, "exact_match", "remove_whitespace"),
    Benchmark("GSM8K", "Math & Code", "gsm8k_cot", 8, "exact_match", "flexible-extract"),
    Benchmark("MGSM", "Math & Code", "attnres_mgsm", 8, "exact_match", "flexible-extract"),
    Benchmark("MATH", "Math & Code", "minerva_math", 4, "math_verify"),
    Benchmark("CMath", "Math & Code", "attnres_cmath", 3, "exact_match"),
    Benchmark("HumanEval", "Math & Code", "humaneval", 0, "pass@1", "create_test"),
    Benchmark("MBPP", "Math & Code", "mbpp", 3, "pass_at_1"),
    Benchmark("CMMLU", "Chinese", "cmmlu", 5, "acc"),
    Benchmark("C-Eval", "Chinese", "ceval-valid", 5, "acc"),
)
