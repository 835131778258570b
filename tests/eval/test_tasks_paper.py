# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The report's benchmarks: every name resolves in the installed lm-eval, with our shots, metrics and filters.

The data sets are on the Hub; miniatures with their fields stand in for them, and lm-eval's own task code makes the
prompts and scores the answers.
"""
# ruff: noqa: RUF001  Chinese prompts have Chinese punctuation.

import sys
from pathlib import Path

import evaluate
import lm_eval.tasks
import miniatures
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from modeling_attnres.eval.benchmarks import REPORT
from modeling_attnres.eval.tasks import TASKS_PATH
from modeling_attnres.eval.tasks.paper.cmath import same_number, to_number


# Of lm-eval's 200 folders, those of the report; the index of all takes 15 s.
FOLDERS = (
    *("mmlu/default", "mmlu_pro", "gpqa/zeroshot", "bbh/cot_fewshot", "arc", "hellaswag", "triviaqa", "gsm8k"),
    *("mgsm/native_cot", "minerva_math", "humaneval", "mbpp", "cmmlu", "ceval"),
)
MULTIPLE_CHOICE = ("MMLU", "GPQA-Diamond", "ARC-C", "HellaSwag", "CMMLU", "C-Eval")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The groups as lm-eval builds them."""
    root = Path(lm_eval.tasks.__file__).parent
    groups = tmp_path_factory.mktemp("groups")
    (groups / "minerva_math.yaml").write_text((root / "benchmarks/minerva_math.yaml").read_text())
    paths = [*(root / folder for folder in FOLDERS), groups, TASKS_PATH]
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load", lambda name: {"code_eval": miniatures.CodeMetric()}[name])
        patch.setattr(
            ConfigurableTask,
            "download",
            lambda self, *_, **__: setattr(self, "dataset", miniatures.load(self.DATASET_PATH)),
        )
        manager = TaskManager(include_path=[str(path) for path in paths], include_defaults=False)
        yield {name: manager.load(name) for name in ("attnres_paper", "attnres_paper_mc")}
    for name in set(sys.modules) - before:  # lm-eval's modules that hold the stand-in metric
        if name.startswith("lm_eval.tasks."):
            del sys.modules[name]


def leaves(loaded, name):
    groups = loaded["group_map"]
    return [leaf for child in groups[name] for leaf in leaves(loaded, child)] if name in groups else [name]


@pytest.fixture(scope="module")
def first_leaf(loaded):
    everything = loaded["attnres_paper"]
    return {benchmark.title: everything["tasks"][leaves(everything, benchmark.name)[0]] for benchmark in REPORT}


def test_sections_are_those_of_the_report(loaded):
    everything = loaded["attnres_paper"]
    sections = {everything["groups"][name].alias: name for name in everything["group_map"]["attnres_paper"]}
    assert list(sections) == ["General", "Math & Code", "Chinese"]
    for title, name in sections.items():
        expected = [benchmark.name for benchmark in REPORT if benchmark.section == title]
        assert everything["group_map"][name] == expected


def test_number_of_tasks(loaded):
    everything = loaded["attnres_paper"]
    counts = {benchmark.title: len(leaves(everything, benchmark.name)) for benchmark in REPORT}
    assert {title: count for title, count in counts.items() if count > 1} == {
        "MMLU": 57,
        "MMLU-Pro": 14,
        "BBH": 27,
        "MGSM": 11,
        "MATH": 7,
        "CMMLU": 67,
        "C-Eval": 52,
    }
    assert len(everything["tasks"]) == sum(counts.values())


@pytest.mark.parametrize("benchmark", REPORT, ids=lambda benchmark: benchmark.title)
def test_shots_metric_filter_and_split(loaded, benchmark):
    everything = loaded["attnres_paper"]
    for name in leaves(everything, benchmark.name):
        task = everything["tasks"][name]
        assert task.config.num_fewshot == benchmark.shots
        filters = [entry["name"] for entry in task.config.filter_list or [{"name": "none"}]]
        assert benchmark.filter in filters
        assert len(task.eval_docs) > 0
        assert task.config.test_split or task.config.validation_split
        assert (task.OUTPUT_TYPE == "multiple_choice") == (benchmark.title in MULTIPLE_CHOICE)
        if benchmark.title not in ("HumanEval", "MBPP"):  # named by their functions, see the scoring below
            assert benchmark.metric in task.aggregation()
        assert bool(task.config.unsafe_code) == (benchmark.title in ("HumanEval", "MBPP"))


def test_multiple_choice_group_is_the_same_without_generation(loaded):
    everything, choices = loaded["attnres_paper"], loaded["attnres_paper_mc"]
    names = [benchmark.name for benchmark in REPORT if benchmark.title in MULTIPLE_CHOICE]
    assert choices["group_map"]["attnres_paper_mc"] == names
    for name, task in choices["tasks"].items():
        assert task.OUTPUT_TYPE == "multiple_choice"
        assert task.config.num_fewshot == everything["tasks"][name].config.num_fewshot


