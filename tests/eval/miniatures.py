# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Miniatures of the report's data sets: the fields and splits of the originals, with documents of our own.

Multiple choice always has gold answer C, or the third; free answers are 42.
"""
# ruff: noqa: RUF001  Chinese questions have Chinese punctuation.

from datasets import Dataset, DatasetDict

from modeling_attnres.eval.tasks.offline.sandbox import run_python


CATEGORIES = (
    *("biology", "business", "chemistry", "computer science", "economics", "engineering", "health"),
    *("history", "law", "math", "other", "philosophy", "physics", "psychology"),
)
OPTIONS = ("iron", "tin", "gold", "lead")
FUNCTION = "def add(a, b):\n    return a + b\n"


def mmlu(index):
    return {"question": f"Which metal is number {index}?", "subject": "x", "choices": list(OPTIONS), "answer": 2}


def mmlu_pro(index):
    return {
        "question_id": index,
        "question": f"Which metal is number {index}?",
        "options": list(OPTIONS),
        "answer": "C",
        "answer_index": 2,
        "cot_content": "A: Let's think step by step. It shines. The answer is (C).",
        "category": CATEGORIES[index % len(CATEGORIES)],
    }


def gpqa(index):
    wrong = {f"Incorrect Answer {number}": f"wrong {number}" for number in (1, 2, 3)}
    return {"Question": f"Hard question {index}?", "Correct Answer": "right", **wrong}


def bbh(index):
    return {"input": f"Input {index} is", "target": "True"}


def arc(index):
    choices = {"text": list(OPTIONS), "label": ["A", "B", "C", "D"]}
    return {"id": str(index), "question": f"Metal {index}?", "choices": choices, "answerKey": "C"}


def hellaswag(index):
    return {
        "ind": index,
        "activity_label": "Cooking",
        "ctx_a": f"Person {index} boils water.",
        "ctx_b": "then the person",
        "ctx": "unused",
        "endings": ["flies away.", "sleeps.", "adds the noodles. [step] Stirs.", "sings."],
        "label": "2",
    }


def triviaqa(index):
    answer = {"value": "Forty-two", "aliases": ["Forty-two", "42"], "normalized_aliases": ["forty two", "42"]}
    return {"question": f"Number {index}", "question_id": str(index), "answer": answer}


def gsm8k(index):
    return {"question": f"What is {index} + 42 - {index}?", "answer": "It cancels. 42 = <<42=42>>42.\n#### 42"}


def mgsm(index, split):
    shot = split == "train"
    return {
        "question": f"Question: What is {index} + 42 - {index}?" if shot else f"What is {index} + 42 - {index}?",
        "answer": "Step-by-Step Answer: It cancels. The answer is 42." if shot else None,
        "answer_number": 42,
        "equation_solution": None,
    }


def math(index):
    return {
        "problem": f"What is ${index} + 42 - {index}$?",
        "level": "Level 1",
        "type": "x",
        "solution": r"$\boxed{42}$",
    }


def cmath(index):
    return {
        "question": f"{index}加42减{index}是多少？",
        "golden": "42",
        "reasoning_step": 2,
        "num_digits": 2,
        "grade": 1,
    }


def humaneval(index):
    return {
        "task_id": f"HumanEval/{index}",
        "prompt": "def add(a, b):\n",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
        "entry_point": "add",
    }


def mbpp(index):
    tests = ["assert add(2, 3) == 5", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"]
    return {"task_id": index, "text": "Add two numbers.", "code": FUNCTION, "test_list": tests}


def cmmlu(index):
    return {"Question": f"第{index}题？", **dict(zip("ABCD", OPTIONS)), "Answer": "C"}


def ceval(index):
    return {"id": index, "question": f"第{index}题？", **dict(zip("ABCD", OPTIONS)), "answer": "C", "explanation": ""}


SPLITS = {
    "cais/mmlu": (mmlu, ("test", "dev")),
    "TIGER-Lab/MMLU-Pro": (mmlu_pro, ("test", "validation")),
    "Idavidrein/gpqa": (gpqa, ("train",)),
    "SaylorTwift/bbh": (bbh, ("test",)),
    "allenai/ai2_arc": (arc, ("train", "validation", "test")),
    "Rowan/hellaswag": (hellaswag, ("train", "validation")),
    "mandarjoshi/trivia_qa": (triviaqa, ("train", "validation")),
    "openai/gsm8k": (gsm8k, ("train", "test")),
    "juletxara/mgsm": (mgsm, ("train", "test")),
    "EleutherAI/hendrycks_math": (math, ("train", "test")),
    "weitianwen/cmath": (cmath, ("validation", "test")),
    "openai/openai_humaneval": (humaneval, ("test",)),
    "google-research-datasets/mbpp": (mbpp, ("test", "validation")),
    "haonan-li/cmmlu": (cmmlu, ("test", "dev")),
    "ceval/ceval-exam": (ceval, ("val", "dev")),
}
# As many as the most shots need (25), for every category of MMLU-Pro its five.
DOCUMENTS = 5 * len(CATEGORIES)


def load(path: str) -> DatasetDict:
    make, splits = SPLITS[path]
    if make is mgsm:
        return DatasetDict({name: Dataset.from_list([mgsm(i, name) for i in range(8)]) for name in splits})
    count = DOCUMENTS if make is mmlu_pro else 30
    return DatasetDict({name: Dataset.from_list([make(index) for index in range(count)]) for name in splits})


class CodeMetric:
    """In place of `evaluate`'s `code_eval`, whose code is on the Hub: pass@1 of one candidate per test."""

    def compute(self, references, predictions, k):
        passed = [run_python(f"{code[0]}\n{test}").passed for test, code in zip(references, predictions)]
        return {"pass@1": sum(passed) / len(passed)}, {}