PROMPTS = {
    "MMLU": ("about abstract algebra", "C. gold", "\nAnswer:"),
    "MMLU-Pro": ("step by step", "The answer is (C).", "Answer: Let's think step by step."),
    "GPQA-Diamond": ("What is the correct answer", "(A) ", "\nAnswer:"),
    "BBH": ("random Boolean", "So the answer is False.", "is\nA: Let's think step by step.\n"),
    "ARC-C": ("Question: Metal", "Answer: gold", "\nAnswer:"),
    "HellaSwag": ("Cooking: Person", "adds the noodles. Stirs.", "Then the person"),
    "TriviaQA": ("Question: Number", "Answer: Forty-two", "?\nAnswer:"),
    "GSM8K": ("Q: There are 15 trees", "The answer is 6.", "\nA:"),
    "MGSM": ("What is", "42", ":"),
    "MATH": ("Problem:\nFind the domain", "I hope it is correct.", "\n\nSolution:"),
    "CMath": ("问题：小红有12本书", "答案是29。", "\n解答："),
    "HumanEval": ("def add(a, b):", "", "def add(a, b):\n"),
    "MBPP": ("expert Python programmer", "[DONE]", "[BEGIN]\n"),
    "CMMLU": ("单项选择题", "答案： C", "\n答案："),
    "C-Eval": ("单项选择题", "答案： C", "\n答案："),
}


@pytest.mark.parametrize("benchmark", REPORT, ids=lambda benchmark: benchmark.title)
def test_prompt(first_leaf, benchmark):
    task = first_leaf[benchmark.title]
    task.set_fewshot_seed(1234)
    document = task.eval_docs[0]  # once: GPQA's choices are shuffled at every access
    prompt = task.fewshot_context(document, benchmark.shots)
    begin, shot, end = PROMPTS[benchmark.title]
    assert begin in prompt[:200]
    assert shot in prompt
    assert prompt.endswith(end)
    zero_shot = task.fewshot_context(document, 0)
    assert prompt.endswith(zero_shot.removeprefix(task.config.description or ""))
    assert (len(prompt) > len(zero_shot)) == (benchmark.shots > 0)


def score(task, benchmark, document, responses):
    """The reported figure of a document, for responses as the model gives them."""
    task.set_fewshot_seed(1234)
    requests = task.construct_requests(document, task.fewshot_context(document, benchmark.shots))
    requests = requests if isinstance(requests, list) else [requests]
    for request, response in zip(requests, responses, strict=True):
        request.resps = [response]
    task._instances = requests
    task.apply_filters()
    filtered = [request.filtered_resps[benchmark.filter] for request in requests]
    return task.process_results(document, filtered)[benchmark.metric]


@pytest.mark.parametrize("title", MULTIPLE_CHOICE)
def test_scoring_of_multiple_choice(first_leaf, title):
    benchmark = next(benchmark for benchmark in REPORT if benchmark.title == title)
    task = first_leaf[title]
    document = task.eval_docs[0]
    gold = "ABCD".index(document["answer"][1]) if title == "GPQA-Diamond" else 2  # GPQA is shuffled
    scores = []
    for likeliest in range(4):
        responses = [(-1.0 if choice == likeliest else -20.0, False) for choice in range(4)]
        scores.append(score(task, benchmark, document, responses))
    assert scores == [float(choice == gold) for choice in range(4)]


@pytest.mark.parametrize(
    ("title", "right", "wrong"),
    [
        ("MMLU-Pro", " It shines. The answer is (C).", " The answer is (B)."),
        ("BBH", "Both hold. So the answer is True.", "So the answer is False."),
        ("TriviaQA", " forty-two", " Forty"),
        ("GSM8K", " It cancels. The answer is 42.", " It is 42 or 43."),
        ("MGSM", " It cancels. The answer is 42.", " The answer is 24."),
        ("MATH", " Final Answer: The final answer is $42$. I hope it is correct.", " The final answer is $41$."),
        ("CMath", "1+42-1=42。答案是42。", "42-1=41。答案是41。"),
        ("HumanEval", "    return a + b\n", "    return a - b\n"),
        ("MBPP", "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return 0\n"),
    ],
)
def test_scoring_of_generated_text(first_leaf, title, right, wrong):
    benchmark = next(benchmark for benchmark in REPORT if benchmark.title == title)
    task = first_leaf[title]
    assert score(task, benchmark, task.eval_docs[0], [right]) == 1
    assert score(task, benchmark, task.eval_docs[0], [wrong]) == 0


@pytest.mark.parametrize(
    ("text", "golden", "expected"),
    [
        ("答案是29。", "29", 1.0),
        ("12+17=29", "29", 1.0),
        ("答案是1,200。", "1200", 1.0),
        ("答案是0.50", "0.5", 1.0),
        ("答案是3/4", "0.75", 1.0),
        ("答案是25%", "0.25", 1.0),
        ("答案是-7", "-7", 1.0),
        ("先有5个，答案是29个，分给3人", "29", 0.0),  # the last number counts
        ("答案是三", "3", 0.0),
        ("答案是1/0", "3", 0.0),
    ],
)
def test_numbers_of_cmath(text, golden, expected):
    assert same_number({"golden": golden}, [text]) == {"exact_match": expected}


def test_a_golden_answer_without_a_number_is_never_right():
    assert to_number("无") is None
    assert same_number({"golden": "无"}, ["无"]) == {"exact_match": 0.0}
